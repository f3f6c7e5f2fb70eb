"""Qwen2 and 2.5 (arXiv 2407.10671, 2412.15115), Qwen3 and its mixtures of experts (2505.09388)."""

from typing import Any

from deltapref_jax.models.families.family import (
    Family,
    Fields,
    active_experts,
    attention_biases,
    layers_by_type,
    one_window,
    size,
)
from deltapref_jax.models.spec import Experts


def _qwen2(config: Any) -> Fields:
    return {"biases": ("q", "k", "v"), "pattern": layers_by_type(config)}


def _qwen3(config: Any) -> Fields:
    return {
        "biases": attention_biases(config),
        "qk_norm": "head",
        "pattern": layers_by_type(config),
    }


def _qwen3_moe(config: Any) -> Fields:
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        raise ValueError(
            f"mlp_only_layers is {config.mlp_only_layers} and decoder_sparse_step "
            f"{config.decoder_sparse_step} in config.json; only models whose layers all have "
            "experts are supported ([] and 1)."
        )
    return {
        "biases": attention_biases(config),
        "qk_norm": "head",
        "pattern": one_window(config),
        "experts": Experts(
            config.num_local_experts,
            active_experts(config),
            size("moe_intermediate_size", config.moe_intermediate_size),
            bool(config.norm_topk_prob),
        ),
    }


_WINDOW = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")

QWEN2 = Family("qwen2", "Qwen2ForCausalLM", _qwen2, reads=_WINDOW, gguf="qwen2")
QWEN3 = Family(
    "qwen3", "Qwen3ForCausalLM", _qwen3, reads=("attention_bias", *_WINDOW), gguf="qwen3"
)
QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    _qwen3_moe,
    reads=(
        "attention_bias",
        "sliding_window",
        "use_sliding_window",
        "num_experts",
        "num_local_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "norm_topk_prob",
        "mlp_only_layers",
        "decoder_sparse_step",
    ),
    # The loss that balances experts in pretraining is no part of the logits.
    unused=("output_router_logits", "router_aux_loss_coef", "max_window_layers"),
    gguf="qwen3moe",
)
