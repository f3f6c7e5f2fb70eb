"""The variance budget of intervals, what narrows them, and which effects would be shown."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa
from scipy import optimize, special

from deltapref_jax.analysis import effects as fx
from deltapref_jax.analysis.components import Kind
from deltapref_jax.analysis.page import ArmSummary, NoiseBudget, Purchase
from deltapref_jax.analysis.statistics import by_question
from deltapref_jax.config import Run

POWER = 0.8
MOST = 100.0  # points by which an accuracy can change
_QUANTILES = (np.arange(1000) + 0.5) / 1000


def budgets(
    effects: Mapping[str, fx.Effects], runs: Mapping[str, list[Run]]
) -> dict[str, NoiseBudget]:
    """Where the noise comes from, by domain, for the arm in the middle.

    Args:
      effects: by domain.
      runs: evaluated, by arm.
    """
    changes = {(d, arm): e.change(arm) for d, e in effects.items() for arm in e.names}
    furthest = fx.furthest(list(changes.values()))
    spread = {key: float(change.draws.std()) for key, change in changes.items()}
    return {
        d: _budget(e, runs, {arm: furthest * spread[d, arm] for arm in e.names})
        for d, e in effects.items()
        if e.names
    }


def detectable(error: float, freedom: float, limit: float | None = None) -> float:
    """The smallest true effect that is shown with 80% power, in points.

    An effect is shown where its estimate is farther from 0 than Student's t times the estimated
    error. The square of that error varies as chi-squared over its degrees of freedom, and given the
    error the estimate is normal: together the noncentral t distribution (Cohen, Statistical Power
    Analysis, 1988, chapter 12), here as the mean over quantiles of chi-squared.

    Args:
      error: standard error of the effect, in points.
      freedom: degrees of freedom of the error's square.
      limit: how far from 0 an estimate must be, in points; None: for one comparison at a two-sided
        5%, by Student's t.
    """
    if not error:
        return 0.0
    t = student(freedom) if limit is None else limit / error
    estimated = np.sqrt(special.chdtri(freedom, _QUANTILES) / freedom)  # over the true error

    def excess(effect: float) -> float:
        return float(special.ndtr(effect - t * estimated).mean()) - POWER

    return error * float(optimize.brentq(excess, 0.0, 10.0 + t * float(estimated.max())))


def student(freedom: float) -> float:
    """Half the width of a two-sided 95% interval, in standard errors."""
    return float(special.stdtrit(freedom, 0.975))


def planned(before: pa.Table, others: Mapping[str, pa.Table], domain: str) -> float:
    """The change that an arm of one seed is expected to show with 80% power, before any trains.

    The noise of a paired change depends on how differently the policy answers the questions. The
    model that differs least from the student, of those already evaluated, stands in for it; without
    one, answers are taken as independent, which is the most that they can differ. The noise of
    training comes on top. A size above MOST says that no change is expected to be shown.

    Args:
      before: the student's rows of `records.Result`.
      others: other models' rows, on the same questions.
      domain: "in" or "out".
    """
    found = fx.effects(before, {name: {Run(0, 0): t} for name, t in others.items()}, domain)
    weights = [{name: 1.0} for name in found.names if found.error({name: 1.0}) > 1e-9]
    if weights:
        nearest = min(weights, key=found.error)
        return detectable(found.error(nearest), found.freedom(nearest))
    variance = 0.0
    base = by_question(before, domain)
    for a in base.values():
        n = len(a.questions)
        # The unbiased variance of a question's mean; the largest, p (1 - p), where one sample or
        # equal samples show none, with p pulled off 0 and 1 (Agresti & Coull 1998).
        within = float(np.mean(a.mean * (1 - a.mean) / np.maximum(a.samples - 1, 1)))
        if a.samples.min() == 1 or within == 0:
            share = (float(a.mean.sum()) + 2) / (n + 4)
            within = share * (1 - share)
        variance += 2 * within / n
    questions = sum(len(a.questions) for a in base.values())
    return detectable(100 * math.sqrt(variance) / max(len(base), 1), max(questions - 1, 1))


def _budget(
    e: fx.Effects, runs: Mapping[str, list[Run]], limits: Mapping[str, float]
) -> NoiseBudget:
    errors = {name: e.error({name: 1.0}) for name in e.names}
    arm = sorted(errors, key=errors.__getitem__)[(len(errors) - 1) // 2]
    middle = e.names.index(arm)
    parts, freedom = _parts(e, middle), e.freedom({arm: 1.0})
    total, t = sum(parts.values()), student(freedom)
    options = [
        Purchase(what, min(t * math.sqrt(max(0.0, total - saved)), MOST))
        for what, saved in _saved(e, middle, parts, runs[arm]).items()
    ]
    buy = min(options, key=lambda option: option.half_width).what
    of_seeds, of_draws = e.noise[middle]
    if of_seeds is None:
        buy = "several seeds of some arms, which measure the noise of training"
    half_width = min(t * math.sqrt(total), MOST)
    found = [detectable(errors[arm], freedom, limit) for limit in (None, limits[arm])]
    alone, adjusted = (size if size <= MOST else math.inf for size in found)
    if e.few_differ({arm: 1.0}):
        # The exact interval holds, and its width follows no component.
        change = e.change(arm).estimate
        half_width, options = (change.high - change.low) / 2, []
        alone = adjusted = math.nan
        buy = "more questions, since too few differ in how they changed to tell their noise"
    return NoiseBudget(
        arm=arm,
        seeds=len({r.seed for r in runs[arm]}),
        draws=len({r.draw for r in runs[arm]}),
        questions=math.sqrt(parts["questions"]),
        seed=None if of_seeds is None else math.sqrt(of_seeds.variance),
        seed_freedom=of_seeds.freedom if of_seeds else 0,
        draw=None if of_draws is None else math.sqrt(of_draws.variance),
        draw_freedom=of_draws.freedom if of_draws else 0,
        drawn=bool(e.kinds.get(arm, Kind()).draw),
        shares={name: 100 * part / total for name, part in parts.items()} if total else {},
        half_width=half_width,
        detectable=alone,
        detectable_adjusted=adjusted,
        options=options,
        buy=buy,
    )


def _parts(e: fx.Effects, row: int) -> dict[str, float]:
    """What the variance of an arm's change is made of; without a component not measured."""
    of_training = zip(("seeds", "draws"), e.noise[row], e.shares[row].tolist(), strict=True)
    return {"questions": float(e.by_question[row].var())} | {
        name: component.variance * share for name, component, share in of_training if component
    }


