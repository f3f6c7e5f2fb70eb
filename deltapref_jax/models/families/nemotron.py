"""Nemotron and Minitron (arXiv 2402.16819, 2407.14679): LayerNorm, and an MLP without a gate."""

from typing import Any

from deltapref_jax.models.families.family import Family, Fields, attention_biases


def _read(config: Any) -> Fields:
    mlp = ("up", "down") if config.mlp_bias else ()
    return {
        "norm": "layer_plus_one",
        "gated": False,
        "biases": attention_biases(config) + mlp,
    }


NEMOTRON = Family(
    "nemotron",
    "NemotronForCausalLM",
    _read,
    epsilon="norm_eps",
    reads=("attention_bias", "mlp_bias", "partial_rotary_factor"),
    partial_rotary=True,
    gguf="nemotron",
)
