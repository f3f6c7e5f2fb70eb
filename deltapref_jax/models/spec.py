"""Sizes of a decoder, read from and written to a Hugging Face `config.json`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

SUPPORTED = ("llama",)
"""Values of `model_type` that the decoder covers."""
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
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(
            f"rope_type is {rope.get('rope_type', rope.get('type'))!r} in config.json; "
            "only 'default' is supported."
        )
    heads = config["num_attention_heads"]
    return ModelSpec(
        vocab=config["vocab_size"],
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_width=config.get("head_dim") or config["hidden_size"] // heads,
        mlp=config["intermediate_size"],
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        tied=config.get("tie_word_embeddings", False),
        max_positions=config.get("max_position_embeddings", 2048),
    )


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
