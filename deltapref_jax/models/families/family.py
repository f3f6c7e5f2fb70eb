"""What a family of decoders declares, and what several of them share."""

import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from deltapref_jax.models.spec import Layer

Fields = Mapping[str, Any]
"""Fields of `spec.ModelSpec` by name."""


class Family(NamedTuple):
    """A family of decoders.

    Attributes:
      model_type: of its config.json.
      architecture: the class of `transformers` that computes it.
      read: maps a config of `transformers` (with all defaults filled in) to the fields of a
        `ModelSpec` that differ from Llama's; raises ValueError, naming the field, for a value that
        is not supported.
      activation: the field of config.json that names the MLP's activation.
      epsilon: the field that the norms add to a variance.
      reads: the fields of config.json that `read` reads.
      unused: fields that `transformers` declares for the family and never computes with.
      tensors: names of a parameter's tensor in safetensors and in GGUF, where they differ from
        `parameters.PARAMETERS`. Parameters of one name lie in one tensor, one after another.
      partial_rotary: whether a part of each head may be rotated.
      stacked_experts: whether safetensors hold the experts of a layer in one tensor [experts, in,
        out], in which the columns of matrices of one name alternate; else each has its own tensor.
      quantised: names of quant_method in quantization_config that are read.
      gguf: name of the architecture in GGUF; empty where llama.cpp's form is not read.
    """

    model_type: str
    architecture: str
    read: Callable[[Any], Fields]
    activation: str = "hidden_act"
    epsilon: str = "rms_norm_eps"
    reads: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    tensors: Mapping[str, tuple[str, str]] = {}
    partial_rotary: bool = False
    stacked_experts: bool = False
    quantised: tuple[str, ...] = ()
    gguf: str = ""


_FLOAT32 = np.finfo(np.float32)
_LARGEST = 2**24
"""A larger size is a damaged or mistyped config: no decoder is that wide, deep or long."""


def size(name: str, value: Any) -> int:
    """A size.

    Raises:
      ValueError: it is no whole number from 1 to `_LARGEST`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LARGEST:
        raise ValueError(
            f"{name} is {reprlib.repr(value)} in config.json; it must be a whole number from 1 to "
            f"{_LARGEST}."
        )
    return value


def positive(name: str, value: Any) -> float:
    """A positive number.

    Raises:
      ValueError: it is no number above 0 that float32 holds.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not _FLOAT32.tiny <= value <= _FLOAT32.max
    ):
        raise ValueError(
            f"{name} is {reprlib.repr(value)} in config.json; it must be a number above 0 that "
            "float32 holds."
        )
    return float(value)


def attention_biases(config: Any) -> tuple[str, ...]:
    """The attention's matrices that attention_bias gives a bias."""
    return ("q", "k", "v", "o") if config.attention_bias else ()


def active_experts(config: Any) -> int:
    """The number of experts that a token is sent to.

    Raises:
      ValueError: there are fewer experts, or it is not above 0.
    """
    active = size("num_experts_per_tok", config.num_experts_per_tok)
    if active > size("num_local_experts", config.num_local_experts):
        raise ValueError(
            f"num_experts_per_tok is {active} in config.json and there are "
            f"{config.num_local_experts} experts; it must be from 1 to their number."
        )
    return active


def layers_by_type(config: Any, ropes: Mapping[str, int] | None = None) -> tuple[Layer, ...]:
    """The kinds of layers that layer_types and sliding_window describe.

    Args:
      config: with layer_types filled in.
      ropes: index of the rotary embeddings of a layer type, where they differ.

    Raises:
      ValueError: a layer type is unknown, or has no window.
    """
    if len(config.layer_types) != config.num_hidden_layers:
        raise ValueError(
            f"layer_types has {len(config.layer_types)} entries in config.json and "
            f"num_hidden_layers is {config.num_hidden_layers}; they must be equal."
        )
    layers = []
    for kind in config.layer_types:
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(
                f"layer_types names {kind!r} in config.json; supported: 'full_attention', "
                "'sliding_attention'."
            )
        window = _window(config) if kind == "sliding_attention" else 0
        layers.append(Layer(window, (ropes or {}).get(kind, 0)))
    return tuple(layers)


def one_window(config: Any) -> tuple[Layer, ...]:
    """One kind of layers: all of them have the window of sliding_window, if it is not null."""
    return (Layer(0 if config.sliding_window is None else _window(config)),)


def _window(config: Any) -> int:
    """The window of the layers that have one."""
    return size("sliding_window", config.sliding_window)
