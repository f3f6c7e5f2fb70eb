"""Every kernel equals dense attention, on meshes too, and skips the tiles that it may skip."""

import functools
import importlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from deltapref_jax.config import MeshShape
from deltapref_jax.mesh import make_mesh, shard
from deltapref_jax.models.attention import dispatch, live
from deltapref_jax.models.attention.blockwise import blockwise_attention, plan_tiles
from deltapref_jax.models.attention.dense import dense_attention
from deltapref_jax.models.attention.dispatch import (
    cached_attention,
    packed_attention,
    select_kernel,
    zigzag_starts,
)
from deltapref_jax.models.attention.live import live_attention, live_tiles
from deltapref_jax.models.attention.masks import (
    Visibility,
    last_query_tile,
    packed_mask,
    tile_ranges,
    visible_until,
)
from deltapref_jax.models.attention.splash import splash_attention, splash_tables
from deltapref_jax.models.attention.triton import triton_attention
from deltapref_jax.models.decoder import Decoder
from deltapref_jax.models.sharding import BATCH, ROWS, shardings
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.scoring.logprobs import sequence_logprobs
from deltapref_jax.scoring.packing import PackedBatch
from tests.marks import mostly

HEADS, GROUPS, WIDTH = 4, 2, 8
LONG = [
    [256],
    [100, 60, 40],
    [],
    [20] * 12,
    [128, 128],
    [1, 130, 5],
]
"""Lengths of the sequences in rows of 256 tokens, which are two tiles of a kernel."""
LAYOUT = [[5, 30, 17, 9], [1, 2, 60], [96], [40, 40], [], [32, 32, 32], [64, 32], [16, 80]]
"""Lengths of the sequences in rows of 96 tokens."""


def rows(layout, length=96):
    """Returns segments [B, L] with sequences of the given lengths, then padding."""
    segments, n = np.zeros((len(layout), length), np.int32), 0
    for row, lengths in zip(segments, layout, strict=True):
        start = 0
        for size in lengths:
            n += 1
            row[start : start + size] = n
            start += size
    return jnp.asarray(segments)


