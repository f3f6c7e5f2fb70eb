"""What a recipe proposes: the widest gap that is shown, and the fraction that a study found."""

import json
import re

import numpy as np
import pytest

from deltapref_jax.analysis import summary
from deltapref_jax.analysis.page import Contrast, Measured, Summary, Trend
from deltapref_jax.analysis.proposal import (
    MARGIN,
    PAPER_FRACTION,
    choose_generators,
    evidence_lines,
    gaps,
    read_evidence,
    select_by,
)
from deltapref_jax.analysis.statistics import Estimate
from deltapref_jax.config import ConfigError, Judge
from deltapref_jax.records import Result, to_table

JUDGES = (Judge(name="j"), Judge(name="other", dimensions=("factuality",)))
FLOPS = {"weak": 1.0, "small": 1.0, "large": 9.0}


def answered(right):
    """Answers to one suite, of which the first so many, or those of a mask, are right."""
    mask = np.arange(200) < right if isinstance(right, int) else right
    return to_table(
        Result,
        [
            Result("s", "in", "t", f"q{i:03}", 0, "", "", bool(is_right), "eos", 0.0, 1)
            for i, is_right in enumerate(mask)
        ],
    )


def test_the_widest_gap_that_is_shown_is_taken():
    capability = {"weak": answered(40), "small": answered(100), "large": answered(150)}
    found = gaps(capability, "in")
    assert [(g.chosen, g.rejected, g.effect.estimate.value) for g in found] == [
        ("large", "weak", pytest.approx(55)),
        ("small", "weak", pytest.approx(30)),
        ("large", "small", pytest.approx(25)),
    ]
    pair = choose_generators(capability, "in", FLOPS)
    assert pair[:2] == ("large", "weak")
    assert "widest of 3 gaps" in pair.why
    assert "+55.0 [" in pair.why


def test_a_cheaper_gap_that_is_the_same_is_taken_and_one_that_may_be_narrower_is_not():
    capability = {"weak": answered(40), "large": answered(150), "small": answered(150)}
    pair = choose_generators(capability, "in", FLOPS)
    assert pair[:2] == ("small", "weak")
    assert "20% of its FLOPs" in pair.why
    capability["large"] = answered(152)  # one point more, and not shown to be within two
    assert choose_generators(capability, "in", FLOPS)[:2] == ("large", "weak")


def test_no_gap_that_is_shown_is_refused():
    rng = np.random.default_rng(0)
    capability = {name: answered(rng.random(200) < 0.5) for name in FLOPS}
    with pytest.raises(ConfigError, match=r"No generator is shown .* in domain.*; give the suites"):
        choose_generators(capability, "in", FLOPS)


def study(*contrasts):
    """summary.json of a study with top arms: (name, fraction, by, value, half of the interval)."""

    def measured(value, half):
        p = 0.01 if abs(value) > half else 0.5
        return Measured(Estimate(value, value - half, value + half), p, p, abs(value) + half)

    s = Summary("old study", "Which | pairs?", ["in", "out"])
    s.trends = [
        Trend("dpo", d, 3, "a", "b", measured(value, 0.2), measured(value, 0.2), 1.0, (0.0, 0.0))
        for d, value in (("in", 0.8), ("out", 0.1))
    ]
    s.contrasts = [
        Contrast(name, "all", "all", {d: measured(value, half) for d in ("in", "out")})
        for name, _, _, value, half in contrasts
    ]
    plain = summary.plain(s)
    plain["arms"] = [
        {"name": name, "fraction": fraction, "by": by, "pair_judge": "j"}
        | {"doubt": "j guesses" if name.startswith("doubted") else ""}
        for name, fraction, by, *_ in contrasts
    ]
    return json.dumps(plain)


@pytest.mark.parametrize(
    ("contrasts", "fraction", "by", "words"),
    [
        # the smallest one that is equivalent or better
        ((("t1", 0.1, "sum", -3, 1), ("t2", 0.2, "sum", 0.5, 1), ("t3", 0.4, "sum", 5, 1)), 0.2)
        + (
            "sum",
            r"the pairs of all in the study old study that.*t2 minus all: in domain \+0\.5",
        ),
        (
            (("t3", 0.4, "factuality", 5, 4), ("t1", 0.5, "sum", 0, 1)),
            0.4,
            "factuality",
            "t3 minus",
        ),
        # undecided, and worse
        ((("t1", 0.1, "sum", 0, 5),), PAPER_FRACTION, "step_coherence", "not measured here"),
        (
            (("t1", 0.1, "sum", -4, 1),),
            PAPER_FRACTION,
            "step_coherence",
            "as well as all pairs; t1 did worse",
        ),
        # the smallest is as good, and a larger one is undecided: nothing was tested behind it
        (
            (("t1", 0.1, "sum", 0, 1), ("t2", 0.2, "sum", 0, 5), ("t3", 0.4, "sum", 0, 1)),
            0.4,
            "sum",
            "t3 minus .*rankings that were looked at: 1, not adjusted for",
        ),
        # another ranking has its own order
        (
            (("t2", 0.2, "sum", 0, 5), ("t3", 0.4, "factuality", 0, 1)),
            0.4,
            "factuality",
            "rankings that were looked at: 2",
        ),
        # of equal fractions all must be as good
        (
            (("t1", 0.1, "sum", 0, 1), ("t2", 0.1, "sum", 0, 5)),
            PAPER_FRACTION,
            "step_coherence",
            "no top fraction is shown",
        ),
        # a judge below the bar carries no conclusion
        (
            (("doubted", 0.1, "sum", 5, 1),),
            PAPER_FRACTION,
            "step_coherence",
            "the judge behind doubted is below the bar",
        ),
        # a number of pairs is no fraction
        ((("t1", 1.0, "sum", 5, 1),), PAPER_FRACTION, "step_coherence", "not measured here"),
    ],
)
def test_the_fraction_is_the_studys_or_the_papers(contrasts, fraction, by, words):
    evidence = read_evidence(study(*contrasts), "summary.json")
    selection = select_by(evidence, JUDGES)
    assert selection[:3] == (fraction, by, "j")
    assert re.search(words, selection.why), selection.why


