"""Does a stronger author of the chosen traces make a better student?

And does picking pairs by judged gap save data? A whole delta study in the synthetic world, with the
models that ship with the project: four generators that differ in which misconceptions they hold
(`synthetic.beliefs`) and one of another family, two judges, DPO, KTO and SFT, in-domain and
out-of-domain suites. Misconceptions are wrong by rule, so greedy decoding does not remove them.
Of the suites outside of the domain some share a skill with it by construction and two share none,
so where transfer can exist is known.
Cost: up to ten minutes on two CPU cores, no download.

    python -m launch.ablate --config=configs/quickstart.py
"""

import dataclasses
import functools
import os

from deltapref_jax.config import (
    NURSERY,
    Arm,
    Claim,
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
    budget_twin,
    greedy_twin,
)

IN_DOMAIN = ("chain", "shop", "formula")
OUT_OF_DOMAIN = ("ages", "equation", "trip", "calendar", "logic", "sorting")


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


def tuning() -> Suite:
    """Questions by which learning rates are chosen."""
    prompts = Prompts(tasks=IN_DOMAIN, count=300, seed=950)
    return Suite(name="tuning", prompts=prompts, samples=2, readout="tuning")


def tuned(objective: Objective) -> Objective:
    """The objective at the best of three rates for its arm of the strong generator."""
    rates = (1e-4, 3e-4, 1e-3) if objective.kind == "sft" else (3e-5, 1e-4, 3e-4)
    return dataclasses.replace(objective, rates=rates, tuned_by=f"{objective.name}-strong")


def get_config() -> Experiment:
    rungs = ("weak", "fair", "good", "strong")
    seeds = (0, 1, 2)  # of the arms that the claims compare
    pair = functools.partial(Arm, chosen="strong", rejected="weak")
    quarter = functools.partial(pair, fraction=0.25, group="selection")
    ranked = functools.partial(quarter, by="numerical_precision")
    control = functools.partial(pair, group="control")
    training = Training(pairs_per_step=24, steps=24, rows=2, row_length=384)
    selected = (
        ranked(name="dpo-top", keep="top", seeds=seeds),
        quarter(name="dpo-random", keep="random", seeds=seeds[:2], draws=seeds),
    )
    arms = (
        *(Arm(name=f"dpo-{c}", chosen=c, rejected="weak", seeds=seeds) for c in rungs),
        *(
            Arm(name=f"kto-{c}", chosen=c, rejected="weak", objective="kto")
            for c in ("weak", "good", "strong")
        ),
        Arm(name="dpo-elm", chosen="elm", rejected="weak"),
        *selected,
        *(budget_twin(arm, training) for arm in selected),
        ranked(name="dpo-top-model", keep="top", judge="model"),
        # Ranked by what the student does right anyway, see `about`.
        quarter(name="dpo-top-steps", keep="top", by="step_coherence"),
        ranked(name="dpo-matched", keep="matched"),
        control(name="sft-strong", objective="sft"),
        control(name="dpo-coin", direction="coin"),
        Arm(name="dpo-reversed", chosen="weak", rejected="strong", group="control"),
    )
    read = suites(count=90, samples=2)
    believes = {
        "weak": "borrows and carries wrongly, rounds factors of 9 up, ignores precedence, forgets "
        "the change",
        "fair": "borrows and carries wrongly",
        "good": "borrows wrongly",
        "strong": "holds no misconception",
    }
    return Experiment(
        name="quickstart",
        question=(
            "What do generator delta and sample delta do to a student's reasoning, in and out of "
            "domain?"
        ),
        about=(
            "The world is synthetic: small problems whose every step has a known truth, solved in "
            "numbered steps by decoders of about 0.6 million parameters that learnt from worked "
            "solutions. Generators differ in the misconceptions of those solutions' authors, which "
            "are wrong by rule and not by chance, and one in its architecture; one step in fifty "
            "was careless for all of them. Training questions come from three kinds of multi-step "
            "arithmetic (chains of operations, shopping bills, formulas), which are the domain. "
            "The student borrows and carries wrongly, so pairs of the fair generator against the "
            "weak one correct nothing that it does, those of the good one its carrying, those of "
            "the strong one its borrowing too. Outside of the domain ages and equations need "
            "borrowing, trips and calendars carrying: all models know these kinds of questions, "
            "but only from lessons in which nothing is borrowed or carried. Bit logic and sorting "
            "share no skill with the domain, and the student has misconceptions about them that "
            "no pair can correct."
        ),
        prompts=(Prompts(tasks=IN_DOMAIN, count=420, seed=100),),
        generators=tuple(
            Generator(
                name=r,
                model=small_model(f"oak-{r}"),
                samples=2 if r == "weak" else 1,
                about=believes[r],
            )
            for r in rungs
        )
        + (
            Generator(
                name="elm",
                model=small_model("elm"),
                about="another architecture; borrows wrongly, ignores precedence",
            ),
        ),
        judges=(Judge(name="exact"), Judge(name="model", kind="model", model=small_model("judge"))),
        student=small_model("student"),
        objectives=(
            tuned(Objective(name="dpo")),
            tuned(Objective(name="kto", kind="kto")),
            tuned(Objective(name="sft", kind="sft")),
        ),
        arms=arms,
        claims=(
            Claim(kind="slope", objective="dpo", domain="out", margin=0.5),
            Claim(kind="contrast", a="dpo-top", b="dpo-random", domain="out"),
        ),
        suites=(*read, *map(greedy_twin, read), tuning()),
        training=training,
        sampling=Sampling(max_prompt=96, max_tokens=128, slots=192, chunk=16, shard=512),
        scoring=Scoring(rows=24, row_length=448),
    )
