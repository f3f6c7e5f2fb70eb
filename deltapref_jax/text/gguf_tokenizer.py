"""The tokenizer inside a GGUF file, rebuilt with `tokenizers`.

`transformers` can read one too, but needs torch to do so. There are two kinds, by llama.cpp's
names: "gpt2" is a byte-level BPE with merges (Llama 3, Qwen, OLMo 2, SmolLM), and "llama" is a BPE
of SentencePiece, with a score for every token and bytes for unknown characters (Llama 2, Mistral,
Gemma, Phi-3).
"""

from collections.abc import Mapping
from typing import Any

import transformers
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from deltapref_jax.text.gguf_file import gguf_parts, open_gguf

_NORMAL = 1  # llama.cpp's types of tokens
_CONTROL = 3
_USER_DEFINED = 4

_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# GPT-4o's pattern splits words where capitals follow small letters.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDING, _REST = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?", r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"
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
    "dbrx": _split(_LLAMA3),  # OLMo 2 and Phi-4
    "gpt-4o": _split(_GPT4O),  # Phi-4-mini
    "tekken": _split(_GPT4O.replace(_ENDING, "").replace(r"\p{N}{1,3}", r"\p{N}")),  # Mistral
}
"""By llama.cpp's names: a GGUF file names its pre-tokenizer without containing it."""

_WHOLE_WORDS = ("llama-bpe", "tekken")
"""Pre-tokenizers of vocabularies in which a word that is a token is taken whole, even where no
merges lead to it. With them, llama.cpp adds a BOS unless the file says otherwise."""


def tokenizer_from_gguf(path: str) -> tuple[transformers.PreTrainedTokenizerFast, list[int]]:
    """The fast tokenizer of a GGUF file, with its chat template, and the end tokens besides EOS.

    The tokenizer adds a BOS to plain text where llama.cpp does: where the file says so, and where
    it says nothing and the tokenizer is that of Llama 2 or 3. It never adds an EOS.

    Raises:
      FileNotFoundError: a part of a split file is missing.
      ValueError: the file is not a GGUF file, its tokenizer is of another kind, has no merges or
        scores, or its pre-tokenizer is not in `PRE_TOKENIZERS`.
    """
    fields = open_gguf(gguf_parts(path)[0]).fields
    model, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if model not in ("gpt2", "llama"):
        raise ValueError(
            f"{path} holds a {model!r} tokenizer; only byte-level BPE ('gpt2') and SentencePiece "
            "('llama') are supported: convert the model to a Hugging Face folder."
        )
    tokens = fields["tokenizer.ggml.tokens"]
    types = fields.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    if model == "gpt2":
        tokenizer = _byte_level(fields, path, pre, tokens)
    else:
        tokenizer = _sentencepiece(fields, path, tokens, types)
    phi3 = model == "llama" and fields.get("general.architecture") == "phi3"
    tokenizer.add_special_tokens(
        [
            # Phi-3's control tokens take the spaces and line ends that follow them.
            AddedToken(
                token, special=True, normalized=False, rstrip=phi3 and token not in _NOT_STRIPPING
            )
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
    # llama.cpp's defaults of a SentencePiece vocabulary.
    usual = {"bos": 1, "eos": 2, "unknown": 0} if model == "llama" else {}
    named = {
        name: fields.get(f"tokenizer.ggml.{name}_token_id", usual.get(name))
        for name in ("eos", "bos", "unknown", "padding", "eot", "eom")
    }
    special = {name: None if i is None else tokens[i] for name, i in named.items()}
    adds = fields.get("tokenizer.ggml.add_bos_token", model == "llama" or pre in _WHOLE_WORDS)
    if special["bos"] is not None and adds:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[special["bos"], "$A"], special_tokens=[(special["bos"], named["bos"])]
        )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=special["eos"],
        bos_token=special["bos"],
        unk_token=special["unknown"],
        pad_token=special["padding"],
        chat_template=fields.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
    )
    return fast, [named[name] for name in ("eot", "eom") if named[name] is not None]


_NOT_STRIPPING = ("<unk>", "<s>", "<|endoftext|>")
_SPACE = "\u2581"  # SentencePiece writes a space as this


def _byte_level(
    fields: Mapping[str, Any], path: str, pre: str | None, tokens: list[str]
) -> Tokenizer:
    """A byte-level BPE.

    Raises:
      ValueError: see `tokenizer_from_gguf`.
    """
    if pre not in PRE_TOKENIZERS:
        raise ValueError(
            f"{path} names the pre-tokenizer {pre!r} (tokenizer.ggml.pre); known: "
            f"{', '.join(PRE_TOKENIZERS)}."
        )
    if fields.get("tokenizer.ggml.merges") is None:
        raise ValueError(
            f"{path} has no tokenizer.ggml.merges, without which its tokenizer cannot be rebuilt; "
            "convert the model again, or give a Hugging Face folder."
        )
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre in _WHOLE_WORDS))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()  # as Qwen's own tokenizer does
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(
    fields: Mapping[str, Any], path: str, tokens: list[str], types: list[int]
) -> Tokenizer:
    """A BPE of SentencePiece (arXiv 1808.06226), as `transformers` converts it to merges.

    Raises:
      ValueError: see `tokenizer_from_gguf`.
    """
    scores = fields.get("tokenizer.ggml.scores")
    if scores is None:
        raise ValueError(
            f"{path} has no tokenizer.ggml.scores, without which its tokenizer cannot be rebuilt; "
            "convert the model again, or give a Hugging Face folder."
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    normal = {token for token, kind in zip(tokens, types, strict=True) if kind == _NORMAL}
    merges = []
    for token, score in zip(tokens, scores, strict=True):
        if token not in normal:
            continue
        for at in range(1, len(token)):
            first, second = token[:at], token[at:]
            if first in normal and second in normal:
                merges.append(((score, len(first), len(second)), (first, second)))
    # A higher score merges first; a token's own splits follow the order of `transformers`.
    merges.sort(key=lambda merge: merge[0], reverse=True)
    unknown = tokens[fields.get("tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab,
            [pair for _, pair in merges],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", _SPACE)]
    steps: list[decoders.Decoder] = [
        decoders.Replace(_SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if fields.get("tokenizer.ggml.add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend(_SPACE))
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer
