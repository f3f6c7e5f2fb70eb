"""Device meshes with the axes data, fsdp, tensor and context; host arrays to devices and back."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from deltapref_jax.config import ConfigError, MeshShape
from deltapref_jax.devices import Devices, count_slices

AXES = ("data", "fsdp", "tensor", "context")

Sizes = tuple[int, ...]
"""Devices along data, fsdp, tensor and context."""


class Batch(NamedTuple):
    """What a mesh spreads: `rows`, which are called `name` in the config's part `field`."""

    field: str
    name: str
    rows: int
    row_length: int = 0


def wide_first(sizes: Sizes) -> Any:
    """Order of choice of meshes of all devices: most shards of rows, then most shards of weights.

    Rows over as many devices as divide them waste none, and fsdp needs the least memory.
    """
    data, fsdp, tensor, _ = sizes
    return -data * fsdp, tensor, data


class Condition(NamedTuple):
    """What a shape must meet, and the sentence, without its end, where no shape of a list does."""

    holds: Callable[[Sizes], bool]
    sentence: Callable[[list[Sizes]], str]


def fit_shape(
    field: str,
    shape: MeshShape,
    devices: Devices,
    conditions: Sequence[Condition] = (),
    order: Callable[[Sizes], Any] = wide_first,
) -> MeshShape:
    """Returns a shape whose four sizes are all stated and fit the devices.

    Sizes that `shape` states are kept. Of the shapes with these sizes that fit, the first by
    `order` is returned.

    Args:
      field: the config field of the shape, for messages.
      shape: see `MeshShape`.
      devices: what the mesh is made over.
      conditions: what it must meet besides, such as `rows_divide`.
      order: sort key of the shapes to choose from.

    Raises:
      ConfigError: no shape fits. The sentence names the field, the devices, and the nearest shapes
        that fit.
    """
    stated = _stated(shape)
    agrees = Condition(
        lambda s: all(s[axis] == size for axis, size in stated.items()),
        lambda _: (
            f"{field} is {shape.stated} and there {'is' if devices.total == 1 else 'are'} "
            f"{devices.words}; the sizes must multiply to that"
        ),
    )
    needed = [_spans_slices(f"{field} is {shape.stated or 'not stated'}", devices), *conditions]
    shapes = every = _shapes(devices.total)
    for condition in (agrees, *needed):
        left = [s for s in shapes if condition.holds(s)]
        if not left:
            fitting = [
                s for s in every if (shape.context or s[3] == 1) and all(c.holds(s) for c in needed)
            ]
            raise ConfigError(f"{condition.sentence(shapes)}{_nearest(stated, fitting, order)}.")
        shapes = left
    return MeshShape(*min(shapes, key=order))


def _spans_slices(beginning: str, devices: Devices) -> Condition:
    tpu = devices.platform == "tpu"
    places, across = ("slices", "data") if tpu else ("hosts", "data x fsdp")
    return Condition(
        lambda s: across_slices(s, devices.slices, tpu) is not None,
        lambda _: (
            f"{beginning} and the {devices.words} are in {devices.slices} {places}; {across} "
            "must be a multiple of that"
        ),
    )


def rows_divide(field: str, shape: MeshShape, batch: Batch, devices: Devices) -> list[Condition]:
    """Conditions that the rows of a batch divide over data x fsdp, and its columns over context.

    Args:
      field: the config field of the mesh, for messages.
      shape: what the config states of the mesh, for messages.
      batch: what the mesh spreads.
      devices: what the mesh is made over.
    """
    where, name, rows, row_length = batch

    def rows_sentence(shapes: list[Sizes]) -> str:
        shards = min(s[0] * s[1] for s in shapes)
        if shape.stated:
            return (
                f"{where}.{name} is {rows} and {field} spreads {name} over {shards} of "
                f"{devices.words} (data x fsdp); make {name} a multiple of that"
            )
        # A mesh that is chosen fails only because data x fsdp must span slices or hosts.
        places = "slices" if devices.platform == "tpu" else "hosts"
        return (
            f"{where}.{name} is {rows} and {field} states no size, so that a mesh is chosen, but "
            f"each over {devices.words} in {devices.slices} {places} spreads {name} over at least "
            f"{shards} (data x fsdp); set {where}.{name} to a multiple of that"
        )

    return [
        Condition(lambda s: rows % (s[0] * s[1]) == 0, rows_sentence),
        Condition(
            lambda s: row_length % s[3] == 0,
            lambda shapes: (
                f"{where}.row_length is {row_length} and {field} splits each row over "
                f"{min(s[3] for s in shapes)} of {devices.words} (context); make row_length a "
                "multiple of that"
            ),
        ),
    ]


