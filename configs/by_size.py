"""What the configs for students of several sizes share; docs/preflight.md looks at all of them.

Prompts are procedural; a set of the hub is named by `prompts` instead. What each needs, by
`launch.preflight`, and why its meshes are as they are: docs/preflight.md.
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


def study(
    name: str,
    question: str,
    student: str,
    weak: str,
    strong: str,
    learning_rate: float,
    slots: int = 64,
) -> Experiment:
    """A study whose judge is the strong generator.

    Args:
      name: of the config and of its workspace.
      question: that its page answers.
      student: a path, as `weak` and `strong` are.
      weak: writes rejected traces.
      strong: writes chosen traces.
      learning_rate: of DPO.
      slots: of sampling.
    """
    tasks = ("gsm_symbolic", "chain_sum")
    return Experiment(
        name=name,
        question=question,
        student=Model(path=student, dtype="bfloat16"),
        prompts=(Prompts(kind="reasoning_gym", tasks=tasks, count=PROMPTS, seed=7),),
        generators=(
            Generator(name="weak", model=Model(path=weak, dtype="bfloat16")),
            Generator(name="strong", model=Model(path=strong, dtype="bfloat16")),
        ),
        judges=(Judge(name="model", kind="model", model=Model(path=strong, dtype="bfloat16")),),
        objectives=(Objective(name="dpo", beta=0.1, learning_rate=learning_rate),),
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
        sampling=Sampling(max_prompt=1024, max_tokens=3072, slots=slots, chunk=32),
        scoring=Scoring(rows=0, row_length=4608, shard=2048),
    )
