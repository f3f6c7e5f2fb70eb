"""Packed = unpacked, chunked = whole, eight devices = one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deltapref_jax.config import MeshShape
from deltapref_jax.mesh import make_mesh, put
from deltapref_jax.models.sharding import BATCH, shardings
from deltapref_jax.scoring import logprobs
from deltapref_jax.scoring.packing import Sample, capacity, layout, pack, sample


def sequences(vocab, count=11, seed=0):
    r = np.random.default_rng(seed)
    return [sample(r.integers(0, vocab, r.integers(1, 9)), r.integers(0, vocab, r.integers(1, 20)))
            for _ in range(count)]


def naive(model, params, s):
    """Sum of log-softmax over the targets of one unpacked sequence, with the logits in full."""
    decoder = nnx.merge(model.graphdef, params)
    tokens = jnp.asarray(s.tokens)[None]
    hidden = decoder.hidden(tokens, jnp.asarray(s.positions)[None], jnp.ones_like(tokens))
    rows = jax.nn.log_softmax(hidden @ decoder.unembedding().T)[0]
    return sum(rows[i - 1, s.tokens[i]] for i in range(1, len(s.tokens)) if s.targets[i])


@pytest.mark.parametrize("columns", [1, 7, 4096])
def test_packed_values_and_gradients_equal_unpacked(tiny, monkeypatch, columns):
    rows = sequences(tiny.spec.vocab)
    micros = pack(rows, [[i] for i in range(len(rows))], 4, 40)
    monkeypatch.setattr(logprobs, "_CHUNK_NUMBERS", tiny.spec.vocab * 4 * columns)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=len(rows)))

    def packed(params):
        total = 0.0
        for m in micros:
            sums, _ = logprobs.sequence_logprobs(nnx.merge(tiny.graphdef, params), m.batch, capacity(4, 40))
            total += (sums[: len(m.order)] * weight[m.order]).sum()
        return total

    ours, our_gradient = jax.value_and_grad(packed)(tiny.state)
    plain, gradient = jax.value_and_grad(
        lambda params: sum(weight[i] * naive(tiny, params, s) for i, s in enumerate(rows)))(tiny.state)
    np.testing.assert_allclose(ours, plain, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5 * float(jnp.abs(b).max())),
                 our_gradient, gradient)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 8, 1), (4, 1, 2), (1, 1, 1, 8), (1, 2, 2, 2)])
def test_eight_devices_equal_one(tiny, one_device, shape):
    rows = sequences(tiny.spec.vocab, 30)
    (micro,) = pack(rows, [[i] for i in range(len(rows))], 16, 64)
    mesh = make_mesh(MeshShape(*shape))
    want, counts = logprobs.scorer(tiny.spec, "float32", 128, one_device)(tiny.state, micro.batch)
    params = jax.device_put(tiny.state, shardings(tiny.state, mesh))
    got, _ = logprobs.scorer(tiny.spec, "float32", 128, mesh)(params, put(micro.batch, mesh, BATCH))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(counts[: len(rows)], [rows[i].targets.sum() for i in micro.order])


def test_layout_holds_every_sequence_once_and_keeps_groups_together():
    r = np.random.default_rng(0)
    lengths = np.minimum(r.lognormal(4, 0.8, 200).astype(int) + 1, 256).tolist()
    groups = [[i, i + 100] for i in range(100)]
    micros = layout(lengths, groups, 8, 256)
    assert sorted(i for micro in micros for row in micro for i in row) == list(range(200))
    home = {i: m for m, micro in enumerate(micros) for row in micro for i in row}
    assert all(home[a] == home[b] for a, b in groups)
    assert all(sum(lengths[i] for i in row) <= 256 for micro in micros for row in micro)
    assert micros == layout(lengths, groups, 8, 256)
    assert sum(lengths) / (len(micros) * 8 * 256) > 0.85


def test_a_sequence_longer_than_a_row_is_named():
    with pytest.raises(ValueError, match=r"Sequences of \[41\] tokens .* do not fit 4 rows of 40"):
        layout([41], [[0]], 4, 40)


def test_branches_see_the_trunk_and_not_each_other(tiny):
    """A trunk with three branches in one sequence = three sequences, each trunk + its branch."""
    r = np.random.default_rng(3)
    trunk, tails = r.integers(0, tiny.spec.vocab, 9), [r.integers(0, tiny.spec.vocab, n) for n in (4, 2, 6)]
    decoder = nnx.merge(tiny.graphdef, tiny.state)
    branched = Sample(np.concatenate([trunk, *tails]).astype(np.int32), np.zeros(21, bool),
                      np.concatenate([np.arange(9), *(9 + np.arange(len(t)) for t in tails)]).astype(np.int32),
                      np.repeat([0, 1, 2, 3], [9, 4, 2, 6]).astype(np.int32))
    (micro,) = pack([branched, sample([1, 2], [3])], [[0], [1]], 1, 32)
    hidden = decoder.hidden(*(jnp.asarray(x) for x in (
        micro.batch.tokens, micro.batch.positions, micro.batch.segments, micro.batch.branches)))[0]
    start = 9
    for tail in tails:
        alone = np.concatenate([trunk, tail])[None]
        want = decoder.hidden(jnp.asarray(alone), jnp.arange(alone.shape[1])[None], jnp.ones_like(alone))[0, 9:]
        np.testing.assert_allclose(hidden[start : start + len(tail)], want, atol=2e-5)
        start += len(tail)
