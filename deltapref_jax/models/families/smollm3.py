"""SmolLM3: Llama without position embeddings on every fourth layer (NoPE, arXiv 2501.18795)."""

from typing import Any

from deltapref_jax.models.families.family import Family, Fields, attention_biases, layers_by_type


def _read(config: Any) -> Fields:
    layers = zip(layers_by_type(config), config.no_rope_layers, strict=False)
    mlp = ("gate", "up", "down") if config.mlp_bias else ()
    return {
        "biases": attention_biases(config) + mlp,
        # Against its name, an entry is 1 where a layer has rotary embeddings.
        "pattern": tuple(layer if rope else layer._replace(rope=None) for layer, rope in layers),
    }


SMOLLM3 = Family(
    "smollm3",
    "SmolLM3ForCausalLM",
    _read,
    reads=(
        "attention_bias",
        "mlp_bias",
        "layer_types",
        "sliding_window",
        "use_sliding_window",
        "no_rope_layers",
        "no_rope_layer_interval",
    ),
    gguf="smollm3",
)
