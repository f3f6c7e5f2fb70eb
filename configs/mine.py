"""A first study of your own: your questions and your models. Copy it; change paths and names.

`questions.jsonl` has one object a line, such as {"question": "What is 2 + 3?", "answer": "5"}, and
the two files of held-out questions have the same columns. A model is a Hugging Face folder, a hub
name or a .gguf file. Cost: `--dry_run` prints how many traces and tokens each artifact takes.

    python -m launch.ablate --config=configs/mine.py --dry_run
    python -m launch.ablate --config=configs/mine.py
"""

import functools

from deltapref_jax.config import Arm, Experiment, Generator, Judge, Model, Objective, Prompts, Suite


def get_config() -> Experiment:
    questions = functools.partial(Prompts, "jsonl", prompt_field="question", checker="math")
    quarter = functools.partial(Arm, chosen="strong", rejected="weak", fraction=0.25)
    e = Experiment(
        name="mine",
        question="Does my student learn more from all pairs, or from those of the largest gap?",
        prompts=(questions("questions.jsonl"),),
        student=Model("models/student"),
        generators=tuple(Generator(n, Model(f"models/{n}")) for n in ("weak", "strong")),
        judges=(Judge("judge", "model", Model("models/judge")),),
        objectives=(Objective("dpo", learning_rate=5e-6),),
        arms=(
            Arm("all", "strong", "weak"),
            *(quarter(keep, keep=keep, group="selection") for keep in ("top", "random")),
        ),
        suites=(
            Suite("held_out", "in", questions("held_out.jsonl")),
            Suite("other", "out", questions("other.jsonl")),
        ),
    )
    e.sampling.max_prompt = e.sampling.max_tokens = 512
    e.training.row_length = e.scoring.row_length = 1536
    return e
