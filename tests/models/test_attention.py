"""Every path = the plain one: values, gradients, branches, padding, meshes; and the work that is skipped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deltapref_jax.config import MeshShape
from deltapref_jax.mesh import make_mesh, shard
from deltapref_jax.models.attention import attend, last, packed_mask, reach, until
from deltapref_jax.models.blockwise import blockwise, plan
from deltapref_jax.models.decoder import Decoder
from deltapref_jax.models.kernels import choose, packed_attention, zigzag
from deltapref_jax.models.sharding import BATCH, shardings
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.models.splash import splash, tables
from deltapref_jax.models.triton import triton
from deltapref_jax.scoring.logprobs import sequence_logprobs
from deltapref_jax.scoring.packing import PackedBatch

HEADS, GROUPS, WIDTH = 4, 2, 8
LONG = [
    [256],
    [100, 60, 40],
    [],
    [20] * 12,
    [128, 128],
    [1, 130, 5],
]  # of rows of 256: two tiles of a kernel
LAYOUT = [[5, 30, 17, 9], [1, 2, 60], [96], [40, 40], [], [32, 32, 32], [64, 32], [16, 80]]


def rows(layout, length=96):
    """Segments [B, L] with sequences of the given lengths, then padding."""
    found, n = np.zeros((len(layout), length), np.int32), 0
    for row, lengths in zip(found, layout, strict=True):
        at = 0
        for size in lengths:
            n += 1
            row[at : at + size] = n
            at += size
    return jnp.asarray(found)


def branched(segments):
    """A third of every segment is trunk, the others a branch each; one of a single token is all branch."""
    found = np.zeros(segments.shape, np.int32)
    for n in np.unique(segments[segments > 0]):
        row, columns = np.nonzero(np.asarray(segments) == n)
        found[row, columns] = (
            np.minimum(3 * np.arange(len(row)) // len(row), 2) if len(row) > 1 else 2
        )
    return jnp.asarray(found)


def arrays(segments, dtype=jnp.float32, heads=HEADS, groups=GROUPS, width=WIDTH):
    r = np.random.default_rng(0)
    return [
        jnp.asarray(r.normal(size=(*segments.shape, n, width)), dtype)
        for n in (heads, groups, groups, heads)
    ]


def results(attention, segments, q, k, v, g):
    """Output and gradients; the cotangent is 0 and the output left out where the query is padding."""
    real = (segments > 0)[..., None, None]

    @jax.jit
    def run(q, k, v, g):
        out, back = jax.vjp(lambda *x: jnp.where(real, attention(*x), 0), q, k, v)
        return out, *back(g)

    return run(q, k, v, g)


def plain(segments, branches=None):
    return lambda q, k, v: attend(q, k, v, packed_mask(segments, branches))


def interpreted(kernel, segments, branches=None):
    """A kernel as a function of queries, keys, values that runs anywhere."""
    about = until(segments, branches) if kernel is triton else segments
    return lambda q, k, v: kernel(q, k, v, about, interpret=True)


def same(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, atol=tolerance * max(1, np.abs(b).max()))


def tiled(ends, block, columns=None):
    """Blockwise attention as a function of queries, keys, values."""
    return lambda q, k, v: blockwise(q, k, v, plan(ends, block, columns), block)


@pytest.mark.parametrize("block", [8, 32, 40])
@pytest.mark.parametrize("branches", [False, True])
def test_blockwise_is_plain(block, branches):
    segments = rows(LAYOUT)
    branches = branched(segments) if branches else None
    got = results(tiled(until(segments, branches), block), segments, *arrays(segments))
    same(got, results(plain(segments, branches), segments, *arrays(segments)), 1e-5)


def test_blockwise_in_bfloat16_is_float32_within_its_rounding():
    segments = rows(LAYOUT)
    exact = results(
        plain(segments),
        segments,
        *[x.astype(jnp.bfloat16).astype(jnp.float32) for x in arrays(segments)],
    )
    got = results(tiled(until(segments), 32), segments, *arrays(segments, jnp.bfloat16))
    assert {x.dtype for x in got} == {jnp.dtype("bfloat16")}
    same([x.astype(jnp.float32) for x in got], exact, 2e-2)


def test_padding_sees_itself_alone():
    segments = rows(LAYOUT)
    q, k, v, _ = arrays(segments)
    out = tiled(until(segments), 40)(q, k, v)
    padding = np.asarray(segments) == 0
    np.testing.assert_allclose(
        out[padding], np.repeat(v, HEADS // GROUPS, axis=2)[padding], rtol=1e-6
    )


def visited(bounds, tiles):
    """Which tiles of keys, [B, t, T]."""
    first, gap, back, end = (np.asarray(x)[..., None] for x in bounds)
    j = np.arange(tiles)
    return (first <= j) & (j < end) & ~((gap <= j) & (j < back))


def test_the_turns_of_a_loop_are_the_visited_tiles():
    segments = rows([*LAYOUT, [7, 1, 88], [50, 46]])
    bounds = plan(until(segments, branched(segments)), 8).reach
    tiles = visited(bounds, 12)
    for b, i in np.ndindex(tiles.shape[:2]):
        turns, at = type(bounds)(*(x[b, i] for x in bounds)).visits()
        assert [int(at(turn)) for turn in range(int(turns))] == np.flatnonzero(tiles[b, i]).tolist()


def work(segments, branches=None, block=64, columns=None):
    return int(plan(until(segments, branches), block, columns).reach.visits()[0].sum())


def test_work_grows_with_the_sum_of_squared_lengths():
    assert work(rows([[64] * 64], 4096)) == 64
    assert work(rows([[4096]], 4096)) == 64 * 65 / 2
    for size in (96, 256, 1024):
        bound = (4096 // size) * ((size / 64 + 1) * (size / 64 + 2) / 2 + 1)
        assert work(rows([[size] * (4096 // size)], 4096)) <= bound


def test_a_branch_costs_its_trunk_and_itself_whatever_lies_between():
    """A trunk of a tile and branches of four: 1 + 4 · (4 + 10) for four branches, not the triangle's 17 · 18 / 2."""
    for branches in (1, 4, 15):
        numbers = jnp.repeat(jnp.arange(branches + 1), jnp.asarray([64] + [256] * branches))[None]
        assert work(jnp.ones_like(numbers), numbers) == 1 + branches * (4 + 10)


