"""The tokenizer inside a GGUF file, rebuilt with `tokenizers`.

`transformers` can read one too, but needs torch to do so.
"""

from typing import Any

import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

_CONTROL = 3  # llama.cpp's token type of special tokens
_USER_DEFINED = 4

_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


PRE_TOKENIZERS = {
    "gpt-2": _GPT2,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2]),
    "llama-bpe": _split(_LLAMA3),
    "qwen2": _split(_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")),
}
"""By llama.cpp's names: a GGUF file names its pre-tokenizer without containing it."""


def field(reader: Any, name: str, default: Any = None) -> Any:
    """Value (number, text or list) of a metadata field of a `gguf.GGUFReader`."""
    found = reader.get_field(name)
    return default if found is None else found.contents()


def open_gguf(path: str) -> Any:
    """A reader of a GGUF file.

    Raises:
      ValueError: the file is not a GGUF file, or is incomplete.
    """
    import gguf

    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is not a readable GGUF file ({e}); fetch it again.") from e


def tokenizer_from_gguf(path: str) -> tuple[transformers.PreTrainedTokenizerFast, list[int]]:
    """The fast tokenizer of a GGUF file, with its chat template, and the end tokens besides EOS.

    The tokenizer adds a BOS to plain text where llama.cpp does: where the file says so, and where
    it says nothing and the pre-tokenizer is that of Llama 3. It never adds an EOS.

    Raises:
      ValueError: the file is not a GGUF file, its tokenizer is not a byte-level BPE, has no
        merges, or its pre-tokenizer is not in `PRE_TOKENIZERS`.
    """
    reader = open_gguf(path)
    model, pre = field(reader, "tokenizer.ggml.model"), field(reader, "tokenizer.ggml.pre", "gpt-2")
    if model != "gpt2":
        raise ValueError(
            f"{path} holds a {model!r} tokenizer; only byte-level BPE ('gpt2') is supported: "
            "convert the model to a Hugging Face folder."
        )
    if pre not in PRE_TOKENIZERS:
        raise ValueError(
            f"{path} names the pre-tokenizer {pre!r}; known: {', '.join(PRE_TOKENIZERS)}."
        )
    if field(reader, "tokenizer.ggml.merges") is None:
        raise ValueError(
            f"{path} has no tokenizer.ggml.merges, without which its tokenizer cannot be rebuilt; "
            "convert the model again, or give a Hugging Face folder."
        )
    tokens = field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in field(reader, "tokenizer.ggml.merges")]
    types = field(reader, "tokenizer.ggml.token_type", [1] * len(tokens))
    llama3 = pre == "llama-bpe"
    vocab = {token: i for i, token in enumerate(tokens)}
    # With ignore_merges a word that is a token is taken whole, even where no merges lead to it.
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=llama3))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == _CONTROL
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == _USER_DEFINED
        ]
    )

    named = {
        name: field(reader, f"tokenizer.ggml.{name}_token_id")
        for name in ("eos", "bos", "unknown", "padding", "eot", "eom")
    }
    special = {name: None if i is None else tokens[i] for name, i in named.items()}
    if special["bos"] is not None and field(reader, "tokenizer.ggml.add_bos_token", llama3):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[special["bos"], "$A"], special_tokens=[(special["bos"], named["bos"])]
        )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=special["eos"],
        bos_token=special["bos"],
        unk_token=special["unknown"],
        pad_token=special["padding"],
        chat_template=field(reader, "tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
    )
    return fast, [named[name] for name in ("eot", "eom") if named[name] is not None]
