"""The tokenizer of a GGUF file: pre-tokenizers by llama.cpp's names, BOS, merges and end tokens."""

import gguf
import pytest
from tokenizers.pre_tokenizers import ByteLevel

from deltapref_jax.text.gguf_tokenizer import PRE_TOKENIZERS
from deltapref_jax.text.preference import Example, tokenise
from deltapref_jax.text.template import ChatTokenizer

TOKENS = ["<bos>", "<eos>", "<eot>", "<eom>", *sorted(ByteLevel.alphabet()), "ab", "cab"]


def pieces(name, words):
    return [
        piece.replace("Ġ", " ").replace("Ċ", "\n")
        for piece, _ in PRE_TOKENIZERS[name].pre_tokenize_str(words)
    ]


@pytest.mark.parametrize(
    ("name", "words", "want"),
    [
        ("gpt-2", "It's 1234 x", ["It", "'s", " 1234", " x"]),
        ("smollm", "It's 1234 x", ["It", "'s", " ", "1", "2", "3", "4", " x"]),
        (
            "llama-bpe",
            "It's 1234567 x!\n\ny",
            ["It", "'s", " ", "123", "456", "7", " x", "!\n\n", "y"],
        ),
        ("llama-bpe", "IT'S", ["IT", "'S"]),
        ("qwen2", "It's 12 x!\ny", ["It", "'s", " ", "1", "2", " x", "!\n", "y"]),
        ("qwen2", "a   b", ["a", "  ", " b"]),
    ],
)
def test_pieces(name, words, want):
    assert pieces(name, words) == want


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_nothing_is_lost(name):
    words = "x  y\t z\n\n\n 12.5, don't (stop)!"
    assert "".join(pieces(name, words)).replace("ĉ", "\t") == words


def loaded(path, pre="llama-bpe", bos=0, template=None, **flags):
    """A file of `TOKENS` with one merge, and what it says of BOS and end tokens."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 4 + [1] * (len(TOKENS) - 4))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(1)
    if bos is not None:
        writer.add_bos_token_id(bos)
    if template:
        writer.add_chat_template(template)
    for name, value in flags.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ChatTokenizer.load(str(path))


@pytest.mark.parametrize("ends", [{}, {"add_eos_token": True}])
@pytest.mark.parametrize(
    ("pre", "flags", "bos", "want"),
    [
        ("llama-bpe", {"add_bos_token": True}, 0, [0]),
        ("llama-bpe", {"add_bos_token": False}, 0, []),
        ("llama-bpe", {}, 0, [0]),  # llama.cpp's default for this pre-tokenizer
        ("llama-bpe", {"add_bos_token": True}, None, []),
        ("qwen2", {"add_bos_token": True}, 0, [0]),
        ("qwen2", {}, 0, []),
        ("gpt-2", {"add_bos_token": False}, 0, []),
    ],
)
def test_bos_is_added_where_the_file_says_so(pre, flags, bos, want, ends, tmp_path):
    text = loaded(tmp_path / "a.gguf", pre, bos, **flags, **ends)
    (two,) = text.encode_plain("2")
    assert text.encode_with_bos("2") == [*want, two]
    (got,) = tokenise(text, [Example("2", ("2", "ab"))])
    assert got.prompt.tolist() == [*want, two]
    assert [c.tolist() for c in got.completions] == [[two, 1], [TOKENS.index("ab"), 1]]
    text.save(tmp_path / "saved")
    again = ChatTokenizer.load(str(tmp_path / "saved"))
    assert again.encode_with_bos("2") == [*want, two]
    assert again.identity == text.identity


def test_a_template_that_writes_bos_gets_no_other(tmp_path):
    for template, count in (
        ("<bos>{{ messages[0].content }}", 1),
        ("{{ messages[0].content }}", 1),
    ):
        text = loaded(tmp_path / "a.gguf", template=template, add_bos_token=True)
        assert text.prompt_ids([{"role": "user", "content": "2"}]).count(0) == count


@pytest.mark.parametrize(("pre", "want"), [("llama-bpe", ["cab"]), ("gpt-2", ["c", "ab"])])
def test_the_pre_tokenizer_of_llama_3_takes_a_word_that_is_a_token_whole(pre, want, tmp_path):
    """Its vocabulary has tokens that no merges lead to, here and in the model's own folder."""
    assert loaded(tmp_path / "a.gguf", pre).encode_plain("cab") == [TOKENS.index(w) for w in want]


def test_the_end_tokens_of_turns_and_messages_end_a_trace(tmp_path):
    assert loaded(tmp_path / "a.gguf").end_ids == (1,)
    text = loaded(tmp_path / "b.gguf", eot_token_id=2)
    assert text.end_ids == (1, 2)