@pytest.mark.parametrize("given", ["q", "k", "v"])
def test_blockwise_reads_no_tile_of_another_branch(given):
    """A NaN in one branch meets no query and no key of the other, in any pass."""
    segments = jnp.ones((1, 160), jnp.int32)
    branches = jnp.repeat(jnp.arange(3), jnp.asarray([32, 64, 64]))[None]
    for column, others in ((50, slice(96, 160)), (150, slice(32, 96))):
        *inputs, g = arrays(segments)
        at = "qkv".index(given)
        inputs[at] = inputs[at].at[0, column].set(jnp.nan)
        out, back = jax.vjp(tiled(until(segments, branches), 32), *inputs)
        found = (out, *back(g))
        assert all(np.isfinite(x[0, others]).all() for x in found)
        assert any(np.isnan(x[0]).any() for x in found)


@pytest.mark.parametrize(
    ("shape", "heads"),
    [
        ((2, 2, 2, 1), (4, 2)),
        ((1, 1, 4, 2), (8, 2)),
        ((1, 2, 1, 4), (4, 2)),
        ((1, 1, 2, 3), (4, 2)),
        ((1, 1, 8, 1), (3, 1)),
    ],
)
def test_a_mesh_is_one_device(shape, heads):
    """Rows over data and fsdp, heads over tensor (groups fewer than devices among them), columns over context."""
    mesh, segments = make_mesh(MeshShape(*shape), jax.devices()[: np.prod(shape)]), rows(LAYOUT[:4])
    given = arrays(segments, heads=heads[0], groups=heads[1])
    attention = packed_attention(shard(segments, mesh, BATCH), None, mesh, "blockwise")
    same(
        results(attention, segments, *shard(given, mesh, BATCH)),
        results(plain(segments), segments, *given),
        1e-5,
    )


