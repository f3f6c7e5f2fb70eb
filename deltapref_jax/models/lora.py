"""Low-rank adapters: W + (alpha / rank) A B with A and B trained and W frozen (arXiv 2106.09685).

    blocks.q     [layers, D, N, H]     the base's W, frozen, in its stored dtype
    blocks.q_a   [layers, D, rank]     A, trained, float32; sharded like the inputs of W
    blocks.q_b   [layers, rank, N, H]  B, trained, float32, 0 at first; sharded like W's outputs
    blocks.scale [layers]              alpha / rank, frozen

A decoder (`decoder.Decoder`) holds them beside their matrices; `sharding.RULES` places them. Full
fine-tuning is the case without adapters: all parameters are trained and nothing is frozen.
"""

import dataclasses
import json
import os
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deltapref_jax.config import ConfigError, Lora, Model
from deltapref_jax.models.export import write_tensors
from deltapref_jax.models.parameters import PARAMETERS, Parameter, block_parameters, matrices
from deltapref_jax.models.spec import NO_ADAPTERS, Adapters, ModelSpec
from deltapref_jax.models.weights import abstract

TARGETS = {
    p.tensor.split(".")[-2]: p.short
    for p in PARAMETERS
    if p.inputs and not p.batch and p.short != "router"
}
"""Llama's name of a matrix to the decoder's, such as "q_proj" to "q"; all families use them here,
also where a file fuses several matrices."""


def adapters(lora: Lora, spec: ModelSpec) -> Adapters:
    """Returns the shape of a config's adapters; alpha is not part of a shape.

    Raises:
      ConfigError: see `fit_lora`.
    """
    if not lora.rank:
        return NO_ADAPTERS
    wanted = fit_lora(lora, spec).targets
    return Adapters(lora.rank, tuple(name for t, name in TARGETS.items() if t in wanted))


def fit_lora(lora: Lora, spec: ModelSpec) -> Lora:
    """Returns a config that names its targets; without any they are all that the model has.

    Those are the matrices of attention and of a dense MLP. A router and experts have no adapters.

    Raises:
      ConfigError: the model lacks a target, or the rank is larger than the narrowest side of an
        adapted matrix, which cannot have that rank.
    """
    declared = matrices(spec)
    there = tuple(t for t, name in TARGETS.items() if name in declared)
    fitted = dataclasses.replace(lora, targets=lora.targets or there)
    if not lora.rank:
        return fitted
    if missing := [t for t in lora.targets if t not in there]:
        raise ConfigError(
            f"config.training.lora.targets names {', '.join(missing)}, which a {spec.family} "
            f"student has not; it has {', '.join(there)}."
        )
    width, name = min((min(declared[TARGETS[t]].sides(spec)), t) for t in fitted.targets)
    if lora.rank > width:
        raise ConfigError(
            f"config.training.lora.rank is {lora.rank} and {name} of the student is {width} wide; "
            "make rank that at most, or train all weights with rank 0."
        )
    return fitted


def partition(params: nnx.State, shape: Adapters) -> tuple[nnx.State, nnx.State]:
    """Splits a decoder's parameters into (trained, frozen).

    With adapters they alone are trained; without, everything is, and frozen is empty.
    """
    trained, frozen = nnx.split_state(params, nnx.LoRAParam if shape.rank else nnx.Param, ...)
    return trained, frozen


def add_adapters(
    spec: ModelSpec, params: nnx.State, lora: Lora, seed: int
) -> tuple[nnx.State, nnx.State]:
    """Initialises adapters and returns (trained, frozen) parameters, see `partition`.

    A is uniform within ±1/√inputs, as in PEFT (Kaiming's uniform initialisation with a = √5), drawn
    from `seed` and the parameter's path. B is 0, so that the adapted decoder starts as its base.

    Args:
      spec: sizes of the decoder.
      params: parameters of the base; its arrays are shared and not copied.
      lora: rank, alpha and targets; rank 0 trains all of `params`.
      seed: 0 to 2³² - 1.
    """
    if not lora.rank:
        return params, nnx.State({})
    adapted = adapters(lora, spec)
    whole = abstract(spec, adapters=adapted)[1]
    tree, shapes = nnx.to_pure_dict(params), nnx.to_pure_dict(whole)["blocks"]
    # The scale has one entry per layer, because the scan over layers slices every parameter.
    fresh: dict[str, Any] = {"scale": jnp.full(spec.layers, lora.alpha / lora.rank, jnp.float32)}
    for name in adapted.targets:
        shape = shapes[f"{name}_a"].shape
        # A path's CRC is the same in every process, unlike `hash`; each matrix has its own key.
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(f"blocks.{name}_a".encode()))
        # The inputs of A are all axes between the layers and the rank.
        bound = int(np.prod(shape[1:-1])) ** -0.5
        fresh[f"{name}_a"] = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
        fresh[f"{name}_b"] = jnp.zeros(shapes[f"{name}_b"].shape, jnp.float32)
    # `whole` holds shapes so far; its leaves are replaced by the base's arrays and the new ones.
    nnx.replace_by_pure_dict(whole, tree | {"blocks": tree["blocks"] | fresh})
    return partition(whole, adapted)


