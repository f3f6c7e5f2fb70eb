"""Micro-batches, devices and interruptions do not change what is learnt."""

import json

import jax
import numpy as np
import pytest

from deltapref_jax.config import ConfigError, MeshShape, Objective
from deltapref_jax.mesh import make_mesh
from deltapref_jax.records import TokenSequence
from deltapref_jax.training import loop
from deltapref_jax.training.checkpoint import read_metrics
from deltapref_jax.training.data import Group, ReferencedSequence, pack_step
from deltapref_jax.training.loop import Run, train
from deltapref_jax.training.state import Optimizer, learning_rate
from tests.marks import mostly

PAIRS = 8


def data(kind, vocab, rows, length=64, reference=-40.0):
    """Step to PAIRS pairs, or twice as many KTO examples, in micro-batches of `rows` rows."""

    def at(step):
        r = np.random.default_rng(step)
        flat = [
            ReferencedSequence(
                TokenSequence(r.integers(0, vocab, 6), r.integers(0, vocab, r.integers(3, 24))),
                reference + i,
            )
            for i in range(2 * PAIRS)
        ]
        if kind == "dpo":
            groups = [Group((flat[i], flat[i + PAIRS])) for i in range(PAIRS)]
        else:
            other = [
                ReferencedSequence(
                    row.sequence._replace(prompt_ids=flat[i - 1].sequence.prompt_ids),
                    reference * 1.5,
                )
                for i, row in enumerate(flat)
            ]
            groups = [Group((row,), i % 2, other[i]) for i, row in enumerate(flat)]
        return pack_step(groups, kind, rows, length)

    return at


def run(tiny, kind, rows, mesh, folder, count=3, guard=False, every=100, **changes):
    config = Run(
        Objective(name=kind, kind=kind, beta=0.1, learning_rate=1e-3),
        count,
        rows,
        64,
        warmup=0.0,
        optimizer=Optimizer(),
        checkpoint_every=every,
        **changes,
    )
    params, counts = train(
        tiny.spec, tiny.state, data(kind, tiny.spec.vocab, rows), config, mesh, folder, guard=guard
    )
    return jax.device_get(params), counts, list(read_metrics(folder / "metrics.jsonl"))


def same(a, b, tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance), a, b)


@pytest.mark.slow
@pytest.mark.parametrize("kind", mostly(pytest.mark.exhaustive, ["dpo", "kto", "sft"], 1))
def test_micro_batches_and_devices_do_not_matter(tiny, one_device, tmp_path, kind):
    params, _, metrics = run(tiny, kind, 16, one_device, tmp_path / "one")
    assert len(data(kind, tiny.spec.vocab, 16)(0).micros) < len(
        data(kind, tiny.spec.vocab, 2)(0).micros
    )
    for name, rows, mesh in (
        ("small", 2, one_device),
        ("eight", 16, make_mesh(MeshShape(2, 2, 2))),
        ("context", 16, make_mesh(MeshShape(1, 2, 1, 4))),
    ):
        other, _, others = run(tiny, kind, rows, mesh, tmp_path / name)
        same(params, other, 1e-5)
        for row, again in zip(metrics, others, strict=True):
            assert row.keys() == again.keys()
            for key in row:
                np.testing.assert_allclose(row[key], again[key], rtol=2e-4, atol=2e-5, err_msg=key)


def test_resumed_is_uninterrupted_bit_for_bit(tiny, one_device, tmp_path):
    params, _, _ = run(tiny, "dpo", 4, one_device, tmp_path / "whole", count=6)
    source = data("dpo", tiny.spec.vocab, 4)

    def stops(step):
        if step == 5:
            raise KeyboardInterrupt
        return source(step)

    config = Run(
        Objective(name="dpo", beta=0.1, learning_rate=1e-3),
        6,
        4,
        64,
        warmup=0.0,
        checkpoint_every=2,
    )
    with pytest.raises(KeyboardInterrupt):
        train(tiny.spec, tiny.state, stops, config, one_device, tmp_path / "cut")
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "lo')  # what a killed process may leave
    seen = []

    def counted(step):
        seen.append(step)
        return source(step)

    resumed, _ = train(tiny.spec, tiny.state, counted, config, one_device, tmp_path / "cut")
    assert seen == [4, 5]  # the step number is the position in the data
    same(params, jax.device_get(resumed), 0)
    assert (tmp_path / "cut" / "metrics.jsonl").read_text() == (
        tmp_path / "whole" / "metrics.jsonl"
    ).read_text()


