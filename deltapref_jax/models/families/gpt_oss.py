"""gpt-oss (arXiv 2508.10925): attention sinks, and mixtures of experts with biases."""

from typing import Any

from deltapref_jax.models.families.family import (
    Family,
    Fields,
    active_experts,
    attention_biases,
    layers_by_type,
    positive,
)
from deltapref_jax.models.spec import Experts

_L, _B = "model.layers.{layer}.", "blk.{layer}."
_EXPERTS = f"{_L}mlp.experts."


def _read(config: Any) -> Fields:
    return {
        "pattern": layers_by_type(config),
        "sinks": True,
        "biases": (
            *attention_biases(config),
            "router",
            "expert_gate",
            "expert_up",
            "expert_down",
        ),
        "experts": Experts(
            config.num_local_experts,
            active_experts(config),
            config.intermediate_size,
            normalized=True,
            swiglu_alpha=positive("swiglu_alpha", config.swiglu_alpha),
            swiglu_limit=positive("swiglu_limit", config.swiglu_limit),
        ),
    }


GPT_OSS = Family(
    "gpt_oss",
    "GptOssForCausalLM",
    _read,
    reads=(
        "attention_bias",
        "sliding_window",
        "layer_types",
        "num_experts",
        "num_local_experts",
        "num_experts_per_tok",
        "swiglu_alpha",
        "swiglu_limit",
        "quantization_config",
    ),
    # The loss that balances experts in pretraining is no part of the logits; the last two are
    # names that the released files have beside those of `transformers`.
    unused=(
        "output_router_logits",
        "router_aux_loss_coef",
        "experts_per_token",
        "initial_context_length",
    ),
    tensors={
        "blocks.mlp_norm": (
            f"{_L}post_attention_layernorm.weight",
            f"{_B}post_attention_norm.weight",
        ),
        "blocks.router": (f"{_L}mlp.router.weight", f"{_B}ffn_gate_inp.weight"),
        "blocks.router_bias": (f"{_L}mlp.router.bias", f"{_B}ffn_gate_inp.bias"),
        "blocks.expert_gate": (f"{_EXPERTS}gate_up_proj", f"{_B}ffn_gate_exps.weight"),
        "blocks.expert_gate_bias": (f"{_EXPERTS}gate_up_proj_bias", f"{_B}ffn_gate_exps.bias"),
        "blocks.expert_up": (f"{_EXPERTS}gate_up_proj", f"{_B}ffn_up_exps.weight"),
        "blocks.expert_up_bias": (f"{_EXPERTS}gate_up_proj_bias", f"{_B}ffn_up_exps.bias"),
        "blocks.expert_down": (f"{_EXPERTS}down_proj", f"{_B}ffn_down_exps.weight"),
        "blocks.expert_down_bias": (f"{_EXPERTS}down_proj_bias", f"{_B}ffn_down_exps.bias"),
    },
    stacked_experts=True,
    quantised=("mxfp4",),
    gguf="gpt-oss",
)
