"""Which attention runs where: one dispatch over the mesh, every path equal to the plain one.

| path      | runs                                       | work                                                    |
|-----------|--------------------------------------------|---------------------------------------------------------|
| plain     | anywhere; the yardstick of the tests       | L² per row, an L x L mask                               |
| blockwise | anywhere, XLA (`models.blockwise`)         | Σ length²; tiles of 128, on CPU of 64                   |
| splash    | TPU, JAX's Pallas kernel (`models.splash`) | Σ length²; tiles of up to 512, skipped ones cost a step |
| triton    | GPU, our Pallas kernels (`models.triton`)  | Σ length²; tiles of 128                                 |

Branches are not expressible in splash's segment ids: on TPU such rows run blockwise, as rows split over `context` do
everywhere. Tiles of other branches are skipped as those of other segments are.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from deltapref_jax.mesh import platform_of
from deltapref_jax.models.attention import attend, packed_mask, until
from deltapref_jax.models.blockwise import blockwise, plan
from deltapref_jax.models.sharding import BATCH

BLOCK = 128  # of `blockwise`, and the row that is not cut into tiles
CPU_BLOCK = 64  # measured against 96, 128 and 192
Attention = Callable[[Any, Any, Any], Any]


def choose(platform: str, length: int, branched: bool, split: bool) -> str:
    """The path for rows of `length` tokens on `platform` ("cpu", "gpu", "tpu"); `split`: rows lie over several devices.

    A row of one tile has nothing to skip and runs plain. On CPU blockwise beats plain at every length measured (256 to
    1024, rows of one segment included).
    """
    if length <= BLOCK and not split:
        return "plain"
    if platform in ("gpu", "cuda") and not split:
        return "triton"
    if platform == "tpu" and not split and not branched:
        return "splash"
    return "blockwise"


def shares_prompts(mesh: Mesh | None, length: int) -> bool:
    """Whether rows of `length` tokens take the same path with branches as without: then a prompt is read only once."""
    split = mesh is not None and mesh.shape["context"] > 1
    plain, branched = (
        choose(platform_of(mesh), length, branches, split) for branches in (False, True)
    )
    return plain == branched


def zigzag(device: Array | int, parts: int, share: int) -> Int[Array, " T"]:
    """The columns of a row whose queries a device computes, where `parts` devices hold `share` columns of it each.

    A row's later columns see more keys. Cut into 2·parts blocks, device d computes blocks d and 2·parts − 1 − d, the
    even one first (Llama 3, arXiv 2407.21783, section 3.3.2): one segment as long as the row is equal work for all. An
    odd share is not cut, and its device computes what it holds.
    """
    if share % 2:
        return device * share + jnp.arange(share)
    mirror = 2 * parts - 1 - device
    even, odd = (jnp.where(device % 2 == bit, device, mirror) for bit in (0, 1))
    half = share // 2
    return (jnp.stack([even, odd])[:, None] * half + jnp.arange(half)).ravel()


def _exchange(x: Array, parts: int, back: bool = False) -> Array:
    """Sends the columns that a device holds, blocks 2·d and 2·d + 1, to those that compute them (`zigzag`), or back."""
    if x.shape[1] % 2:
        return x
    halves = jnp.split(x, 2, axis=1)
    for odd in (0, 1):
        pairs = [(d, min(2 * d + odd, 2 * parts - 1 - (2 * d + odd))) for d in range(parts)]
        halves[odd] = jax.lax.ppermute(
            halves[odd], "context", [pair[::-1] for pair in pairs] if back else pairs
        )
    return jnp.concatenate(halves, axis=1)


def _split(q: Array, k: Array, v: Array, about: Array, parts: int, block: int) -> Array:
    """Attention of rows split over `context`: keys and values are gathered, queries dealt out."""
    k, v, about = (jax.lax.all_gather(x, "context", axis=1, tiled=True) for x in (k, v, about))
    columns = zigzag(jax.lax.axis_index("context"), parts, q.shape[1])
    block = min(block, max(1, q.shape[1] // 2))
    out = blockwise(_exchange(q, parts), k, v, plan(about, block, columns), block)
    return _exchange(out, parts, back=True)


def _local(path: str, q: Array, k: Array, v: Array, about: Array, block: int) -> Array:
    if path == "triton":
        from deltapref_jax.models.triton import triton

        return triton(q, k, v, about)
    if path == "splash":
        from deltapref_jax.models.splash import splash

        return splash(q, k, v, about)
    block = min(block, q.shape[1])
    return blockwise(q, k, v, plan(about, block), block)


def packed_attention(
    segments: Int[Array, "B L"],
    branches: Int[Array, "B L"] | None = None,
    mesh: Mesh | None = None,
    path: str = "",
) -> Callable[
    [Float[Array, "B L N H"], Float[Array, "B L K H"], Float[Array, "B L K H"]],
    Float[Array, "B L N H"],
]:
    """Attention among the tokens of packed rows (who sees whom: `attention`), as a function of queries, keys, values.

    Args:
      segments: 1 upward, one number per sequence, a run each; 0 is padding.
      branches: 0 for the trunk, 1 upward for branches, a run each; None where there are none.
      mesh: over which rows lie (data, fsdp), heads (tensor) and columns (context); None: one device.
      path: "plain", "blockwise", "splash" or "triton"; "": `choose`.
    """
    length = segments.shape[1]
    parts = mesh.shape["context"] if mesh is not None else 1
    path = path or choose(platform_of(mesh), length, branches is not None, parts > 1)
    if path == "plain":
        mask = packed_mask(segments, branches)
        return lambda q, k, v: attend(q, k, v, mask)

    block = CPU_BLOCK if platform_of(mesh) == "cpu" else BLOCK
    about = segments if path == "splash" else until(segments, branches)  # here: once for all layers

    def run(q: Array, k: Array, v: Array, about: Array) -> Array:
        return (
            _split(q, k, v, about, parts, block)
            if parts > 1
            else _local(path, q, k, v, about, block)
        )

    if mesh is None or mesh.size == 1:
        return lambda q, k, v: run(q, k, v, about)

    def spread(q: Array, k: Array, v: Array) -> Array:
        heads, ways = None, mesh.shape["tensor"]
        copies = ways // math.gcd(k.shape[2], ways)
        if q.shape[2] % ways == 0 and q.shape[2] % (k.shape[2] * copies) == 0:
            heads = "tensor"
            k, v = (jnp.repeat(x, copies, axis=2) if copies > 1 else x for x in (k, v))
        tokens = PartitionSpec(*BATCH, heads, None)
        return jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(tokens, tokens, tokens, BATCH),
            out_specs=tokens,
            check_vma=False,
        )(q, k, v, about)

    return spread
