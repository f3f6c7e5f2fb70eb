"""Steps of real lengths waste little, and what is left out of them changes nothing."""

import jax
import numpy as np
import pytest
from flax import nnx

from deltapref_jax.config import ConfigError, Objective, Training
from deltapref_jax.records import TokenSequence
from deltapref_jax.scoring.packing import max_segments
from deltapref_jax.training.data import Data, Group, ReferencedSequence, pack_step
from deltapref_jax.training.loop import train_step
from deltapref_jax.training.state import Optimizer, init_state
from deltapref_jax.training.step import programs


def row(prompt, completion, reference=0.0, trace=""):
    return ReferencedSequence(TokenSequence(prompt, completion, trace_id=trace), reference)


def lognormal(pairs, median, cap, seed=0, one_prompt=False):
    """Pairs of lognormal lengths, sigma 0.8; a quarter is prompt, with `one_prompt` the same."""
    r = np.random.default_rng(seed)
    lengths = np.clip(r.lognormal(np.log(median), 0.8, (pairs, 2)).astype(int), 8, cap)
    prompts = np.minimum(lengths.mean(axis=1, keepdims=True).astype(int) // 4, lengths // 2).min(
        axis=1, keepdims=True
    )
    prompts = prompts.repeat(2, axis=1) if one_prompt else lengths // 4
    return [
        Group(tuple(row(range(p), range(n - p)) for p, n in zip(*pair, strict=True)))
        for pair in zip(prompts.tolist(), lengths.tolist(), strict=True)
    ]


@pytest.mark.parametrize(
    ("share", "pairs", "rows", "least", "filled"),
    [
        (False, 8, 2, 0.85, 0.85),
        (False, 64, 2, 0.95, 0.95),
        (False, 128, 4, 0.95, 0.95),
        (True, 8, 2, 0.88, 0.81),
        (True, 64, 2, 0.95, 0.94),
    ],
)
def test_padding_of_lognormal_lengths_is_small(share, pairs, rows, least, filled):
    """Sigma 0.8, median 160, cap 1024 = row length, over a whole epoch.

    Two shares of the computed positions are bounded: tokens of all sequences (a prompt that is read
    once counts for each of them), and positions that are filled.
    """
    data = Data(
        lognormal(4096, 160, 1024, one_prompt=share),
        "dpo",
        Training(pairs, "epochs", rows=rows, row_length=1024),
        0,
        share=share,
    )
    steps = [data(step).drop_empty_halves(1) for step in range(data.steps)]
    computed = sum(step.positions for step in steps)
    assert sum(step.tokens for step in steps) / computed >= least
    assert sum(step.filled for step in steps) / computed >= filled
    assert {batch.tokens.shape for step in steps for batch, _ in step.micros} == {
        (rows, 1024),
        (rows // 2, 1024),
    }


def test_empty_rows_left_out_change_nothing(tiny, one_device):
    data = Data(lognormal(4, 8, 64, seed=1), "dpo", Training(4, rows=4, row_length=64), 0)
    step = data(0)
    short = step.drop_empty_halves(1)
    assert short.positions < step.positions
    assert (
        step.drop_empty_halves(4).positions == step.positions
    )  # half of four rows does not divide over four devices
    steps = programs(tiny.spec, "float32", "dpo", Optimizer(), max_segments(4, 64), one_device)
    ends = [
        train_step(
            steps,
            init_state(tiny.state, Optimizer(), one_device),
            batch,
            Objective(kind="dpo"),
            1e-3,
            one_device,
        )
        for batch in (step, short)
    ]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6),
        *(nnx.to_pure_dict(state.params) for state, *_ in ends),
    )
    one, other = ({name: float(x) for name, x in sums.items()} for _, sums, _ in ends)
    assert one == pytest.approx(other, rel=1e-5, abs=1e-6)


