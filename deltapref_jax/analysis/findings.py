"""Sentences made from a summary's numbers: direction, size and interval, whatever they are."""

import math
import re
import statistics
from collections.abc import Collection, Mapping, Sequence

from deltapref_jax.analysis.arm_words import data_words, measure_words, share_words, step_words
from deltapref_jax.analysis.judges import WANTED_AUC, failings
from deltapref_jax.analysis.noise import borrowed, freedom_words
from deltapref_jax.analysis.page import (
    ArmSummary,
    Contrast,
    Finding,
    JudgeSummary,
    Measured,
    Summary,
)
from deltapref_jax.config import REFERENCE_MARGIN

MARK = "†"
"""Stands behind the name of an arm whose judge can't carry a conclusion, wherever it is named."""

DOMAIN_WORDS = {"in": "in domain", "out": "out of domain"}
_MOST = 4  # arms in one sentence
_AGAINST = {
    "random": "as many pairs drawn at random",
    "matched": "as many pairs of the same lengths with the pool's {}",
    "bottom": "as many pairs of the smallest {}",
    "middle": "as many pairs of middling {}",
    "all": "all pairs of the pool",
    "all_epochs": "all pairs of the pool for as many epochs",
    "all_steps": "all pairs of the pool for as many steps",
}


def words(name: object) -> str:
    """An identifier as words."""
    return str(name).replace("_", " ")


def points(values: Sequence[float], digits: int = 1) -> str:
    """Value and interval, such as `+3.2 [+1.0, +5.4]`."""
    value, low, high = _rounded(values, digits)
    return f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def p_words(p: float) -> str:
    """A p value after the letter, such as `= 0.014` or `< 0.001`."""
    return f"= {p:.3f}" if p >= 0.001 else "< 0.001"


def _rounded(values: Sequence[float], digits: int) -> list[float]:
    """Numbers of which none is written as "-0.0"."""
    return [0.0 if abs(v) < 0.5 * 10**-digits else v for v in values]


def outcome(effect: Measured, digits: int = 1) -> str:
    """An effect in points, or that none was shown and which sizes are excluded."""
    if effect.shown:
        return f"{points(effect.estimate, digits)} points"
    missed = "not shown in its table" if _alone(effect, digits) else "no effect shown"
    return f"{missed} ({points(effect.estimate, digits)}; excluded: {excluded(effect, digits)})"


def excluded(effect: Measured, digits: int = 1) -> str:
    """What an effect's own interval leaves out, such as `above +6.9 and below -2.2`.

    The interval is not adjusted and the p value is, so an interval may exclude 0 where nothing is
    shown; then that is what it says.
    """
    if _alone(effect, digits):
        return (
            "0 by its own interval, but among all comparisons of its table one as far from 0 comes "
            f"by chance, adjusted p {p_words(effect.p_adjusted)}"
        )
    _, low, high = _rounded(effect.estimate, digits)
    return f"above {high:+.{digits}f} and below {low:+.{digits}f}"


def _alone(effect: Measured, digits: int) -> bool:
    """Whether the interval, as it is written, excludes 0 and the adjusted p value does not."""
    _, low, high = _rounded(effect.estimate, digits)
    return not effect.shown and (low > 0 or high < 0)


def listed(names: Sequence[str], most: int = 6) -> str:
    """Names as in a sentence; of more than `most`, the number of the others."""
    shown = list(names[:most]) + ([f"{len(names) - most} more"] if len(names) > most else [])
    return " and ".join([", ".join(shown[:-1])] * (len(shown) > 1) + list(shown[-1:]))


def _per_domain(s: Summary, clauses: Sequence[str]) -> str:
    """`in domain …; out of domain …`, from a clause for each of the summary's domains."""
    return "; ".join(f"{DOMAIN_WORDS[d]} {c}" for d, c in zip(s.domains, clauses, strict=True))


