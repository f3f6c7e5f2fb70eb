"""Attention on GPU by tokamax's Mosaic kernels, which need Python 3.12 and JAX 0.11 or later.

They outlive Pallas' Triton backend, on which `triton` is built. tokamax's public function takes the
mask as booleans, [B, L, L], and skips nothing but the tiles above the diagonal. The kernels run on
Hopper and Blackwell, in bfloat16; elsewhere tokamax itself falls back to XLA in chunks.
"""

from jaxtyping import Array, Bool, Float

MAX_ROW = 8192
"""Longest row: its mask takes 64 MiB."""


def mosaic_attention(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B L K H"],
    v: Float[Array, "B L K H"],
    mask: Bool[Array, "B L L"],
    cap: float = 0.0,
) -> Float[Array, "B L N H"]:
    """Attention of whole rows under `masks.packed_mask`.

    A cap turns the scores s into cap * tanh(s / cap).
    """
    import tokamax  # Only here, because few machines have it.

    return tokamax.dot_product_attention(
        q,
        k,
        v,
        mask=mask[:, None],
        is_causal=True,
        logits_soft_cap=cap or None,
        implementation=("mosaic_gpu", "xla_chunked"),
    )
