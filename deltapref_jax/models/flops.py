"""Arithmetic of a decoder by formula, and what chips can do: XLA's own count reads a scanned layer once."""

import numpy as np
from jaxtyping import Int

from deltapref_jax.models.spec import ModelSpec

PEAK_FLOPS = (
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),  # v5e
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),  # v5p; after v5 lite, whose name starts alike
    ("TPU v6", 918e12),  # v6e, "TPU v6 lite"
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100", 989e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA A100", 312e12),
)
"""Start of `device_kind` to bfloat16 multiply-adds of one device, dense, in FLOP/s (vendors' data sheets)."""


def peak_flops(device_kind: str) -> float | None:
    """Peak of one device in bfloat16, FLOP/s; None where it is not known."""
    return next((peak for name, peak in PEAK_FLOPS if device_kind.startswith(name)), None)


def forward_flops(spec: ModelSpec, lengths: Int[np.ndarray, " S"], targets: int) -> float:
    """FLOPs of the matrix products of one forward pass; a backward pass takes twice as many.

    2 per token and weight; in attention the two products over the causal half, 2 · N · H · length² per layer (a
    kernel that computes the masked half too does no more useful work); the vocabulary only at target positions.
    Recomputed activations do not count (model FLOPs, arXiv 2204.02311, appendix B).

    Args:
      spec: of the model.
      lengths: real tokens of each sequence.
      targets: positions that are projected to the vocabulary.
    """
    lengths = np.asarray(lengths, np.float64)
    inner = spec.heads * spec.head_width
    block = spec.width * (2 * inner + 2 * spec.kv_heads * spec.head_width) + 3 * spec.width * spec.mlp
    layers = spec.layers * (2.0 * block * lengths.sum() + 2.0 * inner * np.square(lengths).sum())
    return float(layers + 2.0 * spec.width * spec.vocab * targets)
