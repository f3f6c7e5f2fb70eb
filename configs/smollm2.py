"""The same study with a real checkpoint: SmolLM2-135M-Instruct on reasoning-gym, itself as generator, judge and student.

Generators differ in temperature and in whether they are shown a worked example. It is a proof that the flow works with
real weights, a real tokenizer and a real chat template; twelve questions a suite show no small effect, and the page
says so. Cost: under half an hour on two CPU cores.

    python -m launch.ablate --config=configs/smollm2.py                                  # by hub name
    python -m launch.ablate --config=configs/smollm2.py --config.student.path=FILE.gguf  # or a folder, or a GGUF file
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

EXAMPLE = ("Question: Tom has 3 bags of 4 apples and eats 2. How many are left?\n"
           "3 * 4 = 12. 12 - 2 = 10. Answer: 10\n\nAnswer the next question in the same way.\nQuestion: ")


def get_config() -> Experiment:
    tasks = ("gsm_symbolic", "chain_sum")
    return Experiment(
        name="smollm2",
        question="Does a generator that is shown a worked example teach SmolLM2-135M more than a hot one without?",
        student=Model(path="HuggingFaceTB/SmolLM2-135M-Instruct"),
        prompts=(Prompts(kind="reasoning_gym", tasks=tasks, count=24, seed=7),),
        generators=(
            Generator(name="hot", temperature=1.2, samples=2),
            Generator(name="shown", temperature=0.5, prefix=EXAMPLE),
        ),
        judges=(Judge(name="self", kind="model"),),
        objectives=(Objective(name="dpo", learning_rate=5e-6), Objective(name="kto", kind="kto", learning_rate=5e-6)),
        arms=(
            Arm(name="dpo-shown", chosen="shown", rejected="hot"),
            Arm(name="kto-shown", chosen="shown", rejected="hot", objective="kto"),
        ),
        suites=tuple(
            Suite(name=task, domain=domain, prompts=Prompts(kind="reasoning_gym", tasks=(task,), count=12, seed=900))
            for task, domain in ((tasks[0], "in"), (tasks[1], "in"), ("gcd", "out"))
        ),
        training=Training(pairs_per_step=4, steps=3, rows=2, row_length=512, checkpoint_every=3,
                          finishes=("eos", "stop", "length")),
        sampling=Sampling(max_prompt=320, max_tokens=64, slots=12, chunk=16, shard=24),
        scoring=Scoring(rows=2, row_length=768, shard=24),
    )