def merge(params: nnx.State, trained: nnx.State, lora: Lora) -> nnx.State:
    """Returns the parameters of the trained decoder without adapters.

    Adapted matrices are W + (alpha / rank) A B in float32; without adapters this is `trained`.

    Args:
      params: parameters of the base.
      trained: adapters, or all parameters where there are none.
      lora: rank and alpha.
    """
    if not lora.rank:
        return trained
    tree, trained_blocks = nnx.to_pure_dict(params), nnx.to_pure_dict(trained)["blocks"]
    for name in (key.removesuffix("_a") for key in trained_blocks if key.endswith("_a")):
        a, b = trained_blocks[f"{name}_a"], trained_blocks[f"{name}_b"]
        w = tree["blocks"][name]
        adapted = _Merged(w, a, b, lora.alpha / lora.rank)
        # A base in a file is read when it is written, and one layer of it at a time.
        in_file = hasattr(w, "read_parts")
        tree["blocks"][name] = adapted if in_file else adapted[(slice(None),) * w.ndim]
    merged = jax.tree.map(lambda x: x, params)  # a new tree: `params` keeps its arrays
    nnx.replace_by_pure_dict(merged, tree)
    return merged


class _Merged:
    """The matrices of all layers with their adapters; those that are indexed are computed."""

    def __init__(self, base: Any, a: Any, b: Any, scale: float):
        self._base, self._a, self._b, self._scale = base, a, b, scale
        self.shape, self.ndim = base.shape, base.ndim

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Returns layers, the first slice of `index`, in float32."""
        layers = index[0]
        product = jnp.einsum(
            "lir,lro->lio",
            as_3d(self._a[layers], 1),
            as_3d(self._b[layers], 2),
            # The merge is computed once, and accelerators would round float32 products by default.
            precision=jax.lax.Precision.HIGHEST,
        )
        w = np.asarray(self._base[(layers, *(slice(None),) * (self.ndim - 1))]).astype(np.float32)
        # The same scale as `blocks.scale` in training, here on the product of the matrices.
        whole = w + self._scale * product.reshape(w.shape)
        return np.asarray(whole)[(slice(None), *index[1:])]


def as_3d(x: Any, axis: int) -> Any:
    """Merges heads and their widths into one axis.

    Returns A as [layers, in, rank] (`axis` 1) or B as [layers, rank, out] (`axis` 2).
    """
    shape = (x.shape[0], -1, x.shape[-1]) if axis == 1 else (x.shape[0], x.shape[1], -1)
    return x.reshape(shape)


def export_adapter(
    trained: nnx.State, spec: ModelSpec, lora: Lora, base: Model, folder: str | os.PathLike[str]
) -> None:
    """Writes a folder that `peft.PeftModel.from_pretrained` loads.

    It holds adapter_config.json and adapter_model.safetensors. Where a family keeps several
    matrices in one tensor, its adapter has the ranks of theirs together: A of each below the other,
    and B of each in the rows of its matrix, with the same scale.

    Args:
      trained: adapters.
      spec: sizes of the decoder.
      lora: rank, alpha and targets.
      base: path or hub name of the base, and its revision, which PEFT can load it by.
      folder: is created if it does not exist.
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    # PEFT would look up a relative path from the reader's working directory.
    path = os.path.abspath(base.path) if os.path.exists(base.path) else base.path
    blocks = nnx.to_pure_dict(trained)["blocks"]
    modules: dict[str, list[Parameter]] = {}  # matrices of a module, in the order of its rows
    for p in block_parameters(spec).values():
        if p.inputs:
            modules.setdefault(p.tensor.removesuffix("weight"), []).append(p)
    tensors: dict[str, np.ndarray] = {}
    targets, ranks = [], {}
    for module, parts in modules.items():
        adapted = [p for p in parts if f"{p.short}_a" in blocks]
        if not adapted:
            continue
        targets.append(module.split(".")[-2])
        if len(adapted) > 1:
            ranks[targets[-1]] = lora.rank * len(adapted)
        for layer in range(spec.layers):
            a, b = ([_layer(blocks, p, side, layer) for p in adapted] for side in "ab")
            rows, columns = sum(p.sides(spec)[1] for p in parts), lora.rank * len(adapted)
            whole, first = np.zeros((rows, columns), np.float32), 0
            for p in parts:
                out = p.sides(spec)[1]
                if p in adapted:
                    at = adapted.index(p)
                    part = slice(at * lora.rank, (at + 1) * lora.rank)
                    whole[first : first + out, part] = b[at]
                first += out
            name = f"base_model.model.{module.format(layer=layer)}"
            tensors[f"{name}lora_A.weight"] = np.concatenate(a)
            tensors[f"{name}lora_B.weight"] = whole
    # PEFT declares alpha as an integer.
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": path,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    } | ({"revision": base.revision} if base.revision else {})
    if ranks:
        config["rank_pattern"] = ranks
        # PEFT divides each module's alpha by its own rank.
        config["alpha_pattern"] = {
            name: alpha * (rank // lora.rank) for name, rank in ranks.items()
        }
    (root / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_tensors(tensors, root / "adapter_model.safetensors", root / "adapter_config.json")


def _layer(blocks: dict[str, Any], p: Parameter, side: str, layer: int) -> np.ndarray:
    """A [rank, in] or B [out, rank] of a layer: PEFT stores [out, in], as Hugging Face does."""
    array = np.asarray(jax.device_get(blocks[f"{p.short}_{side}"]), np.float32)
    return np.ascontiguousarray(as_3d(array, 1 if side == "a" else 2)[layer].T)
