import json
import random

from deltapref_jax.data.decontaminate import NGRAM, overlapping, words


def row(name, text, before=()):
    messages = [*before, {"role": "user", "content": text}]
    return {"prompt_id": name, "messages": json.dumps(messages)}


def numbered(a, b):
    return " ".join(f"w{i}" for i in range(a, b))


def test_words_ignore_case_punctuation_and_spacing():
    assert words("  What's 1,5 +\n2?") == ("what", "s", "1", "5", "2")


def test_exact_overlap_after_normalising_whatever_the_length():
    evaluation = [row("e", "What is 2 + 2?")]
    training = [
        row("same", "what is 2+2"),
        row("other", "What is 2 + 3?"),
        row("longer", "So what is 2 + 2?"),
        row("with system", "What is 2 + 2?", [{"role": "system", "content": "Be brief."}]),
    ]
    assert overlapping(training, evaluation) == {"same": "exact", "with system": "exact"}


def test_thirteen_words_in_a_row_overlap_and_twelve_do_not():
    assert NGRAM == 13
    evaluation = [row("e", numbered(0, 40))]
    training = [
        row("12", "x " + numbered(7, 19) + " y"),
        row("13", "x " + numbered(7, 20) + " y"),
        row("start", numbered(0, 13) + " y"),
        row("end", "x " + numbered(27, 40)),
        row("apart", numbered(0, 12) + " x " + numbered(12, 24)),
    ]
    assert overlapping(training, evaluation) == {
        "13": "13-gram",
        "start": "13-gram",
        "end": "13-gram",
    }


def test_short_evaluation_question_inside_a_long_one_is_no_overlap():
    assert overlapping([row("t", numbered(0, 30))], [row("e", numbered(3, 15))]) == {}


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
        [row(str(i), t) for i, t in enumerate(training)], [row("", e) for e in evaluation]
    )
    assert set(found) == {str(i) for i, t in enumerate(training) if overlaps(t)}
    assert 0 < len(found) < 60
