"""The study of "Decomposing the Delta" (arXiv 2604.08723), with the models that it names.

The student is Llama-3.1-Nemotron-Nano-8B; s1-3B writes the rejected traces, and s1-3B to s1-32B the
chosen ones; the prompts are those of OpenR1-Math-220k. Arms of the ladder vary the generator's
delta, and those of the selection keep the best pairs by one dimension, with random pairs as their
control. GPT-OSS-120B judges. DeepSeek-R1, the paper's largest generator, is not a model that one
runs beside the others, and has no arm here. Lengths, rates and seeds are not published;
those below are this project's. Cost: docs/models.md has its plan for 64 chips.

    python -m launch.ablate --config=configs/paper.py --dry_run --devices=16x4
    python -m launch.ablate --config=configs/paper.py
"""

import functools

from deltapref_jax.config import (
    Arm,
    Experiment,
    Generator,
    Judge,
    MeshShape,
    Model,
    Objective,
    Prompts,
    Sampling,
    Scoring,
    Suite,
    Training,
)

RUNGS = ("3B", "7B", "14B", "32B")
FRACTIONS = (0.06, 0.12, 0.3, 0.6)


def get_config() -> Experiment:
    model = functools.partial(Model, dtype="bfloat16")
    questions = functools.partial(Prompts, "hub", checker="math")
    ladder = [
        Arm(f"{objective}-{rung}", chosen=f"s1-{rung}", rejected="s1-3B", objective=objective)
        for objective in ("dpo", "kto")
        for rung in RUNGS
    ]
    selection = [
        Arm(
            f"dpo-32B-{keep}-{round(100 * fraction)}",
            chosen="s1-32B",
            rejected="s1-3B",
            keep=keep,
            by="step_coherence" if keep == "top" else "sum",
            fraction=fraction,
            group="selection",
        )
        for keep in ("top", "random")
        for fraction in FRACTIONS
    ]
    return Experiment(
        name="paper",
        question="Does a larger gap between generators, or between traces, teach the student more?",
        student=model("nvidia/Llama-3.1-Nemotron-Nano-8B-v1"),
        prompts=(
            questions("open-r1/OpenR1-Math-220k", prompt_field="problem", count=16_500, seed=7),
        ),
        generators=tuple(
            Generator(
                f"s1-{rung}",
                model(f"simplescaling/s1.1-{rung}"),
                # Two traces of the weakest, which is paired with itself too.
                samples=1 + (rung == "3B"),
                # Weights and cache of the larger ones are divided over a host's four chips.
                mesh=MeshShape(tensor=4 if rung in ("14B", "32B") else 0),
            )
            for rung in RUNGS
        ),
        judges=(Judge("judge", "model", model("openai/gpt-oss-120b")),),
        objectives=(
            Objective("dpo", learning_rate=5e-7),
            Objective("kto", "kto", learning_rate=5e-7),
        ),
        arms=(*ladder, *selection),
        suites=(
            # The numbers are those of all questions; stated, a dry run fetches none to count them.
            Suite(
                "math500",
                "in",
                questions("HuggingFaceH4/MATH-500", "test", prompt_field="problem", count=500),
            ),
            Suite(
                "gsm8k",
                "in",
                questions("openai/gsm8k", "test", name="main", prompt_field="question", count=1319),
            ),
            Suite(
                "theoremqa",
                "out",
                questions(
                    "TIGER-Lab/TheoremQA",
                    "test",
                    prompt_field="Question",
                    answer_field="Answer",
                    count=800,
                ),
            ),
        ),
        training=Training(
            pairs_per_step=64,
            budget="epochs",
            epochs=1.0,
            rows=64,
            row_length=8192,
            remat="attention",
            moments="bfloat16",
        ),
        sampling=Sampling(max_prompt=1024, max_tokens=7168, slots=64, shard=256),
        scoring=Scoring(rows=64, row_length=8192, shard=256),
    )
