"""Guards stop a run with a message that names step and traces; displacement is warned of once."""

import json

import jax
import numpy as np
import pytest

from deltapref_jax.config import ConfigError, Objective
from deltapref_jax.records import TokenSequence
from deltapref_jax.training.checkpoint import Checkpoints, read_metrics
from deltapref_jax.training.data import Group, ReferencedSequence, pack_step
from deltapref_jax.training.guards import (
    NOISE,
    WINDOW,
    LikelihoodDisplacement,
    check_finite,
    check_reference,
)
from deltapref_jax.training.loop import Run, train
from deltapref_jax.training.state import Optimizer, init_state

LENGTH = 64


def rows(vocab=50, count=16, reference=-40.0):
    r = np.random.default_rng(0)
    sequences = [
        TokenSequence(r.integers(0, vocab, 6), r.integers(0, vocab, 9 + i), trace_id=f"t{i}")
        for i in range(count)
    ]
    return [ReferencedSequence(sequence, reference) for sequence in sequences]


def step(kind="dpo", broken=-1, reference=0.0, **changes):
    """Eight pairs, or eight examples and mismatched ones; row `broken` has another reference."""
    flat = rows(**changes)
    if broken >= 0:
        flat[broken] = flat[broken]._replace(reference=reference)
    if kind != "kto":
        return pack_step([Group((flat[i], flat[i + 8])) for i in range(8)], kind, 4, LENGTH)
    return pack_step([Group((flat[i],), i % 2, flat[i + 8]) for i in range(8)], kind, 4, LENGTH)


def scored(batch, value=-40.0):
    """Log-probabilities of a policy that gives every row `value` nats."""
    return [np.full(256, value, np.float32) for _ in batch.traces]


@pytest.mark.parametrize(("kind", "broken"), [("dpo", 3), ("dpo", 12), ("kto", 3), ("kto", 12)])
def test_one_wrong_row_is_enough_and_is_named(kind, broken):
    tokens = 9 + broken
    for share, refused in ((0.9, False), (1.1, True)):
        shift = share * NOISE["float32"] * tokens**0.5
        batch = step(kind, broken, -40.0 - shift)
        if not refused:
            check_reference(kind, batch, scored(batch), "float32")
            continue
        check_reference(kind, batch, scored(batch), "bfloat16")
        with pytest.raises(ConfigError) as error:
            check_reference(kind, batch, scored(batch), "float32")
        assert str(error.value) == (
            "Before training the policy's log-probabilities differ from its reference's in 1 of 16 "
            f"rows, by up to {shift:.3g} nats over {tokens} tokens (noise allowed there: "
            f"{1e-3 * tokens**0.5:.3g}; traces, worst first: t{broken}); likely reasons: the table "
            "was made by other weights, another chat template, another truncation or another "
            "dtype. Score again with this student as the reference."
        )


def test_the_worst_rows_come_first():
    batch = step(reference=float("nan"), broken=5)
    s = scored(batch)
    k, i = next((k, ids.index("t2")) for k, ids in enumerate(batch.traces) if "t2" in ids)
    s[k][i] = -41.0
    with pytest.raises(
        ConfigError, match=r"in 2 of 16 rows, by up to nan nats over 14 .* worst first: t5, t2\)"
    ):
        check_reference("dpo", batch, s, "float32")


def test_numbers_that_are_not_finite_name_the_step_and_its_traces():
    batch = step(broken=12, reference=float("inf"))
    check_finite("dpo", 7, {"loss": 1.0, "grad_norm": 2.0}, batch, scored(batch))
    with pytest.raises(FloatingPointError) as error:
        check_finite("dpo", 7, {"loss": float("nan"), "grad_norm": 2.0}, batch, scored(batch))
    message = str(error.value)
    assert message.startswith(
        "At step 7 the loss is nan and the gradient norm 2.0: 1 log-ratios are not finite (t12); "
        "the checkpoints are of the steps before it; lower the learning rate, or look at that "
        "step's traces: "
    )
    assert set(message.rpartition(": ")[2].rstrip(".").split(", ")) == {f"t{i}" for i in range(16)}
    with pytest.raises(FloatingPointError, match="gradient norm inf: all log-ratios are finite; "):
        check_finite("dpo", 7, {"loss": 1.0, "grad_norm": float("inf")}, step(), scored(batch))
    with pytest.raises(FloatingPointError, match="look at that step's traces: without ids.$"):
        check_finite(
            "dpo",
            7,
            {"loss": float("nan"), "grad_norm": 1.0},
            batch._replace(traces=()),
            scored(batch),
        )


