"""Which generators and which pairs a recipe takes: by measured gaps, and by what a study found."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from deltapref_jax.analysis import effects as fx
from deltapref_jax.analysis.findings import DOMAIN_WORDS, MARK, listed, points, words
from deltapref_jax.analysis.page import Measured
from deltapref_jax.analysis.statistics import Estimate
from deltapref_jax.config import Arm, Claim, ConfigError, Judge, Run
from deltapref_jax.display import printable

MARGIN = Claim().margin  # points within which two accuracies count as the same
ARM = "recipe"  # the name of the arm that a recipe's pairs are of
PAPER_FRACTION, PAPER_BY = 0.3, "step_coherence"
_PAPER = (
    "it is what the paper found (arXiv 2604.08723, read from its figures by eye: of the fractions "
    "6, 12, 30 and 60%, the top 30% by step coherence were the most accurate in domain, at 74.8%), "
    "and it was not measured here"
)


class TopContrast(NamedTuple):
    """An arm of a study that kept the top pairs, minus another arm of the same pool."""

    a: str
    b: str
    kind: str  # how the pairs of b were selected: "random" or "all"
    fraction: float  # of the pool that a keeps
    by: str  # what its pairs were ranked by
    judge: str  # whose ratings ranked them
    doubt: str  # why this judge can't carry a conclusion; "" if it can
    effects: dict[str, Measured]  # by domain


# By judge and what it ranked by, and by the arm of all pairs: the fraction that is as good.
_Best = Mapping[tuple[str, str], Mapping[str, TopContrast | None]]


class Slope(NamedTuple):
    """Change per 10 points of generator delta over the ladder of an objective."""

    objective: str
    effects: dict[str, Measured]  # by domain


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What a finished study found about generator delta and sample delta."""

    study: str
    question: str
    domains: tuple[str, ...]
    claims: tuple[str, ...]  # a sentence each
    slopes: tuple[Slope, ...]
    contrasts: tuple[TopContrast, ...]


class Selection(NamedTuple):
    """Which pairs of the pool are kept: the top ones, or all where the fraction is 1."""

    fraction: float
    by: str
    judge: str  # "" where nobody ranks
    why: str  # a sentence


class Gap(NamedTuple):
    """Accuracy of one generator minus that of another."""

    chosen: str
    rejected: str
    effect: Measured  # adjusted over all gaps of the config's generators


class GeneratorPair(NamedTuple):
    """Who writes the chosen and the rejected traces."""

    chosen: str
    rejected: str
    why: str  # a sentence


@dataclasses.dataclass(frozen=True)
class Proposal:
    """What a recipe makes, and why."""

    generators: GeneratorPair
    selection: Selection
    evidence: tuple[str, ...]  # lines of Markdown
    budget: str  # a sentence

    @property
    def arm(self) -> Arm:
        """The arm of a study that would train on the pairs."""
        kept = self.selection
        return Arm(
            name=ARM,
            chosen=self.generators.chosen,
            rejected=self.generators.rejected,
            keep="top" if kept.fraction < 1 else "all",
            by=kept.by,
            judge=kept.judge if kept.fraction < 1 else "",
            fraction=kept.fraction,
            group="selection",
        )


