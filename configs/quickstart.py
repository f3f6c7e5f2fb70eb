"""Does a stronger author of the chosen traces make a better student?

And does picking pairs by judged gap save data? A whole delta study in the synthetic world, with the
models that ship with the project: four generators that differ in how carelessly they reason and one
of another family, two judges, DPO, KTO and SFT, in-domain and out-of-domain suites.
Cost: two to five minutes on two CPU cores, no download.

    python -m launch.ablate --config=configs/quickstart.py
"""

import os

from deltapref_jax.config import (
    NURSERY,
    Arm,
    Experiment,
    Generator,
    Judge,
    Model,
    Objective,
    Prompts,
    Sampling,
    Scoring,
    Suite,
    Training,
)

IN_DOMAIN = ("chain", "shop")
OUT_OF_DOMAIN = (
    "euclid",
    "equation",
    "sorting",
    "logic",
    "calendar",
)  # none of the models can do "bases"


def small_model(name: str) -> Model:
    return Model(path=os.path.join(NURSERY, name))


def suites(count: int, samples: int) -> tuple[Suite, ...]:
    """One suite per family; `count` questions each in domain, half of it each out of domain."""
    inside = tuple(
        Suite(
            name=task,
            domain="in",
            samples=samples,
            prompts=Prompts(tasks=(task,), count=count, seed=900),
        )
        for task in IN_DOMAIN
    )
    outside = tuple(
        Suite(
            name=task,
            domain="out",
            samples=samples,
            prompts=Prompts(tasks=(task,), count=count // 2, seed=900),
        )
        for task in OUT_OF_DOMAIN
    )
    return inside + outside


def get_config() -> Experiment:
    rungs = ("weak", "fair", "good", "strong")
    arms = [
        Arm(name=f"{objective}-{chosen}", chosen=chosen, rejected="weak", objective=objective)
        for objective, ladder in (("dpo", rungs), ("kto", ("weak", "good", "strong")))
        for chosen in ladder
    ]
    arms.append(Arm(name="dpo-elm", chosen="elm", rejected="weak"))
    for name, keep, judge, objective in (
        ("dpo-top", "top", "", "dpo"),
        ("dpo-top-model", "top", "model", "dpo"),
        ("dpo-random", "random", "", "dpo"),
        ("dpo-matched", "matched", "", "dpo"),
        ("kto-top", "top", "", "kto"),
        ("kto-random", "random", "", "kto"),
    ):
        arms.append(
            Arm(
                name=name,
                chosen="strong",
                rejected="weak",
                objective=objective,
                keep=keep,
                judge=judge,
                by="step_coherence",
                fraction=0.25,
                group="selection",
            )
        )
    arms.append(
        Arm(name="sft-strong", chosen="strong", rejected="weak", objective="sft", group="control")
    )
    return Experiment(
        name="quickstart",
        question=(
            "What do generator delta and sample delta do to a student's reasoning, in and out of "
            "domain?"
        ),
        about=(
            "The world is synthetic: small problems whose every step has a known truth, solved in "
            "numbered steps by decoders of about 0.6 million parameters that learnt from worked "
            "solutions. Generators differ in how many careless steps those solutions had, and one "
            "in its architecture. Training questions come from two kinds of multi-step arithmetic "
            "(chains of operations, shopping bills), which are the domain; Euclid's algorithm, "
            "equations, sorting, bit logic and calendars are outside of it."
        ),
        prompts=(Prompts(tasks=IN_DOMAIN, count=400, seed=100),),
        generators=tuple(
            Generator(
                name=r,
                model=small_model(f"oak-{r}"),
                samples=2 if r == "weak" else 1,
                about=f"learnt from solutions with {careless} careless steps",
            )
            for r, careless in zip(rungs, ("30%", "18%", "6%", "no"), strict=True)
        )
        + (
            Generator(
                name="elm",
                model=small_model("elm"),
                about="another architecture; 9% careless steps",
            ),
        ),
        judges=(Judge(name="exact"), Judge(name="model", kind="model", model=small_model("judge"))),
        student=small_model("student"),
        objectives=(
            Objective(name="dpo"),
            Objective(name="kto", kind="kto"),
            Objective(name="sft", kind="sft", learning_rate=3e-4),
        ),
        arms=tuple(arms),
        suites=suites(count=90, samples=2),
        training=Training(pairs_per_step=24, steps=24, rows=2, row_length=384),
        sampling=Sampling(max_prompt=96, max_tokens=128, slots=192, chunk=16, shard=512),
        scoring=Scoring(rows=24, row_length=448),
    )
