"""Meshes of a run: the shape of every stage and model, chosen or checked before any work.

Training, scoring and judging run on all devices of a job. Sampling and evaluation run on the
devices of each host.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import AbstractMesh

from deltapref_jax.config import (
    ConfigError,
    Experiment,
    Generator,
    Judge,
    MeshShape,
    Model,
    Scoring,
    Training,
    model_of,
    reference_of,
)
from deltapref_jax.devices import Devices
from deltapref_jax.mesh import (
    AXES,
    Batch,
    Condition,
    Sizes,
    describe,
    fit_shape,
    rows_divide,
)
from deltapref_jax.models.parameters import Parameter, parameters
from deltapref_jax.models.sharding import path_name, shardings, undivided
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.models.weights import abstract
from deltapref_jax.sampling.plan import cache_positions

SpecOf = Callable[[str], ModelSpec]
"""A model's path to its sizes."""

Fit = Callable[[str, MeshShape, Model], MeshShape]
"""Field, shape and model to a shape with all sizes stated."""

Item = TypeVar("Item", Generator, Judge)

_ROOM = 0.85  # of a device's memory, for weights and cache; decoding needs the rest
_BYTES = {"float32": 4, "bfloat16": 2}


def fit_meshes(e: Experiment, devices: Devices, spec_of: SpecOf) -> Experiment:
    """Returns the experiment with all four sizes of every mesh stated.

    Args:
      e: validated.
      devices: of the job.
      spec_of: gives the sizes of models.

    Raises:
      ConfigError: a mesh does not fit the devices or the rows, or the devices have no room for a
        model; one sentence names the field, the devices, and the nearest shapes that fit.
    """
    reference = reference_of(e.student, e.reference)

    def scoring(field: str, shape: MeshShape, model: Model) -> MeshShape:
        return _fit_scoring(field, shape, e.scoring, model, devices, spec_of)

    def sampling(field: str, shape: MeshShape, model: Model) -> MeshShape:
        return _fit_sampling(field, shape, e, model, devices.of_host, spec_of)

    def own(item: Item, where: str, stage: str, shape: MeshShape, fit: Fit) -> Item:
        """The item with its mesh, which is that of its stage where it has none of its own."""
        if item.mesh != MeshShape():
            stage, shape = where, item.mesh
        mesh = fit(f"{stage}.mesh", shape, model_of(e, item.model))
        return dataclasses.replace(item, mesh=mesh)

    generators = tuple(
        own(g, f"config.generators[{i}]", "config.sampling", e.sampling.mesh, sampling)
        for i, g in enumerate(e.generators)
    )
    judges = tuple(
        own(j, f"config.judges[{i}]", "config.scoring", e.scoring.mesh, scoring)
        if j.kind == "model"
        else j
        for i, j in enumerate(e.judges)
    )
    return dataclasses.replace(
        e,
        training=fit_training(e.training, e.student, devices, spec_of),
        scoring=dataclasses.replace(
            e.scoring, mesh=scoring("config.scoring.mesh", e.scoring.mesh, reference)
        ),
        sampling=dataclasses.replace(
            e.sampling, mesh=sampling("config.sampling.mesh", e.sampling.mesh, e.student)
        ),
        generators=generators,
        judges=judges,
    )


def fit_training(t: Training, student: Model, devices: Devices, spec_of: SpecOf) -> Training:
    """Returns the training config with all four sizes of its mesh stated.

    Raises:
      ConfigError: see `fit_meshes`; or moments cannot lie on the host of these devices.
    """
    if t.offload_moments and not devices.pinned_host:
        raise ConfigError(
            f"config.training.offload_moments is True and the {devices.words} ({devices.platform}) "
            "have no pinned memory of their host; leave it out."
        )
    # Weights and gradients in float32, and two moments, which are all there in an update; the
    # frozen weights of a run of adapters have at least two bytes.
    width = 2 if t.lora.rank else 8 + 2 * _BYTES[t.moments]
    what = "weights" if t.lora.rank else "weights, gradients and moments"
    field = "config.training.mesh"
    batch = Batch("config.training", "rows", t.rows, t.row_length)
    conditions = rows_divide(field, t.mesh, batch, devices)
    conditions += _divides(field, t.mesh, student, spec_of)
    conditions += _has_room(field, what, student, width, devices, spec_of)
    return dataclasses.replace(t, mesh=fit_shape(field, t.mesh, devices, conditions))


def _fit_scoring(
    field: str, shape: MeshShape, s: Scoring, model: Model, devices: Devices, spec_of: SpecOf
) -> MeshShape:
    batch = Batch("config.scoring", "rows", s.rows, s.row_length)
    conditions = rows_divide(field, shape, batch, devices)
    conditions += _divides(field, shape, model, spec_of)
    conditions += _has_room(field, "weights", model, None, devices, spec_of)
    return fit_shape(field, shape, devices, conditions)


