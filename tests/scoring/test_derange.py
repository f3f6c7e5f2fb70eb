"""A trace never meets its own prompt by derangement."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltapref_jax.config import ConfigError
from deltapref_jax.scoring.derange import derange

PROMPTS = st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=40).filter(
    lambda ids: 2 * max(map(ids.count, ids)) <= len(ids)
)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(PROMPTS, st.integers(0, 3))
def test_a_derangement_uses_each_trace_once_and_never_its_own_prompt(ids, seed):
    partner = derange(ids, seed)
    assert sorted(partner) == list(range(len(ids)))
    assert all(ids[i] != ids[j] for i, j in enumerate(partner))
    assert partner == derange(ids, seed)


def test_the_seed_deranges_otherwise():
    ids = [str(i) for i in range(50)]
    assert derange(ids, 0) != derange(ids, 1)


def test_no_derangement_is_one_sentence():
    with pytest.raises(ConfigError) as error:
        derange(["a", "a", "b"], 0)
    assert str(error.value) == (
        "2 of 3 traces belong to one prompt, so KTO's baseline cannot pair every trace with "
        "another prompt; use more prompts."
    )
