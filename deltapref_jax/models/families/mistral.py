"""Mistral (arXiv 2310.06825): Llama with a window on all layers; Ministral: on some of them."""

from typing import Any

from deltapref_jax.models.families.family import Family, Fields, layers_by_type, one_window


def _mistral(config: Any) -> Fields:
    return {"pattern": one_window(config)}


def _ministral(config: Any) -> Fields:
    return {"pattern": layers_by_type(config)}


MISTRAL = Family("mistral", "MistralForCausalLM", _mistral, reads=("sliding_window",))
MINISTRAL = Family(
    "ministral",
    "MinistralForCausalLM",
    _ministral,
    reads=("sliding_window", "layer_types"),
)
