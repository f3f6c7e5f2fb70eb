"""FLOPs of a decoder by formula, and peak FLOP/s of devices.

XLA's own cost analysis cannot replace the formula: it counts the body of a scan once.
"""

import numpy as np
from jaxtyping import Int

from deltapref_jax.models.parameters import matrices
from deltapref_jax.models.spec import NO_ADAPTERS, Adapters, ModelSpec

PEAK_FLOPS = (
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),  # v5e
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),  # v5p; its name is a prefix of v5 lite's, which therefore comes first
    ("TPU v6", 918e12),  # v6e, "TPU v6 lite"
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100", 989e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA A100", 312e12),
)
"""Prefix of a `device_kind` to the device's dense bfloat16 peak in FLOP/s (vendors' data sheets).

The first match counts.
"""


def peak_flops(device_kind: str) -> float | None:
    """Returns the bfloat16 peak of one device in FLOP/s, or None if it is not known."""
    return next((peak for name, peak in PEAK_FLOPS if device_kind.startswith(name)), None)


def forward_flops(
    spec: ModelSpec,
    positions: Int[np.ndarray, " T"],
    targets: int,
    adapters: Adapters = NO_ADAPTERS,
) -> float:
    """Returns the FLOPs of the matrix products of one forward pass.

    These are model FLOPs (arXiv 2204.02311, appendix B), so recomputed activations do not count:
    2 per token and weight; 2 * N * H * length² per layer and sequence for attention's two products
    over the causal half (a kernel that computes the masked half does no more useful work); and the
    projection to the vocabulary at target positions alone.

    Args:
      spec: sizes of the decoder.
      positions: position of every real token in its own sequence; token i sees i + 1 keys.
      targets: number of positions that are projected to the vocabulary.
      adapters: shape of the adapters, whose products are with activations.
    """
    return sum(_products(spec, positions, targets, adapters))


def training_flops(
    spec: ModelSpec,
    positions: Int[np.ndarray, " T"],
    targets: int,
    adapters: Adapters = NO_ADAPTERS,
) -> float:
    """Returns the FLOPs of a forward and a backward pass; arguments as in `forward_flops`.

    The backward pass computes two products for each of the forward pass, one for the gradient of
    each factor. With adapters the weights are frozen, and a product with them costs only one.
    """
    weights, attention, low_rank = _products(spec, positions, targets, adapters)
    return (2 if adapters.rank else 3) * weights + 3 * (attention + low_rank)


def _products(
    spec: ModelSpec, positions: Int[np.ndarray, " T"], targets: int, adapters: Adapters
) -> tuple[float, float, float]:
    """Returns forward FLOPs of products with weights, of attention and of adapters' products."""
    # Multiplications of one token in one layer, by matrix; of experts, those that it is sent to.
    sides = {name: p.sides(spec) for name, p in matrices(spec).items()}
    share = spec.experts.active if spec.experts else 1
    products = sum(
        a * b * (share if matrices(spec)[name].batch else 1) for name, (a, b) in sides.items()
    )
    per_token = 2.0 * len(positions)
    head = 2.0 * spec.width * spec.vocab * targets
    weights = per_token * spec.layers * products + head
    # A token at position i sees i + 1 keys, or as many as the layer's window holds.
    seen = np.asarray(positions, np.float64) + 1
    inner = spec.heads * spec.head_width
    attention = sum(
        # Σ (2i + 1) over the positions i of a sequence is its length squared.
        2.0 * inner * float((2 * np.minimum(seen, window or np.inf) - 1).sum())
        for window in (kind.window for kind in spec.kinds)
    )
    # An adapter multiplies by A [in, rank] and B [rank, out], which is rank * (in + out) weights.
    low_rank = (
        per_token * spec.layers * adapters.rank * sum(sum(sides[t]) for t in adapters.targets)
    )
    return float(weights), float(attention), float(low_rank)
