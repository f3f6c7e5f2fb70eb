"""Arithmetic of a decoder by formula, and what chips can do: XLA's own count reads a scanned layer once."""

import numpy as np
from jaxtyping import Int

from deltapref_jax.models.spec import NO_ADAPTERS, Adapters, ModelSpec

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


def forward_flops(
    spec: ModelSpec,
    positions: Int[np.ndarray, " T"],
    targets: int,
    adapters: Adapters = NO_ADAPTERS,
) -> float:
    """FLOPs of the matrix products of one forward pass.

    2 per token and weight; in attention the two products over the causal half, 2 · N · H · length² per layer and
    sequence (a kernel that computes the masked half too does no more useful work); the vocabulary only at target
    positions.
    Recomputed activations do not count (model FLOPs, arXiv 2204.02311, appendix B).

    Args:
      spec: of the model.
      positions: of every real token in its own sequence: it sees as many keys, and itself.
      targets: how many positions are projected to the vocabulary.
      adapters: beside the weights; their products are with activations.
    """
    return sum(_products(spec, positions, targets, adapters))


def training_flops(
    spec: ModelSpec,
    positions: Int[np.ndarray, " T"],
    targets: int,
    adapters: Adapters = NO_ADAPTERS,
) -> float:
    """FLOPs of a forward and a backward pass: see `forward_flops` for what counts, and for the arguments.

    Backward, every product is taken twice, for the gradients of its two factors; with adapters the weights are frozen,
    and a product with them is taken once.
    """
    weights, attention, low_rank = _products(spec, positions, targets, adapters)
    return (2 if adapters.rank else 3) * weights + 3 * (attention + low_rank)


def _products(
    spec: ModelSpec, positions: Int[np.ndarray, " T"], targets: int, adapters: Adapters
) -> tuple[float, float, float]:
    """Forward FLOPs of products with weights, of attention, and of products with adapters."""
    D, inner, F = spec.width, spec.heads * spec.head_width, spec.mlp
    kv = spec.kv_heads * spec.head_width
    sizes = {
        "q": (D, inner),
        "k": (D, kv),
        "v": (D, kv),
        "o": (inner, D),
        "gate": (D, F),
        "up": (D, F),
        "down": (F, D),
    }
    per_token = 2.0 * spec.layers * len(positions)
    weights = per_token * sum(a * b for a, b in sizes.values()) + 2.0 * D * spec.vocab * targets
    seen = 2 * np.asarray(positions, np.float64).sum() + len(positions)  # of one sequence: length²
    attention = 2.0 * spec.layers * inner * seen
    return (
        float(weights),
        float(attention),
        float(per_token * adapters.rank * sum(sum(sizes[t]) for t in adapters.targets)),
    )