def test_a_row_split_over_devices_has_the_loss_and_gradient_of_the_unsplit_one():
    spec = ModelSpec(40, 16, 2, 4, 2, 8, 24, tied=True)
    graphdef, state = nnx.split(Decoder(spec, rngs=nnx.Rngs(0)))
    state = jax.tree.map(lambda x: 5 * x, state)
    segments = rows([[50, 40], [9, 80]])
    ids = np.random.default_rng(1).integers(0, 40, segments.shape).astype(np.int32)
    positions = (
        np.concatenate([np.arange(n) for n in (50, 40, 6, 9, 80, 7)])
        .reshape(2, 96)
        .astype(np.int32)
    )
    batch = PackedBatch(ids, positions, np.asarray(segments), np.where(positions > 0, segments, 0))
    weight = jnp.asarray([1.0, -2.0, 0.5, 3.0])

    def run(mesh, state, batch):
        def loss(state):
            return (
                sequence_logprobs(nnx.merge(graphdef, state), batch, 4, "block", mesh)[0] @ weight
            )

        return jax.jit(jax.value_and_grad(loss))(state)

    want = run(None, state, batch)
    for shape in ((1, 1, 1, 8), (1, 2, 2, 2)):
        mesh = make_mesh(MeshShape(*shape))
        got = run(mesh, jax.device_put(state, shardings(state, mesh)), shard(batch, mesh, BATCH))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(
                a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max())
            ),
            got,
            want,
        )


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_a_row_of_one_segment_is_equal_work_for_all_its_devices(parts):
    segments = rows([[96 * parts]], 96 * parts)
    shares = [zigzag(d, parts, 96) for d in range(parts)]
    assert sorted(np.concatenate(shares)) == list(range(96 * parts))
    assert len({work(segments, block=16, columns=columns) for columns in shares}) == 1


@pytest.mark.parametrize(
    ("kernel", "length", "width", "dtype", "tolerance"),
    [
        (splash, 256, 64, jnp.float32, 1e-5),
        (splash, 200, 128, jnp.float32, 1e-5),
        (splash, 256, 64, jnp.bfloat16, 2e-2),
        (triton, 256, 128, jnp.float32, 1e-5),
        (triton, 200, 24, jnp.float32, 1e-5),
        (triton, 256, 64, jnp.bfloat16, 2e-2),
        (triton, 256, 128, jnp.bfloat16, 2e-2),
        (triton, 256, 256, jnp.float32, 1e-5),
    ],
)
def test_a_kernel_interpreted_is_plain(kernel, length, width, dtype, tolerance):
    """One segment as long as the row, many short ones, padding, nothing but padding; rows that are not whole tiles."""
    segments = rows(LONG, 256)[:, :length]
    given = arrays(segments, dtype, width=width)
    got = results(interpreted(kernel, segments), segments, *given)
    assert {x.dtype for x in got} == {jnp.dtype(dtype)}
    exact = results(plain(segments), segments, *[x.astype(jnp.float32) for x in given])
    same([x.astype(jnp.float32) for x in got], exact, tolerance)


@pytest.mark.parametrize("kernel", [splash, triton])
def test_a_kernel_is_finite_at_padding(kernel):
    """What stands there enters the next layer's keys and values, where a weight of 0 would not hide a NaN."""
    segments = rows([[], [60], [130]], 256)
    q, k, v, _ = arrays(segments, width=64)
    out, back = jax.vjp(interpreted(kernel, segments), q, k, v)
    assert all(np.isfinite(x).all() for x in (out, *back(jnp.ones_like(out))))


@pytest.mark.parametrize("given", ["q", "k", "v"])
def test_triton_reads_only_the_tiles_that_a_segment_reaches(given):
    """A NaN at the last key of a row's first tile: no query of the second tile's segments meets it, in any pass."""
    segments = rows([[128, 90, 30], [100, 28, 128]], 256)
    *inputs, g = arrays(segments, width=64)
    at = "qkv".index(given)
    inputs[at] = inputs[at].at[:, 127].set(jnp.nan)
    out, back = jax.vjp(interpreted(triton, segments), *inputs)
    assert np.isnan(out[:, :128]).any()
    assert all(np.isfinite(x[:, 128:]).all() for x in (out, *back(g)))


@pytest.mark.parametrize(
    ("length", "width", "dtype", "tolerance"),
    [
        (256, 64, jnp.float32, 1e-5),
        (200, 24, jnp.float32, 1e-5),
        (256, 256, jnp.float32, 1e-5),
        (256, 64, jnp.bfloat16, 2e-2),
    ],
)
def test_triton_with_branches_is_plain(length, width, dtype, tolerance):
    """Trunk and branches that begin and end within tiles, padding, rows that are not whole tiles."""
    segments = rows(LONG, 256)[:, :length]
    branches, given = branched(segments), arrays(segments, dtype, width=width)
    got = results(interpreted(triton, segments, branches), segments, *given)
    exact = results(plain(segments, branches), segments, *[x.astype(jnp.float32) for x in given])
    same([x.astype(jnp.float32) for x in got], exact, tolerance)


