"""Selects the attention kernel for packed rows, and for decoding, and runs it over the mesh.

| kernel    | runs                                      | work                                     |
|-----------|-------------------------------------------|------------------------------------------|
| dense     | anywhere; the reference of the tests      | L² per row, an L x L mask                |
| blockwise | anywhere, XLA (`blockwise`)               | Σ length²; tiles of 128, on CPU of 64    |
| splash    | TPU, JAX's Pallas kernel (`splash`)       | Σ length²; tiles of up to 512, and a     |
|           |                                           | grid step for every skipped tile         |
| triton    | GPU, this project's Pallas kernels        | Σ length²; tiles of 128                  |
|           | (`triton`)                                |                                          |
| mosaic    | GPU, tokamax's kernels (`mosaic`)         | L² / 2 per row, an L x L mask            |

Rows split over `context` run on splash on TPU and blockwise elsewhere. Tiles of other branches are
skipped like those of other segments. All kernels know windows; splash knows them, and branches, in
rows of up to 32,768 tokens. On GPU capped scores, and windows beside branches, run on mosaic where
tokamax is installed and blockwise elsewhere, and so do all rows once JAX has no Triton backend any
more. All kernels but mosaic know sinks. Decoding is dense, and on TPU runs on `live`.
"""

import functools
import importlib.util
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int

from deltapref_jax.mesh import platform_of
from deltapref_jax.models.attention.blockwise import blockwise_attention, plan_tiles
from deltapref_jax.models.attention.dense import dense_attention, dense_cached_attention
from deltapref_jax.models.attention.masks import (
    Starts,
    Visibility,
    packed_mask,
    visible_until,
    whole_rows,
)
from deltapref_jax.models.sharding import BATCH, ROWS
from deltapref_jax.models.spec import ModelSpec

_logger = logging.getLogger(__name__)

TILE = 128
"""Tile of `blockwise` on accelerators; shorter rows are not cut into tiles on any platform."""
CPU_TILE = 64
"""Tile of `blockwise` on CPU: the fastest of 64, 96, 128 and 192."""


def select_kernel(
    platform: str,
    length: int,
    branched: bool,
    split: bool,
    windowed: bool = False,
    capped: bool = False,
    sinks: bool = False,
) -> str:
    """Returns the kernel for packed rows: "dense", "blockwise", "splash", "triton" or "mosaic".

    A row of one tile has nothing to skip and runs dense. On CPU blockwise was faster than dense at
    every length measured (256 to 1024, rows of one segment included).

    Args:
      platform: "cpu", "gpu" or "cuda", "tpu".
      length: L.
      branched: whether the rows have branches.
      split: whether each row is split over several devices (the mesh axis `context`).
      windowed: whether a layer has a window.
      capped: whether scores are capped.
      sinks: whether heads have sinks.
    """
    if length <= TILE and not split:
        return "dense"
    if platform in ("gpu", "cuda") and not split:
        return _gpu_kernel(capped or (branched and windowed), length > 8192 or sinks)
    if platform != "tpu":
        return "blockwise"
    # The longest row that `splash.MAX_ROW` allows; Pallas is not imported for it.
    if (branched or windowed) and length > 1 << 15:
        _say("blockwise", "plain XLA, as rows with windows or branches exceed 32,768 tokens")
        return "blockwise"
    return "splash"


@functools.cache
def _gpu_kernel(beyond_triton: bool, beyond_mosaic: bool) -> str:
    """Returns the kernel on GPU by what is installed, and says it.

    Args:
      beyond_triton: whether rows have what `triton` does not compute.
      beyond_mosaic: whether rows are longer than `mosaic.MAX_ROW`, or heads have sinks.
    """
    # The project's kernels come first while their backend exists, because they skip tiles.
    if importlib.util.find_spec("jax.experimental.pallas.triton") and not beyond_triton:
        kernel, reason = "triton", "this project's Pallas kernels on Triton"
    elif importlib.util.find_spec("tokamax") and not beyond_mosaic:
        kernel, reason = "mosaic", "tokamax's Mosaic kernels"
    else:
        kernel, reason = "blockwise", "plain XLA"
    _say(kernel, reason)
    return kernel


@functools.cache
def _say(kernel: str, reason: str) -> None:
    """Logs the kernel, once."""
    _logger.warning("Attention over packed rows runs on %s: %s.", kernel, reason)


