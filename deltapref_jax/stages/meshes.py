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
from deltapref_jax.models.sharding import shardings, undivided
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.models.weights import abstract

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
      ConfigError: see `fit_meshes`.
    """
    # Weights and gradients in float32, and two moments; the frozen weights of a run of adapters
    # have at least two bytes.
    width = 2 if t.lora.rank else 8 + 2 * _BYTES[t.moments]
    what = "weights" if t.lora.rank else "weights, gradients and moments"
    field = "config.training.mesh"
    batch = Batch("config.training", "rows", t.rows, t.row_length)
    conditions = rows_divide(field, t.mesh, batch, devices)
    conditions += _has_room(field, what, student, width, devices, spec_of)
    return dataclasses.replace(t, mesh=fit_shape(field, t.mesh, devices, conditions))


def _fit_scoring(
    field: str, shape: MeshShape, s: Scoring, model: Model, devices: Devices, spec_of: SpecOf
) -> MeshShape:
    batch = Batch("config.scoring", "rows", s.rows, s.row_length)
    conditions = rows_divide(field, shape, batch, devices)
    # Their weights stay float32 whatever the dtype of the computation.
    conditions += _has_room(field, "weights", model, 4, devices, spec_of)
    return fit_shape(field, shape, devices, conditions)


def _fit_sampling(
    field: str, shape: MeshShape, e: Experiment, model: Model, host: Devices, spec_of: SpecOf
) -> MeshShape:
    width, s = _BYTES[model.dtype], e.sampling

    def has_cache(sizes: Sizes) -> bool:
        """Whether there is room for the weights and twice the longest cache, which is copied."""
        if not host.memory:
            return True
        spec = spec_of(model.place)
        heads = spec.kv_heads / (sizes[2] if spec.kv_heads % sizes[2] == 0 else 1)
        positions = s.slots / (sizes[0] * sizes[1]) * (s.max_prompt + s.max_tokens)
        cache = 2 * spec.layers * heads * spec.head_width * positions * width
        return _weights(spec, sizes) * width + 2 * cache < _ROOM * host.memory

    def copies_first(sizes: Sizes) -> tuple[bool, int, int]:
        """Decoding reads all weights at every step, so it gathers none over fsdp if it need not."""
        return not has_cache(sizes), sizes[1], -sizes[0]

    conditions = rows_divide(field, shape, Batch("config.sampling", "slots", s.slots), host)
    conditions += _has_room(field, "weights", model, width, host, spec_of)
    return fit_shape(field, shape, host, conditions, copies_first)


def _has_room(
    field: str, what: str, model: Model, width: int, devices: Devices, spec_of: SpecOf
) -> list[Condition]:
    """The condition that parameters of `width` bytes each fit the devices, where that is known.

    It is necessary and not sufficient: activations come on top.
    """
    if not devices.memory:
        return []

    def size(sizes: Sizes) -> int:
        return _weights(spec_of(model.place), sizes) * width

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


def _weights(spec: ModelSpec, sizes: Sizes) -> int:
    """Parameters on one device."""
    params, mesh = _shapes(spec), AbstractMesh(sizes, AXES)
    leaves = zip(jax.tree.leaves(params), jax.tree.leaves(shardings(params, mesh)), strict=True)
    return sum(math.prod(sharding.shard_shape(leaf.shape)) for leaf, sharding in leaves)


def mesh_lines(e: Experiment, devices: Devices, spec_of: SpecOf) -> list[str]:
    """Says which meshes a study runs on, and what their axes leave whole; nothing on one device.

    Args:
      e: with the meshes of `fit_meshes`.
      devices: of the job.
      spec_of: gives the sizes of models.
    """
    if devices.total == 1:
        return []
    everywhere = [
        ("training", e.training.mesh, e.student),
        ("scoring", e.scoring.mesh, reference_of(e.student, e.reference)),
        *((f"judge {j.name}", j.mesh, model_of(e, j.model)) for j in e.judges if j.kind == "model"),
    ]
    on_hosts = [
        ("sampling", e.sampling.mesh, e.student),
        *((f"generator {g.name}", g.mesh, model_of(e, g.model)) for g in e.generators),
    ]

    def listed(stage: MeshShape, meshes: list[tuple[str, MeshShape, Model]]) -> str:
        """Those of the stages, and those of models that have another one than their stage."""
        shown = [
            f"{name} {describe(shape)}"
            for name, shape, _ in meshes
            if " " not in name or shape != stage
        ]
        return "; ".join(shown)

    return [
        f"Meshes: {listed(e.scoring.mesh, everywhere)}; on each host "
        f"{listed(e.sampling.mesh, on_hosts)}.",
        *(line for use in everywhere + on_hosts for line in _whole(*use, spec_of)),
    ]


def training_lines(t: Training, student: Model, spec_of: SpecOf) -> list[str]:
    """Says which mesh a run trains on, and what its axes leave whole; nothing on one device."""
    if t.mesh == MeshShape(1, 1, 1, 1):
        return []
    whole = _whole("training", t.mesh, student, spec_of)
    return [f"Mesh: training {describe(t.mesh)}.", *whole]


def _whole(name: str, shape: MeshShape, model: Model, spec_of: SpecOf) -> list[str]:
    sizes = dataclasses.asdict(shape)
    if sizes["fsdp"] == sizes["tensor"] == 1:
        return []
    found = undivided(_shapes(spec_of(model.place)), sizes)
    return [
        f"Mesh of {name}: {axis}={sizes[axis]} does not divide {', '.join(names)} of {model.path}, "
        "so that every device along it has them whole."
        for axis, names in found.items()
    ]