@pytest.mark.parametrize("given", ["q", "k", "v"])
def test_triton_reads_no_tile_of_another_branch(given):
    """Trunk of one tile, branches of two: a NaN in one branch meets no query and no key of the other, in any pass."""
    segments, branches = (
        rows([[640], [128, 512]], 640),
        np.repeat([0, 1, 2], [128, 256, 256])[None].repeat(2, axis=0),
    )
    branches[1] = np.repeat([0, 1, 2], [256, 256, 128])
    for row, column, others in (
        (0, 200, slice(384, 640)),
        (0, 500, slice(128, 384)),
        (1, 300, slice(512, 640)),
        (1, 600, slice(256, 512)),
    ):
        *inputs, g = arrays(segments, width=16)
        at = "qkv".index(given)
        inputs[at] = inputs[at].at[row, column].set(jnp.nan)
        out, back = jax.vjp(interpreted(triton, segments, jnp.asarray(branches)), *inputs)
        found = (out, *back(g))
        assert all(
            np.isfinite(x[row, others]).all() and np.isfinite(x[1 - row]).all() for x in found
        )
        assert any(np.isnan(x[row]).any() for x in found)


@pytest.mark.parametrize("branches", [False, True])
def test_who_sees_a_key_and_which_tiles_are_reached(branches):
    """`until` = the mask, off padding; a program of the kernels visits a tile if and only if the mask holds a pair."""
    layout = [*LAYOUT, [7, 1, 88], [50, 46]]
    segments = rows(layout)
    branches = branched(segments) if branches else None
    ends, column = until(segments, branches), np.arange(96)
    seen = (column <= column[:, None]) & (column[:, None] < np.asarray(ends)[:, None, :])
    real = np.asarray(segments)[:, :, None] > 0
    np.testing.assert_array_equal(
        seen, np.where(real, packed_mask(segments, branches), np.eye(96, dtype=bool))
    )
    tiles = seen.reshape(-1, 12, 8, 12, 8).any(axis=(2, 4))
    np.testing.assert_array_equal(visited(reach(ends, jnp.arange(96).reshape(12, 8)), 12), tiles)
    to, j = np.asarray(last(ends, 8))[:, None, :], np.arange(12)
    np.testing.assert_array_equal((j <= j[:, None]) & (j[:, None] <= to), tiles)


def test_splash_visits_the_tiles_that_a_segment_reaches():
    """The tables of all three passes list the same tiles; a skipped tile loads what its neighbour loads."""
    segments = np.asarray(rows([[5, 30, 17, 9], [96], [], [1, 60, 20]], 96))
    forward, backward = (
        jax.tree.map(lambda x: np.asarray(x)[0], x) for x in tables(jnp.asarray(segments), 32)
    )
    mask = np.asarray(packed_mask(segments)) & (segments > 0)[:, :, None]
    for b, i, j in np.ndindex(4, 3, 3):
        seen = mask[b, 32 * i : 32 * i + 32, 32 * j : 32 * j + 32].any() or i == j
        assert forward.block_mask[3 * b + i, j] == backward.block_mask[i, 3 * b + j] == seen
        if seen:
            assert (forward.data_next[3 * b + i, j], backward.data_next[i, 3 * b + j]) == (
                3 * b + j,
                3 * b + i,
            )
    for table, axis in ((forward, 1), (backward, 0)):
        steps = np.moveaxis(np.stack([table.data_next, table.block_mask]), axis + 1, 2)
        for loaded, visited in zip(*steps, strict=True):
            assert set(loaded) == set(loaded[visited > 0])
            assert np.count_nonzero(np.diff(loaded)) == len(set(loaded)) - 1