def branched(segments):
    """Makes a third of every segment the trunk and each other third a branch.

    A segment of a single token is all branch.
    """
    branches = np.zeros(segments.shape, np.int32)
    for n in np.unique(segments[segments > 0]):
        row, columns = np.nonzero(np.asarray(segments) == n)
        branches[row, columns] = (
            np.minimum(3 * np.arange(len(row)) // len(row), 2) if len(row) > 1 else 2
        )
    return jnp.asarray(branches)


def arrays(segments, dtype=jnp.float32, heads=HEADS, groups=GROUPS, width=WIDTH):
    r = np.random.default_rng(0)
    return [
        jnp.asarray(r.normal(size=(*segments.shape, n, width)), dtype)
        for n in (heads, groups, groups, heads)
    ]


def results(attention, segments, q, k, v, g):
    """Returns output and gradients; at padding the output and its cotangent are set to 0."""
    real = (segments > 0)[..., None, None]

    @jax.jit
    def run(q, k, v, g):
        out, back = jax.vjp(lambda *x: jnp.where(real, attention(*x), 0), q, k, v)
        return out, *back(g)

    return run(q, k, v, g)


def dense(segments, branches=None):
    return lambda q, k, v: dense_attention(q, k, v, packed_mask(segments, branches))


def interpreted(kernel, segments, branches=None):
    """Returns a kernel as a function of queries, keys and values that runs on any device."""
    if kernel is splash_attention:
        return lambda q, k, v: kernel(q, k, v, segments, interpret=True)
    until = visible_until(segments, branches)
    return lambda q, k, v: kernel(q, k, v, until, interpret=True)


def same(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, atol=tolerance * max(1, np.abs(b).max()))


def tiled(until, tile, columns=None):
    """Returns blockwise attention as a function of queries, keys and values."""
    plan = plan_tiles(Visibility(until), tile, columns)
    return lambda q, k, v: blockwise_attention(q, k, v, plan, tile)


mostly_slow = functools.partial(mostly, pytest.mark.slow)


@pytest.mark.parametrize("tile", mostly_slow([8, 32, 40], 2))
@pytest.mark.parametrize("branches", [False, True])
def test_blockwise_is_dense(tile, branches):
    segments = rows(LAYOUT)
    branches = branched(segments) if branches else None
    got = results(tiled(visible_until(segments, branches), tile), segments, *arrays(segments))
    same(got, results(dense(segments, branches), segments, *arrays(segments)), 1e-5)


def test_blockwise_in_bfloat16_is_float32_within_its_rounding():
    segments = rows(LAYOUT)
    exact = results(
        dense(segments),
        segments,
        *[x.astype(jnp.bfloat16).astype(jnp.float32) for x in arrays(segments)],
    )
    got = results(tiled(visible_until(segments), 32), segments, *arrays(segments, jnp.bfloat16))
    assert {x.dtype for x in got} == {jnp.dtype("bfloat16")}
    same([x.astype(jnp.float32) for x in got], exact, 2e-2)


def test_padding_sees_itself_alone():
    segments = rows(LAYOUT)
    q, k, v, _ = arrays(segments)
    out = tiled(visible_until(segments), 40)(q, k, v)
    padding = np.asarray(segments) == 0
    np.testing.assert_allclose(
        out[padding], np.repeat(v, HEADS // GROUPS, axis=2)[padding], rtol=1e-6
    )


def tiles_read(ranges, tiles):
    """Returns which key tiles each query tile reads, [B, t, T]."""
    first, gap, back, end = (np.asarray(x)[..., None] for x in ranges)
    j = np.arange(tiles)
    return (first <= j) & (j < end) & ~((gap <= j) & (j < back))


def test_tile_indices_are_the_tiles_of_the_ranges():
    segments = rows([*LAYOUT, [7, 1, 88], [50, 46]])
    ranges = plan_tiles(Visibility(visible_until(segments, branched(segments))), 8).ranges
    tiles = tiles_read(ranges, 12)
    for b, i in np.ndindex(tiles.shape[:2]):
        count, index = type(ranges)(*(x[b, i] for x in ranges)).tile_indices()
        assert [int(index(n)) for n in range(int(count))] == np.flatnonzero(tiles[b, i]).tolist()


def work(segments, branches=None, tile=64, columns=None):
    """Returns the number of pairs of tiles that blockwise attention computes."""
    plan = plan_tiles(Visibility(visible_until(segments, branches)), tile, columns)
    return int(plan.ranges.tile_indices()[0].sum())


def test_work_grows_with_the_sum_of_squared_lengths():
    assert work(rows([[64] * 64], 4096)) == 64
    assert work(rows([[4096]], 4096)) == 64 * 65 / 2
    for size in (96, 256, 1024):
        bound = (4096 // size) * ((size / 64 + 1) * (size / 64 + 2) / 2 + 1)
        assert work(rows([[size] * (4096 // size)], 4096)) <= bound


def test_a_branch_costs_its_trunk_and_itself_whatever_lies_between():
    """With a trunk of one tile and branches of four, a branch costs 4 + 10 tiles.

    Four branches make 1 + 4 * (4 + 10) tiles, where the triangle would have 17 * 18 / 2.
    """
    for branches in (1, 4, 15):
        numbers = jnp.repeat(jnp.arange(branches + 1), jnp.asarray([64] + [256] * branches))[None]
        assert work(jnp.ones_like(numbers), numbers) == 1 + branches * (4 + 10)


@pytest.mark.parametrize("operand", mostly_slow(["q", "k", "v"], 1))
def test_blockwise_reads_no_tile_of_another_branch(operand):
    """A NaN in one branch reaches no query and no key of the other, in any pass."""
    segments = jnp.ones((1, 160), jnp.int32)
    branches = jnp.repeat(jnp.arange(3), jnp.asarray([32, 64, 64]))[None]
    for column, others in ((50, slice(96, 160)), (150, slice(32, 96))):
        *inputs, g = arrays(segments)
        n = "qkv".index(operand)
        inputs[n] = inputs[n].at[0, column].set(jnp.nan)
        out, back = jax.vjp(tiled(visible_until(segments, branches), 32), *inputs)
        got = (out, *back(g))
        assert all(np.isfinite(x[0, others]).all() for x in got)
        assert any(np.isnan(x[0]).any() for x in got)


@pytest.mark.parametrize(
    ("shape", "heads"),
    mostly_slow(
        [
            ((2, 2, 2, 1), (4, 2)),
            ((1, 1, 4, 2), (8, 2)),
            ((1, 2, 1, 4), (4, 2)),
            ((1, 1, 2, 3), (4, 2)),
            ((1, 1, 8, 1), (3, 1)),
        ],
        0,
    ),
)
def test_a_mesh_is_one_device(shape, heads):
    """Rows lie over data and fsdp, heads over tensor, columns over context.

    In some cases there are fewer key heads than devices along tensor.
    """
    mesh, segments = make_mesh(MeshShape(*shape), jax.devices()[: np.prod(shape)]), rows(LAYOUT[:4])
    inputs = arrays(segments, heads=heads[0], groups=heads[1])
    attention = packed_attention(shard(segments, mesh, BATCH), None, mesh, "blockwise")
    same(
        results(attention, segments, *shard(inputs, mesh, BATCH)),
        results(dense(segments), segments, *inputs),
        1e-5,
    )


@pytest.mark.slow
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


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_a_row_of_one_segment_is_equal_work_for_all_its_devices(devices):
    segments = rows([[96 * devices]], 96 * devices)
    shares = [
        np.ravel(np.stack(zigzag_starts(d, devices, 96))[:, None] + np.arange(48))
        for d in range(devices)
    ]
    assert sorted(np.concatenate(shares)) == list(range(96 * devices))
    assert len({work(segments, tile=16, columns=columns) for columns in shares}) == 1


@pytest.mark.parametrize(
    ("kernel", "length", "width", "dtype", "tolerance"),
    mostly_slow(
        [
            (splash_attention, 256, 64, jnp.float32, 1e-5),
            (splash_attention, 200, 128, jnp.float32, 1e-5),
            (splash_attention, 256, 64, jnp.bfloat16, 2e-2),
            (triton_attention, 256, 128, jnp.float32, 1e-5),
            (triton_attention, 200, 24, jnp.float32, 1e-5),
            (triton_attention, 256, 64, jnp.bfloat16, 2e-2),
            (triton_attention, 256, 128, jnp.bfloat16, 2e-2),
            (triton_attention, 256, 256, jnp.float32, 1e-5),
        ],
        0,
        3,
    ),
)
def test_a_kernel_interpreted_is_dense(kernel, length, width, dtype, tolerance):
    """Rows hold one long segment, many short ones, padding alone; some are not whole tiles."""
    segments = rows(LONG, 256)[:, :length]
    inputs = arrays(segments, dtype, width=width)
    got = results(interpreted(kernel, segments), segments, *inputs)
    assert {x.dtype for x in got} == {jnp.dtype(dtype)}
    exact = results(dense(segments), segments, *[x.astype(jnp.float32) for x in inputs])
    same([x.astype(jnp.float32) for x in got], exact, tolerance)


def positions_of(segments, branches=None):
    """Positions in a sequence: a branch continues from its trunk."""
    positions = np.zeros(segments.shape, np.int32)
    branches = np.zeros(segments.shape, int) if branches is None else np.asarray(branches)
    for n in np.unique(segments[segments > 0]):
        row, columns = np.nonzero(np.asarray(segments) == n)
        trunk = int((branches[row, columns] == 0).sum())
        for b in np.unique(branches[row, columns]):
            own = columns[branches[row[0], columns] == b]
            positions[row[0], own] = np.arange(len(own)) + (trunk if b else 0)
    return jnp.asarray(positions)


WINDOWS = (0, 7, 40)
"""Windows of the layers' kinds: none, less than a tile, more than one."""


@pytest.mark.parametrize("cap", mostly(pytest.mark.exhaustive, [0.0, 1.5], 1))
@pytest.mark.parametrize("branches", mostly_slow([False, True], 1))
@pytest.mark.parametrize("kernel", ["dense", "blockwise", "splash", "triton"])
def test_windows_and_caps_in_every_kernel(kernel, branches, cap, monkeypatch):
    """Each kind of layer equals dense attention; the kind is traced, as in a scan over layers."""
    if kernel == "splash" and branches:
        return  # below, in the interpreter that knows a position in the grid
    if kernel == "triton" and (branches or cap):
        assert select_kernel("gpu", 256, branches, False, True, bool(cap)) != "triton"
        return
    on_this_device(monkeypatch)
    segments = rows(LONG, 256)
    branches = branched(segments) if branches else None
    positions = positions_of(segments, branches)
    inputs = arrays(segments, width=64)
    attend = packed_attention(segments, branches, None, kernel, positions, WINDOWS, cap)
    for kind, window in enumerate(WINDOWS):
        mask = packed_mask(segments, branches, window, positions)
        exact = results(lambda q, k, v, m=mask: plain(q, k, v, m, cap), segments, *inputs)
        traced = jax.jit(lambda n, *x: results(functools.partial(attend, kind=n), segments, *x))
        same(traced(jnp.int32(kind), *inputs), exact, 2e-5)


def plain(q, k, v, mask, cap, sinks=None):
    """Attention as it is written in a book; a sink is one more key, whose value is 0."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
    scores = cap * jnp.tanh(scores / cap) if cap else scores
    scores = jnp.where(mask[:, None], scores, -1e30)
    if sinks is not None:
        of_head = jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:3], 1))
        scores = jnp.concatenate([scores, of_head], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : mask.shape[2]]
    return jnp.einsum("bnts,bsnh->btnh", weights, v).astype(q.dtype)


def on_this_device(monkeypatch):
    """Has the kernels of accelerators run their programs in XLA."""
    for name in ("splash", "triton", "live"):
        module = importlib.import_module(f"deltapref_jax.models.attention.{name}")
        run = getattr(module, f"{name}_attention")
        monkeypatch.setattr(module, f"{name}_attention", functools.partial(run, interpret=True))


SINKS = jnp.linspace(-1.0, 3.0, HEADS)
"""Logits that take from a hundredth to most of a head's weight."""


@pytest.mark.parametrize(
    ("kernel", "branches", "window", "dtype", "tolerance"),
    mostly_slow(
        [
            ("dense", True, 7, jnp.float32, 2e-5),
            ("blockwise", False, 0, jnp.float32, 2e-5),
            ("blockwise", True, 7, jnp.float32, 2e-5),
            ("splash", False, 7, jnp.float32, 2e-5),
            ("triton", False, 7, jnp.float32, 2e-5),
            ("triton", True, 0, jnp.float32, 2e-5),
            # The gradient of a sink is a sum over queries of products of rounded outputs.
            ("blockwise", False, 7, jnp.bfloat16, 0.05),
            ("splash", False, 0, jnp.bfloat16, 0.05),
            ("triton", False, 0, jnp.bfloat16, 0.05),
        ],
        0,
        2,
        3,
        5,
    ),
)
def test_sinks_in_every_kernel(kernel, branches, window, dtype, tolerance, monkeypatch):
    """Output and gradients, those of the sinks among them, are those of one more key."""
    on_this_device(monkeypatch)
    segments = rows(LONG, 256)
    branches = branched(segments) if branches else None
    positions = positions_of(segments, branches)
    inputs = arrays(segments, dtype, width=64)
    attend = packed_attention(segments, branches, None, kernel, positions, (window,))
    exact = functools.partial(
        plain, mask=packed_mask(segments, branches, window, positions), cap=0.0
    )
    got = results_with_sinks(attend, segments, *inputs)
    assert [x.dtype for x in got] == [dtype] * 4 + [SINKS.dtype]
    same(
        [x.astype(jnp.float32) for x in got],
        results_with_sinks(exact, segments, *(x.astype(jnp.float32) for x in inputs)),
        tolerance,
    )


def results_with_sinks(attention, segments, q, k, v, g, sinks=SINKS):
    """`results`, with the gradient of the sinks behind those of queries, keys and values."""
    real = (segments > 0)[..., None, None]

    @jax.jit
    def run(q, k, v, sinks, g):
        def masked(q, k, v, sinks):
            return jnp.where(real, attention(q, k, v, sinks=sinks), 0)

        out, back = jax.vjp(masked, q, k, v, sinks)
        return out, *back(g)

    return run(q, k, v, sinks, g)


@pytest.mark.parametrize(
    ("shape", "kernel"),
    mostly_slow(
        [((2, 2, 2, 1), "blockwise"), ((1, 2, 1, 4), "blockwise"), ((1, 2, 1, 4), "splash")], 1
    ),
)
def test_sinks_on_a_mesh_are_those_of_one_device(shape, kernel, monkeypatch):
    on_this_device(monkeypatch)
    mesh, segments = make_mesh(MeshShape(*shape), jax.devices()[: np.prod(shape)]), rows(LAYOUT[:4])
    attend = packed_attention(shard(segments, mesh, BATCH), None, mesh, kernel)
    inputs, mask = arrays(segments), packed_mask(segments)
    same(
        results_with_sinks(attend, segments, *shard(inputs, mesh, BATCH)),
        results_with_sinks(functools.partial(plain, mask=mask, cap=0.0), segments, *inputs),
        2e-5,
    )


def test_a_window_of_a_mask_is_counted_in_positions():
    """A branch behind another one sees the end of the trunk as if it followed it directly."""
    segments = jnp.ones((1, 9), jnp.int32)
    branches = jnp.asarray([[0, 0, 0, 0, 1, 1, 1, 2, 2]])
    mask = packed_mask(segments, branches, 3, positions_of(segments, branches))[0]
    seen = [np.flatnonzero(row).tolist() for row in np.asarray(mask)]
    assert seen[4:] == [[2, 3, 4], [3, 4, 5], [4, 5, 6], [2, 3, 7], [3, 7, 8]]


def test_a_window_leaves_tiles_unread():
    segments = rows([[4096]], 4096)
    plan = plan_tiles(Visibility(visible_until(segments, None, 512)), 64)
    assert int(plan.ranges.tile_indices()[0].sum()) <= 64 * (512 // 64 + 1)


@pytest.mark.parametrize(("shape",), mostly_slow([((2, 2, 2, 1),), ((1, 2, 1, 4),)], 1))
def test_windows_on_a_mesh_are_those_of_one_device(shape):
    mesh, segments = make_mesh(MeshShape(*shape), jax.devices()[: np.prod(shape)]), rows(LAYOUT[:4])
    branches = branched(segments)
    for tree in (None, branches):
        positions = positions_of(segments, tree)
        placed = [None if x is None else shard(x, mesh, BATCH) for x in (segments, tree, positions)]
        attend = packed_attention(placed[0], placed[1], mesh, "blockwise", placed[2], WINDOWS, 2.0)
        inputs = arrays(segments)
        for kind, window in enumerate(WINDOWS):
            mask = packed_mask(segments, tree, window, positions)
            same(
                results(
                    functools.partial(attend, kind=kind), segments, *shard(inputs, mesh, BATCH)
                ),
                results(lambda q, k, v, m=mask: plain(q, k, v, m, 2.0), segments, *inputs),
                2e-5,
            )


@pytest.mark.parametrize("kernel", [splash_attention, triton_attention])
def test_a_kernel_is_finite_at_padding(kernel):
    """Padding enters the next layer's keys and values, where a weight of 0 would not hide a NaN."""
    segments = rows([[], [60], [130]], 256)
    q, k, v, _ = arrays(segments, width=64)
    out, back = jax.vjp(interpreted(kernel, segments), q, k, v)
    assert all(np.isfinite(x).all() for x in (out, *back(jnp.ones_like(out))))


@pytest.mark.parametrize("operand", mostly_slow(["q", "k", "v"], 1))
def test_triton_reads_only_the_tiles_of_a_segment(operand):
    """A NaN at the last token of a row's first tile reaches no segment of the second tile."""
    segments = rows([[128, 90, 30], [100, 28, 128]], 256)
    *inputs, g = arrays(segments, width=64)
    n = "qkv".index(operand)
    inputs[n] = inputs[n].at[:, 127].set(jnp.nan)
    out, back = jax.vjp(interpreted(triton_attention, segments), *inputs)
    assert np.isnan(out[:, :128]).any()
    assert all(np.isfinite(x[:, 128:]).all() for x in (out, *back(g)))


@pytest.mark.parametrize(
    ("length", "width", "dtype", "tolerance"),
    mostly_slow(
        [
            (256, 64, jnp.float32, 1e-5),
            (200, 24, jnp.float32, 1e-5),
            (256, 256, jnp.float32, 1e-5),
            (256, 64, jnp.bfloat16, 2e-2),
        ],
        1,
    ),
)
def test_triton_with_branches_is_dense(length, width, dtype, tolerance):
    """Trunks and branches begin and end within tiles; some rows are not whole tiles."""
    segments = rows(LONG, 256)[:, :length]
    branches, inputs = branched(segments), arrays(segments, dtype, width=width)
    got = results(interpreted(triton_attention, segments, branches), segments, *inputs)
    exact = results(dense(segments, branches), segments, *[x.astype(jnp.float32) for x in inputs])
    same([x.astype(jnp.float32) for x in got], exact, tolerance)


@pytest.mark.parametrize(
    ("lengths", "sizes", "windows", "cap"),
    [
        ([[400, 100]], [(100, 200, 100), (1, 99)], (0,), 0.0),
        pytest.param(
            [[700], [300, 400]],
            [(200, 270, 130, 100), (60, 40, 200), (260, 139, 1)],
            (0, 130),
            2.0,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_splash_with_branches_is_dense(lengths, sizes, windows, cap, monkeypatch):
    """One tile of 512, and two rows of three tiles of 256, whose trunks and branches span tiles."""
    module = importlib.import_module("deltapref_jax.models.attention.splash")
    interpret = pltpu.InterpretParams()  # knows the position in the grid within a loop
    run = functools.partial(module.splash_attention, interpret=interpret)
    monkeypatch.setattr(module, "splash_attention", run)
    segments = rows(lengths, 512 if len(lengths) == 1 else 720)
    branches = np.zeros(segments.shape, np.int32)
    for n, parts in enumerate(sizes, 1):
        branches[np.asarray(segments) == n] = np.repeat(np.arange(len(parts)), parts)
    branches = jnp.asarray(branches)
    positions = positions_of(segments, branches)
    inputs = arrays(segments, heads=2, groups=1, width=64)
    attend = packed_attention(segments, branches, None, "splash", positions, windows, cap)
    for kind, window in enumerate(windows):
        mask = packed_mask(segments, branches, window, positions)
        traced = jax.jit(lambda n, *x: results(functools.partial(attend, kind=n), segments, *x))
        exact = results(lambda q, k, v, m=mask: plain(q, k, v, m, cap), segments, *inputs)
        same(traced(jnp.int32(kind), *inputs), exact, 2e-5)


@pytest.mark.parametrize(
    ("context", "lengths", "length", "tree", "windows", "cap"),
    mostly_slow(
        [
            (2, [[256, 100, 100], [512]], 512, False, (0, 40), 2.0),
            # blocks of 75, padded to tiles; the last of a row's is padding beyond the keys' own
            (4, [[256, 100, 100]], 600, False, (0, 40), 0.0),
            (2, [[256, 100, 100]], 510, False, (0,), 0.0),
            (2, [[256, 100, 100], [512]], 512, True, (0,), 0.0),
        ],
        0,
    )
    + mostly(
        pytest.mark.exhaustive, [(4, [[900, 256, 400], [512, 30]], 2048, True, (0, 130), 2.0)]
    ),
)
def test_splash_of_rows_split_over_devices_is_dense(
    context, lengths, length, tree, windows, cap, monkeypatch
):
    """Blocks of whole tiles and padded ones, a share that is not halved, rows with branches."""
    module = importlib.import_module("deltapref_jax.models.attention.splash")
    interpret = pltpu.InterpretParams() if tree else True
    run = functools.partial(module.splash_attention, interpret=interpret)
    monkeypatch.setattr(module, "splash_attention", run)
    mesh = make_mesh(MeshShape(1, 1, 1, context), jax.devices()[:context])
    segments = rows(lengths, length)
    branches = branched(segments) if tree else None
    positions = positions_of(segments, branches)
    placed = [None if x is None else shard(x, mesh, BATCH) for x in (segments, branches, positions)]
    attend = packed_attention(placed[0], placed[1], mesh, "splash", placed[2], windows, cap)
    inputs = arrays(segments, heads=2, groups=1, width=64)
    for kind, window in enumerate(windows):
        mask = packed_mask(segments, branches, window, positions)
        traced = jax.jit(lambda n, *x: results(functools.partial(attend, kind=n), segments, *x))
        exact = results(lambda q, k, v, m=mask: plain(q, k, v, m, cap), segments, *inputs)
        same(traced(jnp.int32(kind), *shard(inputs, mesh, BATCH)), exact, 2e-5)


@pytest.mark.parametrize("operand", mostly_slow(["q", "k", "v"], 1))
def test_triton_reads_no_tile_of_another_branch(operand):
    """A NaN in one branch reaches no query and no key of the other, in any pass."""
    segments = rows([[640], [128, 512]], 640)
    branches = np.repeat([0, 1, 2], [128, 256, 256])[None].repeat(2, axis=0)
    branches[1] = np.repeat([0, 1, 2], [256, 256, 128])
    for row, column, others in (
        (0, 200, slice(384, 640)),
        (0, 500, slice(128, 384)),
        (1, 300, slice(512, 640)),
        (1, 600, slice(256, 512)),
    ):
        *inputs, g = arrays(segments, width=16)
        n = "qkv".index(operand)
        inputs[n] = inputs[n].at[row, column].set(jnp.nan)
        kernel = interpreted(triton_attention, segments, jnp.asarray(branches))
        out, back = jax.vjp(kernel, *inputs)
        got = (out, *back(g))
        assert all(np.isfinite(x[row, others]).all() and np.isfinite(x[1 - row]).all() for x in got)
        assert any(np.isnan(x[row]).any() for x in got)


@pytest.mark.parametrize("branches", [False, True])
def test_visibility_and_tile_ranges_are_those_of_the_mask(branches):
    """`visible_until` is the mask, except at padding; the ranges hold exactly the visible tiles."""
    layout = [*LAYOUT, [7, 1, 88], [50, 46]]
    segments = rows(layout)
    branches = branched(segments) if branches else None
    until, column = visible_until(segments, branches), np.arange(96)
    visible = (column <= column[:, None]) & (column[:, None] < np.asarray(until)[:, None, :])
    real = np.asarray(segments)[:, :, None] > 0
    np.testing.assert_array_equal(
        visible, np.where(real, packed_mask(segments, branches), np.eye(96, dtype=bool))
    )
    tiles = visible.reshape(-1, 12, 8, 12, 8).any(axis=(2, 4))
    ranges = tile_ranges(until, jnp.arange(96).reshape(12, 8))
    np.testing.assert_array_equal(tiles_read(ranges, 12), tiles)
    last, j = np.asarray(last_query_tile(until, 8))[:, None, :], np.arange(12)
    np.testing.assert_array_equal((j <= j[:, None]) & (j[:, None] <= last), tiles)


@pytest.mark.parametrize("tree", [False, True])
def test_splash_tables_list_the_tiles_of_the_mask(tree):
    """All three passes compute the same tiles; a skipped tile loads what its neighbour loads."""
    segments = rows([[5, 30, 17, 9], [96], [], [1, 60, 20]], 96)
    branches = branched(segments) if tree else None
    tables = splash_tables(
        visible_until(segments, branches), 32, jnp.arange(4 * 96), jnp.arange(96)
    )
    forward, backward = (jax.tree.map(lambda x: np.asarray(x)[0], x) for x in tables)
    mask = np.asarray(packed_mask(segments, branches)) & (np.asarray(segments) > 0)[:, :, None]
    for b, i, j in np.ndindex(4, 3, 3):
        computed = mask[b, 32 * i : 32 * i + 32, 32 * j : 32 * j + 32].any() or i == j
        assert forward.block_mask[3 * b + i, j] == backward.block_mask[i, 3 * b + j] == computed
        if computed:
            assert (forward.data_next[3 * b + i, j], backward.data_next[i, 3 * b + j]) == (
                3 * b + j,
                3 * b + i,
            )
    for table, axis in ((forward, 1), (backward, 0)):
        steps = np.moveaxis(np.stack([table.data_next, table.block_mask]), axis + 1, 2)
        for loaded, computed in zip(*steps, strict=True):
            assert set(loaded) == set(loaded[computed > 0])
            assert np.count_nonzero(np.diff(loaded)) == len(set(loaded)) - 1


def test_splash_tables_of_a_row_split_over_devices_are_equal_work():
    """Every device computes a share of the tiles of a whole row, in all passes."""
    until, columns = visible_until(rows([[16_384]], 16_384)), jnp.arange(2048)
    for device in range(4):
        starts = jnp.asarray(zigzag_starts(device, 4, 4096))
        shared = (starts[:, None] + columns).ravel()
        forward, backward = splash_tables(until, 512, shared, shared)
        assert forward.block_mask.shape == backward.block_mask.shape == (1, 8, 32)
        assert forward.block_mask.sum() == backward.block_mask.sum() == 32 * 33 / 2 / 4


def test_work_of_splash_grows_with_the_sum_of_squared_lengths():
    def tiles(layout, length):
        until = visible_until(rows([layout] * 2, length))
        forward, backward = splash_tables(until, 512, jnp.arange(2 * length), jnp.arange(length))
        assert int(forward.block_mask.sum()) == int(backward.block_mask.sum())
        return int(forward.block_mask.sum()) // 2

    assert tiles([512] * 64, 32_768) == 64
    assert tiles([32_768], 32_768) == 64 * 65 / 2
    assert tiles([], 32_768) == 64
    for size in (200, 700, 5000):
        bound = (32_768 // size) * ((size / 512 + 1) * (size / 512 + 2) / 2 + 1)
        assert tiles([size] * (32_768 // size), 32_768) <= bound


@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.parametrize(
    ("platform", "call", "context"),
    [
        ("tpu", "@tpu_custom_call", 1),
        ("tpu", "@tpu_custom_call", 2),
        ("cuda", "@__gpu$xla.gpu.triton", 1),
    ],
)
@pytest.mark.parametrize(("length", "rows"), mostly_slow([(4096, 16), (32_768, 4)], 0))
def test_a_kernel_lowers_for_its_platform_in_a_gradient_on_a_mesh(
    platform, call, context, branches, length, rows, monkeypatch
):
    """The gradient holds three kernels and nothing whose size is the square of the length.

    Rows or their columns lie over four devices and heads over two; the forward kernel is called
    once.
    """
    monkeypatch.setattr(dispatch, "platform_of", lambda mesh: platform)
    spec = ModelSpec(64, 64, 2, 4, 2, 64, 32)
    graphdef, state = nnx.split(Decoder(spec, rngs=nnx.Rngs(0)))
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    batch = PackedBatch(ids, ids, ids, ids, ids if branches else None)
    mesh = make_mesh(MeshShape(1, 4 // context, 2, context))

    @jax.jit
    @jax.value_and_grad
    def gradient(state, batch):
        return sequence_logprobs(nnx.merge(graphdef, state), batch, 8, "attention", mesh)[0].sum()

    text = gradient.trace(state, batch).lower(lowering_platforms=(platform,)).as_text()
    assert text.count(call) == 3
    assert f"{length}x{length}" not in text


def test_platform_and_shape_decide():
    assert select_kernel("cpu", 128, False, False) == "dense"
    assert select_kernel("cpu", 256, False, False) == "blockwise"
    assert select_kernel("tpu", 200, False, False) == "splash"
    assert (
        select_kernel("gpu", 4000, False, False)
        == select_kernel("cuda", 4096, False, False)
        == "triton"
    )
    assert (
        select_kernel("gpu", 4096, True, False)
        == select_kernel("cuda", 4096, True, False)
        == "triton"
    )
    assert select_kernel("cpu", 4096, True, False) == "blockwise"
    assert select_kernel("tpu", 4096, True, False) == "splash"
    for platform, kernel in (("cpu", "blockwise"), ("gpu", "blockwise"), ("tpu", "splash")):
        assert (
            select_kernel(platform, 4096, False, True)
            == select_kernel(platform, 4096, True, True)
            == kernel
        )


def test_rows_that_are_too_long_for_splash_are_said_once(caplog):
    dispatch._say.cache_clear()
    assert select_kernel("tpu", 1 << 16, False, False) == "splash"
    assert not caplog.messages
    for _ in range(2):
        assert select_kernel("tpu", 1 << 16, True, False) == "blockwise"
    assert caplog.messages == [
        "Attention over packed rows runs on blockwise: plain XLA, as rows with windows or branches "
        "exceed 32,768 tokens."
    ]


def test_what_is_installed_decides_on_gpu(monkeypatch, caplog):
    """Without Triton's backend rows run on tokamax's kernels, and without these blockwise."""
    known = {"jax.experimental.pallas.triton", "tokamax"}
    monkeypatch.setattr(
        "deltapref_jax.models.attention.dispatch.importlib.util.find_spec",
        lambda name: name if name in known else None,
    )

    dispatch._say.cache_clear()

    def chosen(length=4096, branched=True, **features):
        dispatch._gpu_kernel.cache_clear()
        return select_kernel("cuda", length, branched, False, **features)

    assert chosen() == "triton"
    (message,) = caplog.messages
    assert message == (
        "Attention over packed rows runs on triton: this project's Pallas kernels on Triton."
    )
    assert chosen(capped=True) == chosen(windowed=True) == "mosaic"
    assert chosen(16_384, capped=True) == "blockwise"
    known.remove("jax.experimental.pallas.triton")
    assert chosen() == chosen(branched=False) == "mosaic"
    known.remove("tokamax")
    assert chosen() == chosen(capped=True) == "blockwise"
    dispatch._gpu_kernel.cache_clear()


def test_mosaic_gets_the_mask_and_the_cap_as_tokamax_takes_them(monkeypatch):
    """A stand-in for tokamax, which needs a later Python, computes what its documentation says."""

    def attention(q, k, v, *, mask, is_causal, logits_soft_cap, implementation):
        assert implementation[0] == "mosaic_gpu"
        assert mask.shape == (q.shape[0], 1, q.shape[1], k.shape[1])
        assert is_causal
        return plain(q, k, v, mask[:, 0] & jnp.tri(q.shape[1], dtype=bool), logits_soft_cap or 0.0)

    module = types.SimpleNamespace(dot_product_attention=attention)
    monkeypatch.setitem(sys.modules, "tokamax", module)
    mesh, segments = make_mesh(MeshShape(2, 2, 2)), rows(LAYOUT[:4])
    branches = branched(segments)
    positions, inputs = positions_of(segments, branches), arrays(segments)
    attend = packed_attention(segments, branches, mesh, "mosaic", positions, WINDOWS, 2.0)
    for kind, window in enumerate(WINDOWS):
        mask = packed_mask(segments, branches, window, positions)
        got = results(functools.partial(attend, kind=kind), segments, *inputs)
        want = results(lambda q, k, v, m=mask: plain(q, k, v, m, 2.0), segments, *inputs)
        same(got, want, 2e-5)


@pytest.mark.slow
def test_rows_of_32k_tokens_need_no_square_of_their_length():
    """Temporary memory of a training step's gradient grows like the length and not its square."""
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


@pytest.mark.exhaustive
def test_a_row_of_32k_tokens_runs_and_split_over_devices_it_is_the_same():
    """The row is one sequence; its columns lie on one device and on eight, forward and backward."""
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


def cache_of(positions, length, dtype, heads=4, groups=2, width=128):
    """One token a row and a cache [B, K, S, H], of which what no token sees is NaN."""
    r = np.random.default_rng(7)
    B = len(positions)
    shapes = [
        (B, 1, heads, width),
        *((B, 1, groups, width),) * 2,
        *((B, groups, length, width),) * 2,
    ]
    q, k, v, *cache = (jnp.asarray(r.normal(size=shape), dtype) for shape in shapes)
    live = jnp.arange(length) < (jnp.asarray(positions)[:, None] // 128 + 1) * 128
    return q, k, v, *(jnp.where(live[:, None, :, None], x, jnp.nan) for x in cache)


@pytest.mark.parametrize(
    ("positions", "tiles", "window", "cap", "sinks", "dtype", "tolerance"),
    mostly_slow(
        [
            ([255, 0, 127, 128, 40], 1, 0, 0.0, False, jnp.float32, 2e-5),
            ([255, 0, 383, 128, 40, 127], 2, 0, 0.0, False, jnp.float32, 2e-5),
            ([0, 383, 129, 255, 256, 380], 1, 130, 5.0, True, jnp.float32, 2e-5),
            ([0, 639, 511, 512, 300, 600, 90], 4, 200, 5.0, True, jnp.float32, 2e-5),
            ([639, 1, 256, 385], 3, 300, 0.0, True, jnp.bfloat16, 2e-2),
            ([383, 200, 15, 16], 9, 0, 0.0, True, jnp.bfloat16, 2e-2),
            ([300], 2, 1, 0.0, False, jnp.bfloat16, 2e-2),
        ],
        1,
    ),
)
def test_decoding_on_live_tiles_is_dense(
    positions, tiles, window, cap, sinks, dtype, tolerance, monkeypatch
):
    """And writes what dense attention writes; a tile that no token sees is not copied.

    `tiles` are computed at a time. What was never written is NaN in the interpreter.
    """
    # Blocks of two rows in float32, so that there are several.
    monkeypatch.setattr(live, "_BLOCK_BYTES", 2 * HEADS * 128 * 4)
    monkeypatch.setattr(live, "_CHUNK_BYTES", tiles * 4 * 128 * 128 * dtype.dtype.itemsize)
    length = 128 * (max(positions) // 128 + 1)
    positions = jnp.asarray(positions, jnp.int32)
    q, k, v, *cache = cache_of(positions, length, dtype)
    sinks = SINKS if sinks else None
    out, *written = live_attention(
        *(x[:, 0] for x in (q, k, v)),
        *cache,
        positions,
        sinks,
        window,
        cap,
        interpret=pltpu.InterpretParams(detect_races=True),
    )
    assert not interpret_pallas_call.races.races_found
    exact = cached_attention(positions[:, None], length, None, (window,), cap)
    finite = [jnp.nan_to_num(x.astype(jnp.float32)) for x in (q, k, v, *cache)]
    want, *kept = exact(*finite, window, sinks)
    same([out.astype(jnp.float32)], [want[:, 0]], tolerance)
    for got, all_of_it in zip(written, kept, strict=True):
        np.testing.assert_array_equal(jnp.nan_to_num(got.astype(jnp.float32)), all_of_it)


def test_live_tiles_are_those_with_a_visible_key():
    positions = jnp.arange(600)
    for window in (0, 1, 128, 130):
        first, last = live_tiles(positions, window)
        for at in range(600):
            seen = range(max(0, at - window + 1) if window else 0, at + 1)
            assert (first[at], last[at]) == (seen[0] // 128, seen[-1] // 128)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 1, 2, 1), (1, 2, 4, 1)])
def test_decoding_on_a_mesh_is_that_of_one_device(shape, monkeypatch):
    """Two key heads lie over `tensor`, and are whole on every device where it has four."""
    mesh = make_mesh(MeshShape(*shape), jax.devices()[: np.prod(shape)])
    positions = jnp.asarray([255, 0, 40, 130], jnp.int32)
    inputs = [jnp.nan_to_num(x) for x in cache_of(positions, 256, jnp.float32)]
    want = cached_attention(positions[:, None], 256)(*inputs, 0, SINKS)
    on_this_device(monkeypatch)
    monkeypatch.setattr(dispatch, "platform_of", lambda mesh: "tpu")
    attend = cached_attention(positions[:, None], 256, mesh)
    got = jax.jit(lambda *inputs: attend(*inputs, 0, SINKS))(*shard(inputs, mesh, ROWS))
    same(got, want, 2e-5)
