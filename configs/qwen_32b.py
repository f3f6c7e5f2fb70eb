"""A student of 32B: Qwen3 32B, with rejected traces of Qwen3 8B.

Prompts are procedural; a set of the hub is named by `prompts` instead.

    python -m launch.preflight --config=configs/qwen_32b.py --topology=v5p:4x4x4
    python -m launch.ablate --config=configs/qwen_32b.py

What it needs, by `launch.preflight`, and why its meshes are as they are: docs/preflight.md.
"""

from deltapref_jax.config import (
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

PROMPTS = 16_384


def get_config() -> Experiment:
    tasks = ("gsm_symbolic", "chain_sum")
    return Experiment(
        name="qwen_32b",
        question="Does a delta in scale still teach a student of 32B?",
        student=Model(path="Qwen/Qwen3-32B", dtype="bfloat16"),
        prompts=(Prompts(kind="reasoning_gym", tasks=tasks, count=PROMPTS, seed=7),),
        generators=(
            Generator(name="weak", model=Model(path="Qwen/Qwen3-8B", dtype="bfloat16")),
            Generator(name="strong", model=Model(path="Qwen/Qwen3-32B", dtype="bfloat16")),
        ),
        judges=(
            Judge(name="model", kind="model", model=Model(path="Qwen/Qwen3-32B", dtype="bfloat16")),
        ),
        objectives=(Objective(name="dpo", beta=0.1, learning_rate=1e-7),),
        arms=(
            Arm(name="dpo-strong", chosen="strong", rejected="weak"),
            Arm(
                name="dpo-strong-top-30",
                chosen="strong",
                rejected="weak",
                keep="top",
                by="step_coherence",
                fraction=0.3,
                group="selection",
            ),
        ),
        suites=tuple(
            Suite(
                name=task,
                domain=domain,
                samples=4,
                prompts=Prompts(kind="reasoning_gym", tasks=(task,), count=512, seed=900),
            )
            for task, domain in ((tasks[0], "in"), (tasks[1], "in"), ("gcd", "out"))
        ),
        training=Training(
            pairs_per_step=128,
            budget="epochs",
            rows=0,
            row_length=4096,
            checkpoint_every=100,
        ),
        sampling=Sampling(max_prompt=1024, max_tokens=3072, slots=128, chunk=32),
        scoring=Scoring(rows=0, row_length=4608, shard=2048),
    )