def test_work_of_splash_grows_with_the_sum_of_squared_lengths():
    def tiles(layout, length):
        found = [int(x.block_mask.sum()) for x in tables(rows([layout] * 2, length), 512)]
        assert found[0] == found[1]
        return found[0] // 2

    assert tiles([512] * 64, 32_768) == 64
    assert tiles([32_768], 32_768) == 64 * 65 / 2
    assert tiles([], 32_768) == 64
    for size in (200, 700, 5000):
        bound = (32_768 // size) * ((size / 512 + 1) * (size / 512 + 2) / 2 + 1)
        assert tiles([size] * (32_768 // size), 32_768) <= bound


@pytest.mark.parametrize(
    ("platform", "call", "branches"),
    [
        ("tpu", "@tpu_custom_call", False),
        *(("cuda", "@__gpu$xla.gpu.triton", x) for x in (False, True)),
    ],
)
@pytest.mark.parametrize(("length", "rows"), [(4096, 16), (32_768, 4)])
def test_a_kernel_lowers_for_its_platform_in_a_gradient_on_a_mesh(
    platform, call, branches, length, rows, monkeypatch
):
    """A decoder, rows over four devices and heads over two: three kernels, forward once, no square of the length."""
    monkeypatch.setattr("deltapref_jax.models.kernels.platform_of", lambda mesh: platform)
    spec = ModelSpec(64, 64, 2, 4, 2, 64, 32)
    graphdef, state = nnx.split(Decoder(spec, rngs=nnx.Rngs(0)))
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    batch = PackedBatch(ids, ids, ids, ids, ids if branches else None)
    mesh = make_mesh(MeshShape(1, 4, 2, 1))

    @jax.jit
    @jax.value_and_grad
    def gradient(state, batch):
        return sequence_logprobs(nnx.merge(graphdef, state), batch, 8, "attention", mesh)[0].sum()

    text = gradient.trace(state, batch).lower(lowering_platforms=(platform,)).as_text()
    assert text.count(call) == 3
    assert f"{length}x{length}" not in text


def test_platform_and_shape_decide():
    assert choose("cpu", 128, False, False) == "plain"
    assert choose("cpu", 256, False, False) == "blockwise"
    assert choose("tpu", 200, False, False) == "splash"
    assert choose("gpu", 4000, False, False) == choose("cuda", 4096, False, False) == "triton"
    assert choose("gpu", 4096, True, False) == choose("cuda", 4096, True, False) == "triton"
    assert choose("cpu", 4096, True, False) == choose("tpu", 4096, True, False) == "blockwise"
    for platform in ("cpu", "gpu", "tpu"):
        assert (
            choose(platform, 4096, False, True) == choose(platform, 4096, True, True) == "blockwise"
        )


def test_rows_of_32k_tokens_need_no_square_of_their_length():
    """A training step's gradient: what it keeps beside its arguments grows like the length, 32 times less than L²."""
    spec = ModelSpec(64, 16, 2, 2, 1, 8, 32)
    graphdef, state = nnx.split(Decoder(spec, rngs=nnx.Rngs(0)))

    def extra(length):
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        batch = PackedBatch(ids, ids, ids, ids)
        gradient = jax.grad(
            lambda s, b: sequence_logprobs(nnx.merge(graphdef, s), b, 8, "block")[0].sum()
        )
        return jax.jit(gradient).lower(state, batch).compile().memory_analysis().temp_size_in_bytes

    short, long = extra(4096), extra(32_768)
    assert long < 9 * short
    assert long < 32_768**2 / 8


@pytest.mark.slow
def test_a_row_of_32k_tokens_runs_and_split_over_devices_it_is_the_same():
    """One sequence as long as the row, forward and backward, its columns on one device and on eight."""
    spec, length = ModelSpec(40, 16, 1, 2, 1, 8, 24, tied=True), 32_768
    graphdef, state = nnx.split(Decoder(spec, rngs=nnx.Rngs(0)))
    state = jax.tree.map(lambda x: 5 * x, state)
    ids = np.random.default_rng(1).integers(0, 40, (1, length)).astype(np.int32)
    positions = np.arange(length, dtype=np.int32)[None]
    batch = PackedBatch(ids, positions, np.ones_like(ids), (positions > 0).astype(np.int32))

    def run(mesh, state, batch):
        def loss(state):
            return sequence_logprobs(nnx.merge(graphdef, state), batch, 1, "block", mesh)[0].sum()

        return jax.jit(jax.value_and_grad(loss))(state)

    want, mesh = run(None, state, batch), make_mesh(MeshShape(1, 1, 1, 8))
    got = run(mesh, jax.device_put(state, shardings(state, mesh)), shard(batch, mesh, BATCH))
    assert np.isfinite(float(want[0]))
    assert float(got[0]) == pytest.approx(float(want[0]), rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(b).max())
        ),
        got[1],
        want[1],
    )
