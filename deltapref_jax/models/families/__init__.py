"""The families of decoders that load: one file each, which says how it differs from Llama.

A family is a `Family`: the fields of config.json that it reads, what they mean for a
`spec.ModelSpec`, and the names of tensors that differ from `parameters.PARAMETERS`.
"""

from deltapref_jax.models.families import (
    gemma,
    gpt_oss,
    llama,
    mistral,
    nemotron,
    olmo,
    phi,
    qwen,
    smollm3,
)
from deltapref_jax.models.families.family import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        llama.LLAMA,
        mistral.MISTRAL,
        mistral.MINISTRAL,
        smollm3.SMOLLM3,
        qwen.QWEN2,
        qwen.QWEN3,
        qwen.QWEN3_MOE,
        gemma.GEMMA2,
        gemma.GEMMA3,
        olmo.OLMO2,
        olmo.OLMO3,
        phi.PHI3,
        nemotron.NEMOTRON,
        gpt_oss.GPT_OSS,
    )
}
"""Families by the model_type of their config.json."""

__all__ = ["FAMILIES", "Family"]
