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
    Sampling,
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
    wide_first,
)
from deltapref_jax.models.parameters import Parameter, parameters
from deltapref_jax.models.sharding import path_name, shardings, undivided
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.models.weights import abstract
from deltapref_jax.sampling.plan import cache_positions, prompt_groups

SpecOf = Callable[[str], ModelSpec]
"""A model's path to its sizes."""

Fit = Callable[[str, MeshShape, Model], MeshShape]
"""Field, shape and model to a shape with all sizes stated."""

Item = TypeVar("Item", Generator, Judge)

# Of a device's memory: what lies there while a sampler decodes, and while it fills all slots.
_DECODING, _FILLING = 0.85, 0.95
_BYTES = {"float32": 4, "bfloat16": 2}


def fit_meshes(e: Experiment, devices: Devices, spec_of: SpecOf, refuse: bool = True) -> Experiment:
    """Returns the experiment with all four sizes of every mesh stated.

    Args:
      e: validated.
      devices: of the job.
      spec_of: gives the sizes of models.
      refuse: a model that the devices have no room for; else it has the mesh that lacks least.

    Raises:
      ConfigError: a mesh does not fit the devices or the rows, or the devices have no room for a
        model; one sentence names the field, the devices, and the nearest shapes that fit.
    """
    reference, suites = reference_of(e.student, e.reference), [s.samples for s in e.suites]

    def scoring(field: str, shape: MeshShape, model: Model) -> MeshShape:
        batch = Batch("config.scoring", "rows", e.scoring.rows, e.scoring.row_length)
        return _fit(field, shape, batch, model, devices, spec_of, refuse)

    def sampling(samples: int, field: str, shape: MeshShape, model: Model) -> MeshShape:
        host = devices.of_host
        return _fit_sampling(field, shape, e.sampling, samples, model, host, spec_of, refuse)

    def own(item: Item, where: str, stage: str, shape: MeshShape, fit: Fit) -> Item:
        """The item with its mesh, which is that of its stage where it has none of its own."""
        if item.mesh != MeshShape():
            stage, shape = where, item.mesh
        mesh = fit(f"{stage}.mesh", shape, model_of(e, item.model))
        return dataclasses.replace(item, mesh=mesh)

    generators = tuple(
        own(
            g,
            f"config.generators[{i}]",
            "config.sampling",
            e.sampling.mesh,
            functools.partial(sampling, min([g.samples, *suites])),
        )
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
        training=fit_training(e.training, e.student, devices, spec_of, refuse),
        scoring=dataclasses.replace(
            e.scoring, mesh=scoring("config.scoring.mesh", e.scoring.mesh, reference)
        ),
        sampling=dataclasses.replace(
            e.sampling,
            mesh=sampling(
                min(suites, default=1), "config.sampling.mesh", e.sampling.mesh, e.student
            ),
        ),
        generators=generators,
        judges=judges,
    )


def fit_training(
    t: Training, student: Model, devices: Devices, spec_of: SpecOf, refuse: bool = True
) -> Training:
    """Returns the training config with all four sizes of its mesh stated; see `fit_meshes`.

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
    mesh = _fit(field, t.mesh, batch, student, devices, spec_of, refuse, what, width)
    return dataclasses.replace(t, mesh=mesh)


def _fit_sampling(
    field: str,
    shape: MeshShape,
    s: Sampling,
    samples: int,
    model: Model,
    host: Devices,
    spec_of: SpecOf,
    refuse: bool,
) -> MeshShape:
    """The mesh of a sampler that draws at least so many traces of one prompt."""

    def lacking(sizes: Sizes) -> float:
        """Bytes that a device lacks with the longest cache, for decoding or to fill all slots.

        The cache grows array by array, so that one array is there twice, beside the prompts of one
        prefill. Where all slots are free, the prompts of more wait.
        """
        if not host.memory:
            return 0.0
        spec, shards = _spec(model, spec_of), sizes[0] * sizes[1]
        heads = spec.kv_heads / (sizes[2] if spec.kv_heads % sizes[2] == 0 else 1)
        position = heads * spec.head_width * _BYTES[model.dtype]  # of keys or values of one layer
        array = s.slots / shards * cache_positions(s, host.platform) * position
        rows, groups = prompt_groups(s, shards, samples)
        # Every device along data and fsdp has all prompts that wait.
        prompts = 2 * spec.layers * rows * s.max_prompt * position
        held = _weights(spec, sizes, model.dtype) + 2 * spec.layers * array
        return max(
            0.0,
            held + array + prompts - _DECODING * host.memory,
            held + groups * prompts - _FILLING * host.memory,
        )

    def copies_first(sizes: Sizes) -> tuple[float, int, int]:
        """Decoding reads all weights at every step, so it gathers none over fsdp if it need not."""
        return lacking(sizes), sizes[1], -sizes[0]

    batch = Batch("config.sampling", "slots", s.slots)
    return _fit(field, shape, batch, model, host, spec_of, refuse, order=copies_first)


def _fit(
    field: str,
    shape: MeshShape,
    batch: Batch,
    model: Model,
    devices: Devices,
    spec_of: SpecOf,
    refuse: bool,
    what: str = "weights",
    width: int | None = None,
    order: Callable[[Sizes], Any] = wide_first,
) -> MeshShape:
    """The first shape by `order` that divides rows and model and has room for the parameters.

    Args:
      field: the config field of the shape, for messages.
      shape: what the config states.
      batch: what the mesh spreads.
      model: that runs on it.
      devices: what the mesh is made over.
      spec_of: gives the sizes of models.
      refuse: see `fit_meshes`.
      what: must have room.
      width: bytes of a parameter; None: as the model is stored that is not trained, by its dtype
        and quantization.
      order: sort key of the shapes.
    """
    conditions = rows_divide(field, shape, batch, devices)
    conditions += _divides(field, shape, model, spec_of)

    def size(sizes: Sizes) -> int:
        if width is None:
            return _weights(_spec(model, spec_of), sizes, model.dtype)
        return _on_device(spec_of(model.place), sizes, lambda _: width)

    # Necessary and not sufficient: activations come on top.
    has_room = Condition(
        lambda s: not devices.memory or size(s) < devices.memory,
        lambda shapes: (
            f"{what.capitalize()} of the model {model.path} need "
            f"{min(map(size, shapes)) / 2**30:,.1f} GiB on each of {devices.words} by {field}, "
            f"and a device has {devices.memory / 2**30:,.1f} GiB; take more devices or "
            "another mesh"
        ),
    )
    if refuse:
        return fit_shape(field, shape, devices, [*conditions, has_room], order)

    def least_first(sizes: Sizes) -> tuple[int, Any]:
        return 0 if has_room.holds(sizes) else size(sizes), order(sizes)

    return fit_shape(field, shape, devices, conditions, least_first)


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