def test_the_last_checkpoint_is_of_finite_steps(tiny, one_device, tmp_path):
    good, bad = (step(vocab=tiny.spec.vocab, broken=b, reference=float("nan")) for b in (-1, 5))
    run = Run(
        Objective(kind="dpo", learning_rate=1e-3), 6, 4, LENGTH, warmup=0.0, checkpoint_every=1
    )
    with pytest.raises(
        FloatingPointError,
        match=r"^At step 4 the loss is nan .*: 1 log-ratios are not finite \(t5\)",
    ):
        train(tiny.spec, tiny.state, lambda at: bad if at == 3 else good, run, one_device, tmp_path)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    with Checkpoints(tmp_path / "checkpoints", 1) as checkpoints:
        assert checkpoints.newest() == 3
        state, _ = checkpoints.restore(init_state(tiny.state, Optimizer(), one_device))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


def metrics(chosen, rejected, beta=0.1):
    return [
        {"step": i + 1, "rewards/chosen": beta * c, "rewards/rejected": beta * r}
        for i, (c, r) in enumerate(zip(chosen, rejected, strict=True))
    ]


def test_displacement_is_warned_of_once():
    down, noise = -np.arange(40.0), np.random.default_rng(0).normal(0, 0.1, (2, 40))
    displacement = LikelihoodDisplacement(beta=0.1)
    warnings = [displacement(row) for row in metrics(down + noise[0], 2 * down + noise[1])]
    assert [bool(w) for w in warnings] == [i == 2 * WINDOW - 1 for i in range(40)]
    assert displacement.step == 2 * WINDOW
    assert warnings[2 * WINDOW - 1] == (
        "Up to step 20 the log-probabilities of chosen and rejected traces decrease together "
        f"(likelihood displacement; last 10 steps: {np.mean((down + noise[0])[10:20]):.2f} and "
        f"{np.mean((2 * down + noise[1])[10:20]):.2f} nats from the reference); a lower learning "
        "rate, a higher beta, nll_weight or rejected traces of the student's own may stop it."
    )


@pytest.mark.parametrize(("chosen", "rejected"), [(1, -1), (-1, 1), (1, 1), (0, -1), (0, 0)])
def test_anything_else_is_not_displacement(chosen, rejected):
    time, noise = np.arange(60.0), np.random.default_rng(1).normal(0, 1, (2, 60))
    displacement = LikelihoodDisplacement(beta=0.1)
    assert not any(
        displacement(row)
        for row in metrics(chosen * time + noise[0] - 5, rejected * time + noise[1] - 5)
    )
    assert displacement.step == 0


def test_a_decrease_above_the_reference_or_of_one_side_is_not_displacement():
    displacement, down = LikelihoodDisplacement(beta=0.1), -np.arange(40.0)
    assert not any(displacement(row) for row in metrics(down + 100, down))
    displacement = LikelihoodDisplacement(beta=0.1)
    assert not any(
        displacement({k: v for k, v in row.items() if k != "rewards/rejected"})
        for row in metrics(down, down)
    )


def test_displacement_is_warned_of_once_and_counted_across_a_resume(
    tiny, one_device, tmp_path, capsys
):
    batch = step("apo_down", vocab=tiny.spec.vocab)
    objective = Objective(kind="apo_down", beta=0.02, learning_rate=3e-3)

    def trained(steps):
        run = Run(
            objective, steps, 4, LENGTH, warmup=0.0, schedule="constant", checkpoint_every=100
        )
        return train(tiny.spec, tiny.state, lambda _: batch, run, one_device, tmp_path)[1]

    assert trained(15)["both_fell_at"] == 0
    assert trained(24)["both_fell_at"] == 20  # Half of its window was before the resume.
    assert (
        capsys.readouterr().err.count(
            "Warning: Up to step 20 the log-probabilities of chosen and rejected"
        )
        == 1
    )
    assert trained(26)["both_fell_at"] == 20
    assert "Warning" not in capsys.readouterr().err
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len([json.loads(line) for line in lines]) == 26


def test_without_a_reference_no_displacement_is_detected():
    falling = [
        {"step": i, "rewards/chosen": -0.1 * i, "rewards/rejected": -0.2 * i} for i in range(1, 41)
    ]
    displacement, silent = LikelihoodDisplacement(0.1), LikelihoodDisplacement(0.1, reference=False)
    assert any(displacement(row) for row in falling)
    assert not any(silent(row) for row in falling)
    assert displacement.step > silent.step == 0
