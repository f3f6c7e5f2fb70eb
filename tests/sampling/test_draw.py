import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from deltapref_jax.config import MeshShape
from deltapref_jax.mesh import make_mesh
from deltapref_jax.models.sharding import ROWS
from deltapref_jax.sampling.draw import (
    Vocabulary,
    block_size,
    draw,
    invert,
    nucleus,
    request_keys,
    uniforms,
)

DRAW = jax.jit(draw, static_argnums=(5, 6))
NUCLEUS = jax.jit(lambda gap, *rest: nucleus(gap, *rest, Vocabulary(gap.shape[-1])))
INVERT = jax.jit(lambda w, u: invert(w, u, jnp.zeros_like(w), Vocabulary(w.shape[-1]))[0])


def run(logits, uniform, temperature=1.0, top_p=1.0, top_k=0, filtered=True):
    rows = len(uniform)
    logits = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (rows, np.shape(logits)[-1]))
    full = [
        jnp.full(rows, x, t)
        for x, t in ((temperature, jnp.float32), (top_p, jnp.float32), (top_k, jnp.int32))
    ]
    return jax.tree.map(
        np.asarray, DRAW(logits, jnp.asarray(uniform, jnp.float32), *full, filtered)
    )


def sorted_reference(logits, top_p, top_k):
    """Returns the ids kept in one row, by sorting in float64."""
    order = np.argsort(-logits, kind="stable")
    probabilities = np.exp(logits - logits.max())
    if top_k:
        order = order[:top_k]
    mass = np.cumsum(probabilities[order]) / probabilities[order].sum()
    return (
        {int(i) for i in order[: 1 + np.sum(mass < top_p)]}
        if top_p < 1
        else {int(i) for i in order}
    )


@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
@pytest.mark.parametrize(
    ("top_p", "top_k"), [(0.9, 0), (0.5, 0), (1.0, 7), (0.8, 20), (0.01, 0), (0.999, 300)]
)
def test_nucleus_is_that_of_a_sort(scale, top_p, top_k):
    logits = (scale * np.random.default_rng(1).normal(size=(40, 301))).astype(np.float32)
    gap = logits.max(-1, keepdims=True) - logits
    kept = np.asarray(NUCLEUS(gap, np.exp(-gap), jnp.full(40, top_p), jnp.full(40, top_k)))
    for row, mask in zip(logits.astype(np.float64), kept, strict=True):
        assert set(np.flatnonzero(mask)) == sorted_reference(row, top_p, top_k)


def test_ties_at_the_border_are_all_kept():
    gap = jnp.asarray([[0.0, 1.0, 1.0, 1.0, 2.0]])
    assert NUCLEUS(gap, jnp.exp(-gap), jnp.ones(1), jnp.full(1, 2))[0].tolist() == [
        True,
        True,
        True,
        True,
        False,
    ]


def test_rows_have_settings_of_their_own():
    gap = jnp.tile(jnp.asarray([[0.0, 1.0, 2.0, 3.0]]), (3, 1))
    kept = NUCLEUS(gap, jnp.exp(-gap), jnp.asarray([1.0, 1.0, 0.1]), jnp.asarray([0, 2, 0]))
    assert kept.sum(axis=-1).tolist() == [4, 2, 1]


@pytest.mark.parametrize("vocab", [2, 5, 1000])
def test_invert_is_the_inverse_of_the_cumulative_distribution(vocab):
    rng = np.random.default_rng(vocab)
    # Float32 sums of small integers are exact.
    weights = rng.integers(0, 4, (200, vocab)).astype(np.float32)
    weights[:, rng.integers(vocab)] += 1
    uniform = (rng.integers(0, 1 << 23, 200) / (1 << 23)).astype(np.float32)
    cumulative = np.cumsum(weights.astype(np.float64), axis=-1)
    target = (uniform * cumulative[:, -1].astype(np.float32))[:, None]
    assert (
        np.asarray(INVERT(jnp.asarray(weights), jnp.asarray(uniform))).tolist()
        == np.argmax(cumulative > target, axis=-1).tolist()
    )


def test_a_token_of_weight_zero_is_never_drawn():
    weights = jnp.zeros((1, 100)).at[0, 40].set(1e-30)
    for uniform in (0.0, 0.5, 1 - 2**-23):
        assert INVERT(weights, jnp.asarray([uniform])).tolist() == [40]


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.7, 1.0, 0), (1.3, 0.9, 9)]
)
def test_frequencies_match_probabilities(temperature, top_p, top_k):
    logits = np.random.default_rng(0).normal(size=24)
    keys = request_keys(3, "ab" * 8, ["cd" * 8] * 20_000, range(20_000))
    tokens, _ = run(
        logits,
        np.asarray(uniforms(keys, jnp.zeros(len(keys), jnp.int32))),
        temperature,
        top_p,
        top_k,
    )
    kept = sorted(sorted_reference(logits / temperature, top_p, top_k))
    expected = np.exp(logits[kept] / temperature)
    expected *= len(keys) / expected.sum()
    counts = np.bincount(tokens, minlength=24)
    assert counts.sum() == counts[kept].sum()
    statistic, freedom = np.sum((counts[kept] - expected) ** 2 / expected), len(kept) - 1
    # Chi-square's mean and 4 standard deviations; the seed is fixed.
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5


