"""Dense attention under an explicit mask: the reference for the kernels, and decoding's own."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from deltapref_jax.models.attention.masks import MASKED_SCORE


def dense_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """Grouped-query attention by XLA: softmax in float32, memory of B * N * T * S scores."""
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])


def cached_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K H S"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """Computes `dense_attention` over a key/value cache.

    The cache stores keys and values in the layouts that the two products read, so that a decoding
    step transposes neither of them.
    """
    B, T, N, H = q.shape
    K = k.shape[1]
    q = jnp.moveaxis(q.reshape(B, T, K, -1, H), 1, 2).reshape(B, K, -1, H)  # m = T * N/K
    scores = jnp.einsum("bkmh,bkhs->bkms", q, k, preferred_element_type=jnp.float32) * H**-0.5
    # Along m the queries of one token are neighbours, so each row of the mask is repeated for them.
    mask = jnp.repeat(mask, N // K, axis=1)[:, None]
    weights = jax.nn.softmax(jnp.where(mask, scores, MASKED_SCORE), axis=-1).astype(q.dtype)
    attended = jnp.einsum("bkms,bksh->bkmh", weights, v).reshape(B, K, T, -1, H)
    return jnp.moveaxis(attended, 2, 1).reshape(B, T, N, H)
