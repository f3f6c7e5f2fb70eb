"""Claims in words: what is compared, what became of it, and whether one rung decides it."""

from collections.abc import Mapping

from deltapref_jax.analysis.arm_words import arm_words, run_words
from deltapref_jax.analysis.findings import DOMAIN_WORDS, points
from deltapref_jax.analysis.page import Measured
from deltapref_jax.config import Arm, Claim, Experiment, is_balanced, judge_of, uses_ratings

RUNG_RULE = (
    "A slope hangs on one rung where leaving it out turns its sign, or decides whether it is "
    "shown; p is adjusted over the same claims, by the same draws."
)


def claim_words(claim: Claim) -> str:
    """What a claim compares."""
    domain = DOMAIN_WORDS[claim.domain]
    if claim.kind == "slope":
        return f"change {domain} per 10 points of generator delta, {claim.objective.upper()} ladder"
    if claim.kind == "contrast":
        return f"{claim.a} minus {claim.b}, {domain}"
    return f"{claim.a} against the student before training, {domain}"


def claim_about(claim: Claim, e: Experiment) -> str:
    """What the arms of a claim are, for a reader who does not know their names."""
    if claim.kind == "slope":
        return (
            "arms whose chosen traces have a stronger author, against how much stronger it is than "
            "the rejected traces' author"
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
        return "not measured: an arm of it is missing"
    if effect.shown:
        direction = "gain" if effect.estimate.value > 0 else "loss"
        small = f", smaller than the margin of {claim.margin:g}"
        return f"{direction} shown{small if effect.bound < claim.margin else ''}"
    if effect.bound < claim.margin:
        return f"equivalent: within ±{claim.margin:g}"
    return f"undecided: neither shown nor within ±{claim.margin:g}"


def rung_sentence(slope: Measured, without: Mapping[str, Measured | None]) -> str:
    """Whether a slope hangs on one rung (RUNG_RULE), and what it is without it; "" if it does not.

    Args:
      slope: over all rungs.
      without: by rung, the slope over the others, adjusted as `slope` is; None where they have
        none.
    """
    found = {name: m for name, m in without.items() if m is not None}
    if not found:
        return f"Hangs on every one of its {len(without)} rungs: without one, no slope is left."
    decides = [name for name, m in found.items() if m.shown != slope.shown]
    turns = [
        name
        for name, m in found.items()
        if name not in decides and m.estimate.value * slope.estimate.value < 0
    ]
    left = {
        name: f"{points(m.estimate, 2)}, {'' if m.shown else 'not '}shown (p = {m.p_adjusted:.3f})"
        for name, m in found.items()
    }
    left |= {name: "no slope is left" for name, m in without.items() if m is None}
    groups = (
        ("Whether there is a slope", [name for name in without if name not in found]),
        ("Whether it is shown", decides),
        ("Its sign", turns),
    )
    return " ".join(
        f"{what} hangs on {'one rung' if len(names) == 1 else 'single rungs'}, "
        f"{'; '.join(f'without {name}: {left[name]}' for name in names)}."
        for what, names in groups
        if names
    )
