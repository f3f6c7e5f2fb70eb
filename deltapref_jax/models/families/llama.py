"""Llama 2 and 3 (arXiv 2307.09288, 2407.21783), SmolLM2, and others that name themselves llama."""

from typing import Any

from deltapref_jax.models.families.family import Family, Fields, attention_biases


def _read(config: Any) -> Fields:
    mlp = ("gate", "up", "down") if config.mlp_bias else ()
    return {"biases": attention_biases(config) + mlp}


LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    _read,
    reads=("attention_bias", "mlp_bias"),
    unused=("pretraining_tp",),
    gguf="llama",
)
