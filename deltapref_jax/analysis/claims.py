"""Claims in words: what is compared, what became of it, and whether one rung decides it."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

from deltapref_jax.analysis.arm_words import arm_words, run_words
from deltapref_jax.analysis.findings import DOMAIN_WORDS, listed, p_words, points
from deltapref_jax.analysis.page import Measured
from deltapref_jax.analysis.statistics import Estimate
from deltapref_jax.config import (
    Arm,
    Claim,
    Experiment,
    is_balanced,
    judge_of,
    ladder_of,
    uses_ratings,
)

RUNG_RULE = (
    "A slope hangs on a rung where the slope of the other rungs lies outside of its interval; the "
    "whole slope minus it is by the same draws, with p adjusted over the rungs."
)


class WithoutRung(NamedTuple):
    """What a slope is without one of its rungs."""

    slope: Estimate  # over the others
    difference: Measured  # the whole slope minus it, adjusted over the rungs


def claim_words(claim: Claim) -> str:
    """What a claim compares."""
    domain = DOMAIN_WORDS[claim.domain]
    if claim.kind == "slope":
        return f"change {domain} per 10 points of generator delta, {claim.objective.upper()} ladder"
    if claim.kind == "contrast":
        return f"{claim.a} minus {claim.b}, {domain}"
    return f"{claim.a} against the student before training, {domain}"


def claim_about(claim: Claim, e: Experiment, rungs: Collection[str] = ()) -> str:
    """What the arms of a claim are, for a reader who does not know their names.

    Args:
      claim: of the config.
      e: the config.
      rungs: arms that a slope is over; those of the config that are missing are named.
    """
    if claim.kind == "slope":
        of_config = [a.name for a in ladder_of(e, claim.objective)]
        missing = [name for name in of_config if name not in rungs]
        some = f"; over {len(rungs)} of its {len(of_config)} rungs, without {listed(missing)}"
        return (
            "arms whose chosen traces have a stronger author, against how much stronger it is than "
            f"the rejected traces' author{some if rungs and missing else ''}"
        )
    named = {a.name: a for a in e.arms}
    arms = [named[name] for name in (claim.a, claim.b) if name in named]
    described = [_described(e, a) for a in arms]
    if len(set(described)) < len(described):  # they differ in their runs alone
        described = [f"{text}, {run_words(a)}" for text, a in zip(described, arms, strict=True)]
    return "; ".join(f"{a.name}: {text}" for a, text in zip(arms, described, strict=True))


def _described(e: Experiment, arm: Arm) -> str:
    judge = judge_of(e, arm) if uses_ratings(arm) else ""
    return arm_words(arm, judge, e.balance if is_balanced(e, arm) else "")


def claim_verdict(claim: Claim, effect: Measured | None) -> str:
    """One of: not measured, shown (a gain or a loss), equivalent at the margin, undecided."""
    if effect is None:
        if claim.kind == "slope":
            return "not measured: it takes three rungs, of more than one generator delta"
        return "not measured: an arm of it is missing"
    if effect.shown:
        direction = "gain" if effect.estimate.value > 0 else "loss"
        small = f", smaller than the margin of {claim.margin:g}"
        return f"{direction} shown{small if effect.bound < claim.margin else ''}"
    if effect.bound < claim.margin:
        return f"equivalent: within ±{claim.margin:g}"
    return f"undecided: neither shown nor within ±{claim.margin:g}"


def rung_sentence(slope: Estimate, without: Mapping[str, WithoutRung | None]) -> str:
    """Which rungs a slope hangs on (RUNG_RULE), and what it is without them; "" if on none.

    Args:
      slope: over all rungs.
      without: by rung; None where the others have no slope.
    """
    if not any(without.values()):
        return f"Hangs on every one of its {len(without)} rungs: without one, no slope is left."
    left = {}
    for name, rest in without.items():
        if rest is None:
            left[name] = "no slope is left"
        elif not slope.low <= rest.slope.value <= slope.high:
            d = rest.difference
            left[name] = (
                f"it is {points(rest.slope, 2)} (the slope of all minus that of the others: "
                f"{points(d.estimate, 2)}, {'' if d.shown else 'not '}shown, "
                f"p {p_words(d.p_adjusted)})"
            )
    if not left:
        return ""
    text = "; ".join(f"without {name} {words}" for name, words in left.items())
    return f"Hangs on {'one rung' if len(left) == 1 else 'single rungs'}: {text}."
