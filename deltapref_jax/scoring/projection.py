"""Log-probabilities of target tokens without a logits tensor [B, L, V].

          vocabulary ->        The targets of a device's rows are moved to the front (other tokens
    targets | x x x x          are not projected) and multiplied by the vocabulary, one tile of
        |   | x x x x          logits [C, E] at a time (x). The outer loop runs over slices of the
        v   | . . . .          vocabulary, so that the gradient of the unembedding is written once;
                               the inner loop runs over tiles of targets and ends at the last one.

Operations: 2 * V * D per target forward and 6 * V * D backward, where the logits are computed again
(4 * V * D where the unembedding is frozen). Extra memory: up to three float32 buffers of one tile
(logits, their exponentials, their gradient) and the reordered hidden states; backward, the gradient
of these in float32 too.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from deltapref_jax.mesh import platform_of
from deltapref_jax.models.attention.dense import capped
from deltapref_jax.models.sharding import BATCH

_MAX_TILE_ENTRIES = 2048
"""Vocabulary entries of a tile, at most."""
_CPU_TILE_LOGITS = 3 << 17
"""Logits of a tile on CPU: 192 targets of 2048 entries, 1.5 MiB in float32, fit the caches."""
_TILE_LOGITS = 1 << 24
"""Logits of a tile on accelerators, where a tile must outweigh reading its unembedding slice."""
_LOG_ZERO = -1e30
"""Logarithm of an empty sum. It is finite, so that no difference of two of them is NaN."""


def _tile_shape(tokens: int, vocab: int, logits: int) -> tuple[int, int]:
    """Returns targets and vocabulary entries of a tile of about `logits` numbers.

    The entries divide the vocabulary, which is not padded.
    """
    # The widest divisor of the vocabulary, so that the scan over slices needs no remainder.
    entries = max(n for n in range(1, min(vocab, _MAX_TILE_ENTRIES) + 1) if vocab % n == 0)
    # Slices of a vocabulary whose size is prime, or nearly, would be too narrow.
    if entries < min(vocab, _MAX_TILE_ENTRIES // 8):
        entries = vocab
    return max(1, min(tokens, logits // entries)), entries


class _Targets(NamedTuple):
    """The tokens of a device with its targets first, padded to whole tiles (M tokens)."""

    order: Array  # int32 [T]: the token at each index of the new order
    tiles: Array  # int32 []: number of tiles that hold targets
    hidden: Array  # [M, D]
    labels: Array  # int32 [M], counted from the first entry of this device's vocabulary shard


def _targets_first(
    hidden: Array, labels: Array, mask: Array, tile: int, axis: str | None, vocab: int
) -> _Targets:
    # A stable sort keeps the tokens' order; False sorts before True, so targets come first.
    order = jnp.argsort(~mask.reshape(-1), stable=True)
    # Labels count from the device's first entry: those of another shard fall outside its range and
    # match no column.
    first_entry = jax.lax.axis_index(axis) * vocab if axis else 0
    return _Targets(
        order,
        # Rounded up; the loop ends here, and tiles without a target are never computed.
        -(-mask.sum() // tile),
        _pad_to_tiles(hidden.reshape(-1, hidden.shape[-1])[order], tile),
        _pad_to_tiles(labels.reshape(-1)[order] - first_entry, tile),
    )


def _pad_to_tiles(x: Array, tile: int) -> Array:
    return jnp.pad(x, ((0, -x.shape[0] % tile), *((0, 0),) * (x.ndim - 1)))


def _get_tile(x: Array, i: Array, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, i * size, size)


def _set_tile(x: Array, i: Array, values: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, values, i * values.shape[0], 0)


def _logits(
    hidden: Float[Array, "C D"], entries: Float[Array, "E D"], cap: float
) -> Float[Array, "C E"]:
    # The product accumulates in float32 also where the operands are bfloat16.
    logits = jax.lax.dot_general(
        hidden, entries, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    return capped(logits, cap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _token_logprobs(
    hidden: Array,
    unembedding: Array,
    labels: Array,
    mask: Array,
    axis: str | None,
    tile_logits: int,
    cap: float,
) -> Array:
    """`token_logprobs` on one device.

    `axis` is the mesh axis that `unembedding` is one shard of, or None where it is whole.
    """
    return _forward(hidden, unembedding, labels, mask, axis, tile_logits, cap)[0]


def _forward(
    hidden: Array,
    unembedding: Array,
    labels: Array,
    mask: Array,
    axis: str | None,
    tile_logits: int,
    cap: float,
) -> tuple[Array, tuple[Array, ...]]:
    vocab, width = unembedding.shape
    # Shapes of tiles are static; only the number of tiles that are computed depends on the data.
    size, entries = _tile_shape(mask.size, vocab, tile_logits)
    t = _targets_first(hidden, labels, mask, size, axis, vocab)

    def vocab_slice(
        carry: tuple[Array, Array], x: tuple[Array, Array]
    ) -> tuple[tuple[Array, Array], None]:
        first, w = x

        def tile(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            label_logits, lse = carry
            logits = _logits(_get_tile(t.hidden, i, size), w, cap)
            # The label's logit is selected by a comparison, which XLA fuses, unlike a gather.
            is_label = jnp.arange(entries) == (_get_tile(t.labels, i, size) - first)[:, None]
            label_logit = jnp.where(is_label, logits, 0.0).sum(axis=1)
            slice_lse = jax.nn.logsumexp(logits, axis=1)
            return (
                _set_tile(label_logits, i, _get_tile(label_logits, i, size) + label_logit),
                _set_tile(lse, i, jnp.logaddexp(_get_tile(lse, i, size), slice_lse)),
            )

        return jax.lax.fori_loop(0, t.tiles, tile, carry), None

    # Running sums: the label's logit adds up from 0, the log-sum-exp from the logarithm of 0.
    init = jnp.zeros(t.labels.shape), jnp.full(t.labels.shape, _LOG_ZERO)
    (label_logits, lse), _ = jax.lax.scan(
        vocab_slice, init, (jnp.arange(0, vocab, entries), unembedding.reshape(-1, entries, width))
    )
    if axis:
        # Joins the log-sum-exps of the vocabulary shards; one of them alone holds the label.
        max_lse = jax.lax.pmax(lse, axis)
        lse = max_lse + jnp.log(jax.lax.psum(jnp.exp(lse - max_lse), axis))
        label_logits = jax.lax.psum(label_logits, axis)
    # The order is inverted by a scatter, and padding behind the tokens is cut off.
    logprobs = jnp.zeros(mask.size).at[t.order].set((label_logits - lse)[: mask.size])
    # Logits are not saved: the backward pass computes them again, tile by tile.
    saved = (hidden, unembedding, labels, mask, lse)
    return jnp.where(mask, logprobs.reshape(mask.shape), 0.0), saved


def _forward_for_vjp(
    hidden: Any,
    unembedding: Any,
    labels: Any,
    mask: Any,
    axis: str | None,
    tile_logits: int,
    cap: float,
) -> tuple[Array, tuple[Any, ...]]:
    """`_forward` of arguments that say whether they are differentiated (`symbolic_zeros`).

    A frozen unembedding has no gradient. That is static, so it is saved as () or None.
    """
    out, saved = _forward(
        hidden.value, unembedding.value, labels.value, mask.value, axis, tile_logits, cap
    )
    return out, (*saved, () if unembedding.perturbed else None)


def _backward(
    axis: str | None, tile_logits: int, cap: float, saved: tuple[Any, ...], g: Float[Array, "B L"]
) -> tuple[Array, Array | None, None, None]:
    """Gradients by d logits = g * (onehot(label) - softmax(logits)), tile by tile."""
    hidden, unembedding, labels, mask, lse, trained = saved
    vocab, width = unembedding.shape
    size, entries = _tile_shape(mask.size, vocab, tile_logits)
    # The same order as in the forward pass, because it depends on the mask alone.
    t = _targets_first(hidden, labels, mask, size, axis, vocab)
    # Devices along `axis` have the same output: shard_map hands each of them its share of the
    # gradient, and adds up what they return.
    g = _pad_to_tiles(
        jnp.where(mask, jax.lax.psum(g, axis) if axis else g, 0.0).reshape(-1)[t.order], size
    )

    def vocab_slice(d_hidden: Array, x: tuple[Array, Array]) -> tuple[Array, Array | None]:
        first, w = x

        def tile(i: Array, carry: tuple[Array, Array | None]) -> tuple[Array, Array | None]:
            d_hidden, d_w = carry
            h = _get_tile(t.hidden, i, size)
            # The softmax of a tile from the saved log-sum-exp, without a second reduction.
            logits = _logits(h, w, cap)
            p = jnp.exp(logits - _get_tile(lse, i, size)[:, None])
            is_label = jnp.arange(entries) == (_get_tile(t.labels, i, size) - first)[:, None]
            # The gradient of the logits is cast, so that both products run in the inputs' dtype.
            d_logits = jnp.where(is_label, 1 - p, -p) * _get_tile(g, i, size)[:, None]
            if cap:
                d_logits *= 1 - jnp.square(logits / cap)  # the derivative of tanh is 1 - tanh²
            d_logits = d_logits.astype(hidden.dtype)
            d_h = jax.lax.dot(d_logits, w, preferred_element_type=jnp.float32)
            if d_w is not None:
                d_w += jax.lax.dot_general(
                    d_logits, h, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
                )
            return _set_tile(d_hidden, i, _get_tile(d_hidden, i, size) + d_h), d_w

        # The slice's gradient stays in the loop's carry and is written once, after all tiles of
        # targets.
        zeros = None if trained is None else jnp.zeros(w.shape, jnp.float32)
        d_hidden, d_w = jax.lax.fori_loop(0, t.tiles, tile, (d_hidden, zeros))
        return d_hidden, None if d_w is None else d_w.astype(w.dtype)

    d_hidden, d_w = jax.lax.scan(
        vocab_slice,
        jnp.zeros(t.hidden.shape, jnp.float32),
        (jnp.arange(0, vocab, entries), unembedding.reshape(-1, entries, width)),
    )
    # Gradients return to the tokens' own order.
    d_hidden = jnp.zeros((mask.size, width), jnp.float32).at[t.order].set(d_hidden[: mask.size])
    d_w = None if d_w is None else d_w.reshape(unembedding.shape)
    return d_hidden.astype(hidden.dtype).reshape(hidden.shape), d_w, None, None


_token_logprobs.defvjp(_forward_for_vjp, _backward, symbolic_zeros=True)


@jax.named_scope("unembedding")
def token_logprobs(
    hidden: Float[Array, "B L D"],
    unembedding: Float[Array, "V D"],
    labels: Int[Array, "B L"],
    mask: Bool[Array, "B L"],
    mesh: Mesh | None = None,
    cap: float = 0.0,
) -> Float[Array, "B L"]:
    """Returns log softmax(hidden * unembeddingᵀ)[label] in nats where `mask`, and 0 elsewhere.

    The result is float32. On a mesh every device projects its own rows and columns (data, fsdp,
    context) on its shard of the vocabulary (tensor). The log-sum-exps of the shards are joined
    once, and gradients of the unembedding are added up once, both after the loops.

    Args:
      hidden: hidden states after the final norm.
      unembedding: rows of the output projection (`Decoder.unembedding`).
      labels: the token that each position predicts; read where `mask` alone.
      mask: positions to project.
      mesh: the mesh over which the batch lies; None means one device.
      cap: logits z become cap * tanh(z / cap) before the softmax; 0 leaves them.
    """
    tile_logits = _CPU_TILE_LOGITS if platform_of(mesh) == "cpu" else _TILE_LOGITS
    if mesh is None or mesh.size == 1:
        return _token_logprobs(hidden, unembedding, labels, mask, None, tile_logits, cap)
    # A vocabulary that does not divide over `tensor` is projected whole on every device.
    divides = unembedding.shape[0] % mesh.shape["tensor"] == 0
    axis = "tensor" if mesh.shape["tensor"] > 1 and divides else None
    return jax.shard_map(
        lambda *local: _token_logprobs(*local, axis, tile_logits, cap),
        mesh=mesh,
        in_specs=(PartitionSpec(*BATCH, None), PartitionSpec(axis, None), BATCH, BATCH),
        out_specs=BATCH,
        check_vma=False,
    )(hidden, unembedding, labels, mask)
