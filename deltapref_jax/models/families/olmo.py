"""OLMo 2 (arXiv 2501.00656) and 3: norms behind attention and MLP, and of all heads at once."""

from typing import Any

from deltapref_jax.models.families.family import Family, Fields, attention_biases, layers_by_type


def _olmo2(config: Any) -> Fields:
    return {"norms": "after", "qk_norm": "heads", "biases": attention_biases(config)}


def _olmo3(config: Any) -> Fields:
    # Layers with a window keep plain rotary embeddings; a scaling is for the others.
    ropes = {"full_attention": 0, "sliding_attention": 1}
    return {**_olmo2(config), "pattern": layers_by_type(config, ropes)}


OLMO2 = Family("olmo2", "Olmo2ForCausalLM", _olmo2, reads=("attention_bias",), gguf="olmo2")
OLMO3 = Family(
    "olmo3",
    "Olmo3ForCausalLM",
    _olmo3,
    reads=("attention_bias", "sliding_window", "layer_types"),
)
