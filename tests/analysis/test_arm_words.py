"""Two arms that are trained differently have different words, and the words are the right ones."""

import dataclasses
import itertools

import pytest

from configs import delta_grid, quickstart
from deltapref_jax.analysis.arm_words import arm_words
from deltapref_jax.analysis.claims import claim_about
from deltapref_jax.config import Arm, Claim, Experiment, Judge, judge_of, uses_ratings

TOP = Arm("top", chosen="strong", rejected="weak", keep="top", fraction=0.12, group="selection")
FIRST_JUDGE = (Judge(name="exact"), Judge(name="model", kind="model"))
OTHERS = (
    {"chosen": "good"},
    {"rejected": "fair"},
    {"chosen": "weak", "rejected": "strong"},
    {"direction": "coin"},
    {"direction": "exact"},
    {"direction": "model"},
    {"keep": "all", "fraction": 1.0},
    {"keep": "bottom"},
    {"keep": "middle"},
    {"keep": "random"},
    {"keep": "matched"},
    {"keep": "matched", "by": "factuality"},
    {"keep": "my_pairs:clear_steps"},
    {"keep": "my_pairs:clear_steps", "fraction": 1.0},
    {"keep": "my_pairs:clear_steps", "fraction": 1.0, "pairs": 6},
    {"by": "factuality"},
    {"by": "reference_margin"},
    {"by": "reference_margin", "chosen_sample": "best"},
    {"judge": "model"},
    {"fraction": 0.125},
    {"fraction": 1.0},
    {"fraction": 1.0, "pairs": 6},
    {"fraction": 1.0, "pairs": 7},
    {"stratum": "both_wrong"},
    {"stratum": "both_right"},
    {"chosen_sample": "best"},
    {"rejected_sample": "best"},
    {"chosen_sample": "best", "rejected_sample": "worst"},
    {"keep": "random", "chosen_sample": "best"},
    {"keep": "random", "chosen_sample": "best", "by": "factuality"},
    {"keep": "random", "chosen_sample": "best", "judge": "model"},
    {"chosen_sample": "right"},
    {"objective": "kto"},
    {"steps": 3},
    {"epochs": 3.0},
    {"epochs": 0.25},
    {"pairs_per_step": 3},
    {"learning_rate": 3e-5},
    {"learning_rate": 3e-4},
)


def described(e, arm):
    return arm_words(arm, judge_of(e, arm) if uses_ratings(arm) else "")


@pytest.mark.parametrize("config", [quickstart, delta_grid])
def test_no_two_arms_of_a_config_have_equal_words(config):
    e = config.get_config()
    found = {arm.name: described(e, arm) for arm in e.arms}
    assert len(set(found.values())) == len(found)


def test_every_field_that_changes_what_is_trained_changes_the_words():
    e = Experiment(judges=FIRST_JUDGE)
    arms = [TOP, *(dataclasses.replace(TOP, **other) for other in OTHERS)]
    for a, b in itertools.combinations(arms, 2):
        assert described(e, a) != described(e, b), (a, b)
    varied = {name for other in OTHERS for name in other}
    fields = {field.name for field in dataclasses.fields(Arm)}
    assert varied == fields - {"name", "group", "seeds", "draws"}


def test_the_arms_of_a_claim_are_told_apart():
    """The arm of a coin and of three epochs was described as the arm that it was compared with."""
    strong = Arm("strong", chosen="strong", rejected="weak")
    coin = dataclasses.replace(strong, name="coin", direction="coin")
    wrong = dataclasses.replace(strong, name="wrong", stratum="both_wrong", epochs=3.0)
    again = dataclasses.replace(strong, name="again", seeds=(1, 2))
    e = Experiment(judges=FIRST_JUDGE, arms=(TOP, strong, coin, wrong, again))

    def about(a, b):
        return claim_about(Claim(kind="contrast", a=a, b=b), e)

    assert about("coin", "wrong") == (
        "coin: dpo on strong over weak, sides drawn by a coin, all pairs; wrong: dpo on strong "
        "over weak, stratum both wrong, all pairs, 3 epochs"
    )
    assert about("top", "strong") == (
        "top: dpo on strong over weak, 12% of pairs of the largest gaps in the sum of all "
        "dimensions, judge exact; strong: dpo on strong over weak, all pairs"
    )
    assert about("strong", "again") == (
        "strong: dpo on strong over weak, all pairs, seeds 0, draws 0; "
        "again: dpo on strong over weak, all pairs, seeds 1 2, draws 0"
    )
    e.balance = "correctness"
    kept = dataclasses.replace(strong, name="kept", group="control")
    e.arms += (kept,)
    assert about("strong", "kept").endswith(
        "all pairs, balanced by correctness; kept: dpo on strong over weak, all pairs"
    )
