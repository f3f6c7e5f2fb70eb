"""Sentences made from a summary's numbers: direction, size and interval, whatever they are."""

from collections.abc import Sequence
from statistics import NormalDist

from deltapref_jax.analysis.judges import USELESS_AUC, WANTED_AUC
from deltapref_jax.analysis.page import Contrast, Finding, JudgeSummary, Summary
from deltapref_jax.analysis.statistics import Estimate

DOMAIN_WORDS = {"in": "in domain", "out": "out of domain"}
_AGAINST = {
    "random": "as many pairs drawn at random",
    "matched": "as many pairs of the same lengths",
    "all": "all pairs of the pool",
}
# Effect found with 80% power at a two-sided 5% level, over the width of the 95% interval.
_DETECTABLE = (NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.8)) / (
    2 * NormalDist().inv_cdf(0.975)
)


def words(name: object) -> str:
    """An identifier as words."""
    return str(name).replace("_", " ")


def points(values: Sequence[float], digits: int = 1) -> str:
    """Value and interval, such as `+3.2 [+1.0, +5.4]`."""
    value, low, high = (0.0 if abs(v) < 0.5 * 10**-digits else v for v in values)  # no "-0.0"
    return f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def outcome(effect: Estimate, digits: int = 1) -> str:
    """An effect in points, or that none was detected and which size would have been."""
    if effect.clear:
        return f"{points(effect, digits)} points"
    size = _DETECTABLE * (effect.high - effect.low)
    return (
        f"no effect detected ({points(effect, digits)}; an effect of {size:.{digits}f} points "
        "would have been)"
    )


def _listed(names: Sequence[str], most: int = 6) -> str:
    shown = list(names[:most]) + ([f"{len(names) - most} more"] if len(names) > most else [])
    return shown[0] if len(shown) == 1 else ", ".join(shown[:-1]) + " and " + shown[-1]


def _per_domain(s: Summary, clauses: Sequence[str]) -> str:
    """`in domain …; out of domain …`, from a clause for each of the summary's domains."""
    return "; ".join(f"{DOMAIN_WORDS[d]} {c}" for d, c in zip(s.domains, clauses, strict=True))


def findings(s: Summary) -> list[Finding]:
    """The page's headline, made from the numbers alone."""
    return [
        *_part(s),
        *_generator_delta(s),
        *_sample_delta(s),
        *_survival(s),
        *_controls(s),
        *_arms(s),
        *_instruments(s),
    ]


def _part(s: Summary) -> list[Finding]:
    """Which arms the page has, where a run was of some of them."""
    if not s.left_out:
        return []
    run, config = len(s.arms), len(s.arms) + len(s.left_out)
    missing = (
        f" Comparisons that need them are missing: {_listed(s.uncompared)}." if s.uncompared else ""
    )
    return [
        Finding(
            "Part of the study",
            f"this page has {run} of the {config} arms of the config "
            f"({_listed([a.name for a in s.arms])}), and its p values are adjusted over these "
            f"alone. Left out: {_listed(s.left_out)}.{missing} Prompts and pairs are those of the "
            "whole study.",
        )
    ]


def _generator_delta(s: Summary) -> list[Finding]:
    sentences = []
    for objective in dict.fromkeys(t.objective for t in s.trends):
        trends = [t for t in s.trends if t.objective == objective]
        slopes = "; ".join(f"{DOMAIN_WORDS[t.domain]} {outcome(t.per_10, 2)}" for t in trends)
        ends = "; ".join(f"{DOMAIN_WORDS[t.domain]} {outcome(t.ends)}" for t in trends)
        sentences.append(
            Finding(
                f"Generator delta, {objective.upper()}",
                "per 10 points by which the chosen traces' author is better than the rejected "
                f"traces' author, the student's accuracy changed: {slopes}. The widest of "
                f"{trends[0].rungs} rungs against the narrowest ({trends[0].high} minus "
                f"{trends[0].low}): {ends}.",
            )
        )
    return sentences


def _sample_delta(s: Summary) -> list[Finding]:
    """One sentence per objective, judge and dimension; several fractions give a range."""
    arms = {a.name: a for a in s.arms}
    groups: dict[tuple[str, str, str], list[Contrast]] = {}
    for c in s.contrasts:
        a = arms[c.a]
        groups.setdefault((a.arm.objective, a.pair_judge, a.arm.by), []).append(c)
    sentences = []
    for (objective, judge, ranked_by), contrasts in groups.items():
        fractions = sorted({arms[c.a].arm.fraction for c in contrasts})
        share = _listed([f"{100 * f:.0f}%" for f in fractions])
        clauses = []
        for kind in dict.fromkeys(c.kind for c in contrasts):
            effects = [[c.difference[d] for c in contrasts if c.kind == kind] for d in s.domains]
            clauses.append(f"against {_AGAINST[kind]}: {_per_domain(s, [*map(_several, effects)])}")
        clauses[1:] = [c[0].upper() + c[1:] for c in clauses[1:]]
        sentences.append(
            Finding(
                f"Sample delta, {objective.upper()}, judge {judge}",
                f"training on the {share} of pairs with the largest gap in {words(ranked_by)}, "
                f"{'. '.join(clauses)}.",
            )
        )
    return sentences