def test_guard_refuses_a_reference_of_other_weights(tiny, one_device, tmp_path):
    with pytest.raises(
        ConfigError, match=r"differ from its reference's in 16 of 16 rows, .* made by other weights"
    ):
        run(tiny, "dpo", 4, one_device, tmp_path, guard=True)


def test_rows_must_divide_over_the_mesh(tiny, tmp_path):
    with pytest.raises(ConfigError, match="rows is 4 and the mesh spreads rows over 8 devices"):
        run(tiny, "dpo", 4, make_mesh(MeshShape(8)), tmp_path)


def test_rows_must_split_over_context(tiny, tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"row_length is 64 and the mesh splits each row over 3 devices \(context\)",
    ):
        run(tiny, "dpo", 4, make_mesh(MeshShape(context=3), jax.devices()[:3]), tmp_path)


@pytest.mark.parametrize("remat", ["projections", "attention", "block"])
def test_a_remat_policy_learns_the_same(tiny, one_device, tmp_path, remat):
    want, _, _ = run(tiny, "dpo", 16, one_device, tmp_path / "kept")
    got, _, _ = run(tiny, "dpo", 16, one_device, tmp_path / remat, remat=remat)
    same(got, want, 1e-5)


def test_a_loss_that_is_not_finite_stops_with_the_step(tiny, one_device, tmp_path):
    broken = data("dpo", tiny.spec.vocab, 4, reference=float("nan"))
    with pytest.raises(FloatingPointError, match="At step 1 the loss is nan"):
        train(
            tiny.spec, tiny.state, broken, Run(Objective(name="x"), 2, 4, 64), one_device, tmp_path
        )


def test_metrics_are_json(tiny, one_device, tmp_path):
    _, counts, _ = run(tiny, "kto", 4, one_device, tmp_path, count=1)
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert {
        "loss",
        "grad_norm",
        "learning_rate",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
        "kl",
        "epoch",
        "step",
        "num_tokens",
    } == row.keys()
    assert counts["tokens"] <= counts["positions"]


def test_learning_rate_warms_up_from_zero_and_ends_at_the_floor():
    linear = [learning_rate(i, 20, 1e-3, 0.2, "linear") for i in range(20)]
    np.testing.assert_allclose(linear[:5], [0, 2.5e-4, 5e-4, 7.5e-4, 1e-3])
    np.testing.assert_allclose(linear[-1], 1e-3 / 16, rtol=1e-5)
    assert [learning_rate(i, 4, 2.0, 0, "constant") for i in range(4)] == [2.0] * 4
    np.testing.assert_allclose(learning_rate(10, 10, 1.0, 0, "cosine", 0.1), 0.1, rtol=1e-6)


@pytest.mark.parametrize("kind", mostly(pytest.mark.exhaustive, ["kto", "dpo", "sft"], 0))
def test_a_step_sends_nothing_to_the_devices_unasked(tiny, one_device, tmp_path, kind, monkeypatch):
    """Whichever array of a step is left on the host, training stops: the transfer guard is on."""
    sent, shard = [], loop.shard

    def recorded(tree, mesh, spec):
        sent.append(tree)
        return shard(tree, mesh, spec)

    monkeypatch.setattr(loop, "shard", recorded)
    run(tiny, kind, 4, one_device, tmp_path / "whole", count=1)
    # rows and examples of each micro-batch, three sets of scalars, and KTO's baseline
    step = data(kind, tiny.spec.vocab, 4)(0)
    baseline = len(step.baseline)
    assert (kind == "kto") == (baseline > 0)
    assert len(sent) == 3 + 2 * len(step.micros) + (3 * baseline + 1 if baseline else 0)
    unused = baseline  # z0 before it is measured: no program reads that zero, or the loss has no z0
    for smuggled in set(range(len(sent))) - {unused}:
        calls = iter(range(len(sent)))

        def left(tree, mesh, spec, calls=calls, smuggled=smuggled):
            return tree if next(calls) == smuggled else shard(tree, mesh, spec)

        monkeypatch.setattr(loop, "shard", left)
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            run(tiny, kind, 4, one_device, tmp_path / str(smuggled), count=1)
