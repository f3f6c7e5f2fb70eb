"""The variance budget: what share of an interval is questions, seeds and draws, and what to buy."""

import math
from collections.abc import Mapping
from statistics import NormalDist

import numpy as np

from deltapref_jax.analysis import effects as fx
from deltapref_jax.analysis.page import NoiseBudget, Purchase
from deltapref_jax.config import Run

_Z95 = NormalDist().inv_cdf(0.975)


def budgets(
    effects: Mapping[str, fx.Effects], runs: Mapping[str, list[Run]]
) -> dict[str, NoiseBudget]:
    """Where the noise comes from, by domain, for the arm in the middle.

    Args:
      effects: by domain.
      runs: evaluated, by arm.
    """
    return {d: _budget(e, runs) for d, e in effects.items() if e.names}


def _budget(e: fx.Effects, runs: Mapping[str, list[Run]]) -> NoiseBudget:
    deviations = e.by_question + e.by_run
    middle = int(np.argsort(deviations.std(axis=1))[(len(deviations) - 1) // 2])
    arm = e.names[middle]
    seeds, draws = len({r.seed for r in runs[arm]}), len({r.draw for r in runs[arm]})
    of_seeds, of_draws = e.noise
    seed, draw = (None if c is None else c.variance for c in e.noise)
    # Questions hold the interaction with runs, which falls with the runs.
    questions = float(e.by_question[middle].var())
    interaction = (of_seeds.rest if of_seeds else 0.0) / len(runs[arm])
    parts = {"questions": questions}
    of_seed, of_draw = (float(share) for share in e.shares[middle])
    if seed is not None:
        parts["seeds"] = seed * of_seed
    if draw is not None:
        parts["draws"] = draw * of_draw
    total = sum(parts.values())

    def with_runs(name: str, now: int) -> float:
        """The variance with one more seed, or draw of pairs, of this arm."""
        saved = parts[name] / (now + 1)
        if name == "draws":  # a new draw brings a new seed of training
            saved += parts.get("seeds", 0.0) / (now + 1)
        return total - saved - min(interaction, questions) / (now + 1)

    after = {"twice the questions": total - questions / 2}
    if "seeds" in parts:
        after["one more seed of every arm"] = with_runs("seeds", seeds)
    if "draws" in parts and of_draw:
        after["one more draw of pairs of every arm"] = with_runs("draws", draws)
    options = [Purchase(what, _Z95 * math.sqrt(v)) for what, v in after.items()]
    best = min(options, key=lambda option: option.half_width)
    buy = best.what
    if seed is None:
        buy = "several seeds of some arms, which measure the noise of training"
    half_width, detectable = _Z95 * math.sqrt(total), fx.detectable(deviations[middle])
    if fx.few_changed(e.gaps[middle]):
        # The exact interval holds, and its width follows no component.
        change = e.change(arm).estimate
        half_width, detectable, options = (change.high - change.low) / 2, math.nan, []
        buy = "more questions, since too few answers changed to tell the noise of them"
    return NoiseBudget(
        arm=arm,
        seeds=seeds,
        draws=draws,
        questions=math.sqrt(questions),
        seed=None if seed is None else math.sqrt(seed),
        seed_freedom=of_seeds.freedom if of_seeds else 0,
        draw=None if draw is None else math.sqrt(draw),
        draw_freedom=of_draws.freedom if of_draws else 0,
        shares={name: 100 * part / total for name, part in parts.items()} if total else {},
        half_width=half_width,
        detectable=detectable,
        options=options,
        buy=buy,
    )