def findings(s: Summary) -> list[Finding]:
    """The page's headline, made from the numbers alone."""
    return [
        *_part(s),
        *_claims(s),
        *_generator_delta(s),
        *_sample_delta(s),
        *_survival(s),
        *_controls(s),
        *_arms(s),
        *_greedy(s),
        *_instruments(s),
    ]


def _part(s: Summary) -> list[Finding]:
    """Which arms the page has, where a run was of some of them."""
    if not s.left_out:
        return []
    run, config = len(s.arms), len(s.arms) + len(s.left_out)
    missing = (
        f" Comparisons that need them are missing: {listed(s.uncompared)}." if s.uncompared else ""
    )
    return [
        Finding(
            "Part of the study",
            f"this page has {run} of the {config} arms of the config "
            f"({listed([a.name for a in s.arms])}), and its p values are adjusted over these "
            f"alone. Left out: {listed(s.left_out)}.{missing} Prompts and pairs are those of the "
            "whole study.",
        )
    ]


def _claims(s: Summary) -> list[Finding]:
    """What was claimed before the run, first of all."""
    return [
        Finding(
            "Claim",
            f"{c.what}: {points(c.effect.estimate, 2 if c.claim.kind == 'slope' else 1)} "
            f"{c.unit}; {c.verdict}.{' ' * bool(c.hangs_on)}{c.hangs_on}"
            if c.effect
            else f"{c.what}: {c.verdict}.",
        )
        for c in s.claims
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
    """One sentence for arms that differ in how many pairs they keep, which gives a range."""
    arms = {a.name: a for a in s.arms}
    groups: dict[tuple[str, ...], list[Contrast]] = {}
    for c in s.contrasts:
        a = arms[c.a]
        pairs = (a.arm.by, a.arm.chosen, a.arm.rejected)
        groups.setdefault((_selection_topic(a), *pairs), []).append(c)
    sentences = []
    for (topic, by, chosen, rejected), contrasts in groups.items():
        share = share_words([arms[c.a].arm for c in contrasts])
        measures = "margins" if by == REFERENCE_MARGIN else "gaps"
        clauses = []
        for kind in dict.fromkeys(c.kind for c in contrasts):
            effects = [[c.difference[d] for c in contrasts if c.kind == kind] for d in s.domains]
            against = _AGAINST[kind].format(measures)
            clauses.append(f"against {against}: {_per_domain(s, [*map(_several, effects)])}")
        clauses[1:] = [c[0].upper() + c[1:] for c in clauses[1:]]
        sentences.append(
            Finding(
                topic,
                f"training on the {share} ({chosen} over {rejected}) with the largest "
                f"{measure_words(by)}, {'. '.join(clauses)}.",
            )
        )
    return sentences


def _selection_topic(a: ArmSummary) -> str:
    """What arms of one sentence have in common, such as `Sample delta, DPO, judge exact`."""
    ranked_by = "Margin of the reference" if a.arm.by == REFERENCE_MARGIN else "Sample delta"
    judge = [f"judge {a.pair_judge}{MARK if a.doubt else ''}"] * bool(a.pair_judge)
    budget = [a.budget] * bool(a.budget)
    return ", ".join(
        [ranked_by, a.arm.objective.upper(), *judge, *data_words(a.arm), *budget]
        + step_words(a.arm)
    )


def _several(effects: Sequence[Measured]) -> str:
    """The outcome of one comparison, or the range over several."""
    if len(effects) == 1:
        return outcome(effects[0])
    values = [e.estimate.value for e in effects]
    return (
        f"{min(values):+.1f} to {max(values):+.1f} points over {len(effects)} comparisons, "
        f"{sum(e.shown for e in effects)} of them shown"
    )


def _survival(s: Summary) -> list[Finding]:
    sentences = []
    for c in s.survival:
        # Whether one of two is shown and the other is not says nothing about their difference.
        clauses = [
            f"{outcome(change.difference)} between them ({c.first} {points(change.a)}, {c.second} "
            f"{points(change.b)})"
            for change in (c.changes[d] for d in s.domains)
        ]
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
            outcomes = _per_domain(s, [outcome(a.changes[d]) for d in s.domains])
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
        shown = {a.name: a.changes[d].estimate.value for a in s.arms if a.changes[d].shown}
        up = [name for name, change in shown.items() if change > 0]
        down = [name for name, change in shown.items() if change < 0]
        gained = f"{len(up)} gained ({listed(up)})" if up else "none gained"
        lost = f"{len(down)} lost ({listed(down)})" if down else "none lost"
        detectable = s.noise[d].detectable
        limit = (
            "too few questions differ in how they changed to say which change would be shown"
            if math.isnan(detectable)
            else "no change that an accuracy can have is shown with 80% power"
            if math.isinf(detectable)
            else f"an arm in the middle shows {detectable:.1f} points with 80% power"
        )
        clauses.append(f"{gained} and {lost}; alone, {limit}")
    return [
        Finding(
            f"The {len(s.arms)} arms" if s.left_out else f"All {len(s.arms)} arms",
            "against the student before training, adjusted over all of them: "
            f"{_per_domain(s, clauses)}.",
        )
    ]


def _greedy(s: Summary) -> list[Finding]:
    """What greedy decoding takes from the changes that were shown, and what became sharper."""
    sentences = []
    before = s.student.surprise if s.student else math.nan
    claimed = {name for c in s.claims for name in (c.claim.a, c.claim.b)}
    for twin in (r for r in s.readouts if r.greedy_twin):
        shown = [a for a in s.arms if a.changes[twin.domain].shown]
        if not shown:
            continue
        kept = {
            a.name: twin.changes[a.name].estimate.value / twin.sampled[a.name].value
            for a in shown
            if twin.sampled[a.name].value
        }
        some = len(twin.read_again) < twin.averaged
        over = (
            f", over the {len(twin.read_again)} of {twin.averaged} suites that were answered "
            f"greedily too ({listed(twin.read_again)}),"
        )
        of_all = (
            f"greedy decoding keeps {min(kept.values()):.0%} to {max(kept.values()):.0%} of the "
            f"{len(kept)} changes that are shown as sampled, {statistics.median(kept.values()):.0%}"
            f" in the middle; sampled minus greedy is shown for "
            f"{sum(twin.lost[name].shown for name in kept)} of them. "
            if len(kept) > 1
            else ""
        )
        # Arms of claims first, then those of which it keeps the least.
        first = sorted(shown, key=lambda a: (a.name not in claimed, kept.get(a.name, -math.inf)))
        arms = [
            f"{a.name} changed {twin.sampled[a.name].value:+.1f} points sampled and "
            f"{points(twin.changes[a.name].estimate)} greedy"
            f"{f' ({kept[a.name]:.0%} of it)' if kept.get(a.name, 0) > 0 else ''}, sampled "
            f"minus greedy {points(twin.lost[a.name].estimate)} "
            f"({'' if twin.lost[a.name].shown else 'not '}shown, adjusted p "
            f"{p_words(twin.lost[a.name].p_adjusted)}); its answers "
            f"{a.surprise - before:+.3f} nats a token"
            for a in first[:_MOST]
        ]
        text = (
            f"{DOMAIN_WORDS[twin.domain]}{over * some} {of_all}{'. '.join(arms)}"
            f"{f'. {len(kept) - _MOST} more in the table' if len(kept) > _MOST else ''} "
            f"(nats of the student before: {before:.3f})."
        )
        sentences.append(Finding("Sampled and greedy", text))
    return sentences


def unmeasured(s: Summary) -> list[str]:
    """What no interval of the page contains, and what was not compared."""
    if not s.arms:
        return []
    sentences = []
    noise = list(s.noise.values())
    if any(n.seed is None for n in noise):
        sentences.append(_seeds_unmeasured(s))
    elif alone := [a.arm.objective for a in s.arms if a.seeds == 1]:
        freedom = freedom_words(
            (a.arm.objective, a.seeds) for a in s.arms if a.arm.objective in alone
        )
        sentences.append(
            f"The noise of training in {len(alone)} of {len(s.arms)} arms, which have one seed: "
            f"they borrow what the others measured{_in_brackets(freedom)}."
        )
    if not _freedom_of_draws(s):
        sentences.append("Another draw of the pairs: no arm has several.")
    sentences += borrowed(s.arms)
    sentences += [f"{c.what}: {c.verdict}." for c in s.claims if c.effect is None]
    sentences += no_rungs({objective: of.left_out for objective, of in s.ladders.items()})
    judged = [j.name for j in s.judges if j.audit is None and j.edited is None]
    if judged:
        sentences.append(f"Judge {listed(judged)} against known corruption.")
    sentences += s.limits
    if s.lessons:
        sentences.append(s.lessons)
    sentences += [
        f"Rates beyond the {r.edge} that {r.objective} tried: it is the one that was chosen "
        f"({r.chosen}), so a better one may lie outside."
        for r in s.rates
        if r.edge
    ]
    tuned = {r.objective for r in s.rates}
    given = list(dict.fromkeys(a.arm.objective for a in s.arms if a.arm.objective not in tuned))
    if len({a.arm.objective for a in s.arms}) > 1 and given:
        sentences.append(
            f"Which learning rate is best for {listed(given)}: it was given and not chosen by the "
            "study, so what differs between objectives may be their rates."
        )
    sentences.append("Any other student, world or way of decoding than the one below.")
    return sentences


def no_rungs(left_out: Mapping[str, Mapping[str, str]]) -> list[str]:
    """A sentence for every objective with arms that no slope counts; `left_out`: arm → why."""
    return [
        f"The slope of the {objective.upper()} ladder leaves out "
        f"{listed([f'{arm} ({why})' for arm, why in of.items()])}: its rungs differ in their "
        "generators alone."
        for objective, of in left_out.items()
        if of
    ]


def rung_words(s: Summary) -> list[str]:
    """What the rungs of every ladder have in common, as they are."""
    sentences: dict[str, list[str]] = {}
    for objective, ladder in s.ladders.items():
        if len(ladder.rungs) < 2 or not ladder.prompts:
            continue
        if ladder.shared == ladder.prompts:
            text = (
                "share prompts and rejected traces, so they differ in the author of the chosen "
                "trace and in nothing else"
            )
        else:
            authors = f", which {listed(ladder.rejected)} wrote," * (len(ladder.rejected) > 1)
            text = (
                f"have {ladder.shared} of {ladder.prompts} prompts with a rejected trace{authors} "
                "in common, so they differ in more than the author of the chosen trace"
            )
        sentences.setdefault(text, []).append(objective.upper())
    return [
        f"The rungs of the {listed(names)} ladder{'s' * (len(names) > 1)} {text}."
        for text, names in sentences.items()
    ]


def _seeds_unmeasured(s: Summary) -> str:
    """What the intervals have in them where no arm has several seeds."""
    alone, freedom = sum(not a.redrawn for a in s.arms), _freedom_of_draws(s)
    if not freedom:
        return (
            "The noise of training: no arm has several seeds, so every interval is of questions "
            "alone and too short."
        )
    rest = f"; those of the other {alone} are of questions alone" if alone else ""
    # A seed that all draws share shifts them alike, so their differences do not have it.
    return (
        "The noise of training seeds: no arm has several, and draws of pairs that share one do not "
        "differ by it, so every interval is too short. Those of "
        f"{len(s.arms) - alone} of {len(s.arms)} arms, whose pairs are drawn, have what another "
        f"draw changes{_in_brackets(freedom)}{rest}."
    )


def _freedom_of_draws(s: Summary) -> str:
    """Degrees of freedom that draws of pairs were measured with, by kind; "" if they were not."""
    return freedom_words((a.redrawn, a.draws) for a in s.arms if a.redrawn)


def _in_brackets(freedom: str) -> str:
    return f" (degrees of freedom by kind: {freedom})" if freedom else ""


def interval_words(s: Summary) -> str:
    """What the intervals of the page are of."""
    noise = list(s.noise.values())
    seeds = ["training seeds"] * any(n.seed is not None for n in noise)
    draws = ["draws of pairs (of arms whose pairs are drawn)"]
    draws *= bool(_freedom_of_draws(s))
    if not seeds and not draws:
        return "questions alone: the noise of training is not measured"
    of = listed(["questions", *seeds, *draws])
    return of if seeds else f"{of}: training seeds are not measured"


def _instruments(s: Summary) -> list[Finding]:
    sentences = [Finding("Judges", text) for text in s.judge_sentences if "cannot carry" in text]
    falling = [a.name for a in s.arms if a.training.falling]
    if falling:
        sentences.append(
            Finding(
                "Training",
                f"in {len(falling)} of {len(s.arms)} arms the log-probabilities of chosen and "
                f"rejected traces fell together ({listed(falling)}): these arms made both kinds "
                "of trace less likely.",
            )
        )
    return sentences


def judge_sentence(j: JudgeSummary, judges: Sequence[JudgeSummary]) -> str:
    """What this judge may be used for.

    Args:
      j: the judge.
      judges: of the study, among them an exact one to fall back on, if it has one.
    """
    measured = j.edited or j.audit
    if measured is None and not j.reliability:
        return f"Judge {j.name} was measured neither against known corruption nor against itself."
    reasons: dict[str, list[str]] = {}
    for d in j.dimensions:
        for reason, value in failings(j, d).items():
            reasons.setdefault(reason, []).append(f"{words(d)} {value:.2f}")
    if reasons:
        useless = [d for d in j.dimensions if failings(j, d)]
        why = "; ".join(f"{reason}: {', '.join(of)}" for reason, of in reasons.items())
        exact = [other for other in judges if other.kind == "exact" and other.name != j.name]
        able = [d for d in useless if any(_carries(other, d) for other in exact)]
        which = "it" if able == useless else listed([words(d) for d in able])
        carried = f" The exact judge carries {which}." if able else ""
        return (
            f"Judge {j.name} cannot carry a conclusion on {len(useless)} of {len(j.dimensions)} "
            f"dimensions: {why}.{carried}"
        )
    found = {d: a.value for d, a in measured.auc.items()} if measured else {}
    auc = {d: value for d, value in found.items() if not math.isnan(value)}
    if not auc:
        return (
            f"Judge {j.name} keeps its gaps under other wordings of its rubric; it was not "
            "measured against known corruption."
        )
    low = [f"{words(d)} ({value:.2f})" for d, value in auc.items() if value < WANTED_AUC]
    if low:
        return (
            f"Judge {j.name} is usable but weak, with an AUC below {WANTED_AUC}, on {listed(low)}."
        )
    texts = "edited traces from the traces as they were" if j.edited else "corrupted solutions"
    rest = [words(d) for d in j.dimensions if d not in auc]
    which = f"{len(auc)} of {len(j.dimensions)} dimensions" if rest else "every dimension"
    return (
        f"Judge {j.name} tells {texts} in {which} (lowest AUC {min(auc.values()):.2f}; "
        f"{WANTED_AUC} was wanted){f'; not measured: {listed(rest)}' if rest else ''}."
    )


def _carries(judge: JudgeSummary, by: str) -> bool:
    """Whether a judge rates a dimension and nothing that was measured is below the bar."""
    return by in judge.dimensions and not failings(judge, by)


def mark_names(text: str, doubted: Collection[str]) -> str:
    """The text with a dagger behind every name of an arm whose judge can't carry a conclusion."""
    if not doubted:
        return text
    # The longest name first, of names that begin alike; a name inside a longer one is not its arm.
    names = "|".join(re.escape(name) for name in sorted(doubted, key=len, reverse=True))
    return re.sub(rf"(?<![\w-])({names})(?![\w-]|\.\w)(?!{MARK})", rf"\1{MARK}", text)