def test_a_ranking_is_of_one_arms_pairs_and_one_measure():
    """A fraction is not what a ranking of other generators or another objective shows alone."""

    def selected(*contrasts):
        given = [(name, f, by, value, half) for name, f, by, value, half, _ in contrasts]
        text = json.loads(study(*given))
        for contrast, (*_, b) in zip(text["contrasts"], contrasts, strict=True):
            contrast["b"] = b
        return select_by(read_evidence(json.dumps(text), "summary.json"), JUDGES)

    strong = ("t30", 0.3, "sum", 0, 1, "dpo-strong")
    other = ("e10", 0.1, "sum", 0, 1, "dpo-elm")
    for more in ((), (("t10", 0.1, "sum", -6, 1, "dpo-strong"),)):
        chosen = selected(strong, *more, other)
        assert chosen[:3] == (0.3, "sum", "j")
        assert "smallest top fraction of the pairs of dpo-strong in the study" in chosen.why
        assert "rankings that were looked at: 2," in chosen.why
    # The larger fraction failed for one of them, and says nothing of the other's smaller one.
    chosen = selected(("t30", 0.3, "sum", 0, 5, "dpo-strong"), other)
    assert chosen[:2] == (PAPER_FRACTION, "step_coherence")
    assert chosen.why.endswith(
        "in the study old study e10 did as well as dpo-elm by sum, by which no top fraction of the "
        "pairs of dpo-strong is shown to"
    )


@pytest.mark.parametrize("by", ["reference_margin", "numerical_precision"])
def test_a_fraction_by_what_the_recipe_cannot_rate_is_said_and_not_followed(by):
    judges = (Judge(name="j", dimensions=("step_coherence",)),)
    evidence = read_evidence(study(("t30", 0.3, by, 0, 1)), "summary.json")
    selection = select_by(evidence, judges)
    assert selection[:3] == (PAPER_FRACTION, "step_coherence", "j")
    assert "no top fraction" not in selection.why
    assert selection.why.endswith(
        f"in the study old study t30 did as well as all by {by.replace('_', ' ')}, which judge j "
        "does not rate"
    )


def test_without_a_study_the_papers_fraction_is_said_to_be_the_papers():
    selection = select_by(None, JUDGES)
    assert selection[:3] == (PAPER_FRACTION, "step_coherence", "j")
    assert "it was not measured here" in selection.why
    assert select_by(None, JUDGES[1:])[:3] == (PAPER_FRACTION, "sum", "other")
    assert select_by(None, ())[:3] == (1.0, "sum", "")
    assert "was not measured here" in evidence_lines(None)[0]


def test_the_evidence_has_every_interval_and_its_text_is_escaped():
    evidence = read_evidence(study(("t1", 0.1, "sum", 0.5, 1)), "summary.json")
    lines = evidence_lines(evidence)
    assert r"Which \| pairs?" in lines[0]
    assert lines[-2:] == (
        "| slope, dpo ladder, per 10 points of generator delta | +0.80 [+0.60, +1.00], p 0.01, "
        "shown | +0.10 [-0.10, +0.30], p 0.5, not shown |",
        "| t1 (top 10% by sum, judge j) minus all (all pairs) | +0.5 [-0.5, +1.5], p 0.5, not "
        "shown | +0.5 [-0.5, +1.5], p 0.5, not shown |",
    )
    assert MARGIN == 2.0
    lines = evidence_lines(read_evidence(study(("doubted", 0.1, "sum", 0.5, 1)), "summary.json"))
    assert lines[-3].startswith("| doubted† (top 10% by sum, judge j) minus all (all pairs) | +0.5")
    assert lines[-1] == "† j guesses."


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"arms": [{}]}', "null"])
def test_what_is_no_summary_is_refused(text):
    with pytest.raises(ConfigError, match=r"--study: here is not the summary\.json"):
        read_evidence(text, "here")
