"""Phi-3 (arXiv 2404.14219) and Phi-4-mini: fused tensors, partial and long rotary embeddings."""

from typing import Any

from deltapref_jax.models.families.family import Family, Fields, one_window

_L, _B = "model.layers.{layer}.", "blk.{layer}."
_QKV = (f"{_L}self_attn.qkv_proj.weight", f"{_B}attn_qkv.weight")
_GATE_UP = (f"{_L}mlp.gate_up_proj.weight", f"{_B}ffn_up.weight")


def _read(config: Any) -> Fields:
    return {"pattern": one_window(config)}


PHI3 = Family(
    "phi3",
    "Phi3ForCausalLM",
    _read,
    reads=("sliding_window", "original_max_position_embeddings", "partial_rotary_factor"),
    unused=("resid_pdrop", "embd_pdrop"),
    tensors={
        "blocks.q": _QKV,
        "blocks.k": _QKV,
        "blocks.v": _QKV,
        "blocks.gate": _GATE_UP,
        "blocks.up": _GATE_UP,
    },
    partial_rotary=True,
    gguf="phi3",
)
