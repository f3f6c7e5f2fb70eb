"""Device meshes with the axes data, fsdp, tensor and context; host arrays to devices and back."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deltapref_jax.config import ConfigError, MeshShape

AXES = ("data", "fsdp", "tensor", "context")


def make_mesh(shape: MeshShape, devices: list[Any] | None = None) -> Mesh:
    """Makes a mesh over `devices` (all by default) with Auto axes.

    One size may be -1: it is the number of devices divided by the other sizes.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = devices or jax.devices()
    sizes = [shape.data, shape.fsdp, shape.tensor, shape.context]
    fixed = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes and len(devices) % fixed == 0:
        sizes[sizes.index(-1)] = len(devices) // fixed
    if int(np.prod(sizes)) != len(devices):
        raise ConfigError(
            f"config.mesh is {shape.data} x {shape.fsdp} x {shape.tensor} x {shape.context} (data, "
            f"fsdp, tensor, context) and there are {len(devices)} devices; the sizes must multiply "
            "to that, one of them may be -1."
        )
    return jax.make_mesh(
        tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def check_rows(where: str, rows: int, row_length: int, mesh: Mesh) -> None:
    """Checks that packed batches [rows, row_length] divide over the mesh.

    Args:
      where: the config field that `rows` and `row_length` belong to, for the message.
      rows: rows of a batch, split over data and fsdp.
      row_length: tokens of a row, split over context.
      mesh: the mesh.

    Raises:
      ConfigError: they do not divide.
    """
    row_shards, context_shards = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["context"]
    if rows % row_shards:
        raise ConfigError(
            f"{where}.rows is {rows} and the mesh spreads rows over {row_shards} devices (data x "
            "fsdp); make rows a multiple of that."
        )
    if row_length % context_shards:
        raise ConfigError(
            f"{where}.row_length is {row_length} and the mesh splits each row over "
            f"{context_shards} devices (context); make row_length a multiple of that."
        )


def shard(tree: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    """Places host arrays on the mesh as global arrays laid out by `spec`.

    Args:
      tree: arrays, with the same values on every process; None leaves stay None.
      mesh: the mesh, which may span several processes.
      spec: the layout of every leaf.
    """
    sharding = NamedSharding(mesh, spec)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    # Each process places its own part; `device_put` would compare the values across processes.
    # Unlike that, JAX counts this as an implicit transfer, which the training loop disallows.
    with jax.transfer_guard_host_to_device("allow"):
        return jax.tree.map(
            lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), tree
        )


def platform_of(mesh: Mesh | None) -> str:
    """Returns "cpu", "gpu" or "tpu": the mesh's platform, or JAX's default without a mesh.

    They differ when a program is compiled ahead of time for devices that are not attached.
    """
    return mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()


def gather_to_host(tree: Any) -> Any:
    """Returns global arrays as whole host arrays; a collective, so every process must call it."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)


def is_first() -> bool:
    """Whether this is process 0, which plans, writes and prints for the job."""
    return jax.process_index() == 0
