"""Ready-made suites, one per task, so that every task gets its own line and its own interval."""

from collections.abc import Sequence

from deltapref_jax.config import Prompts, Suite
from deltapref_jax.synthetic.families import FAMILIES

GYM = (
    "gsm_symbolic",
    "chain_sum",
    "basic_arithmetic",
    "gcd",
    "number_sorting",
    "word_sorting",
    "syllogism",
)


def synthetic(
    domain: str,
    count: int,
    samples: int = 1,
    temperature: float = 1.0,
    difficulty: int = 2,
    seed: int = 900,
) -> tuple[Suite, ...]:
    """One suite per synthetic family of `domain` ("in" or "out"), `count` questions each."""
    return tuple(
        Suite(
            name=name,
            domain=domain,
            samples=samples,
            temperature=temperature,
            prompts=Prompts(tasks=(name,), count=count, difficulty=difficulty, seed=seed),
        )
        for name, family in FAMILIES.items()
        if family.domain == domain
    )


def reasoning_gym(
    in_domain: Sequence[str],
    count: int,
    tasks: Sequence[str] = GYM,
    samples: int = 1,
    temperature: float = 1.0,
    seed: int = 900,
) -> tuple[Suite, ...]:
    """One suite per reasoning-gym task, `count` questions each; `in_domain` are trained on."""
    return tuple(
        Suite(
            name=task,
            domain="in" if task in in_domain else "out",
            samples=samples,
            temperature=temperature,
            prompts=Prompts(kind="reasoning_gym", tasks=(task,), count=count, seed=seed),
        )
        for task in dict.fromkeys((*in_domain, *tasks))
    )
