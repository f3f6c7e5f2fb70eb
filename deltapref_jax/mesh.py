"""Devices as a mesh with the axes data, fsdp, tensor and context; several processes as one job."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deltapref_jax.config import ConfigError, MeshShape

AXES = ("data", "fsdp", "tensor", "context")


def make_mesh(shape: MeshShape, devices: list[Any] | None = None) -> Mesh:
    """A mesh over `devices` (all by default) with Auto axes; one size may be -1 and takes what is left.

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
            f"config.mesh is {shape.data} x {shape.fsdp} x {shape.tensor} x {shape.context} (data, fsdp, "
            f"tensor, context) and there are {len(devices)} devices; the sizes must multiply to that, "
            "one of them may be -1."
        )
    return jax.make_mesh(
        tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def check_rows(where: str, rows: int, row_length: int, mesh: Mesh) -> None:
    """Whether packed batches [rows, row_length] divide over the mesh.

    Raises:
      ConfigError: they do not; `where` is what the fields belong to.
    """
    ways, parts = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["context"]
    if rows % ways:
        raise ConfigError(
            f"{where}.rows is {rows} and the mesh spreads rows over {ways} devices (data x fsdp); make "
            "rows a multiple of that."
        )
    if row_length % parts:
        raise ConfigError(
            f"{where}.row_length is {row_length} and the mesh splits each row over {parts} devices "
            "(context); make row_length a multiple of that."
        )


def shard(tree: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    """Host arrays, the same on every process, as global arrays laid out by `spec`; None leaves stay None."""
    sharding = NamedSharding(mesh, spec)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), tree
    )


def platform_of(mesh: Mesh | None) -> str:
    """ "cpu", "gpu" or "tpu": of the mesh's devices (which a program may be compiled for without having them)."""
    return mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()


def gather_to_host(tree: Any) -> Any:
    """Global arrays as whole host arrays, on every process; all of them must ask."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)


def is_first() -> bool:
    """Whether this process plans, writes and prints for the job."""
    return jax.process_index() == 0
