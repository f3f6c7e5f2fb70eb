"""Sizes of a decoder, read from and written to a Hugging Face `config.json`."""

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from typing import Any, NamedTuple

SUPPORTED = ("llama",)
"""Values of `model_type` that the decoder covers."""
_LARGEST = 2**24
"""A larger size is a damaged or mistyped config: no decoder is that wide, deep or long."""
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Sizes and constants of a decoder.

    It is hashable, so that models of one shape share their compiled functions.
    """

    vocab: int  # V
    width: int  # D
    layers: int
    heads: int  # N, query heads
    kv_heads: int  # K, key and value heads; divides `heads`
    head_width: int  # H, even; heads * head_width may differ from width
    mlp: int  # F
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    norm_eps: float = 1e-5
    tied: bool = True  # whether the embedding is the output projection too
    max_positions: int = 2048  # the longest sequence, in tokens

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads is {self.heads}; it must be a multiple of kv_heads, {self.kv_heads}."
            )
        if self.head_width % 2:
            raise ValueError(
                f"head_width is {self.head_width}; rotary embeddings need an even number."
            )

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        attention = self.width * self.head_width * (2 * self.heads + 2 * self.kv_heads)
        block = attention + 3 * self.width * self.mlp + 2 * self.width
        return self.vocab * self.width * (1 if self.tied else 2) + self.layers * block + self.width


class Adapters(NamedTuple):
    """Shape of a decoder's low-rank adapters (`models.lora`); hashable."""

    rank: int = 0  # 0 means no adapters
    targets: tuple[str, ...] = ()  # names of the adapted matrices in `decoder.Block`, such as "q"


NO_ADAPTERS = Adapters()
"""A decoder without adapters."""


def spec_from_hf(config: Mapping[str, Any]) -> ModelSpec:
    """Reads a spec from the contents of a `config.json`.

    Raises:
      ValueError: the architecture or one of its options is not supported, or a field is missing.
    """
    kind = config.get("model_type", "")
    if kind not in SUPPORTED:
        raise ValueError(
            f"model_type is {kind!r} in config.json; supported: {', '.join(SUPPORTED)}."
        )
    if missing := [name for name in _REQUIRED if name not in config]:
        raise ValueError(
            f"config.json has no {', '.join(missing)}; give the config of a whole {kind} model."
        )
    for option in ("attention_bias", "mlp_bias"):
        if config.get(option):
            raise ValueError(
                f"{option} is true in config.json; a {kind} decoder with biases is not supported."
            )
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(
            f"hidden_act is {config['hidden_act']!r} in config.json; only 'silu' is supported."
        )
    # transformers 5 writes rope_parameters, 4 writes rope_scaling and a rope_theta of its own.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(
            f"rope_parameters is {reprlib.repr(rope)} in config.json; it must be a JSON object."
        )
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(
            f"rope_type is {rope.get('rope_type', rope.get('type'))!r} in config.json; "
            "only 'default' is supported."
        )
    heads = _size(config, "num_attention_heads")
    width = _size(config, "hidden_size")
    return ModelSpec(
        vocab=_size(config, "vocab_size"),
        width=width,
        layers=_size(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=_size(config, "num_key_value_heads", heads),
        head_width=_size(config, "head_dim", width // heads),
        mlp=_size(config, "intermediate_size"),
        rope_theta=_constant("rope_theta", rope.get("rope_theta") or config.get("rope_theta"), 1e4),
        norm_eps=_constant("rms_norm_eps", config.get("rms_norm_eps"), 1e-6),
        tied=bool(config.get("tie_word_embeddings", False)),
        max_positions=_size(config, "max_position_embeddings", 2048),
    )


def _size(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A size in `config`; one that is missing, null or 0 is the default where there is one.

    Raises:
      ValueError: it is no whole number from 1 to `_LARGEST`.
    """
    value = config.get(name)
    if default is not None and not value:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LARGEST:
        raise ValueError(
            f"{name} is {reprlib.repr(value)} in config.json; it must be a whole number from 1 to "
            f"{_LARGEST}."
        )
    return value


def _constant(name: str, value: Any, default: float) -> float:
    """A positive number, or the default where it is missing.

    Raises:
      ValueError: it is no positive number.
    """
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(
            f"{name} is {reprlib.repr(value)} in config.json; it must be a number above 0."
        )
    return float(value)


def spec_to_hf(spec: ModelSpec) -> dict[str, Any]:
    """Returns the contents of a `config.json` that `transformers` (4 and 5) and vLLM read."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": spec.vocab,
        "hidden_size": spec.width,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_width,
        "intermediate_size": spec.mlp,
        "hidden_act": "silu",
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": spec.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rope_theta},
        "tie_word_embeddings": spec.tied,
        "max_position_embeddings": spec.max_positions,
        "attention_bias": False,
        "mlp_bias": False,
    }