def _fit_sampling(
    field: str, shape: MeshShape, e: Experiment, model: Model, host: Devices, spec_of: SpecOf
) -> MeshShape:
    width, s = _BYTES[model.dtype], e.sampling

    def has_cache(sizes: Sizes) -> bool:
        """Whether there is room for the weights and twice the longest cache, which is copied."""
        if not host.memory:
            return True
        spec = _spec(model, spec_of)
        heads = spec.kv_heads / (sizes[2] if spec.kv_heads % sizes[2] == 0 else 1)
        positions = s.slots / (sizes[0] * sizes[1]) * cache_positions(s, host.platform)
        cache = 2 * spec.layers * heads * spec.head_width * positions * width
        return _weights(spec, sizes, model.dtype) + 2 * cache < _ROOM * host.memory

    def copies_first(sizes: Sizes) -> tuple[bool, int, int]:
        """Decoding reads all weights at every step, so it gathers none over fsdp if it need not."""
        return not has_cache(sizes), sizes[1], -sizes[0]

    conditions = rows_divide(field, shape, Batch("config.sampling", "slots", s.slots), host)
    conditions += _divides(field, shape, model, spec_of)
    conditions += _has_room(field, "weights", model, None, host, spec_of)
    return fit_shape(field, shape, host, conditions, copies_first)


def _divides(field: str, shape: MeshShape, model: Model, spec_of: SpecOf) -> list[Condition]:
    """The condition that every axis divides the dimensions of parameters that it shards."""

    def whole(sizes: Sizes) -> dict[str, list[str]]:
        if sizes[1] == sizes[2] == 1:
            return {}
        axes = dict(zip(AXES, sizes, strict=True))
        return undivided(_shapes(_spec(model, spec_of)), axes)

    def sentence(shapes: list[Sizes]) -> str:
        sizes = min(shapes, key=lambda s: sum(map(len, whole(s).values())))
        axis, names = next(iter(whole(sizes).items()))
        return (
            f"{field} is {shape.stated or 'not stated'} and "
            f"{sizes[AXES.index(axis)]} devices along {axis} do not divide {', '.join(names)} of "
            f"{model.path}"
        )

    return [Condition(lambda s: not whole(s), sentence)]


def _has_room(
    field: str, what: str, model: Model, width: int | None, devices: Devices, spec_of: SpecOf
) -> list[Condition]:
    """The condition that parameters of `width` bytes each fit the devices, where that is known.

    A width of None is that of a model that is not trained, by its dtype and quantization. The
    condition is necessary and not sufficient: activations come on top.
    """
    if not devices.memory:
        return []

    def size(sizes: Sizes) -> int:
        if width is None:
            return _weights(_spec(model, spec_of), sizes, model.dtype)
        return _on_device(spec_of(model.place), sizes, lambda _: width)

    return [
        Condition(
            lambda s: size(s) < devices.memory,
            lambda shapes: (
                f"{what.capitalize()} of the model {model.path} need "
                f"{min(map(size, shapes)) / 2**30:,.1f} GiB on each of {devices.words} by {field}, "
                f"and a device has {devices.memory / 2**30:,.1f} GiB; take more devices or "
                "another mesh"
            ),
        )
    ]


@functools.lru_cache(maxsize=8)
def _shapes(spec: ModelSpec) -> Any:
    """The shapes of a model's parameters; many meshes are tried on one model."""
    return abstract(spec)[1]


def _spec(model: Model, spec_of: SpecOf) -> ModelSpec:
    """Sizes of a model that is not trained."""
    return spec_of(model.place).quantised(model.quantization)


def _weights(spec: ModelSpec, sizes: Sizes, dtype: str) -> int:
    """Bytes on one device of a model that is not trained, by the dtype of its computation."""
    return _on_device(spec, sizes, lambda p: p.stored_dtype(spec, dtype).itemsize)


def _on_device(spec: ModelSpec, sizes: Sizes, width: Callable[[Parameter], int]) -> int:
    """Bytes of a model's parameters on one device; `width`: bytes of a number of one."""
    params, mesh, declared = _shapes(spec), AbstractMesh(sizes, AXES), parameters(spec)
    leaves = zip(
        jax.tree_util.tree_leaves_with_path(params),
        jax.tree.leaves(shardings(params, mesh)),
        strict=True,
    )
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * width(declared[path_name(path)])
        for (path, leaf), sharding in leaves
    )


def mesh_lines(e: Experiment, devices: Devices) -> list[str]:
    """Says which meshes a study runs on; nothing on one device.

    Args:
      e: with the meshes of `fit_meshes`.
      devices: of the job.
    """
    if devices.total == 1:
        return []
    everywhere = [
        ("training", e.training.mesh),
        ("scoring", e.scoring.mesh),
        *((f"judge {j.name}", j.mesh) for j in e.judges if j.kind == "model"),
    ]
    on_hosts = [
        ("sampling", e.sampling.mesh),
        *((f"generator {g.name}", g.mesh) for g in e.generators),
    ]

    def listed(stage: MeshShape, meshes: list[tuple[str, MeshShape]]) -> str:
        """Those of the stages, and those of models that have another one than their stage."""
        shown = [
            f"{name} {describe(shape)}"
            for name, shape in meshes
            if " " not in name or shape != stage
        ]
        return "; ".join(shown)

    return [
        f"Meshes: {listed(e.scoring.mesh, everywhere)}; on each host "
        f"{listed(e.sampling.mesh, on_hosts)}."
    ]


def training_lines(t: Training) -> list[str]:
    """Says which mesh a run trains on; nothing on one device."""
    if t.mesh == MeshShape(1, 1, 1, 1):
        return []
    return [f"Mesh: training {describe(t.mesh)}."]
