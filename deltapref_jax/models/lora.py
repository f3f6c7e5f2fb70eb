"""Low-rank adapters: W + (alpha / rank) A B, A and B trained, W left as it is (LoRA, arXiv 2106.09685).

    blocks.q   [layers, D, N, H]    the base's, frozen, in the dtype that it is stored in
    blocks.q_a [layers, D, rank]    trained, float32; `sharding.RULES` places it where W's inputs lie
    blocks.q_b [layers, rank, N, H] trained, float32, 0 at the start; where W's outputs lie
    blocks.scale [layers]           alpha / rank, frozen with the base

A decoder (`decoder.Decoder`) holds them beside their matrices. Full fine-tuning is the case without adapters: all
parameters are trained and nothing is frozen.
"""

import json
import os
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deltapref_jax.config import ConfigError, Lora
from deltapref_jax.models.spec import NO_ADAPTERS, Adapters, ModelSpec
from deltapref_jax.models.weights import abstract, stored_name, write_tensors

TARGETS = {
    stored_name(f"blocks.{name}").split(".")[-2]: name
    for name in ("q", "k", "v", "o", "gate", "up", "down")
}
"""Hugging Face's name of a matrix to ours."""


def adapters(lora: Lora) -> Adapters:
    """The shape that a config asks for; alpha is no part of it."""
    return (
        Adapters(lora.rank, tuple(TARGETS[t] for t in TARGETS if t in lora.targets))
        if lora.rank
        else NO_ADAPTERS
    )


def check_rank(lora: Lora, spec: ModelSpec) -> None:
    """A product of rank r adds nothing to a matrix with fewer than r rows or columns.

    Raises:
      ConfigError: the rank is larger than the narrowest of the adapted matrices.
    """
    heads, kv_heads = spec.heads * spec.head_width, spec.kv_heads * spec.head_width
    other = {
        "q": heads,
        "k": kv_heads,
        "v": kv_heads,
        "o": heads,
    }  # the side that is not the model's width
    width, name = min((min(spec.width, other.get(TARGETS[t], spec.mlp)), t) for t in lora.targets)
    if lora.rank > width:
        raise ConfigError(
            f"config.training.lora.rank is {lora.rank} and {name} of the student is {width} wide; make "
            "rank that at most, or train all weights with rank 0."
        )


def divide(params: nnx.State, shape: Adapters) -> tuple[nnx.State, nnx.State]:
    """A decoder's parameters as (trained, frozen); frozen is empty where there are no adapters."""
    trained, frozen = nnx.split_state(params, nnx.LoRAParam if shape.rank else nnx.Param, ...)
    return trained, frozen


def attach(
    spec: ModelSpec, params: nnx.State, lora: Lora, seed: int
) -> tuple[nnx.State, nnx.State]:
    """What is trained from `params`, and what stays: fresh adapters and the base, or all parameters and nothing.

    A is uniform in ±1/√inputs (as PEFT draws it: Kaiming's with a = √5), from `seed` and its path; B is 0, so that the
    adapted decoder is its base.

    Args:
      spec: of the model.
      params: of the base; its arrays are kept, not copied.
      lora: rank, alpha, targets.
      seed: 0 to 2³² - 1.
    """
    if not lora.rank:
        return params, nnx.State({})
    whole = abstract(spec, adapters=adapters(lora))[1]
    tree, shapes = nnx.to_pure_dict(params), nnx.to_pure_dict(whole)["blocks"]
    fresh: dict[str, Any] = {"scale": jnp.full(spec.layers, lora.alpha / lora.rank, jnp.float32)}
    for name in adapters(lora).targets:
        shape = shapes[f"{name}_a"].shape
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(f"blocks.{name}_a".encode()))
        bound = int(np.prod(shape[1:-1])) ** -0.5
        fresh[f"{name}_a"] = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
        fresh[f"{name}_b"] = jnp.zeros(shapes[f"{name}_b"].shape, jnp.float32)
    nnx.replace_by_pure_dict(whole, tree | {"blocks": tree["blocks"] | fresh})
    return divide(whole, adapters(lora))


def merge(params: nnx.State, trained: nnx.State, lora: Lora) -> nnx.State:
    """Parameters of the decoder that was trained, float32 where adapted: base and adapters as one, or `trained` itself.

    Args:
      params: of the base.
      trained: adapters, or all parameters where there are none.
      lora: rank, alpha, targets.
    """
    if not lora.rank:
        return trained
    tree, parts = nnx.to_pure_dict(params), nnx.to_pure_dict(trained)["blocks"]
    for name in adapters(lora).targets:
        a, b, w = parts[f"{name}_a"], parts[f"{name}_b"], tree["blocks"][name]
        product = jnp.einsum(
            "lir,lro->lio",
            a.reshape(spread(a, 1)),
            b.reshape(spread(b, 2)),
            precision=jax.lax.Precision.HIGHEST,
        )
        tree["blocks"][name] = w.astype(jnp.float32) + lora.alpha / lora.rank * product.reshape(
            w.shape
        )
    merged = jax.tree.map(lambda x: x, params)
    nnx.replace_by_pure_dict(merged, tree)
    return merged


def spread(x: Any, axis: int) -> tuple[int, int, int]:
    """Shape [layers, in, rank] of A (`axis` 1) or [layers, rank, out] of B (2): heads and their widths as one axis."""
    return (x.shape[0], -1, x.shape[-1]) if axis == 1 else (x.shape[0], x.shape[1], -1)


def export_adapter(
    trained: nnx.State, lora: Lora, base: str, folder: str | os.PathLike[str]
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, which `peft.PeftModel.from_pretrained` loads.

    Args:
      trained: adapters.
      lora: rank, alpha, targets.
      base: path or hub name of the base, for those who load it by the config alone.
      folder: is made.
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    base = os.path.abspath(base) if os.path.exists(base) else base
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": [t for t in TARGETS if t in lora.targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (root / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors: dict[str, np.ndarray] = {}
    for name, leaf in nnx.to_pure_dict(trained)["blocks"].items():
        target, side = name.split("_")
        array = np.asarray(jax.device_get(leaf), np.float32)
        place = (
            stored_name(f"blocks.{target}").removesuffix("weight") + f"lora_{side.upper()}.weight"
        )
        for i, layer in enumerate(array.reshape(spread(array, 1 if side == "a" else 2))):
            tensors[f"base_model.model.{place.format(i)}"] = np.ascontiguousarray(layer.T)
    write_tensors(tensors, root / "adapter_model.safetensors", root / "adapter_config.json")
