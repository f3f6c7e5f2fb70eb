"""Packed = unpacked, cached = full, recomputed = kept, eight devices = one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deltapref_jax.config import REMATS, MeshShape
from deltapref_jax.mesh import make_mesh, shard
from deltapref_jax.models.attention import attend, attend_cache, packed_mask, rotate, rotation
from deltapref_jax.models.decoder import (
    POLICIES,
    Decoder,
    empty_cache,
    gated,
    linear,
    rms_norm,
    unstacked,
)
from deltapref_jax.models.kernels import BLOCK
from deltapref_jax.models.sharding import BATCH, shardings
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.models.weights import abstract
from deltapref_jax.scoring.packing import pack, sample

SPEC = ModelSpec(40, 16, 3, 4, 2, 8, 24, tied=False)
LENGTHS = (9, 5, 7, 12, 3)


@pytest.fixture(scope="module")
def split():
    """Matrices ten times larger than at the start of training, so that attention is far from uniform."""
    graphdef, state = nnx.split(Decoder(SPEC, rngs=nnx.Rngs(3)))
    return graphdef, jax.tree.map(
        lambda x: 10 * x if x.size > SPEC.layers * SPEC.width else x, state
    )


def hidden(split, *batch, mesh=None):
    return jax.jit(lambda state, *batch: nnx.merge(split[0], state).hidden(*batch, mesh=mesh))(
        split[1], *batch
    )


@pytest.fixture(scope="module")
def alone(split):
    """Hidden states of every sequence in a row of its own."""
    tokens, segments = np.zeros((2, len(LENGTHS), max(LENGTHS)), np.int32)
    for i, s in enumerate(sequences()):
        tokens[i, : len(s)], segments[i, : len(s)] = s, 1
    found = hidden(split, tokens, np.tile(np.arange(max(LENGTHS)), (len(LENGTHS), 1)), segments)
    return [row[:n] for row, n in zip(np.asarray(found), LENGTHS, strict=True)]


def sequences(seed=0):
    r = np.random.default_rng(seed)
    return [r.integers(0, SPEC.vocab, n) for n in LENGTHS]


def packed(rows=2, length=20):
    (micro,) = pack([[[sample(s[:1], s[1:], i)]] for i, s in enumerate(sequences())], rows, length)
    return micro


def test_mask_is_the_picture_in_the_docstring():
    segments, branches = jnp.array([[1, 1, 2, 2, 2, 2, 0]]), jnp.array([[0, 0, 0, 1, 1, 2, 0]])
    want = ["1......", "11.....", "..1....", "..11...", "..111..", "..1..1.", "......1"]
    got = packed_mask(segments, branches)[0]
    assert ["".join(".1"[int(x)] for x in row) for row in got] == want
    assert not bool(packed_mask(segments)[0, 3, 1])
    assert bool(
        packed_mask(segments)[0, 5, 4]
    )  # without branches, all of a segment that came before


def test_rotation_turns_pairs_by_the_position_and_scores_depend_on_distance_only():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 2, 8)), jnp.float32)
    positions = jnp.array([[0, 1, 5, 9]])
    got = rotate(x, rotation(positions, 8, 100.0))
    turn = np.exp(1j * np.asarray(positions)[0][:, None, None] * 100.0 ** (-np.arange(4) / 4))
    complex_ = (np.asarray(x)[0, ..., :4] + 1j * np.asarray(x)[0, ..., 4:]) * turn
    np.testing.assert_allclose(
        got[0], np.concatenate([complex_.real, complex_.imag], -1), atol=1e-5
    )

    def score(a, b):
        at = lambda p, y: rotate(y, rotation(jnp.array([[p]]), 8, 100.0))[0, 0, 0]  # noqa: E731
        return float(at(a, x[:, :1]) @ at(b, x[:, 1:2]))

    np.testing.assert_allclose(score(7, 3), score(104, 100), rtol=1e-4)


def test_norm_is_x_over_its_root_mean_square():
    x = jnp.array([[3.0, 4.0]])
    np.testing.assert_allclose(
        rms_norm(x, jnp.array([1.0, 2.0]), 0.0), [[3 / 12.5**0.5, 8 / 12.5**0.5]], rtol=1e-6
    )
    assert rms_norm(x.astype(jnp.bfloat16), jnp.ones(2), 1e-5).dtype == jnp.bfloat16


def test_attention_over_a_cache_is_attention_and_both_are_the_formula():
    r = np.random.default_rng(1)
    q, k, v = (
        jnp.asarray(r.normal(size=shape), jnp.float32)
        for shape in ((2, 3, 4, 8), (2, 5, 2, 8), (2, 5, 2, 8))
    )
    mask = jnp.asarray(r.random((2, 3, 5)) < 0.7).at[:, :, 0].set(True)
    plain = attend(q, k, v, mask)
    cached = attend_cache(q, k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3), mask)
    np.testing.assert_allclose(cached, plain, atol=1e-5)
    for b, t, n in np.ndindex(2, 3, 4):  # query head n reads key head n // 2
        scores = np.where(
            mask[b, t], np.asarray(k)[b, :, n // 2] @ np.asarray(q)[b, t, n] / 8**0.5, -np.inf
        )
        p = np.exp(scores - scores.max())
        np.testing.assert_allclose(
            plain[b, t, n], p / p.sum() @ np.asarray(v)[b, :, n // 2], atol=1e-5
        )


def test_packed_is_unpacked(split, alone):
    micro = packed()
    found = np.asarray(hidden(split, *micro.batch[:3]))
    for segment, i in enumerate(micro.order):
        np.testing.assert_allclose(found[micro.batch.segments == segment + 1], alone[i], atol=2e-4)


def test_cached_decoding_is_the_full_forward_pass(split, alone):
    """Prompts of unequal length prefilled with padding on the right, then the rest token by token."""
    rows = sequences()
    padded = np.zeros((len(rows), 6), np.int32)
    starts = np.array([min(len(s) - 1, 6) for s in rows])
    for row, s, n in zip(padded, rows, starts, strict=True):
        row[:n] = s[:n]
    for graphdef, state in (split, unstacked(*split)):
        decoder = nnx.merge(graphdef, state)
        step = jax.jit(lambda t, p, c, d=decoder: d.decode(t, p, c))
        states, cache = step(
            padded, np.tile(np.arange(6), (len(rows), 1)), empty_cache(SPEC, len(rows), 16)
        )
        found = [list(h[:n]) for h, n in zip(np.asarray(states), starts, strict=True)]
        for t in range(max(LENGTHS)):
            at = np.minimum(starts + t, np.array(LENGTHS) - 1)  # a finished row goes on at its end
            token = np.array([s[i] for s, i in zip(rows, at, strict=True)])[:, None]
            states, cache = step(token, at[:, None], cache)
            for row, h, i in zip(found, np.asarray(states), at, strict=True):
                if len(row) == i:
                    row.append(h[0])
        for got, want in zip(found, alone, strict=True):
            np.testing.assert_allclose(np.stack(got), want, atol=2e-4)


def test_recomputed_is_kept(split):
    """Every policy gives the gradients of keeping everything, and each recomputes more products than the one before."""
    arrays = [
        jnp.asarray(x) for x in packed(2, BLOCK + 8).batch[:3]
    ]  # longer than a tile: blockwise
    weight = jnp.asarray(np.random.default_rng(2).normal(size=SPEC.width), jnp.float32)

    def run(remat):
        def loss(state):
            return (nnx.merge(split[0], state).hidden(*arrays, remat=remat) @ weight).mean()

        products = str(jax.make_jaxpr(jax.grad(loss))(split[1])).count("dot_general")
        return jax.jit(jax.value_and_grad(loss))(split[1]), products

    assert set(REMATS) == {"none", *POLICIES}
    (want, least), *others = [run(remat) for remat in REMATS]
    for got, _ in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)
    assert least == others[0][1] < others[1][1] < others[2][1]


@pytest.mark.parametrize(
    "shape", [(1, 8, 1), (2, 2, 2), (1, 1, 8), (1, 4, 2), (1, 2, 1, 4), (2, 1, 2, 2)]
)
def test_eight_devices_are_one(split, shape):
    mesh, micro = make_mesh(MeshShape(*shape)), packed(8, 12)
    state = jax.device_put(split[1], shardings(split[1], mesh))
    real = (
        micro.batch.segments > 0
    )  # what padding computes is nobody's business, and each path has its own
    np.testing.assert_allclose(
        hidden((split[0], state), *shard(micro.batch[:3], mesh, BATCH), mesh=mesh)[real],
        hidden(split, *micro.batch[:3])[real],
        atol=3e-4,
    )


def test_more_layers_are_not_a_longer_program():
    def equations(layers):
        graphdef, state = abstract(dataclasses.replace(SPEC, layers=layers))
        ones = jnp.ones((1, 4), int)
        return str(
            jax.make_jaxpr(lambda s: nnx.merge(graphdef, s).hidden(ones, ones, ones))(state)
        ).count("\n")

    assert equations(2) == equations(5)


def test_bfloat16_computes_in_bfloat16_from_float32_parameters():
    decoder = Decoder(SPEC, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    ones = jnp.ones((1, 4), int)
    assert decoder.hidden(ones, ones, ones).dtype == decoder.unembedding().dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(decoder))} == {jnp.dtype("float32")}


def plain_norm(x, weight):
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-5) * weight


@pytest.mark.parametrize(
    ("ours", "plain", "shapes"),
    [
        (lambda x, w: rms_norm(x, w, 1e-5), plain_norm, ((2, 5, 12), (12,))),
        (gated, lambda gate, up: gate / (1 + jnp.exp(-gate)) * up, ((2, 5, 12), (2, 5, 12))),
        (linear, lambda x, w: jnp.einsum("bti,io->bto", x, w), ((2, 5, 12), (12, 20))),
        (linear, lambda x, w: jnp.einsum("bti,io->bto", x, w), ((2, 5, 20), (20, 12))),
        (linear, lambda x, w: jnp.einsum("bti,inh->btnh", x, w), ((2, 5, 12), (12, 3, 2))),
    ],
    ids=["norm", "gated", "linear, wider", "linear, narrower", "linear, heads"],
)
def test_backward_passes_of_our_own_are_those_that_autodiff_derives(ours, plain, shapes):
    with jax.enable_x64(True):
        r = np.random.default_rng(0)
        arguments = [jnp.asarray(r.normal(size=shape)) for shape in shapes]
        if ours is gated:
            arguments[0] = (
                arguments[0].at[0, 0].set(jnp.asarray([-400.0, 400, 0, *range(9)]))
            )  # exp(400) is finite
        out, back = jax.vjp(ours, *arguments)
        want, want_back = jax.vjp(plain, *arguments)
        np.testing.assert_allclose(out, want, rtol=1e-6, atol=1e-9)
        g = jnp.asarray(r.normal(size=out.shape))
        for got, expected in zip(back(g), want_back(g), strict=True):
            np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-6)