def test_log_probability_is_unfiltered_at_temperature_one():
    logits = np.random.default_rng(0).normal(size=50).astype(np.float32)
    uniform = np.linspace(0, 0.999, 64)
    tokens, logprobs = run(logits, uniform, temperature=0.3, top_p=0.7, top_k=5)
    np.testing.assert_allclose(logprobs, np.asarray(jax.nn.log_softmax(logits))[tokens], atol=1e-6)


def test_temperature_zero_takes_the_first_largest():
    tokens, logprobs = run([0.0, 2.0, 2.0, 1.0], [0.99], temperature=0.0, filtered=False)
    assert tokens.tolist() == [1]
    np.testing.assert_allclose(
        logprobs, jax.nn.log_softmax(jnp.asarray([0.0, 2.0, 2.0, 1.0]))[1], atol=1e-6
    )


def test_filters_that_are_off_change_nothing():
    logits = np.random.default_rng(2).normal(size=77)
    uniform = np.random.default_rng(3).random(300)
    assert (
        run(logits, uniform, filtered=True)[0].tolist()
        == run(logits, uniform, filtered=False)[0].tolist()
    )


def test_keys_depend_on_seed_generator_prompt_and_sample_alone():
    def key(seed=0, generator="aa" * 8, prompt="bb" * 8, sample=0, before=0):
        return tuple(
            request_keys(seed, generator, ["cc" * 8] * before + [prompt], [0] * before + [sample])[
                -1
            ]
        )

    assert key(before=5) == key()
    others = [key(seed=1), key(generator="ab" * 8), key(prompt="bc" * 8), key(sample=1)]
    assert len({key(), *others}) == 5
    keys = request_keys(0, "aa" * 8, ["bb" * 8] * 2, [0, 1])
    together = uniforms(keys, jnp.asarray([4, 9]))
    assert float(uniforms(keys[1:], jnp.asarray([9]))[0]) == float(together[1])
    assert float(uniforms(keys[1:], jnp.asarray([8]))[0]) != float(together[1])


@pytest.mark.parametrize(
    ("vocab", "size"),
    [(128_256, 501), (151_936, 1187), (262_144, 512), (49_152, 256), (32_000, 250), (50_257, 256)],
)
def test_a_shard_of_a_vocabulary_holds_whole_blocks(vocab, size):
    assert block_size(vocab) == size
    assert vocab % 8 or vocab // 8 % size == 0


def mixed_rows(vocab, rows=64):
    """Logits and settings of rows that are greedy, warm, filtered and none of these."""
    rng = np.random.default_rng(vocab)
    logits = jnp.asarray(4 * rng.normal(size=(rows, vocab)), jnp.float32)
    uniform = jnp.asarray(rng.random(rows), jnp.float32)
    temperature = jnp.asarray(np.tile([0.0, 0.7, 1.0, 1.3], rows // 4), jnp.float32)
    top_p = jnp.asarray(np.tile([1.0, 1.0, 0.9, 0.5, 1.0, 0.9, 1.0, 0.99], rows // 8), jnp.float32)
    top_k = jnp.asarray(np.tile([0, 3, 0, 17, 0, 0, 1, 300], rows // 8), jnp.int32)
    return logits, uniform, temperature, top_p, top_k


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 1, 4), (2, 2, 2), (1, 4, 2), (8, 1, 1)])
def test_a_draw_from_shards_has_the_bits_of_a_draw_from_the_whole(shape, filtered):
    rows = mixed_rows(1000)
    if not filtered:
        rows = (*rows[:3], jnp.ones_like(rows[3]), jnp.zeros_like(rows[4]))
    one, many = DRAW(*rows, filtered, None), DRAW(*rows, filtered, make_mesh(MeshShape(*shape)))
    assert len(set(np.asarray(one[0]).tolist())) > 30
    for whole, sharded in zip(one, many, strict=True):
        np.testing.assert_array_equal(np.asarray(sharded), np.asarray(whole))


@pytest.mark.parametrize(("vocab", "tensor"), [(1002, 2), (1001, 8)])
def test_shards_that_cut_blocks_and_a_vocabulary_that_is_not_split_draw_the_same(vocab, tensor):
    rows = mixed_rows(vocab)
    one = DRAW(*rows, True, None)
    many = DRAW(*rows, True, make_mesh(MeshShape(8 // tensor, 1, tensor)))
    assert np.asarray(one[0]).tolist() == np.asarray(many[0]).tolist()
    np.testing.assert_allclose(one[1], many[1], atol=1e-5)


def test_no_row_of_logits_is_gathered():
    mesh, vocab = make_mesh(MeshShape(1, 1, 8)), 8 * 4096
    row, logits = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((16,), (16, vocab)))
    logits = jax.ShapeDtypeStruct(
        logits.shape, logits.dtype, sharding=NamedSharding(mesh, PartitionSpec(*ROWS, "tensor"))
    )
    count = jax.ShapeDtypeStruct((16,), jnp.int32)
    text = DRAW.lower(logits, row, row, row, count, True, mesh).compile().as_text()
    moved = re.findall(r"= \w+\[([\d,]*)\]\S* all-(?:gather|reduce)\(", text)
    assert moved
    numbers = [np.prod([int(n) for n in dims.split(",") if n]) for dims in moved]
    assert max(numbers) == 16 * vocab / block_size(vocab)