def shares_prompts(platform: str, split: bool, length: int, spec: ModelSpec) -> bool:
    """Returns whether completions of one prompt are packed as branches behind one copy of it.

    They are where rows of `length` tokens run on the same kernel with and without branches:
    otherwise the branches would cost the faster kernel. Not where LongRoPE has two lists of
    factors: a prompt's numbers would depend on the length of each completion. `platform` and
    `split` are as in `select_kernel`.
    """
    if any(0 < rope.original < length for rope in spec.ropes):
        return False
    unbranched, branched = (
        select_kernel(
            platform,
            length,
            branches,
            split,
            any(spec.windows),
            bool(spec.attention_cap),
            spec.sinks,
        )
        for branches in (False, True)
    )
    return unbranched == branched


def zigzag_starts(device: Array | int, devices: int, share: int) -> list[Any]:
    """Returns the first columns of the blocks of queries that one of a row's devices computes.

    Later columns see more keys. The row is cut into 2 * `devices` blocks, and device d computes
    blocks d and 2 * devices - 1 - d, the even one first (Llama 3, arXiv 2407.21783, section 3.3.2):
    for one segment as long as the row, all devices do equal work. An odd share is not cut, and its
    device computes the columns that it holds.

    Args:
      device: d, the device's index along `context`.
      devices: number of devices that hold the row.
      share: columns that each of them holds.
    """
    if share % 2:
        return [device * share]
    mirror = 2 * devices - 1 - device
    # Of the two blocks one is even and one is odd, because their sum is odd.
    return [jnp.where(device % 2 == bit, device, mirror) * (share // 2) for bit in (0, 1)]


def _zigzag_exchange(x: Array, devices: int, inverse: bool = False) -> Array:
    """Sends the columns that a device holds, blocks 2d and 2d + 1, to their computing devices.

    These are the devices of `zigzag_starts`; `inverse` sends the columns back.
    """
    if x.shape[1] % 2:
        return x
    halves = jnp.split(x, 2, axis=1)
    for odd in (0, 1):
        # Block b = 2d + odd is computed by device min(b, 2 * devices - 1 - b). Every device holds
        # one even and one odd block, before and after, so each half is a permutation of devices.
        pairs = [(d, min(2 * d + odd, 2 * devices - 1 - (2 * d + odd))) for d in range(devices)]
        halves[odd] = jax.lax.ppermute(
            halves[odd], "context", [pair[::-1] for pair in pairs] if inverse else pairs
        )
    return jnp.concatenate(halves, axis=1)


def _context_parallel(
    run: Callable[..., Array], q: Array, k: Array, v: Array, visibility: Any, devices: int
) -> Array:
    """Attention of rows split over `context`: all-gathered keys and values, exchanged queries."""
    # What a kernel reads of the tokens, and its layer's window.
    *of_tokens, window = visibility
    k, v, of_tokens = jax.tree.map(
        lambda x: jax.lax.all_gather(x, "context", axis=1, tiled=True), (k, v, of_tokens)
    )
    share = q.shape[1]

    def starts() -> list[Any]:
        return zigzag_starts(jax.lax.axis_index("context"), devices, share)

    out = run(_zigzag_exchange(q, devices), k, v, (*of_tokens, window), starts=starts)
    return _zigzag_exchange(out, devices, inverse=True)


def _run_kernel(
    q: Array,
    k: Array,
    v: Array,
    visibility: Any,
    kernel: str,
    windows: tuple[int, ...],
    sinks: Array | None,
    tile: int,
    cap: float,
    starts: Starts = whole_rows,
) -> Array:
    """Attention on one device; `visibility` is the kernel's form of the mask of whole rows."""
    # Pallas for a platform is imported where that platform is used: elsewhere it only costs time.
    if kernel == "triton":
        from deltapref_jax.models.attention.triton import triton_attention

        return triton_attention(q, k, v, visibility.until, sinks=sinks)
    if kernel == "mosaic":
        from deltapref_jax.models.attention.mosaic import mosaic_attention

        return mosaic_attention(q, k, v, visibility, cap)
    if kernel == "splash":
        from deltapref_jax.models.attention.splash import splash_attention

        segments, branches, kind = visibility
        return splash_attention(
            q, k, v, segments, branches, windows, kind, cap, sinks=sinks, starts=starts
        )
    size = q.shape[1] // len(starts())
    columns = (jnp.asarray(starts())[:, None] + jnp.arange(size)).ravel()
    tile = min(tile, size)  # a tile lies within a block of columns
    plan = plan_tiles(Visibility(*visibility), tile, columns)
    return blockwise_attention(q, k, v, plan, tile, cap, sinks)


def _head_sharding(heads: int, kv_heads: int, devices: int) -> tuple[str | None, int]:
    """Returns the mesh axis of the heads, and how often key heads are repeated for it.

    Heads are split over `tensor` if every device then has whole groups of query heads; key heads
    are repeated where there are fewer of them than devices. Otherwise every device of `tensor`
    computes all heads.
    """
    copies = devices // math.gcd(kv_heads, devices)
    if heads % devices == 0 and heads % (kv_heads * copies) == 0:
        return "tensor", copies
    return None, 1


Attend = Callable[..., Array]
"""Attention of a layer: (queries [B, L, N, H], keys and values [B, L, K, H], `kind`: the index of
the layer's window, `sinks` [N] or None) to [B, L, N, H]."""


def packed_attention(
    segments: Int[Array, "B L"],
    branches: Int[Array, "B L"] | None = None,
    mesh: Mesh | None = None,
    kernel: str = "",
    positions: Int[Array, "B L"] | None = None,
    windows: Sequence[int] = (0,),
    cap: float = 0.0,
    sinks: bool = False,
) -> Attend:
    """Returns attention among the tokens of packed rows as a function of queries, keys, values.

    The function's fourth argument says which of `windows` the layer has, as an index; it may be
    traced, so that a scan over layers of different windows compiles one layer. Its fifth has the
    sinks of the layer's heads (`attention.sinks`). The mask is that of `masks.packed_mask`; what
    the output holds at padding differs by kernel.

    Args:
      segments: 1 upward, a contiguous run per sequence; 0 is padding.
      branches: 0 for the trunk, 1 upward for branches, a contiguous run each; None where there
        are none.
      mesh: rows lie over data and fsdp, heads over tensor, columns over context; None means one
        device.
      kernel: one of those that `select_kernel` returns; "" means that of `select_kernel`.
      positions: position of each token in its own sequence; read with branches and windows alone.
      windows: positions that a query sees, its own included, in layers of each kind; 0 means all.
      cap: turns the scores s into cap * tanh(s / cap); 0 leaves them.
      sinks: whether layers have sinks.
    """
    length = segments.shape[1]
    context = mesh.shape["context"] if mesh is not None else 1
    kernel = kernel or select_kernel(
        platform_of(mesh),
        length,
        branches is not None,
        context > 1,
        any(windows),
        bool(cap),
        sinks,
    )
    # Computed here and not in the returned function, so that all layers share them.
    if kernel == "dense":
        masks = [packed_mask(segments, branches, window, positions) for window in windows]
        return lambda q, k, v, kind=0, sinks=None: dense_attention(
            q, k, v, _select(masks, kind), cap, sinks
        )

    tile = CPU_TILE if platform_of(mesh) == "cpu" else TILE
    if kernel == "mosaic":
        visibilities: list[Any] = [packed_mask(segments, branches, w, positions) for w in windows]
        specs: Any = PartitionSpec(BATCH[0], None, None)
    elif kernel == "splash":
        visibilities = [(segments, branches, kind) for kind in range(len(windows))]
        specs = (BATCH, BATCH, PartitionSpec())
    elif branches is not None and any(windows):
        until = visible_until(segments, branches)
        visibilities = [Visibility(until, positions, window or length) for window in windows]
        specs = Visibility(BATCH, BATCH, PartitionSpec())
    else:
        visibilities = [Visibility(visible_until(segments, branches, w)) for w in windows]
        specs = Visibility(BATCH)

    def attend(q: Array, k: Array, v: Array, visibility: Any, sinks: Array | None) -> Array:
        run = functools.partial(
            _run_kernel, kernel=kernel, windows=tuple(windows), sinks=sinks, tile=tile, cap=cap
        )
        if context > 1:
            return _context_parallel(run, q, k, v, visibility, context)
        return run(q, k, v, visibility)

    if mesh is None or mesh.size == 1:
        return lambda q, k, v, kind=0, sinks=None: attend(
            q, k, v, _select(visibilities, kind), sinks
        )

    def attend_sharded(
        q: Array, k: Array, v: Array, kind: Any = 0, sinks: Array | None = None
    ) -> Array:
        heads, copies = _head_sharding(q.shape[2], k.shape[2], mesh.shape["tensor"])
        # Every device of `tensor` needs a key head of its own.
        k, v = (jnp.repeat(x, copies, axis=2) if copies > 1 else x for x in (k, v))
        tokens = PartitionSpec(*BATCH, heads, None)
        return jax.shard_map(
            attend,
            mesh=mesh,
            in_specs=(tokens, tokens, tokens, specs, PartitionSpec(heads)),
            out_specs=tokens,
            check_vma=False,
        )(q, k, v, _select(visibilities, kind), sinks)

    return attend_sharded


LANES = 128
"""Lanes of a TPU's vector registers."""
LIVE_TILE = 128
"""Positions of a tile of the decoding kernel (`live`)."""
CachedAttend = Callable[..., tuple[Array, Array, Array]]
"""Attention of a layer to its cache: (queries [B, T, N, H], keys and values [B, T, K, H], the
cache's keys and values, the layer's window, sinks [N] or None) to [B, T, N, H] and the cache."""


def cached_attention(
    positions: Int[Array, "B T"],
    length: int,
    mesh: Mesh | None = None,
    windows: Sequence[int] = (0,),
    cap: float = 0.0,
    positions_last: bool = False,
    together: int = 1,
) -> CachedAttend:
    """Returns a function that writes keys and values into a layer's cache and attends to it.

    A query sees the cache up to its own position. On TPU one token a row runs on `live`, which
    reads live tiles alone, where heads are whole lanes wide and the cache is whole tiles long; all
    else is dense and reads all of the cache.

    Args:
      positions: of the queries in their own sequences; keys and values are written there.
      length: S, positions of the cache.
      mesh: the mesh over which the rows lie; None means one device.
      windows: those of the layers.
      cap: turns the scores s into cap * tanh(s / cap); 0 leaves them.
      positions_last: the layout of the keys, as of `decoder.Cache`.
      together: heads beside each other, as of `decoder.Cache`.
    """
    rows = jnp.arange(positions.shape[0])[:, None]
    column, at = jnp.arange(length), positions[:, :, None]
    masks = {w: (column <= at) & (at - column < w) if w else column <= at for w in windows}
    live = platform_of(mesh) == "tpu" and positions.shape[1] == 1 and length % LIVE_TILE == 0

    def attend(
        q: Array,
        k: Array,
        v: Array,
        keys: Array,
        values: Array,
        window: int = 0,
        sinks: Array | None = None,
    ) -> tuple[Array, Array, Array]:
        k, v = (x.reshape(*x.shape[:2], x.shape[2] // together, -1) for x in (k, v))
        if live and k.shape[3] % LANES == 0:
            return _live_attention(q, k, v, keys, values, positions[:, 0], window, cap, sinks, mesh)
        # Two index arrays with slices between them: NumPy's rule puts their axes first, [B, T, K,
        # H], which is the shape of `k` and `v`.
        at_keys = (rows, slice(None), *(slice(None),) * positions_last, positions)
        keys = keys.at[at_keys].set(k.astype(keys.dtype))
        values = values.at[rows, :, positions].set(v.astype(values.dtype))
        all_k, all_v = (_apart(x, together).astype(q.dtype) for x in (keys, values))
        mask = masks[window]
        out = dense_cached_attention(q, all_k, all_v, mask, cap, sinks, positions_last)
        return out, keys, values

    return attend


def _apart(cache: Array, together: int) -> Array:
    """Returns keys or values [B, K, S, H] of a cache whose heads lie beside each other."""
    if together == 1:
        return cache
    B, K, S, _ = cache.shape
    apart = jnp.moveaxis(cache.reshape(B, K, S, together, -1), 3, 2)
    return apart.reshape(B, K * together, S, -1)


def _live_attention(
    q: Array,
    k: Array,
    v: Array,
    keys: Array,
    values: Array,
    positions: Array,
    window: int,
    cap: float,
    sinks: Array | None,
    mesh: Mesh | None,
) -> tuple[Array, Array, Array]:
    """`live` on every device of the mesh; of one token a row, [B, 1, N, H]."""
    from deltapref_jax.models.attention.live import live_attention

    run: Any = functools.partial(live_attention, window=window, cap=cap)
    if mesh is not None:  # of one device too, so that its platform is the kernel's
        # A cache whose heads do not divide is whole on every device of `tensor`.
        heads = "tensor" if keys.shape[1] % mesh.shape["tensor"] == 0 else None
        of_heads = PartitionSpec(*ROWS, heads)
        run = jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(*(of_heads,) * 5, ROWS, PartitionSpec(heads)),
            out_specs=of_heads,
            check_vma=False,
        )
    out, keys, values = run(q[:, 0], k[:, 0], v[:, 0], keys, values, positions, sinks)
    return out[:, None], keys, values


def _select(kinds: Sequence[Any], kind: Any) -> Any:
    """Returns the entry of a layer's kind; `kind` may be traced where there are several."""
    if len(kinds) == 1:
        return kinds[0]
    if isinstance(kind, int):
        return kinds[kind]
    return jax.tree.map(lambda *entries: jnp.stack(entries)[kind], *kinds)
