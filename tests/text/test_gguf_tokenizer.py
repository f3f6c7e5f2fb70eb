"""Pre-tokenizers by name: the pieces that llama.cpp's names stand for."""

import pytest

from deltapref_jax.text.gguf_tokenizer import PRE_TOKENIZERS


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
