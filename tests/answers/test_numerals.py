"""Numbers in words are these numbers, and words that are none are not taken for one."""

from fractions import Fraction

import pytest

from deltapref_jax.answers.numerals import in_words


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("zero", 0),
        ("twelve apples", 12),
        ("twenty-one", 21),
        ("twenty one", 21),
        ("minus three", -3),
        ("negative two thirds", Fraction(-2, 3)),
        ("a hundred", 100),
        ("one hundred and five", 105),
        ("two thousand three hundred", 2300),
        ("one million two hundred thousand and six", 1_200_006),
        ("two dozen", 24),
        ("half", Fraction(1, 2)),
        ("a quarter of them", Fraction(1, 4)),
        ("three-quarters", Fraction(3, 4)),
        ("one and a half", Fraction(3, 2)),
        ("a third", Fraction(1, 3)),
        ("two fifths", Fraction(2, 5)),
    ],
)
def test_words_are_numbers(text, value):
    assert in_words(text)[0] == value


@pytest.mark.parametrize(
    "text",
    [
        "", "tension", "ones", "once", "two of them", "three or four", "two five", "third",
        "two hundredths", "half a dozen", "five and six", "ten to twelve", "four 4", "twenty-fifth",
        "twenty thirty",
    ],
)  # fmt: skip
def test_other_words_are_none(text):
    assert in_words(text) is None
