import random

from deltapref_jax.synthetic.families import FAMILIES
from deltapref_jax.synthetic.world import problem, solution


def test_digits_and_line_ends_are_tokens_of_their_own(text):
    for i, family in enumerate(FAMILIES):
        worked = solution(problem(family, 3, 8, i), random.Random(i), 0.5)
        pieces = [text.tokenizer.decode([t]) for t in text.encode_plain(worked)]
        assert "".join(pieces) == worked
        for piece in pieces:
            assert piece.strip(" ").isdigit() <= (len(piece.strip(" ")) == 1), piece
            assert ("\n" in piece) <= (piece == "\n"), piece


def test_any_text_comes_back(text):
    for words in ("Zürich 東京 🙂", "\t\r\n  x", "0123456789"):
        assert text.decode(text.encode_plain(words)) == words
    assert len(text.encode_plain("0123456789")) == 10
    assert [text.tokenizer.decode([i]) for i in text.end_ids] == ["<|im_end|>"]