def test_a_pair_that_one_row_cannot_hold_is_refused_at_once():
    wide = [Group((row(range(8), range(40)), row(range(8), range(40))))] + lognormal(5, 8, 30)
    with pytest.raises(
        ConfigError,
        match=r"1 of 6 pairs have more tokens in both sequences together than config."
        r"training.row_length \(64\), and config.training.rows is 1; .* rows 2",
    ):
        Data(wide, "dpo", Training(2, rows=1, row_length=64), 0)
    assert Data(wide, "dpo", Training(2, rows=2, row_length=64), 0)(0).total == 2


def test_a_first_token_has_nothing_before_it_and_is_no_target():
    """Of an empty prompt: the token mean of SFT and of the NLL term is over what is scored."""
    step = pack_step([Group((row([], range(5)), row([], range(3))))], "dpo", 2, 8)
    assert step.chosen_tokens == 4
    assert pack_step([Group((row([], range(5)),))], "sft", 2, 8).total == 4
    assert pack_step([Group((row([9], range(5)),))], "sft", 2, 8).total == 5


def behind(row, other):
    """A row's completion behind the prompt of another."""
    return row._replace(sequence=row.sequence._replace(prompt_ids=other.sequence.prompt_ids))


def shared(kind, count, seed=0):
    """Pairs, or examples with mismatched rows, that share prompts of 5 to 20 tokens."""
    r = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        prompt = r.integers(0, 40, r.integers(5, 21)).tolist()
        pair = [
            row(prompt, r.integers(0, 40, r.integers(3, 30)).tolist(), -float(r.integers(10, 60)))
            for _ in "ab"
        ]
        found += (
            [Group(tuple(pair))]
            if kind in ("dpo", "simpo")
            else [Group((row,), i) for i, row in enumerate(pair)]
        )
    if kind == "kto":
        found = [
            group._replace(mismatched=behind(group.rows[0], found[i - 2].rows[0]))
            for i, group in enumerate(found)
        ]
    return found


@pytest.mark.parametrize("kind", ["dpo", "simpo", "kto", "sft"])
def test_prompts_read_once_change_no_loss_and_no_weight(tiny, one_device, kind):
    """Metrics and weights after a step of 8 pairs, or of 16 examples and 16 mismatched rows."""
    steps = programs(tiny.spec, "float32", kind, Optimizer(), max_segments(4, 64), one_device)
    once, again = (pack_step(shared(kind, 8), kind, 4, 64, share=share) for share in (True, False))
    assert (once.tokens, once.total, once.chosen_tokens) == (
        again.tokens,
        again.total,
        again.chosen_tokens,
    )
    assert again.filled == again.tokens
    assert once.filled < 0.95 * again.filled
    ends = [
        train_step(
            steps,
            init_state(tiny.state, Optimizer(), one_device),
            batch,
            Objective(kind=kind),
            1e-3,
            one_device,
        )
        for batch in (once, again)
    ]
    one, other = ({name: float(x) for name, x in sums.items()} for _, sums, _ in ends)
    assert one == pytest.approx(other, rel=2e-5, abs=1e-5)
    # Adam divides a gradient by its own size: where it is rounding noise, the sign is noise
    moved = [
        jax.tree.leaves(
            jax.tree.map(
                lambda a, b: np.asarray(a - b),
                nnx.to_pure_dict(state.params),
                nnx.to_pure_dict(tiny.state),
            )
        )
        for state, *_ in ends
    ]
    for a, b in zip(*moved, strict=True):
        assert np.mean(np.abs(a - b) > 2e-5) < 2e-3


def test_a_pair_that_fits_a_row_behind_one_prompt_needs_one_row():
    """8 + 40 + 40 tokens in two sequences are 96; behind one prompt 7 + 2 * 41 are 89."""
    wide = [Group((row(range(8), range(40)), row(range(8), range(1, 41))))] * 2
    with pytest.raises(ConfigError, match="make rows 2"):
        Data(wide, "dpo", Training(2, rows=1, row_length=90), 0)
    step = Data(wide, "dpo", Training(2, rows=1, row_length=90), 0, share=True)(0)
    assert [np.count_nonzero(batch.segments) for batch in step.batches] == [89, 89]
    assert step.tokens == 4 * 48
