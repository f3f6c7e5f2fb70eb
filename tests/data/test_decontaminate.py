import json
import random

from deltapref_jax.data.decontaminate import NGRAM, overlapping, words
from deltapref_jax.records import Prompt


def prompt(name, text, before=()):
    messages = [*before, {"role": "user", "content": text}]
    return Prompt(name, "task", json.dumps(messages), "", "", "{}")


def numbered(a, b):
    return " ".join(f"w{i}" for i in range(a, b))


def test_words_ignore_case_punctuation_and_spacing():
    assert words("  What's 1,5 +\n2?") == ("what", "s", "1", "5", "2")


def test_exact_overlap_after_normalising_whatever_the_length():
    evaluation = [prompt("e", "What is 2 + 2?")]
    training = [
        prompt("same", "what is 2+2"),
        prompt("other", "What is 2 + 3?"),
        prompt("longer", "So what is 2 + 2?"),
        prompt("with system", "What is 2 + 2?", [{"role": "system", "content": "Be brief."}]),
    ]
    assert overlapping(training, evaluation) == {"same": "exact", "with system": "exact"}


def test_thirteen_words_in_a_row_overlap_and_twelve_do_not():
    assert NGRAM == 13
    evaluation = [prompt("e", numbered(0, 40))]
    training = [
        prompt("12", "x " + numbered(7, 19) + " y"),
        prompt("13", "x " + numbered(7, 20) + " y"),
        prompt("start", numbered(0, 13) + " y"),
        prompt("end", "x " + numbered(27, 40)),
        prompt("apart", numbered(0, 12) + " x " + numbered(12, 24)),
    ]
    assert overlapping(training, evaluation) == {
        "13": "13-gram",
        "start": "13-gram",
        "end": "13-gram",
    }


def test_short_evaluation_question_inside_a_long_one_is_no_overlap():
    assert overlapping([prompt("t", numbered(0, 30))], [prompt("e", numbered(3, 15))]) == {}


def test_agrees_with_a_direct_search():
    rng = random.Random(0)
    text = [" ".join(rng.choices("ab", k=rng.randint(5, 30))) for _ in range(120)]
    training, evaluation = text[:60], text[60:]

    def overlaps(t):
        grams = (t.split()[i : i + 13] for i in range(len(t.split()) - 12))
        return any(t == e for e in evaluation) or any(
            f" {' '.join(g)} " in f" {e} " for g in grams for e in evaluation
        )

    found = overlapping(
        [prompt(str(i), t) for i, t in enumerate(training)], [prompt("", e) for e in evaluation]
    )
    assert set(found) == {str(i) for i, t in enumerate(training) if overlaps(t)}
    assert 0 < len(found) < 60
