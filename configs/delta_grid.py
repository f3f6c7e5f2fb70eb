"""The full grid: every rung × objective, and every selection × judge × dimension × fraction.

The world is the quickstart's, with more questions. Every arm passes over its own pairs as often as
every other (`budget="epochs"`), so a fraction is a fraction of the pairs that there are; twins of
equal steps show what the smaller number of steps does. What is claimed is named before the run: the
paper's two findings, and whether selected pairs do what all pairs do.

Cost: `--dry_run` counts policies and tokens. Sampling, judging and reference scoring are done once
for all of them.

    python -m launch.ablate --config=configs/delta_grid.py --dry_run
    python -m launch.ablate --config=configs/delta_grid.py
"""

import functools

from configs import quickstart
from deltapref_jax.config import (
    DIMENSIONS,
    Arm,
    Claim,
    Experiment,
    Objective,
    Prompts,
    Training,
    budget_twin,
    greedy_twin,
)

RUNGS = ("weak", "fair", "good", "strong", "elm")
OBJECTIVES = (
    Objective(name="dpo"),
    Objective(name="dpo_norm", kind="dpo_norm", beta=5.0),
    Objective(name="kto", kind="kto"),
)
FRACTIONS = (0.06, 0.12, 0.3, 0.6)
SEEDS = (0, 1, 2)
BY = "numerical_precision"  # what misconceptions are about


def get_config() -> Experiment:
    pair = functools.partial(Arm, chosen="strong", rejected="weak")
    selection = functools.partial(pair, group="selection")
    control = functools.partial(pair, group="control", seeds=SEEDS)
    ladder = tuple(
        Arm(f"{o.name}-{chosen}", chosen=chosen, rejected="weak", objective=o.name, seeds=SEEDS)
        for o in OBJECTIVES
        for chosen in RUNGS
    )
    # Draws of random and matched pairs, and of ties at the cut; seeds of one draw of each.
    drawn = tuple(
        selection(f"dpo-{keep}-{round(100 * f)}", keep=keep, by=by, fraction=f, draws=SEEDS)
        for keep, by in (("random", "sum"), ("matched", BY))
        for f in FRACTIONS
    )
    top = tuple(
        selection(
            f"dpo-top-{judge}-{dimension}-{round(100 * f)}",
            keep="top",
            judge=judge,
            by=dimension,
            fraction=f,
            draws=SEEDS,
        )
        for judge in ("exact", "model")
        for dimension in DIMENSIONS
        for f in FRACTIONS
    )
    controls = (
        *(control(f"dpo-{stratum}", stratum=stratum) for stratum in ("both_wrong", "right_wrong")),
        control("dpo-coin", direction="coin", draws=SEEDS, seeds=(0,)),
        control("dpo-reversed", chosen="weak", rejected="strong"),
        control("dpo-weak-judged", chosen="weak", direction="exact"),
        control("sft-strong", objective="sft"),
    )
    e = quickstart.get_config()
    e.name = "delta_grid"
    e.prompts = (Prompts(tasks=quickstart.IN_DOMAIN, count=2000, seed=100),)
    e.objectives = tuple(map(quickstart.tuned, (*OBJECTIVES, Objective(name="sft", kind="sft"))))
    e.training = Training(pairs_per_step=24, budget="epochs", epochs=1.0, rows=2, row_length=384)
    compared = ("dpo-random-", f"dpo-top-exact-{BY}-")
    twins = (budget_twin(a, e.training) for a in (*drawn, *top) if a.name.startswith(compared))
    e.arms = (*ladder, *drawn, *top, *twins, *controls)
    selected = f"dpo-top-exact-{BY}-30"
    e.claims = (
        Claim(kind="slope", objective="dpo", domain="out", margin=0.5),
        Claim(kind="contrast", a=selected, b="dpo-random-30", domain="out", margin=3.0),
        Claim(kind="contrast", a=selected, b="dpo-strong", domain="out", margin=3.0),
    )
    read = quickstart.suites(count=240, samples=2)
    e.suites = (*read, *map(greedy_twin, read), quickstart.tuning())
    return e