def read_evidence(text: str, where: str) -> Evidence:
    """What `summary.json` says of a study.

    Args:
      text: of the file.
      where: its name, for messages.

    Raises:
      ConfigError: it is no summary that this version wrote.
    """
    try:
        summary = json.loads(text)
        arms = {arm["name"]: arm for arm in summary["arms"]}
        slopes: dict[str, dict[str, Measured]] = {t["objective"]: {} for t in summary["trends"]}
        for trend in summary["trends"]:
            slopes[trend["objective"]][trend["domain"]] = _measured(trend["per_10"])
        return Evidence(
            summary["name"],
            summary["question"],
            tuple(summary["domains"]),
            tuple(_claim(claim) for claim in summary["claims"]),
            tuple(Slope(*slope) for slope in slopes.items()),
            tuple(
                TopContrast(
                    c["a"],
                    c["b"],
                    c["kind"],
                    float(arms[c["a"]]["fraction"]),
                    arms[c["a"]]["by"],
                    arms[c["a"]]["pair_judge"],
                    arms[c["a"]]["doubt"],
                    {d: _measured(c[d]) for d in summary["domains"]},
                )
                for c in summary["contrasts"]
                if c["kind"] in ("random", "all")
            ),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ConfigError(
            f"--study: {where} is not the summary.json of a study that this version wrote "
            f"({type(e).__name__}: {e}); give the folder of a study's page, such as "
            "workspace/by_name/quickstart/report."
        ) from e


def _measured(found: Mapping[str, Any]) -> Measured:
    def number(value: float | None) -> float:
        return math.nan if value is None else float(value)

    value, low, high = map(number, found["estimate"])
    return Measured(
        Estimate(value, low, high), *(number(found[key]) for key in ("p", "p_adjusted", "bound"))
    )


def _claim(claim: Mapping[str, Any]) -> str:
    if claim["effect"] is None:
        return f"{claim['what']}: {claim['verdict']}."
    digits = 2 if claim["claim"]["kind"] == "slope" else 1
    effect = points(_measured(claim["effect"]).estimate, digits)
    return f"{claim['what']}: {effect} {claim['unit']}; {claim['verdict']}."


def evidence_lines(evidence: Evidence | None) -> tuple[str, ...]:
    """What a study says about generator delta and sample delta, as lines of Markdown."""
    if evidence is None:
        return (
            "No study: that a wider generator delta and a larger sample delta help a student is "
            "the paper's finding (arXiv 2604.08723), and was not measured here.",
        )
    heads = [DOMAIN_WORDS[d] for d in evidence.domains]
    rows = [
        (f"slope, {cell(s.objective)} ladder, per 10 points of generator delta", s.effects, 2)
        for s in evidence.slopes
    ] + [
        (
            f"{cell(c.a)}{MARK * bool(c.doubt)} (top {c.fraction:.0%} by {words(c.by)}, judge "
            f"{cell(c.judge)}) minus {cell(c.b)} "
            f"({'as many at random' if c.kind == 'random' else 'all pairs'})",
            c.effects,
            1,
        )
        for c in evidence.contrasts
    ]
    lines = [
        f"The study {cell(evidence.study)}: {cell(evidence.question)} Effects are in points of a "
        "student's accuracy with 95% intervals; p values are adjusted over each kind of effect.",
        "",
        *(f"- {cell(claim)}" for claim in evidence.claims),
        "",
    ]
    if not rows:
        return (*lines, "It has no slope over a ladder, and no top pairs against others.")
    lines += table(("effect", *heads), [(what, *_cells(e, n)) for what, e, n in rows])
    doubts = dict.fromkeys(c.doubt for c in evidence.contrasts if c.doubt)
    return (*lines, *([""] if doubts else []), *(f"{MARK} {cell(why)}." for why in doubts))


def _cells(effects: Mapping[str, Measured], digits: int) -> list[str]:
    return [
        f"{points(e.estimate, digits)}, p {e.p_adjusted:.2g}, {'' if e.shown else 'not '}shown"
        for e in effects.values()
    ]


def cell(text: object) -> str:
    """Text of a config or a file as one cell of a Markdown table, or within one line."""
    return re.sub(r"([|`<*\[\]\\])", r"\\\1", " ".join(printable(str(text)).split()))


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table; its cells are text that needs no escape."""
    lines = [heads, ["---"] * len(heads), *rows]
    return [f"| {' | '.join(map(str, line))} |" for line in lines]


def select_by(evidence: Evidence | None, judges: Sequence[Judge]) -> Selection:
    """The fraction of pairs to keep, and who ranks them.

    It is the smallest top fraction of the study that was not worse than all pairs in any domain,
    better or the same within `MARGIN` points, as were all larger fractions of its ranking: those
    by one measure of the pairs of one arm, which has its generators and objective. Tested in this
    order, none needs an adjustment for the others (fixed-sequence tests: Maurer, Hothorn, Lehmacher
    1995); several rankings do, and their number is said. Of several by one measure each must have
    such a fraction, and the largest is taken. What a judge below the bar ranked is not taken. Where
    no study shows a fraction by what a judge of the config rates, it is the paper's.

    Args:
      evidence: of a study; None without one.
      judges: of the config; the study's judge is used where one has its name, else the first.
    """
    if not judges:
        why = "all pairs are kept, for the config has no judge that could rank them"
        return Selection(1.0, "sum", "", why)
    contrasts = [c for c in evidence.contrasts if c.kind == "all"] if evidence else []
    measures: dict[tuple[str, str], dict[str, list[TopContrast]]] = {}
    for c in contrasts:
        # A number of pairs is no fraction.
        if c.fraction < 1 and not c.doubt:
            measures.setdefault((c.judge, c.by), {}).setdefault(c.b, []).append(c)
    best: _Best = {
        measure: {b: _smallest_as_good(ranking) for b, ranking in of_arms.items()}
        for measure, of_arms in measures.items()
    }
    rated = [of_arms for (judge, by), of_arms in best.items() if _rates(_judge(judges, judge), by)]
    found = [
        max(filter(None, o.values()), key=lambda c: c.fraction) for o in rated if all(o.values())
    ]
    if evidence and found:
        c = min(found, key=lambda c: (c.fraction, -_worst(c)))
        judge = _judge(judges, c.judge).name
        other = f", whose judge was {c.judge}," * (judge != c.judge)
        return Selection(
            c.fraction,
            c.by,
            judge,
            f"the top {c.fraction:.0%} by {words(c.by)} are kept, rated by judge {judge}: the "
            f"smallest top fraction of the pairs of {c.b} in the study {evidence.study}{other} "
            f"that, as all larger ones, did as well as all of them or better ({c.a} minus {c.b}: "
            f"{in_domains(c.effects)} points; as well: within ±{MARGIN:g}; rankings that were "
            f"looked at: {sum(map(len, rated))}, not adjusted for)",
        )
    by = PAPER_BY if PAPER_BY in judges[0].dimensions else "sum"
    why = (
        f"the top {PAPER_FRACTION:.0%} by {words(by)} are kept, rated by judge {judges[0].name}: "
        f"{_PAPER}"
    )
    if by != PAPER_BY:
        why += f"; the judge does not rate {words(PAPER_BY)}, so the sum of its ratings ranks"
    if evidence:
        shown = _not_followed(judges, best)
        none = "no top fraction is shown to do as well as all pairs"
        why += f"; in the study {evidence.study} {'; '.join(shown) or none}"
        lost = [c.a for c in contrasts if any(_lost(e) for e in c.effects.values())]
        why += f"; {listed(lost)} did worse" * bool(lost)
        doubted = [c.a for c in contrasts if c.doubt]
        below = f"; the judge behind {listed(doubted)} is below the bar or not measured"
        why += below * bool(doubted)
    return Selection(PAPER_FRACTION, by, judges[0].name, why)


def _not_followed(judges: Sequence[Judge], best: _Best) -> list[str]:
    """The fractions that are as good as all pairs of an arm, and why the recipe can't take them."""
    found = []
    for (name, by), of_arms in best.items():
        judge, without = _judge(judges, name), listed([b for b, c in of_arms.items() if not c])
        why = f"which judge {judge.name} does not rate"
        if _rates(judge, by):
            why = f"by which no top fraction of the pairs of {without} is shown to"
        found += [
            f"{c.a} did as well as {c.b} by {words(by)}, {why}" for c in of_arms.values() if c
        ]
    return found


def _smallest_as_good(ranking: Sequence[TopContrast]) -> TopContrast | None:
    """The worst contrast of the smallest fraction that, with all larger ones, was not worse."""
    found = None
    for fraction in sorted({c.fraction for c in ranking}, reverse=True):
        at = [c for c in ranking if c.fraction == fraction]
        if not all(_as_good(e) for c in at for e in c.effects.values()):
            break
        found = min(at, key=_worst)
    return found


def _worst(contrast: TopContrast) -> float:
    return min(e.estimate.value for e in contrast.effects.values())


def _as_good(effect: Measured) -> bool:
    return effect.bound < MARGIN or (effect.shown and effect.estimate.value > 0)


def _lost(effect: Measured) -> bool:
    return effect.shown and effect.estimate.value < 0


def _judge(judges: Sequence[Judge], name: str) -> Judge:
    """The judge of that name, or the first one."""
    return next((j for j in judges if j.name == name), judges[0])


def _rates(judge: Judge, by: str) -> bool:
    """Whether a judge gives what pairs are ranked by."""
    return by == "sum" or by in judge.dimensions


def in_domains(effects: Mapping[str, Measured], digits: int = 1) -> str:
    """Effects with their intervals, such as `in domain +3.2 [+1.0, +5.4], out of domain …`."""
    return ", ".join(f"{DOMAIN_WORDS[d]} {points(e.estimate, digits)}" for d, e in effects.items())


def _effects(capability: Mapping[str, pa.Table], domain: str) -> fx.Effects:
    """Accuracies of all generators against the first one, on the questions that they share."""
    runs = {name: {Run(0, 0): table} for name, table in capability.items()}
    return fx.effects(next(iter(capability.values())), runs, domain)


def gaps(capability: Mapping[str, pa.Table], domain: str) -> list[Gap]:
    """The gap of every two generators that is above 0, widest first.

    Args:
      capability: generator to rows of `records.Result`, on the same questions.
      domain: "in" or "out".
    """
    effects, names = _effects(capability, domain), list(capability)
    both = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    found = {(a, b): effects.contrast(a, b) for a, b in both}
    # A gap is that of the better over the worse.
    turned = {
        (b, a) if e.estimate.value < 0 else (a, b): effects.contrast(b, a)
        if e.estimate.value < 0
        else e
        for (a, b), e in found.items()
    }
    measured = [Gap(*names, effect) for names, effect in fx.measured(turned).items()]
    return sorted(measured, key=lambda gap: -gap.effect.estimate.value)


def choose_generators(
    capability: Mapping[str, pa.Table], domain: str, flops: Mapping[str, float]
) -> GeneratorPair:
    """The two generators whose gap in accuracy is the widest, if it is shown to be above 0.

    A cheaper two take their place if their gap is the same within `MARGIN` points (two one-sided
    tests at 5%), or exactly the same, and shown too.

    Args:
      capability: generator to rows of `records.Result`, on the same questions.
      domain: "in" or "out".
      flops: generator to FLOPs of its traces of one prompt and of their ratings.

    Raises:
      ConfigError: no gap is shown.
    """
    all_gaps = gaps(capability, domain)
    widest, where = all_gaps[0], DOMAIN_WORDS[domain]
    if not widest.effect.shown:
        raise ConfigError(
            f"No generator is shown to be more accurate than another {where}: the widest gap is "
            f"that of {widest.chosen!r} over {widest.rejected!r}, "
            f"{points(widest.effect.estimate)} points; give the suites more questions, or the "
            "config generators that are further apart."
        )
    effects = _effects(capability, domain)

    def as_wide(gap: Gap) -> bool:
        weights = dict.fromkeys(capability, 0.0)
        for name, weight in zip((*widest[:2], *gap[:2]), (1.0, -1.0, -1.0, 1.0), strict=True):
            weights[name] += weight
        apart = effects.combined(weights)
        return apart.estimate.value == 0 or apart.bound < MARGIN

    def cost(gap: Gap) -> float:
        return flops[gap.chosen] + flops[gap.rejected]

    tied = [g for g in all_gaps if g is widest or (g.effect.shown and as_wide(g))]
    best = min(tied, key=cost)
    why = (
        f"{best.chosen} over {best.rejected}: the widest of {len(all_gaps)} gaps in accuracy "
        f"{where}, {points(best.effect.estimate)} points (adjusted p {best.effect.p_adjusted:.2g})"
    )
    if best is not widest:
        why = (
            f"{best.chosen} over {best.rejected}: a gap in accuracy {where} of "
            f"{points(best.effect.estimate)} points (adjusted p {best.effect.p_adjusted:.2g}), the "
            f"same within {MARGIN:g} points as the widest of {len(all_gaps)}, that of "
            f"{widest.chosen} over {widest.rejected} ({points(widest.effect.estimate)}), at "
            f"{cost(best) / cost(widest):.0%} of its FLOPs"
        )
    return GeneratorPair(best.chosen, best.rejected, why)
