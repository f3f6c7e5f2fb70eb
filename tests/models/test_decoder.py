"""Equal results: packed and unpacked, cached and full, with and without remat, on any mesh."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deltapref_jax.config import REMATS, MeshShape
from deltapref_jax.mesh import make_mesh, shard
from deltapref_jax.models.attention.dense import dense_attention, dense_cached_attention
from deltapref_jax.models.attention.dispatch import TILE
from deltapref_jax.models.attention.masks import packed_mask
from deltapref_jax.models.decoder import (
    POLICIES,
    Decoder,
    empty_cache,
    gated,
    linear,
    rms_norm,
    unstacked,
)
from deltapref_jax.models.rotary import apply_rotary, rotary_angles
from deltapref_jax.models.sharding import BATCH, shardings
from deltapref_jax.models.spec import ModelSpec, Rope
from deltapref_jax.models.weights import abstract
from deltapref_jax.records import TokenSequence
from deltapref_jax.scoring.packing import pack, pack_one
from deltapref_jax.scoring.projection import token_logprobs

swiglu = functools.partial(gated, activation="silu")


def product(x, weight):
    """`linear` of one weight."""
    return linear(x, (weight,))[0]


SPEC = ModelSpec(40, 16, 3, 4, 2, 8, 24, tied=False)
LENGTHS = (9, 5, 7, 12, 3)


@pytest.fixture(scope="module")
def split():
    """A decoder with matrices ten times their initial size: its attention is far from uniform."""
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
    """The hidden states of every sequence in a row of its own."""
    tokens, segments = np.zeros((2, len(LENGTHS), max(LENGTHS)), np.int32)
    for i, s in enumerate(sequences()):
        tokens[i, : len(s)], segments[i, : len(s)] = s, 1
    states = hidden(split, tokens, np.tile(np.arange(max(LENGTHS)), (len(LENGTHS), 1)), segments)
    return [row[:n] for row, n in zip(np.asarray(states), LENGTHS, strict=True)]


def sequences(seed=0):
    r = np.random.default_rng(seed)
    return [r.integers(0, SPEC.vocab, n) for n in LENGTHS]


def packed(rows=2, length=20):
    samples = [pack_one(TokenSequence(s[:1], s[1:]), i) for i, s in enumerate(sequences())]
    (micro,) = pack([[[sample]] for sample in samples], rows, length)
    return micro


def test_mask_is_the_picture_in_the_docstring():
    segments, branches = jnp.array([[1, 1, 2, 2, 2, 2, 0]]), jnp.array([[0, 0, 0, 1, 1, 2, 0]])
    want = ["1......", "11.....", "..1....", "..11...", "..111..", "..1..1.", "......1"]
    got = packed_mask(segments, branches)[0]
    assert ["".join(".1"[int(x)] for x in row) for row in got] == want
    assert not bool(packed_mask(segments)[0, 3, 1])
    # Without branches a token sees all of its segment that came before.
    assert bool(packed_mask(segments)[0, 5, 4])


def test_rotation_turns_pairs_by_the_position_and_scores_depend_on_distance_only():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 2, 8)), jnp.float32)
    positions = jnp.array([[0, 1, 5, 9]])
    got = apply_rotary(x, rotary_angles(positions, Rope(100.0), 8))
    turn = np.exp(1j * np.asarray(positions)[0][:, None, None] * 100.0 ** (-np.arange(4) / 4))
    complex_ = (np.asarray(x)[0, ..., :4] + 1j * np.asarray(x)[0, ..., 4:]) * turn
    np.testing.assert_allclose(
        got[0], np.concatenate([complex_.real, complex_.imag], -1), atol=1e-5
    )

    def score(a, b):
        q = apply_rotary(x[:, :1], rotary_angles(jnp.array([[a]]), Rope(100.0), 8))[0, 0, 0]
        k = apply_rotary(x[:, 1:2], rotary_angles(jnp.array([[b]]), Rope(100.0), 8))[0, 0, 0]
        return float(q @ k)

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
    dense = dense_attention(q, k, v, mask)
    sinks = jnp.asarray(r.normal(size=4), jnp.float32)
    for keys, last in ((k.transpose(0, 2, 1, 3), False), (k.transpose(0, 2, 3, 1), True)):
        cache = keys, v.transpose(0, 2, 1, 3)
        cached = dense_cached_attention(q, *cache, mask, positions_last=last)
        np.testing.assert_allclose(cached, dense, atol=1e-5)
        np.testing.assert_allclose(
            dense_cached_attention(q, *cache, mask, sinks=sinks, positions_last=last),
            dense_attention(q, k, v, mask, sinks=sinks),
            atol=1e-5,
        )
    for b, t, n in np.ndindex(2, 3, 4):  # query head n reads key head n // 2
        scores = np.where(
            mask[b, t], np.asarray(k)[b, :, n // 2] @ np.asarray(q)[b, t, n] / 8**0.5, -np.inf
        )
        p = np.exp(scores - scores.max())
        np.testing.assert_allclose(
            dense[b, t, n], p / p.sum() @ np.asarray(v)[b, :, n // 2], atol=1e-5
        )


def test_packed_is_unpacked(split, alone):
    micro = packed()
    states = np.asarray(hidden(split, *micro.batch[:3]))
    for segment, i in enumerate(micro.order):
        np.testing.assert_allclose(states[micro.batch.segments == segment + 1], alone[i], atol=2e-4)


def test_cached_decoding_is_the_full_forward_pass(split, alone):
    """Prompts are prefilled with padding on the right, the rest is decoded token by token."""
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
        decoded = [list(h[:n]) for h, n in zip(np.asarray(states), starts, strict=True)]
        for t in range(max(LENGTHS)):
            # A finished row repeats its last token.
            position = np.minimum(starts + t, np.array(LENGTHS) - 1)
            token = np.array([s[i] for s, i in zip(rows, position, strict=True)])[:, None]
            states, cache = step(token, position[:, None], cache)
            for row, h, i in zip(decoded, np.asarray(states), position, strict=True):
                if len(row) == i:
                    row.append(h[0])
        for got, want in zip(decoded, alone, strict=True):
            np.testing.assert_allclose(np.stack(got), want, atol=2e-4)


@pytest.mark.parametrize("length", [6, TILE + 8])
def test_prefilled_keys_and_values_are_those_of_cached_decoding(split, length):
    """Rows longer than a tile are prefilled blockwise."""
    tokens = np.random.default_rng(4).integers(0, SPEC.vocab, (2, length))
    positions = np.tile(np.arange(length), (2, 1))
    graphdef, state = unstacked(*split)
    decoder = nnx.merge(graphdef, state)
    _, want = jax.jit(decoder.decode)(tokens, positions, empty_cache(SPEC, 2, length))
    got = jax.jit(decoder.prefill)(tokens)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), got, want)


def test_recomputed_is_kept(split):
    """Every policy gives the gradients of "none"; each recomputes more products than the last."""
    # Rows longer than a tile run blockwise.
    arrays = [jnp.asarray(x) for x in packed(2, TILE + 8).batch[:3]]
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
    real = micro.batch.segments > 0  # at padding the output differs from kernel to kernel
    np.testing.assert_allclose(
        hidden((split[0], state), *shard(micro.batch[:3], mesh, BATCH), mesh=mesh)[real],
        hidden(split, *micro.batch[:3])[real],
        atol=3e-4,
    )


@pytest.mark.parametrize("step", ["forward", "gradient", "decode"])
def test_the_lowered_program_names_the_parts_of_a_step(step):
    """Profiles show these names, so that time can be attributed to the parts of a decoder."""
    graphdef, state = abstract(SPEC)
    ids = jax.ShapeDtypeStruct((1, TILE + 8), jnp.int32)
    cache = jax.eval_shape(lambda: empty_cache(SPEC, 1, TILE + 8))

    def forward(state, tokens):
        model = nnx.merge(graphdef, state)
        states = model.hidden(tokens, tokens, tokens, remat="attention")
        return token_logprobs(states, model.unembedding(), tokens, tokens > 0).sum()

    def decode(state, tokens, cache):
        return nnx.merge(graphdef, state).decode(tokens, tokens, cache)

    traced = {
        "forward": (forward, state, ids),
        "gradient": (jax.grad(forward), state, ids),
        "decode": (decode, state, ids, cache),
    }
    function, *arguments = traced[step]
    text = jax.jit(function).lower(*arguments).as_text(debug_info=True)
    operations = re.findall(r'loc\("([^"]*)/[^"/]*"', text)
    scopes = {scope for path in operations for scope in re.split(r"[/()]", path)}
    parts = {"embedding", "attention_norm", "attention", "mlp_norm", "mlp", "final_norm"}
    assert parts <= scopes
    assert ("unembedding" in scopes) == (step != "decode")  # the sampler projects by itself


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
        (swiglu, lambda gate, up: gate / (1 + jnp.exp(-gate)) * up, ((2, 5, 12), (2, 5, 12))),
        (product, lambda x, w: jnp.einsum("bti,io->bto", x, w), ((2, 5, 12), (12, 20))),
        (product, lambda x, w: jnp.einsum("bti,io->bto", x, w), ((2, 5, 20), (20, 12))),
        (product, lambda x, w: jnp.einsum("bti,inh->btnh", x, w), ((2, 5, 12), (12, 3, 2))),
    ],
    ids=["norm", "swiglu", "linear, wider", "linear, narrower", "linear, heads"],
)
def test_backward_passes_of_our_own_are_those_that_autodiff_derives(ours, plain, shapes):
    with jax.enable_x64(True):
        r = np.random.default_rng(0)
        arguments = [jnp.asarray(r.normal(size=shape)) for shape in shapes]
        if ours is swiglu:
            # Large gates, whose exponentials are still finite in float64.
            gates = jnp.asarray([-400.0, 400, 0, *range(9)])
            arguments[0] = arguments[0].at[0, 0].set(gates)
        out, back = jax.vjp(ours, *arguments)
        want, want_back = jax.vjp(plain, *arguments)
        np.testing.assert_allclose(out, want, rtol=1e-6, atol=1e-9)
        g = jnp.asarray(r.normal(size=out.shape))
        for got, expected in zip(back(g), want_back(g), strict=True):
            np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-6)
