"""Mixtures of experts: every token is multiplied by the matrices of a few experts out of many.

    tokens           t0 t1 t2          each is sent to 2 of 4 experts
    experts          1,3 0,1 1,2
    sorted by expert t1 | t0 t1 t2 | t2 | t0     groups of rows, one matrix each (`ragged_dot`)

The products are grouped, so no token is dropped and none is computed for an expert that it was not
sent to. On a mesh, every device sorts its own tokens, and the experts lie over `tensor`: a device
computes those of its tokens that its experts serve, and one sum over `tensor` ends the layer.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from deltapref_jax.models.products import gather_shards, in_values_of
from deltapref_jax.models.quantization import Quantised, in_dtype
from deltapref_jax.models.sharding import BATCH
from deltapref_jax.models.spec import Experts


def mixture(
    x: Float[Array, "B T D"],
    weights: Mapping[str, Array | Quantised],
    experts: Experts,
    activation: Callable[[Array], Array],
    mesh: Mesh | None = None,
) -> Float[Array, "B T D"]:
    """Sums the outputs of each token's experts, weighted by the router's probabilities.

    The router is a softmax over all experts in float32, of which the largest `active` count (Qwen3,
    arXiv 2505.09388). Where they are normalised, this is a softmax over those alone (gpt-oss).

    Args:
      x: the tokens; padding is computed too.
      weights: "router" [D, E], and of the experts "gate" and "up" [E, D, X] and "down" [E, X, D],
        which may be quantised; in some families also "router_bias" [E], "gate_bias" and "up_bias"
        [E, X], and "down_bias" [E, D].
      experts: their number, how many are active, and whether their weights are normalised.
      activation: of the gate, where the experts have no `clamped_swiglu`.
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
    # Matrices come in with their width over fsdp, as they are stored, and are gathered in the dtype
    # of the tokens; their gradients are summed over devices in float32.
    divides = mesh.shape["fsdp"] > 1 and x.shape[-1] % mesh.shape["fsdp"] == 0
    widths = {
        name: dimension
        for name, dimension in (("router", 0), ("gate", 1), ("up", 1), ("down", 2))
        if divides and not isinstance(weights[name], Quantised)
    }

    def spec(name: str) -> PartitionSpec:
        axes: list[str | None] = [None if "router" in name else axis, None, None]
        if name in widths:
            axes[widths[name]] = "fsdp"
            return PartitionSpec(*axes[: 2 if name == "router" else 3])
        return PartitionSpec(axes[0])

    def local(x: Array, weights: dict[str, Any]) -> Array:
        gathered = {name: gather_shards(weights[name], widths[name], x.dtype) for name in widths}
        return _local(x, weights | gathered, experts, activation, axis)

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(tokens, {name: spec(name) for name in weights}),
        out_specs=tokens,
        check_vma=False,
    )(x, dict(weights))


def clamped_swiglu(gate: Float[Array, "*n X"], up: Array, alpha: float, limit: float) -> Array:
    """Returns (u + 1) * g * sigmoid(alpha * g), the gated product of gpt-oss (arXiv 2508.10925).

    Here g is min(gate, limit), and u is `up` between -limit and limit.
    """
    gate = jnp.minimum(gate, limit)
    return (jnp.clip(up, -limit, limit) + 1) * gate * jax.nn.sigmoid(alpha * gate)


def _local(
    x: Array,
    weights: Mapping[str, Array | Quantised],
    experts: Experts,
    activation: Callable[[Array], Array],
    axis: str | None,
) -> Array:
    """`mixture` of one device's tokens, on the experts that it holds."""
    flat = x.reshape(-1, x.shape[-1])
    # Routers and biases are never quantised.
    exact = {name: w for name, w in weights.items() if not isinstance(w, Quantised)}
    logits = jnp.dot(flat, exact["router"].astype(x.dtype), preferred_element_type=jnp.float32)
    if "router_bias" in exact:
        logits = logits + in_values_of(exact["router_bias"], x.dtype)
    probability, chosen = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), experts.active)
    if experts.normalized:
        probability = probability / jnp.sum(probability, axis=-1, keepdims=True)
    held = jax.tree.leaves(weights["gate"])[0].shape[0]
    first = jax.lax.axis_index(axis) * held if axis else 0
    # Pairs of a token and an expert, sorted by expert; those of other devices' experts come last.
    expert = chosen.reshape(-1) - first
    expert = jnp.where((expert >= 0) & (expert < held), expert, held)
    order = jnp.argsort(expert, stable=True)
    sizes = jnp.bincount(expert, length=held).astype(jnp.int32)
    rows = flat[order // experts.active]

    def of_expert(rows: Array) -> Array:
        """Rows [E, n] of every token's expert; rows of no expert here have some, and are cut."""
        return rows[jnp.minimum(expert[order], held - 1)]

    def product(rows: Array, name: str) -> Array:
        matrix = weights[name]
        if isinstance(matrix, Quantised):
            values = in_dtype(matrix.values, rows)
            y = jax.lax.ragged_dot(rows, values, sizes, preferred_element_type=jnp.float32)
            y = (y * of_expert(matrix.scale)).astype(rows.dtype)
        else:
            y = jax.lax.ragged_dot(rows, matrix.astype(rows.dtype), sizes)
        bias = exact.get(f"{name}_bias")
        return y if bias is None else y + of_expert(bias).astype(y.dtype)

    gate, up = product(rows, "gate"), product(rows, "up")
    if experts.swiglu_alpha:
        inner = clamped_swiglu(gate, up, experts.swiglu_alpha, experts.swiglu_limit)
    else:
        inner = activation(gate) * up
    y = product(inner, "down")
    # Rows behind the last group belong to no expert of this device.
    y = jnp.where((jnp.arange(len(order)) < jnp.sum(sizes))[:, None], y, 0)
    # Back to the tokens' order, in which the experts of a token are neighbours.
    y = y[jnp.argsort(order)].reshape(*chosen.shape, -1)
    out = jnp.einsum("tkd,tk->td", y.astype(jnp.float32), probability)
    out = jax.lax.psum(out, axis) if axis else out
    return out.astype(x.dtype).reshape(x.shape)
