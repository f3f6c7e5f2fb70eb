"""Compiled functions with abstract arguments: what a run compiles, without an array of it."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deltapref_jax.models.parameters import parameters
from deltapref_jax.models.sharding import BATCH, path_name, shardings
from deltapref_jax.models.spec import ModelSpec


class Program(NamedTuple):
    """A jitted function with the shapes, dtypes and shardings of its arguments.

    Attributes:
      call: the function.
      args: `jax.ShapeDtypeStruct`, in trees.
      beside: what lies on the devices while it runs and is no argument, such as moments while the
        gradient is computed.
      kwargs: arguments by name, static ones with their values.
      trips: of loops whose length depends on data, at most.
    """

    call: Callable[..., Any]
    args: tuple[Any, ...]
    beside: Any = ()
    kwargs: Mapping[str, Any] = {}
    trips: int = 1

    def lower(self) -> jax.stages.Lowered:
        """Traces and lowers the function; no array is allocated."""
        lowered: jax.stages.Lowered = self.call.lower(  # type: ignore[attr-defined]
            *self.args, **self.kwargs
        )
        return lowered

    def result(self) -> Any:
        """Shapes of what it returns."""
        return jax.eval_shape(lambda *args: self.call(*args, **self.kwargs), *self.args)


def placed(tree: Any, mesh: Mesh) -> Any:
    """Shapes of parameters or of a training state with the shardings of `sharding.RULES`."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings(tree, mesh),
    )


def placed_weights(tree: Any, spec: ModelSpec, mesh: Mesh, dtype: str) -> Any:
    """`placed` with the dtypes that `weights.open_model` gives to weights that are not trained.

    Args:
      tree: shapes of the parameters of a decoder, stacked or not, or of a part of them.
      spec: of the decoder.
      mesh: the mesh.
      dtype: of the computation.
    """
    declared = parameters(spec)

    def stored(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        # The layers of an unstacked decoder have numbers.
        parameter = declared.get(re.sub(r"^blocks\.\d+\.", "blocks.", path_name(path)))
        numbers = parameter.stored_dtype(spec, dtype) if parameter else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, numbers, sharding=leaf.sharding)

    return jax.tree_util.tree_map_with_path(stored, placed(tree, mesh))


def array(mesh: Mesh, spec: PartitionSpec, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    """An abstract array; `spec` is its layout."""
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=NamedSharding(mesh, spec))


def packed_rows(mesh: Mesh, rows: int, length: int) -> jax.ShapeDtypeStruct:
    """One of the arrays [rows, length] of a packed batch."""
    return array(mesh, BATCH, jnp.int32, rows, length)


def device_bytes(tree: Any) -> int:
    """Bytes of abstract arrays on one device."""

    def size(leaf: Any) -> int:
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
        return math.prod(shape) * jnp.dtype(leaf.dtype).itemsize

    return sum(map(size, jax.tree.leaves(tree)))
