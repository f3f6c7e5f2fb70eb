"""Mixtures of experts: every token is multiplied by the matrices of a few experts out of many.

    tokens           t0 t1 t2          each is sent to 2 of 4 experts
    experts          1,3 0,1 1,2
    sorted by expert t1 | t0 t1 t2 | t2 | t0     groups of rows, one matrix each (`ragged_dot`)

The products are grouped, so no token is dropped and none is computed for an expert that it was not
sent to. On a mesh, every device sorts its own tokens, and the experts lie over `tensor`: a device
computes those of its tokens that its experts serve, and one sum over `tensor` ends the layer.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from deltapref_jax.models.sharding import BATCH
from deltapref_jax.models.spec import Experts


def mixture(
    x: Float[Array, "B T D"],
    weights: Sequence[Array],
    experts: Experts,
    activation: Callable[[Array], Array],
    mesh: Mesh | None = None,
) -> Float[Array, "B T D"]:
    """Sums the outputs of each token's experts, weighted by the router's probabilities.

    The router is a softmax over all experts in float32, of which the largest `active` count (Qwen3,
    arXiv 2505.09388).

    Args:
      x: the tokens; padding is computed too.
      weights: the router [D, E], and of the experts gate [E, D, X], up [E, D, X], down [E, X, D].
      experts: their number, how many are active, and whether their weights are normalised.
      activation: of the gate.
      mesh: rows lie over data and fsdp, columns over context, experts over tensor; None means one
        device.
    """
    if mesh is None or mesh.size == 1:
        return _local(x, weights, experts, activation, None)
    axis = "tensor" if experts.total % mesh.shape["tensor"] == 0 else None
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    # A few rows, as of one prompt, need not divide over the mesh; every device computes them then.
    whole = x.shape[0] % rows or x.shape[1] % mesh.shape["context"]
    tokens = PartitionSpec() if whole else PartitionSpec(*BATCH, None)
    matrix = PartitionSpec(axis, None, None)
    return jax.shard_map(
        lambda x, weights: _local(x, weights, experts, activation, axis),
        mesh=mesh,
        in_specs=(tokens, (PartitionSpec(), matrix, matrix, matrix)),
        out_specs=tokens,
        check_vma=False,
    )(x, tuple(weights))


def _local(
    x: Array,
    weights: Sequence[Array],
    experts: Experts,
    activation: Callable[[Array], Array],
    axis: str | None,
) -> Array:
    """`mixture` of one device's tokens, on the experts that it holds."""
    router, gate, up, down = weights
    flat = x.reshape(-1, x.shape[-1])
    logits = jnp.dot(flat, router.astype(x.dtype), preferred_element_type=jnp.float32)
    probability, chosen = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), experts.active)
    if experts.normalized:
        probability = probability / jnp.sum(probability, axis=-1, keepdims=True)
    held = gate.shape[0]
    first = jax.lax.axis_index(axis) * held if axis else 0
    # Pairs of a token and an expert, sorted by expert; those of other devices' experts come last.
    expert = chosen.reshape(-1) - first
    expert = jnp.where((expert >= 0) & (expert < held), expert, held)
    order = jnp.argsort(expert, stable=True)
    sizes = jnp.bincount(expert, length=held).astype(jnp.int32)
    rows = flat[order // experts.active]

    def product(rows: Array, matrix: Array) -> Array:
        return jax.lax.ragged_dot(rows, matrix.astype(rows.dtype), sizes)

    y = product(activation(product(rows, gate)) * product(rows, up), down)
    # Rows behind the last group belong to no expert of this device.
    y = jnp.where((jnp.arange(len(order)) < jnp.sum(sizes))[:, None], y, 0)
    # Back to the tokens' order, in which the experts of a token are neighbours.
    y = y[jnp.argsort(order)].reshape(*chosen.shape, -1)
    out = jnp.einsum("tkd,tk->td", y.astype(jnp.float32), probability)
    out = jax.lax.psum(out, axis) if axis else out
    return out.astype(x.dtype).reshape(x.shape)
