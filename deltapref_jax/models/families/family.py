"""What a family of decoders declares, and what several of them share."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

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
      reads: the fields of config.json that `read` reads.
      unused: fields that `transformers` declares for the family and never computes with.
      tensors: names of a parameter's tensor in safetensors and in GGUF, where they differ from
        `parameters.PARAMETERS`. Parameters of one name lie in one tensor, one after another.
      partial_rotary: whether a part of each head may be rotated.
      gguf: name of the architecture in GGUF; empty where llama.cpp's form is not read.
    """

    model_type: str
    architecture: str
    read: Callable[[Any], Fields]
    reads: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    tensors: Mapping[str, tuple[str, str]] = {}
    partial_rotary: bool = False
    gguf: str = ""


def attention_biases(config: Any) -> tuple[str, ...]:
    """The attention's matrices that attention_bias gives a bias."""
    return ("q", "k", "v", "o") if config.attention_bias else ()


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
    window = config.sliding_window
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(
            f"sliding_window is {window!r} in config.json; layers with a window need a whole "
            "number above 0."
        )
    return window
