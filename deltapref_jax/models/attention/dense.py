"""Dense attention under an explicit mask: the reference for the kernels, and decoding's own."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from deltapref_jax.models.attention.masks import MASKED_SCORE
from deltapref_jax.models.attention.sinks import softmax_with_sinks


def dense_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
    cap: float = 0.0,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention by XLA: softmax in float32, memory of B * N * T * S scores.

    A cap turns the scores s into cap * tanh(s / cap) (Gemma 2, arXiv 2408.00118, section 2); for
    sinks see `attention.sinks`.
    """
    if not cap and sinks is None:
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])
    groups = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    scores = jnp.einsum("btkgh,bskh->bkgts", groups, k, preferred_element_type=jnp.float32)
    scores = capped(scores * q.shape[-1] ** -0.5, cap)
    scores = jnp.where(mask[:, None, None], scores, MASKED_SCORE)
    weights = _softmax(scores, None if sinks is None else sinks.reshape(k.shape[2], -1, 1, 1))
    out = jnp.einsum("bkgts,bskh->btkgh", weights.astype(v.dtype), v)
    return out.reshape(q.shape).astype(q.dtype)


def _softmax(scores: Float[Array, "*n S"], sinks: Float[Array, "*m"] | None) -> Array:
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    return softmax_with_sinks(scores, sinks.astype(jnp.float32))


def capped(x: Array, cap: float) -> Array:
    """Returns cap * tanh(x / cap), or `x` where the cap is 0."""
    return cap * jnp.tanh(x / cap) if cap else x


def dense_cached_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"],
    cap: float = 0.0,
    sinks: Float[Array, " N"] | None = None,
    positions_last: bool = False,
) -> Float[Array, "B T N H"]:
    """Computes `dense_attention` over a key/value cache.

    The cache stores keys and values in the layouts that the two products read, so that a decoding
    step transposes neither of them: keys are [B, K, H, S] where `positions_last`
    (`decoder.empty_cache` chooses).
    """
    B, T, N, H = q.shape
    K = k.shape[1]
    q = jnp.moveaxis(q.reshape(B, T, K, -1, H), 1, 2).reshape(B, K, -1, H)  # m = T * N/K
    keys = "bkhs" if positions_last else "bksh"
    scores = jnp.einsum(f"bkmh,{keys}->bkms", q, k, preferred_element_type=jnp.float32) * H**-0.5
    scores = capped(scores, cap)
    # Along m the queries of one token are neighbours, so each row of the mask is repeated for them.
    mask = jnp.repeat(mask, N // K, axis=1)[:, None]
    if sinks is not None:
        sinks = jnp.tile(sinks.reshape(K, -1), T)[..., None]
    weights = _softmax(jnp.where(mask, scores, MASKED_SCORE), sinks).astype(q.dtype)
    attended = jnp.einsum("bkms,bksh->bkmh", weights, v).reshape(B, K, T, -1, H)
    return jnp.moveaxis(attended, 2, 1).reshape(B, T, N, H)
