"""Gemma 2 (arXiv 2408.00118) and the text part of Gemma 3 (2503.19786)."""

from typing import Any

from deltapref_jax.models.families.family import (
    Family,
    Fields,
    attention_biases,
    layers_by_type,
    positive,
)

_L, _B = "model.layers.{layer}.", "blk.{layer}."
# The norm that Llama calls post_attention_layernorm, in front of the MLP, has another name here.
_TENSORS = {
    "blocks.mlp_norm": (f"{_L}pre_feedforward_layernorm.weight", f"{_B}ffn_norm.weight"),
}


def _cap(config: Any, name: str) -> float:
    """A cap of logits; 0 where there is none."""
    value = getattr(config, name)
    return positive(name, value) if value else 0.0


def _shared(config: Any) -> dict[str, Any]:
    if config.use_bidirectional_attention:
        raise ValueError(
            "use_bidirectional_attention is true in config.json; only causal attention is "
            "supported."
        )
    return {
        "norm": "rms_plus_one",
        "norms": "both",
        "biases": attention_biases(config),
        "query_scale": positive("query_pre_attn_scalar", config.query_pre_attn_scalar) ** -0.5,
        "logit_cap": _cap(config, "final_logit_softcapping"),
        "embedding_scale": config.hidden_size**0.5,
    }


def _gemma2(config: Any) -> Fields:
    return _shared(config) | {
        "pattern": layers_by_type(config),
        "attention_cap": _cap(config, "attn_logit_softcapping"),
    }


def _gemma3(config: Any) -> Fields:
    ropes = {"full_attention": 0, "sliding_attention": 1}
    return _shared(config) | {"qk_norm": "head", "pattern": layers_by_type(config, ropes)}


_READS = (
    "attention_bias",
    "use_bidirectional_attention",
    "query_pre_attn_scalar",
    "final_logit_softcapping",
    "sliding_window",
    "layer_types",
)

GEMMA2 = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    _gemma2,
    activation="hidden_activation",
    reads=(*_READS, "attn_logit_softcapping"),
    unused=("hidden_act",),  # their classes compute with hidden_activation alone
    tensors=_TENSORS,
    gguf="gemma2",
)
GEMMA3 = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    _gemma3,
    activation="hidden_activation",
    reads=(*_READS, "sliding_window_pattern", "rope_local_base_freq", "text_config"),
    unused=("attn_logit_softcapping", "hidden_act"),
    tensors=_TENSORS,
    gguf="gemma3",
)
