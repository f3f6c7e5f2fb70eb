"""The full grid: every rung × objective × fraction, three seeds each.

The world is the quickstart's, with more questions.

Cost: 96 policies (`--dry_run` counts its tokens). Sampling, judging and reference scoring are
shared with the quickstart's design and done once.

    python -m launch.ablate --config=configs/delta_grid.py
"""

from configs import quickstart
from deltapref_jax.config import Arm, Experiment, Objective, Prompts

RUNGS = ("weak", "fair", "good", "strong", "elm")
OBJECTIVES = (
    Objective(name="dpo"),
    Objective(name="dpo_norm", kind="dpo_norm", beta=5.0),
    Objective(name="kto", kind="kto"),
)
FRACTIONS = (0.06, 0.12, 0.3, 0.6)
SEEDS = (0, 1, 2)


def get_config() -> Experiment:
    arms = [
        Arm(
            name=f"{o.name}-{chosen}", chosen=chosen, rejected="weak", objective=o.name, seeds=SEEDS
        )
        for o in OBJECTIVES
        for chosen in RUNGS
    ]
    arms += [
        Arm(
            name=f"dpo-strong-{keep}-{round(100 * f)}",
            chosen="strong",
            rejected="weak",
            keep=keep,
            by="step_coherence",
            fraction=f,
            seeds=SEEDS,
            group="selection",
        )
        for keep in ("top", "random", "matched")
        for f in FRACTIONS
    ]
    arms += [
        Arm(
            name=f"dpo-strong-{stratum}",
            chosen="strong",
            rejected="weak",
            stratum=stratum,
            seeds=SEEDS,
            group="control",
        )
        for stratum in ("both_right", "both_wrong", "right_wrong")
    ]
    arms += [
        Arm(
            name="dpo-weak-judged",
            chosen="weak",
            rejected="weak",
            direction="exact",
            seeds=SEEDS,
            group="control",
        ),
        Arm(
            name="sft-strong",
            chosen="strong",
            rejected="weak",
            objective="sft",
            seeds=SEEDS,
            group="control",
        ),
    ]
    e = quickstart.get_config()
    e.name = "delta_grid"
    e.prompts = (Prompts(tasks=quickstart.IN_DOMAIN, count=2000, seed=100),)
    e.objectives = (*OBJECTIVES, Objective(name="sft", kind="sft", learning_rate=3e-4))
    e.arms = tuple(arms)
    e.suites = quickstart.suites(count=240, samples=4)
    return e
