"""A student of 8B: Llama 3.1 8B, with rejected traces of Llama 3.2 1B.

The size of the student of arXiv 2604.08723. Prompts are procedural; a set of the hub is named
by `prompts` instead.

    python -m launch.preflight --config=configs/llama_8b.py --topology=v5e:4x4
    python -m launch.ablate --config=configs/llama_8b.py

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
        name="llama_8b",
        question="What does a student of 8B learn from its own traces against those of 1B?",
        student=Model(path="meta-llama/Llama-3.1-8B-Instruct", dtype="bfloat16"),
        prompts=(Prompts(kind="reasoning_gym", tasks=tasks, count=PROMPTS, seed=7),),
        generators=(
            Generator(
                name="weak", model=Model(path="meta-llama/Llama-3.2-1B-Instruct", dtype="bfloat16")
            ),
            Generator(
                name="strong",
                model=Model(path="meta-llama/Llama-3.1-8B-Instruct", dtype="bfloat16"),
            ),
        ),
        judges=(
            Judge(
                name="model",
                kind="model",
                model=Model(path="meta-llama/Llama-3.1-8B-Instruct", dtype="bfloat16"),
            ),
        ),
        objectives=(Objective(name="dpo", beta=0.1, learning_rate=5e-7),),
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
        sampling=Sampling(max_prompt=1024, max_tokens=3072, slots=64, chunk=32),
        scoring=Scoring(rows=0, row_length=4608, shard=2048),
    )
