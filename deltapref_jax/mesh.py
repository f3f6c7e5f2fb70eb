"""Device meshes with the axes data, fsdp, tensor and context; host arrays to devices and back."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from deltapref_jax.config import ConfigError, MeshShape

AXES = ("data", "fsdp", "tensor", "context")


def make_mesh(shape: MeshShape, devices: list[Any] | None = None) -> Mesh:
    """Makes a mesh over `devices` (all by default) with Auto axes.

    One size may be -1: it is the number of devices divided by the other sizes. See `device_grid`
    for devices in several slices.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices, or do not divide over slices.
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
    types = (AxisType.Auto,) * len(AXES)
    if _slices(devices) == 1:
        return jax.make_mesh(tuple(sizes), AXES, axis_types=types, devices=devices)
    return Mesh(device_grid(sizes, devices), AXES, axis_types=types)


def _slices(devices: list[Any]) -> int:
    """Number of groups of devices with a fast network: slices of TPUs, hosts of GPUs or CPUs."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def device_grid(sizes: list[int], devices: list[Any]) -> np.ndarray:
    """Arranges devices of several slices so that the slow network carries as little as possible.

    `data` spans the slices, because it exchanges gradients once a step. GPUs of several hosts may
    be spanned by `fsdp` too, where `data` is too small.

    Args:
      sizes: of the axes; their product is the number of devices.
      devices: devices with a `slice_index`, equally many in each slice.

    Returns:
      Devices [data, fsdp, tensor, context].

    Raises:
      ConfigError: the sizes do not divide over the slices; the sentence names the nearest that do.
    """
    slices, tpu = _slices(devices), devices[0].platform == "tpu"
    across = _across_slices(sizes, slices, tpu)
    if across is None:
        fits = [
            other
            for other in itertools.product(_divisors(len(devices)), repeat=len(sizes))
            if math.prod(other) == len(devices) and _across_slices(other, slices, tpu)
        ]
        nearest = min(
            fits, key=lambda o: sum(abs(math.log(x / y)) for x, y in zip(o, sizes, strict=True))
        )
        raise ConfigError(
            f"config.mesh is {' x '.join(map(str, sizes))} (data, fsdp, tensor, context) and the "
            f"{len(devices)} devices are in {slices} {'slices' if tpu else 'hosts'}; "
            f"{'data' if tpu else 'data x fsdp'} must be a multiple of that: the nearest is "
            f"{' x '.join(map(str, nearest))}."
        )
    return mesh_utils.create_hybrid_device_mesh(
        [size // outer for size, outer in zip(sizes, across, strict=True)],
        across,
        devices,
        # As in `jax.make_mesh`: any axis may take part of a physical axis of these.
        allow_split_physical_axes=devices[0].device_kind in ("TPU v5 lite", "TPU v5e"),
    )


def _across_slices(sizes: Sequence[int], slices: int, tpu: bool) -> list[int] | None:
    """How often every axis crosses slices; None where the sizes do not divide over them."""
    data = slices if tpu else math.gcd(sizes[0], slices)
    fsdp = slices // data
    return None if sizes[0] % data or sizes[1] % fsdp else [data, fsdp, 1, 1]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


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


def place(tree: Any, shardings: Any, dtype: Any = None) -> Any:
    """Puts arrays on devices as global arrays, sending every device its own part only.

    `jax.device_put` would put whole leaves on every device of a job of several processes, to
    compare the processes' values.

    Args:
      tree: arrays, with the same values on every process, or what has a shape and is indexed as
        one (`stored.StoredParameter`); None leaves stay None.
      shardings: a sharding for all leaves, or a tree of them.
      dtype: every part is copied to this dtype, so that the result may be donated; None keeps the
        leaf's dtype, and the result may share memory with a host array.
    """

    def parts(x: Any, sharding: Sharding) -> jax.Array:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x if dtype is None else x.astype(dtype), sharding)
        # What can be cut without being read, such as a parameter in its file, is not read whole.
        host = np.asarray(x) if isinstance(x, jax.Array) or not hasattr(x, "shape") else x
        return jax.make_array_from_callback(
            host.shape,
            sharding,
            lambda index: host[index] if dtype is None else np.array(host[index], dtype),
        )

    local = all(s.is_fully_addressable for s in jax.tree.leaves(shardings))
    on_host = all(isinstance(x, np.ndarray | jax.Array) for x in jax.tree.leaves(tree))
    if local and dtype is None and on_host:
        return jax.device_put(tree, shardings)
    if isinstance(shardings, Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    # JAX counts the callbacks as implicit transfers, which the training loop disallows.
    with jax.transfer_guard_host_to_device("allow"):
        return jax.tree.map(parts, tree, shardings)


def shard(tree: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    """Places host arrays on the mesh as global arrays; `spec` is the layout of every leaf."""
    return place(tree, NamedSharding(mesh, spec))


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
