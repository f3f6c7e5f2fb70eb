"""The tokenizer of a GGUF file: pre-tokenizers, SentencePiece, BOS, merges and end tokens."""

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
        ("dbrx", "It's 1234 x!\n", ["It", "'s", " ", "123", "4", " x", "!\n"]),
        ("gpt-4o", "isn't camelCase 1234/\n", ["isn't", " camel", "Case", " ", "123", "4", "/\n"]),
        ("tekken", "isn't HTTPServer 12", ["isn", "'t", " HTTPServer", " ", "1", "2"]),
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


def test_qwen_composes_characters(tmp_path):
    """Its own tokenizer normalises text to NFC; those of Llama 3 and others do not."""
    text = loaded(tmp_path / "a.gguf", "qwen2")
    assert text.encode_plain("e\u0301") == text.encode_plain("\u00e9")
    text = loaded(tmp_path / "b.gguf", "llama-bpe")
    assert text.encode_plain("e\u0301") != text.encode_plain("\u00e9")


BYTES = [f"<0x{i:02X}>" for i in range(256)]
PIECES = {  # with scores: the highest merges first
    "\u2581": -9.0,
    "a": -9.0,
    "b": -9.0,
    "c": -9.0,
    "\n": -9.0,
    "ab": -2.0,
    "bc": -1.0,
    "abc": -3.0,
    "\u2581a": -4.0,
}


def sentencepiece(path, arch="llama", **flags):
    """A SentencePiece vocabulary of control tokens, `PIECES`, runs of newlines, and bytes."""
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_tokenizer_model("llama")
    tokens = ["<unk>", "<s>", "</s>", "<|user|>", *PIECES, "\n\n", "  ", *BYTES]
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 4 + list(PIECES.values()) + [-1000.0] * 2 + [0.0] * 256)
    writer.add_token_types([2, 3, 3, 3, *[1] * len(PIECES), 4, 4, *[6] * 256])
    for name, value in flags.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ChatTokenizer.load(str(path))


def names(text, ids):
    return [text.tokenizer.convert_ids_to_tokens(i) for i in ids]


@pytest.mark.parametrize(
    ("words", "want"),
    [
        ("abc", ["abc"]),
        ("abb", ["ab", "b"]),
        (" ab", ["\u2581", "ab"]),  # "ab" has a higher score than a space with "a"
        ("ab", ["ab"]),
        ("c a", ["c", "\u2581a"]),
        ("c  a", ["c", "  ", "a"]),  # a run of spaces is a token of its own
        ("a\n\n\nb", ["a", "\n\n", "\n", "b"]),
        ("\u00e9", ["<0xC3>", "<0xA9>"]),
        ("a</s>b", ["a", "</s>", "b"]),
        ("", []),
    ],
)
def test_sentencepiece(words, want, tmp_path):
    text = sentencepiece(tmp_path / "a.gguf", add_space_prefix=False)
    ids = text.encode_plain(words)
    assert names(text, ids) == want
    assert text.decode(ids) == words.replace("</s>", "")


def test_sentencepiece_begins_with_a_space_and_bos_unless_told_otherwise(tmp_path):
    text = sentencepiece(tmp_path / "a.gguf")
    assert names(text, text.encode_with_bos("ab")) == ["<s>", "\u2581", "ab"]
    assert names(text, text.encode_plain("ab")) == ["ab"]  # behind a prompt
    assert text.tokenizer.decode(text.encode_with_bos("ab"), skip_special_tokens=True) == "ab"
    assert (text.tokenizer.eos_token, text.tokenizer.unk_token) == ("</s>", "<unk>")
    text = sentencepiece(tmp_path / "b.gguf", add_bos_token=False, add_space_prefix=False)
    assert names(text, text.encode_with_bos("ab")) == ["ab"]


@pytest.mark.parametrize(("arch", "want"), [("phi3", ["a"]), ("llama", ["\n", "a"])])
def test_control_tokens_of_phi_3_take_the_spaces_behind_them(arch, want, tmp_path):
    text = sentencepiece(tmp_path / "a.gguf", arch, add_space_prefix=False)
    assert names(text, text.encode_plain("<|user|>\na"))[1:] == want
