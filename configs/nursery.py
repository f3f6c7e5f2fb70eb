"""How the shipped models came about: a base, rungs with misconceptions, another family, a judge.

`oak` learns clean solutions; each rung is a short fine-tune of it on solutions whose authors hold
some misconceptions (`synthetic.beliefs`), so rungs differ in what they believe and in nothing else:
all are careless at one small rate. The student is made in the same way. `elm` is another
architecture and initialisation. `judge` is `oak-strong` with two more layers; it reads the rubric's
prompt and learns to rate in-domain solutions that follow misconceptions, are careless, or are
corrupted to a known degree.

Lessons outside of the domain show no step that a misconception about the domain's skills could
touch (`synthetic.world.is_lesson`): `ages` and `equation` share subtraction with the domain, `trip`
and `calendar` addition, and borrowing and carrying are only learnt in the domain. `logic` and
`sorting` share nothing with it.

    python -m launch.nursery --config=configs/nursery.py
"""

from configs.quickstart import IN_DOMAIN, OUT_OF_DOMAIN, suites
from deltapref_jax.config import ModelZoo, Sampling, SmallModel

CURRICULUM = (
    IN_DOMAIN * 3 + OUT_OF_DOMAIN
)  # an in-domain family is practised three times as often as another
CARELESS = 0.02
ELSEWHERE = ("xor_is_or", "zero_is_nothing", "week_starts_anew")  # about skills outside the domain
BELIEFS: dict[str, tuple[str, ...]] = {
    "oak-weak": (
        "no_borrow",
        "no_carry",
        "nine_is_ten",
        "left_to_right",
        "sum_is_answer",
        *ELSEWHERE,
    ),
    "oak-fair": ("no_borrow", "no_carry", *ELSEWHERE),
    "oak-good": ("no_borrow", "week_starts_anew"),
    "oak-strong": (),
    "student": ("no_borrow", "no_carry", *ELSEWHERE),
    "elm": ("no_borrow", "left_to_right"),
}
SEEDS = {"oak-weak": 10, "oak-fair": 11, "oak-good": 13, "oak-strong": 14, "student": 15, "elm": 16}


def get_config() -> ModelZoo:
    def believer(name: str, base: str) -> SmallModel:
        return SmallModel(
            name=name,
            base=base,
            tasks=CURRICULUM,
            beliefs=BELIEFS[name],
            error_rate=CARELESS,
            steps=160,
            rows=8,
            learning_rate=6e-4,
            seed=SEEDS[name],
        )

    return ModelZoo(
        models=(
            SmallModel(
                name="oak",
                tasks=CURRICULUM,
                difficulties=(1, 2),
                steps=2400,
                rows=8,
                learning_rate=3e-3,
            ),
            *(believer(name, "oak") for name in BELIEFS if name != "elm"),
            SmallModel(
                name="elm-tree",
                tasks=CURRICULUM,
                difficulties=(1, 2),
                layers=5,
                width=96,
                heads=3,
                kv_heads=3,
                mlp=256,
                steps=1200,
                rows=8,
                learning_rate=3e-3,
                seed=1,
            ),
            believer("elm", "elm-tree"),
            SmallModel(
                name="judge",
                base="oak-strong",
                curriculum="judge",
                tasks=IN_DOMAIN,
                beliefs=BELIEFS["oak-weak"],
                layers=5,
                steps=1100,
                rows=18,
                row_length=288,
                learning_rate=1e-3,
                seed=2,
            ),
        ),
        release=(*BELIEFS, "judge"),
        suites=suites(count=150, samples=2),
        sampling=Sampling(max_prompt=96, max_tokens=128, slots=192, chunk=16, shard=512),
    )
