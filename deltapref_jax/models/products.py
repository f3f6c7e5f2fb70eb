"""Matrix products over a mesh: what is gathered before them, and what is summed after them.

    x        bf16 [B, T, D]     rows over data and fsdp, columns over context (and tensor)
    weight   f32  [D/f, F/t]    --cast, all-gather over fsdp-->  bf16 [D, F/t]
    x weight      [B, T, F/t]   every device multiplies its tokens; nothing is summed over fsdp
    xᵀ g     f32  [D, F/t]      --reduce-scatter over fsdp-->    f32 [D/f, F/t]
                                --all-reduce over data and context

These collectives are stated in `shard_map` and not left to XLA's partitioner: for a weight that is
sharded along the axis that a product sums over, the partitioner adds up partial products in
bfloat16, so that a mesh would compute less exactly than one device.

Over `tensor`, a product whose outputs are sharded (q, k, v, gate, up) is followed by one whose
inputs are (o, down), as in Megatron-LM (arXiv 1909.08053). Between them the residual stream has its
columns over `tensor` (sequence parallelism, arXiv 2205.05198): they are gathered before the first
product and summed and scattered after the second, which moves what one sum would.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from deltapref_jax.models.sharding import BATCH

GATHERED = "gathered"
"""Name of gathered weights and columns for `jax.checkpoint`, whose policies must not save them: the
backward pass gathers them again."""


class Layout(NamedTuple):
    """How the residual stream of packed rows lies over a mesh of several devices."""

    mesh: Mesh
    split: bool  # whether its columns are over `tensor` too

    @classmethod
    def of(cls, mesh: Mesh | None, length: int) -> "Layout | None":
        """Returns the layout of rows of `length` tokens; None on one device."""
        if mesh is None or mesh.size == 1:
            return None
        tensor = mesh.shape["tensor"]
        return cls(mesh, tensor > 1 and length % (tensor * mesh.shape["context"]) == 0)

    @property
    def residual(self) -> PartitionSpec:
        """The sharding of the residual stream, [B, T, D]."""
        columns = ("context", "tensor") if self.split else "context"
        return PartitionSpec(BATCH[0], columns, None)

    def run(self, f: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """Returns `f`, which computes one device's shares, as a function of global arrays."""
        return jax.shard_map(
            f, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def several(self, *axes: str) -> tuple[str, ...]:
        """Returns those of the axes that have several devices."""
        return tuple(axis for axis in axes if self.mesh.shape[axis] > 1)


@jax.custom_vjp
def add_bias(y: Float[Array, "*n O"], bias: Float[Array, " O"]) -> Array:
    """Adds a bias in the dtype of `y`; its gradient is summed in float32."""
    return y + bias.astype(y.dtype)


def _add_bias_forward(y: Array, bias: Array) -> tuple[Array, Array]:
    return add_bias(y, bias), bias


def _add_bias_backward(bias: Array, g: Array) -> tuple[Array, Array]:
    rows = tuple(range(g.ndim - bias.ndim))
    return g, jnp.sum(g, rows, dtype=jnp.float32).astype(bias.dtype)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


def in_values_of(bias: Array, dtype: jnp.dtype) -> Array:
    """Rounds a bias or sinks to the values of the computation's dtype, in their own dtype.

    So a bias is the same number whether it is held in float32 or in the computation's dtype. The
    gradient passes by the rounding, and is summed in the bias's own dtype.
    """
    # XLA may drop a cast to a narrower dtype and back, but not this operation.
    kept = jnp.finfo(dtype)
    rounded = jax.lax.reduce_precision(bias, kept.nexp, kept.nmant)
    return bias + jax.lax.stop_gradient(rounded - bias)


def scatter_sum(x: Array, axis: int, devices: str = "fsdp") -> Array:
    """Sums over the mesh axis `devices` inside a `shard_map`; each keeps its part along `axis`.

    XLA compiles `psum_scatter` for TPU as a sum of everything on every device, followed by a slice,
    which moves twice as much. There a ring of permutations does it.
    """

    def part(x: Array) -> Array:
        return jax.lax.psum_scatter(x, devices, scatter_dimension=axis, tiled=True)

    ring = functools.partial(ring_sum, axis=axis, devices=devices)
    return jax.lax.platform_dependent(x, tpu=ring, default=part)


_UNROLLED = 16
"""Steps of a ring that are laid out, so that they overlap with what else a layer computes."""


def ring_sum(x: Array, axis: int, devices: str) -> Array:
    """`scatter_sum` in steps: a device adds its own part to a sum that it hands to the next one."""
    count, me = jax.lax.axis_size(devices), jax.lax.axis_index(devices)
    size = x.shape[axis] // count
    ring = [(i, (i + 1) % count) for i in range(count)]

    def step(turn: Any, total: Array) -> Array:
        # The sum that a device begins is that of the device before it, where it ends.
        own = jax.lax.dynamic_slice_in_dim(x, (me - 1 - turn) % count * size, size, axis)
        return jax.lax.ppermute(total, devices, ring) + own

    first = jax.lax.dynamic_slice_in_dim(x, (me - 1) % count * size, size, axis)
    return jax.lax.fori_loop(1, count, step, first, unroll=count <= _UNROLLED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather_shards(x: Array, axis: int | None, dtype: jnp.dtype) -> Array:
    """Gathers an array that is sharded over fsdp along `axis`, in `dtype`, inside a `shard_map`.

    The sum of the gradient over fsdp is float32 and scattered. An axis of None gathers nothing.
    """
    x = x.astype(dtype)
    x = x if axis is None else jax.lax.all_gather(x, "fsdp", axis=axis, tiled=True)
    return checkpoint_name(x, GATHERED)


def _scatter_gradient(axis: int | None, dtype: jnp.dtype, saved: Array, g: Array) -> tuple[Array]:
    g = g.astype(jnp.float32)
    if axis is not None:
        g = scatter_sum(g, axis)
    return (g.astype(saved.dtype),)


gather_shards.defvjp(
    # An empty array tells the backward pass the dtype.
    lambda x, axis, dtype: (gather_shards(x, axis, dtype), jnp.zeros(0, x.dtype)),
    _scatter_gradient,
)


def _without_fsdp(spec: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec))


class _Specs(NamedTuple):
    """Shardings of a group of products x * w of one x, inside and outside of them."""

    sums: bool  # whether x and the weights are sharded along the axis that is summed over
    x: PartitionSpec  # of whole columns
    given: PartitionSpec  # of x as the caller has it
    weights: tuple[PartitionSpec, ...]  # gathered
    outputs: tuple[PartitionSpec, ...]

    @classmethod
    def of(cls, specs: Sequence[PartitionSpec], layout: Layout) -> "_Specs":
        sums = specs[0][0] == "tensor"
        tokens = PartitionSpec(*BATCH, "tensor" if sums else None)
        weights = tuple(_without_fsdp(spec) for spec in specs)
        return cls(
            sums,
            tokens,
            layout.residual if layout.split and not sums else tokens,
            weights,
            tuple(
                layout.residual if sums else PartitionSpec(*BATCH, *spec[1:]) for spec in weights
            ),
        )


def _sum_over_tensor(x: Array, layout: Layout, dtype: jnp.dtype) -> Array:
    """Sums float32 over `tensor` and rounds once, as one device does."""
    if layout.split:
        return scatter_sum(x, 1, "tensor").astype(dtype)
    return jax.lax.psum(x, "tensor").astype(dtype)


def _whole_columns(x: Array) -> Array:
    return jax.lax.all_gather(x, "tensor", axis=1, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def products(
    x: Float[Array, "B T I"],
    weights: tuple[Float[Array, "I *out"], ...],
    specs: tuple[PartitionSpec, ...],
    layout: Layout,
) -> tuple[Array, ...]:
    """Returns x * w, [B, T, *out], of each weight, in the dtype of `x`.

    Values and gradients are those of `decoder.linear`: sums over devices are float32 and are
    rounded once. A weight that is not differentiated has no gradient.

    Args:
      x: over data, fsdp and context; over tensor it has its columns where the layout splits them
        and its last axis where the weights have their first.
      weights: matrices, in any dtype.
      specs: sharding of every weight, with as many entries as it has axes.
      layout: of the residual stream.
    """
    return _multiply(x, weights, specs, layout)[0]


def _multiply(
    x: Array, weights: Sequence[Array], specs: Sequence[PartitionSpec], layout: Layout
) -> tuple[tuple[Array, ...], Array, tuple[Array, ...]]:
    """Returns the products, and what they read: whole columns of x, whole weights."""
    s, dtype = _Specs.of(specs, layout), x.dtype
    if layout.split and not s.sums:
        x = checkpoint_name(layout.run(_whole_columns, s.given, s.x)(x), GATHERED)

    def gather(w: Array, spec: PartitionSpec, whole: PartitionSpec) -> Array:
        axis = spec.index("fsdp") if "fsdp" in layout.several(*filter(None, spec)) else None
        gathered = layout.run(lambda w: gather_shards(w, axis, dtype), spec, whole)(w)
        return checkpoint_name(gathered, GATHERED)

    gathered = tuple(
        gather(w, spec, whole) for w, spec, whole in zip(weights, specs, s.weights, strict=True)
    )

    def local(x: Array, *weights: Array) -> tuple[Array, ...]:
        if not (s.sums and layout.several("tensor")):
            return tuple(jnp.tensordot(x, w, 1) for w in weights)
        shares = (jnp.tensordot(x, w, 1, preferred_element_type=jnp.float32) for w in weights)
        return tuple(_sum_over_tensor(y, layout, dtype) for y in shares)

    return layout.run(local, (s.x, *s.weights), s.outputs)(x, *gathered), x, gathered


def _forward(
    x: Any, weights: Any, specs: tuple[PartitionSpec, ...], layout: Layout
) -> tuple[tuple[Array, ...], tuple[Any, ...]]:
    outputs, whole, gathered = _multiply(x.value, [w.value for w in weights], specs, layout)
    # Of a trained weight an empty array is kept, which has its dtype.
    trained = tuple(jnp.zeros(0, w.value.dtype) if w.perturbed else None for w in weights)
    return outputs, (whole if any(w.perturbed for w in weights) else None, gathered, trained)


def _backward(
    specs: tuple[PartitionSpec, ...], layout: Layout, saved: tuple[Any, ...], g: tuple[Array, ...]
) -> tuple[Array, tuple[Array | None, ...]]:
    x, gathered, trained = saved
    s, tensor = _Specs.of(specs, layout), layout.mesh.shape["tensor"]
    which = [i for i, dtype in enumerate(trained) if dtype is not None]

    def local(x: Array, weights: Sequence[Array], g: Sequence[Array]) -> tuple[Array, list[Array]]:
        if s.sums and layout.split:
            g = [_whole_columns(y) for y in g]
        dx = jnp.float32(0)
        for y, w, spec in zip(g, weights, s.weights, strict=True):
            axes = tuple(range(2, y.ndim)), tuple(range(1, w.ndim))
            share = jax.lax.dot_general(y, w, (axes, ((), ())), preferred_element_type=jnp.float32)
            # Where the outputs are on every device of `tensor`, each has the whole of the product.
            dx += share if s.sums or "tensor" in spec else share / tensor
        if not s.sums and layout.several("tensor"):
            dx = _sum_over_tensor(dx, layout, g[0].dtype)
        return dx.astype(g[0].dtype), [_weight_gradient(x, g[i], specs[i], layout) for i in which]

    run = layout.run(
        local,
        (s.x if which else None, s.weights, s.outputs),
        (s.given, [specs[i] for i in which]),
    )
    dx, found = run(x, gathered, g)
    gradients = dict(zip(which, found, strict=True))
    return dx, tuple(
        None if dtype is None else gradients[i].astype(dtype.dtype)
        for i, dtype in enumerate(trained)
    )


def _weight_gradient(x: Array, g: Array, spec: PartitionSpec, layout: Layout) -> Array:
    """Sums xᵀ g over all tokens; returns the device's shard of it, in float32."""
    d = jax.lax.dot_general(x, g, (((0, 1), (0, 1)), ((), ())), preferred_element_type=jnp.float32)
    whole = layout.several("data", "fsdp", "context")
    if "fsdp" in whole and "fsdp" in spec:
        d = scatter_sum(d, spec.index("fsdp"))
        whole = layout.several("data", "context")
    return jax.lax.psum(d, whole) if whole else d


products.defvjp(_forward, _backward, symbolic_zeros=True)