def _stated(shape: MeshShape) -> dict[int, int]:
    """Sizes that are not free to choose, by the number of their axis."""
    sizes = dataclasses.astuple(shape)
    chosen = () if -1 in sizes else (0, 1, 2)  # context is never chosen
    return {
        axis: max(size, 1)
        for axis, size in enumerate(sizes)
        if size != -1 and not (size == 0 and axis in chosen)
    }


def _shapes(count: int) -> list[Sizes]:
    """All sizes that multiply to `count`."""
    divisors = [d for d in range(1, count + 1) if count % d == 0]
    return [
        (a, b, c, count // (a * b * c))
        for a, b, c in itertools.product(divisors, repeat=3)
        if count % (a * b * c) == 0
    ]


def _nearest(
    stated: dict[int, int], fitting: Iterable[Sizes], order: Callable[[Sizes], Any]
) -> str:
    """Names the two fitting shapes that differ least from the stated sizes, by ratios."""

    def distance(sizes: Sizes) -> float:
        return sum(abs(math.log(sizes[axis] / size)) for axis, size in stated.items())

    best = sorted(fitting, key=lambda s: (round(distance(s), 9), order(s)))[:2]
    if not best:
        return ""
    return "; nearest that fits: " + " or ".join(describe(MeshShape(*sizes)) for sizes in best)


def describe(shape: MeshShape) -> str:
    """The axes with more than one device, such as "data=2 fsdp=8"."""
    sizes = {axis: size for axis, size in dataclasses.asdict(shape).items() if size != 1}
    return " ".join(f"{axis}={size}" for axis, size in sizes.items()) or "data=1"


def make_mesh(
    shape: MeshShape, devices: list[Any] | None = None, field: str = "config.mesh"
) -> Mesh:
    """Makes a mesh over `devices` (all by default) with Auto axes.

    `data` takes what is left if no size says otherwise; `fit_shape` chooses by what fits. See
    `device_grid` for devices in several slices.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices, or do not divide over slices.
    """
    devices = devices or jax.devices()
    if not shape.data and -1 not in dataclasses.astuple(shape):
        shape = dataclasses.replace(shape, data=-1)
    known = Devices(len(devices), len(devices), count_slices(devices), devices[0].platform)
    sizes = dataclasses.astuple(fit_shape(field, shape, known))
    types = (AxisType.Auto,) * len(AXES)
    if known.slices == 1:
        return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices)
    return Mesh(device_grid(sizes, devices), AXES, axis_types=types)


def device_grid(sizes: Sequence[int], devices: list[Any]) -> np.ndarray:
    """Arranges devices of several slices so that the slow network carries as little as possible.

    `data` spans the slices, because it exchanges gradients once a step. GPUs of several hosts may
    be spanned by `fsdp` too, where `data` is too small.

    Args:
      sizes: of the axes; their product is the number of devices, and they divide over the slices.
      devices: devices with a `slice_index`, equally many in each slice.

    Returns:
      Devices [data, fsdp, tensor, context].
    """
    across = across_slices(sizes, count_slices(devices), devices[0].platform == "tpu")
    assert across, f"{sizes} do not divide over the slices"
    return mesh_utils.create_hybrid_device_mesh(
        [size // outer for size, outer in zip(sizes, across, strict=True)],
        across,
        devices,
        # As in `jax.make_mesh`: any axis may take part of a physical axis of these.
        allow_split_physical_axes=devices[0].device_kind in ("TPU v5 lite", "TPU v5e"),
    )


def across_slices(sizes: Sequence[int], slices: int, tpu: bool) -> list[int] | None:
    """How often every axis crosses slices; None where the sizes do not divide over them.

    Args:
      sizes: devices along data, fsdp, tensor and context.
      slices: see `Devices`.
      tpu: whether they are slices of TPUs, which `data` alone spans.
    """
    data = slices if tpu else math.gcd(sizes[0], slices)
    fsdp = slices // data
    return None if sizes[0] % data or sizes[1] % fsdp else [data, fsdp, 1, 1]


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


def rows_of(rows: int, mesh: Mapping[str, int]) -> int:
    """`rows`, or two on every device that rows lie over where it is 0: two pad least.

    Args:
      rows: of a batch, as the config has them.
      mesh: devices along every axis.
    """
    return rows or 2 * mesh["data"] * mesh["fsdp"]


def place(tree: Any, shardings: Any, dtype: Any = None) -> Any:
    """Puts arrays on devices as global arrays, sending every device its own part only.

    `jax.device_put` would put whole leaves on every device of a job of several processes, to
    compare the processes' values.

    Args:
      tree: arrays, with the same values on every process, or what has a shape and is indexed as
        one (`quantization.QuantisedMatrix`) or has `read_parts` (`stored.StoredParameter`); None
        leaves stay None.
      shardings: a sharding for all leaves, or a tree of them.
      dtype: every part is copied to this dtype, so that the result may be donated; None keeps the
        leaf's dtype, and the result may share memory with a host array.
    """

    def parts(x: Any, sharding: Sharding) -> jax.Array:
        if hasattr(x, "read_parts"):
            return _read(x, sharding, dtype)
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x if dtype is None else x.astype(dtype), sharding)
        # What can be cut without being computed, such as a quantised matrix, is not made whole.
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


