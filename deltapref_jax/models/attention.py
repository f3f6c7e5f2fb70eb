"""Who sees whom, and rotary positions.

A packed row holds several segments; a segment may hold a trunk (branch 0) and branches that share it but not each
other:

    tokens     p p p t t t | q q t t a a b b | .
    segments   1 1 1 1 1 1 | 2 2 2 2 2 2 2 2 | 0      (0: padding)
    branches   0 0 0 0 0 0 | 0 0 0 0 1 1 2 2 | 0
    positions  0 1 2 3 4 5 | 0 1 2 3 4 5 4 5 | 0

A branch is one run of tokens, as a segment is.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def packed_mask(segments: Int[Array, "B L"], branches: Int[Array, "B L"] | None = None) -> Bool[Array, "B L L"]:
    """True where query (axis 1) may see key (axis 2): same segment, not later, and in the trunk or the same branch."""
    length = segments.shape[1]
    mask = (segments[:, :, None] == segments[:, None, :]) & jnp.tril(jnp.ones((length, length), bool))
    if branches is not None:
        mask &= (branches[:, None, :] == 0) | (branches[:, :, None] == branches[:, None, :])
    return mask


def until(segments: Int[Array, "B L"], branches: Int[Array, "B L"] | None = None) -> Int[Array, "B L"]:
    """`packed_mask` as one integer per key: query i sees key j where j <= i < until[j].

    The end of the key's segment, in a branch that of the branch: FlashMask's column-wise mask (arXiv 2410.01359). Here
    padding sees itself, so that every query has a key.

    Args:
      segments: one run each; 0 is padding.
      branches: one run each within a segment; the trunk may lie anywhere. None where there are none.
    """
    column = jnp.arange(segments.shape[1])

    def end(x: Array) -> Array:  # of the token's run of equal numbers
        last = jnp.pad(x[:, 1:] != x[:, :-1], ((0, 0), (0, 1)), constant_values=True)
        return jax.lax.cummin(jnp.where(last, column + 1, segments.shape[1]), axis=1, reverse=True)

    found = end(segments)
    if branches is not None:
        found = jnp.where(branches > 0, jnp.minimum(found, end(branches)), found)
    return jnp.where(segments > 0, found, column + 1)


def rotation(positions: Int[Array, "B L"], head_width: int, theta: float) -> tuple[Array, Array]:
    """Cosines and sines [B, L, 1, H/2], float32 (RoFormer, arXiv 2104.09864; half-split layout of Llama)."""
    frequencies = theta ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B L N H"], rotations: tuple[Array, Array]) -> Float[Array, "B L N H"]:
    """Applies `rotation` to queries or keys; computes in float32, returns the dtype of `x`."""
    cos, sin = rotations
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """Grouped-query attention, the portable path: softmax in float32, memory B·N·T·S."""
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])


def attend_cache(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K H S"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """`attend` over a cache whose keys and values already lie as the two products read them: nothing is transposed."""
    B, T, N, H = q.shape
    K = k.shape[1]
    q = jnp.moveaxis(q.reshape(B, T, K, -1, H), 1, 2).reshape(B, K, -1, H)  # m = T · N/K
    scores = jnp.einsum("bkmh,bkhs->bkms", q, k, preferred_element_type=jnp.float32) * H**-0.5
    mask = jnp.repeat(mask, N // K, axis=1)[:, None]
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1).astype(q.dtype)
    attended = jnp.einsum("bkms,bksh->bkmh", weights, v).reshape(B, K, T, -1, H)
    return jnp.moveaxis(attended, 2, 1).reshape(B, T, N, H)
