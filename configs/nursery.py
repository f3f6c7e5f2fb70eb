"""How the shipped models came about: a base, careless rungs, another family, a judge.

`oak` learns clean solutions of every family; each rung is a short fine-tune of it on solutions with
a known rate of careless steps, so rungs differ in capability and in nothing else. The student is
made in the same way. `elm` is another architecture and initialisation, trained in three stages to
stand between two rungs. `judge` is `oak-strong` with two more layers; it reads the rubric's prompt
and learns to rate in-domain solutions that are careless, or corrupted to a known degree.

    python -m launch.nursery --config=configs/nursery.py
"""

import dataclasses

from configs.quickstart import IN_DOMAIN, suites
from deltapref_jax.config import ModelZoo, Sampling, SmallModel

OUT_OF_DOMAIN = ("euclid", "bases", "equation", "sorting", "logic", "calendar")
CURRICULUM = (
    IN_DOMAIN * 3 + OUT_OF_DOMAIN
)  # an in-domain family is practised three times as often as another
CARELESS = {"oak-weak": 0.3, "oak-fair": 0.18, "oak-good": 0.06, "oak-strong": 0.0}
SEEDS = {"oak-weak": 10, "oak-fair": 11, "oak-good": 13, "oak-strong": 14, "student": 15, "elm": 16}


def get_config() -> ModelZoo:
    def careless(name: str, base: str, rate: float) -> SmallModel:
        return SmallModel(
            name=name,
            base=base,
            tasks=CURRICULUM,
            error_rate=rate,
            steps=160,
            rows=16,
            learning_rate=6e-4,
            seed=SEEDS[name],
        )

    elm = SmallModel(
        name="elm-sapling",
        tasks=CURRICULUM,
        difficulties=(1, 2),
        layers=5,
        width=96,
        heads=3,
        kv_heads=3,
        mlp=256,
        error_rate=0.02,
        steps=700,
        rows=16,
        learning_rate=3e-3,
        seed=1,
    )
    return ModelZoo(
        models=(
            SmallModel(
                name="oak",
                tasks=CURRICULUM,
                difficulties=(1, 2),
                steps=2000,
                rows=16,
                learning_rate=3e-3,
            ),
            *(careless(name, "oak", rate) for name, rate in CARELESS.items()),
            careless("student", "oak-strong", 0.11),
            elm,
            dataclasses.replace(
                elm, name="elm-tree", base=elm.name, steps=600, learning_rate=2e-3, seed=4
            ),
            careless("elm", "elm-tree", 0.09),
            SmallModel(
                name="judge",
                base="oak-strong",
                curriculum="judge",
                tasks=IN_DOMAIN,
                layers=5,
                steps=1100,
                rows=18,
                row_length=288,
                learning_rate=1e-3,
                seed=2,
            ),
        ),
        release=(*CARELESS, "student", "elm", "judge"),
        suites=suites(count=150, samples=2),
        sampling=Sampling(max_prompt=96, max_tokens=128, slots=192, chunk=16, shard=512),
    )