def _read(x: Any, sharding: Sharding, dtype: Any) -> jax.Array:
    """Reads the parts of this process's devices: straight to the memory of a CPU.

    For accelerators a leaf of many layers is read and sent layer by layer, so that the host holds
    one layer's parts of its own devices at a time.
    """
    first: Any = next(iter(sharding.addressable_devices))
    if x.in_bucket and isinstance(sharding, NamedSharding) and not sharding.is_fully_addressable:
        layout = _fewest_bytes(x, sharding)
        if layout is not sharding:
            array = _read_whole(x, layout, dtype, x.shape, ())
            return jax.jit(lambda a: a, out_shardings=sharding)(array)
    if first.platform == "cpu" or len(x.shape) < 3:
        return _read_whole(x, sharding, dtype, x.shape, ())
    return read_by_layer(x, sharding, dtype or x.dtype)


def _fewest_bytes(x: Any, sharding: NamedSharding) -> NamedSharding:
    """The layout in which the processes of a mesh read the fewest bytes of a bucket.

    A request takes as long as a megabyte, so whole rows of a matrix are read, and a layout that
    cuts columns would have every process read all of it. The processes read layers or rows of
    their own instead, and the devices exchange them. All processes choose the same layout.

    Args:
      x: a parameter (`stored.StoredParameter`).
      sharding: that it is wanted in, which is chosen if no other one is better.
    """
    mesh = sharding.mesh

    def most(layout: NamedSharding) -> int:
        """Numbers that a process reads."""
        parts: dict[int, set[tuple[tuple[int, int], ...]]] = {}
        indices: Any = layout.devices_indices_map(x.shape)
        for device, index in indices.items():
            part = tuple(index[axis].indices(x.shape[axis])[:2] for axis in x.row_axes)
            parts.setdefault(device.process_index, set()).add(part)
        return max(
            sum(math.prod(end - first for first, end in part) for part in found)
            for found in parts.values()
        )

    names = [name for name in mesh.axis_names if mesh.shape[name] > 1]
    others = [
        NamedSharding(mesh, PartitionSpec(*[None] * axis, chosen))
        for axis in x.row_axes
        for count in range(1, len(names) + 1)
        for chosen in itertools.combinations(names, count)
        if x.shape[axis] % math.prod(mesh.shape[name] for name in chosen) == 0
    ]
    return min([sharding, *others], key=most)


def read_by_layer(x: Any, sharding: Sharding, dtype: Any) -> jax.Array:
    """Reads a parameter of many layers (`stored.StoredParameter`) one layer at a time."""
    array = jax.jit(lambda: jnp.zeros(x.shape, dtype), out_shardings=sharding)()
    for layer in range(x.shape[0]):
        one = _read_whole(x, sharding, dtype, (1, *x.shape[1:]), (slice(layer, layer + 1),))
        array = _put_layer(array, one, np.int32(layer))
    return array


_put_layer = jax.jit(
    functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0), donate_argnums=0
)


def _read_whole(
    x: Any, sharding: Sharding, dtype: Any, shape: tuple[int, ...], layers: tuple[slice, ...]
) -> jax.Array:
    """Reads and sends an array of `shape`: all of `x`, or of its first axis the slice `layers`."""
    indices: Any = sharding.addressable_devices_indices_map(shape)
    distinct = {str(index): index for index in indices.values()}
    parts = x.read_parts([(*layers, *index[len(layers) :]) for index in distinct.values()], dtype)
    of = dict(zip(distinct, parts, strict=True))
    return jax.make_array_from_single_device_arrays(
        shape,
        sharding,
        [jax.device_put(of[str(index)], device) for device, index in indices.items()],
    )


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