def _saved(
    e: fx.Effects, row: int, parts: Mapping[str, float], runs: list[Run]
) -> dict[str, float]:
    """What every purchase takes from the variance of an arm's change."""
    saved = {"twice the questions": parts["questions"] / 2}
    seeds, draws = len({r.seed for r in runs}), len({r.draw for r in runs})
    # Questions hold the interaction with runs, which falls with the runs.
    of_seeds = e.noise[row].seed
    interaction = min((of_seeds.rest if of_seeds else 0.0) / len(runs), parts["questions"])
    if "seeds" in parts:
        saved["one more seed of every arm"] = (parts["seeds"] + interaction) / (seeds + 1)
    if "draws" in parts and e.shares[row, 1]:
        saved["one more draw of pairs of every arm"] = (parts["draws"] + interaction) / (draws + 1)
    return saved


def freedom_words(runs: Iterable[tuple[str, int]]) -> str:
    """Degrees of freedom by kind, such as `dpo: 6; kto: 1`; "" where no arm has several runs.

    Args:
      runs: of every arm its kind, and how many seeds or draws it has.
    """
    found: Counter[str] = Counter()
    for kind, several in runs:
        found[kind] += several - 1
    return "; ".join(f"{kind}: {n}" for kind, n in found.items() if n)


def borrowed(arms: Sequence[ArmSummary]) -> list[str]:
    """Which arms have the noise of others in their intervals, because none of their kind has any.

    Arms are of one kind where their objective, and for draws their selection and their budget, are
    one (`analysis.components`).
    """
    of_seeds = [("Seeds", a.arm.objective, a.seeds) for a in arms]
    of_draws = [("Draws of pairs", a.redrawn, a.draws) for a in arms if a.redrawn]
    sentences = []
    for of_arms in (of_seeds, of_draws):
        measured = sorted({kind for _, kind, several in of_arms if several > 1})
        alone = Counter(kind for _, kind, _ in of_arms if kind not in measured)
        if measured and alone:
            kinds = "; ".join(f"{kind} ({n} arm{'s' * (n > 1)})" for kind, n in alone.items())
            sentences.append(
                f"{of_arms[0][0]} of a kind of which no arm has several: {kinds}. Their intervals "
                f"have the noise of other kinds ({'; '.join(measured)}), which may differ."
            )
    return sentences