def _several(effects: Sequence[Estimate]) -> str:
    """The outcome of one fraction, or the range over several."""
    if len(effects) == 1:
        return outcome(effects[0])
    values, clear = [e.value for e in effects], sum(e.clear for e in effects)
    return (
        f"{min(values):+.1f} to {max(values):+.1f} points over {len(effects)} fractions, "
        f"{clear} of them with an interval off 0"
    )


def _verdict(change: Estimate) -> str:
    if not change.clear:
        return "no effect detected"
    return "gain" if change.value > 0 else "loss"


def _survival(s: Summary) -> list[Finding]:
    sentences = []
    for c in s.survival:
        clauses = []
        for change in (c.changes[d] for d in s.domains):
            a, b = _verdict(change.a), _verdict(change.b)
            clauses.append(
                f"{'the same' if a == b else 'another'} verdict "
                f"({c.first}: {a}, {points(change.a)}; {c.second}: {b}, {points(change.b)}; "
                f"difference {points(change.difference)})"
            )
        sentences.append(
            Finding(
                "Change of judge",
                f"{c.a} and {c.b} differ only in the judge that shaped their pairs, and "
                f"share {c.shared:.0f}% of them: {_per_domain(s, clauses)}.",
            )
        )
    return sentences


def _controls(s: Summary) -> list[Finding]:
    sentences = []
    for a in s.arms:
        if a.kind == "sft":
            outcomes = _per_domain(s, [outcome(a.changes[d].change) for d in s.domains])
            sentences.append(
                Finding(
                    "Control, SFT",
                    f"imitating the chosen traces of {a.arm.chosen} alone, without the rejected "
                    f"ones, changed accuracy: {outcomes}.",
                )
            )
    return sentences


def _arms(s: Summary) -> list[Finding]:
    if not s.arms:
        return []
    clauses = []
    for d in s.domains:
        clear = [(a.name, a.changes[d].change.value) for a in s.arms if a.changes[d].p_holm < 0.05]
        up = [name for name, change in clear if change > 0]
        down = [name for name, change in clear if change < 0]
        gained = f"{len(up)} gained ({_listed(up)})" if up else "none gained"
        lost = f"{len(down)} lost ({_listed(down)})" if down else "none lost"
        limit = s.detectable.get(d)
        shown = f"; one arm alone would have shown {limit:.1f} points" if limit is not None else ""
        clauses.append(f"{gained} and {lost}{shown}")
    return [
        Finding(
            f"The {len(s.arms)} arms" if s.left_out else f"All {len(s.arms)} arms",
            "against the student before training, after Holm's correction: "
            f"{_per_domain(s, clauses)}.",
        )
    ]


def _instruments(s: Summary) -> list[Finding]:
    sentences = [Finding("Judges", text) for text in s.judge_sentences if "cannot carry" in text]
    falling = [a.name for a in s.arms if a.training.falling]
    if falling:
        sentences.append(
            Finding(
                "Training",
                f"in {len(falling)} of {len(s.arms)} arms the log-probabilities of chosen and "
                f"rejected traces fell together ({_listed(falling)}): these arms made both kinds "
                "of trace less likely.",
            )
        )
    return sentences


def judge_sentence(j: JudgeSummary, has_exact: bool) -> str:
    """What this judge may be used for.

    Args:
      j: the judge.
      has_exact: whether the study has an exact judge to fall back on.
    """
    if j.audit is None:
        return (
            f"Judge {j.name} was not measured against known corruption: the questions have no "
            "known truth for that."
        )
    auc, useless = j.audit.auc, [words(d) for d in j.audit.useless]
    carried = " The exact judge carries it." if has_exact and j.kind != "exact" else ""
    if j.audit.auc_mean < USELESS_AUC:
        return (
            f"Judge {j.name} cannot carry a conclusion: its AUC against known corruption is "
            f"{j.audit.auc_mean:.2f} on average, below {USELESS_AUC}.{carried}"
        )
    low = [
        f"{words(d)} ({a.value:.2f})" for d, a in auc.items() if USELESS_AUC <= a.value < WANTED_AUC
    ]
    if useless:
        weak = f" It is weak, below {WANTED_AUC}, on {_listed(low)}." if low else ""
        return (
            f"Judge {j.name} cannot carry a conclusion on {_listed(useless)}: its AUC against "
            f"known corruption is below {USELESS_AUC} there.{carried}{weak}"
        )
    if low:
        return (
            f"Judge {j.name} is usable but weak, with an AUC below {WANTED_AUC}, on {_listed(low)}."
        )
    return (
        f"Judge {j.name} tells corrupted solutions from clean ones in every dimension (lowest AUC "
        f"{min(a.value for a in auc.values()):.2f}; {WANTED_AUC} was wanted)."
    )
