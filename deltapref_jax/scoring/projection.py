"""Log-probabilities of target tokens without a logits tensor: a tiled projection with its own backward pass.

          vocabulary ->        the targets of a device's rows, moved to the front (the rest is not projected), times the
    targets | x x x x          vocabulary, one tile of logits [C, E] at a time (x). Shares of the vocabulary are the
        |   | x x x x          outer loop, so the gradient of the unembedding is written once; tiles of targets are the
        v   | . . . .          inner one, which ends behind the last target.

Operations: 2·V·D per target forward, 6·V·D backward (the logits are computed again; 4·V·D where the unembedding is
frozen). Extra memory: up to three float32 buffers of one tile (logits, their exponentials, their gradient), and the
hidden states in their new order; backward, their gradient in float32 too.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from deltapref_jax.mesh import platform_of
from deltapref_jax.models.sharding import BATCH

_ENTRIES = 2048  # of the vocabulary in one tile, at most
_NUMBERS = (
    3 << 17
)  # logits of one tile on CPU: 192 targets, 1.5 MiB in float32, which stay in the caches
_ACCELERATOR = 1 << 24  # elsewhere, where a tile must outweigh reading its share of the unembedding
_LOW = -1e30  # log of nothing: finite, so that no difference of two is NaN


def _tile(tokens: int, vocab: int, numbers: int) -> tuple[int, int]:
    """Tokens and vocabulary entries of a tile: the latter divide the vocabulary, which is not padded."""
    entries = max(n for n in range(1, min(vocab, _ENTRIES) + 1) if vocab % n == 0)
    if entries < min(vocab, _ENTRIES // 8):  # a prime, or nearly
        entries = vocab
    return max(1, min(tokens, numbers // entries)), entries


class _Targets(NamedTuple):
    """The tokens of a device, targets first, in whole tiles (M); what is behind them is padding."""

    order: Array  # int32 [T]: the token at each place
    tiles: Array  # int32, how many tiles hold targets
    hidden: Array  # [M, D]
    labels: Array  # int32 [M], from the first entry of this device's share of the vocabulary


def _targets(
    hidden: Array, labels: Array, mask: Array, tile: int, axis: str | None, vocab: int
) -> _Targets:
    order = jnp.argsort(~mask.reshape(-1), stable=True)
    first = jax.lax.axis_index(axis) * vocab if axis else 0
    return _Targets(
        order,
        -(-mask.sum() // tile),
        _whole(hidden.reshape(-1, hidden.shape[-1])[order], tile),
        _whole(labels.reshape(-1)[order] - first, tile),
    )


def _whole(x: Array, tile: int) -> Array:
    return jnp.pad(x, ((0, -x.shape[0] % tile), *((0, 0),) * (x.ndim - 1)))


def _at(x: Array, tile: Array, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, tile * size, size)


def _put(x: Array, tile: Array, values: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, values, tile * values.shape[0], 0)


def _logits(hidden: Float[Array, "C D"], entries: Float[Array, "E D"]) -> Float[Array, "C E"]:
    return jax.lax.dot_general(
        hidden, entries, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _token_logprobs(
    hidden: Array, unembedding: Array, labels: Array, mask: Array, axis: str | None, numbers: int
) -> Array:
    """`token_logprobs` on one device; `axis`: the mesh axis that `unembedding` is one share of, or None."""
    return _forward(hidden, unembedding, labels, mask, axis, numbers)[0]


def _forward(
    hidden: Array, unembedding: Array, labels: Array, mask: Array, axis: str | None, numbers: int
) -> tuple[Array, tuple[Array, ...]]:
    vocab, width = unembedding.shape
    size, entries = _tile(mask.size, vocab, numbers)
    t = _targets(hidden, labels, mask, size, axis, vocab)

    def share(
        carry: tuple[Array, Array], x: tuple[Array, Array]
    ) -> tuple[tuple[Array, Array], None]:
        first, w = x

        def tile(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            picked, lse = carry
            logits = _logits(_at(t.hidden, i, size), w)
            # compared, not gathered, so that it fuses
            is_label = jnp.arange(entries) == (_at(t.labels, i, size) - first)[:, None]
            more = jnp.where(is_label, logits, 0.0).sum(axis=1), jax.nn.logsumexp(logits, axis=1)
            return (
                _put(picked, i, _at(picked, i, size) + more[0]),
                _put(lse, i, jnp.logaddexp(_at(lse, i, size), more[1])),
            )

        return jax.lax.fori_loop(0, t.tiles, tile, carry), None

    start = jnp.zeros(t.labels.shape), jnp.full(t.labels.shape, _LOW)
    (picked, lse), _ = jax.lax.scan(
        share, start, (jnp.arange(0, vocab, entries), unembedding.reshape(-1, entries, width))
    )
    if axis:
        top = jax.lax.pmax(lse, axis)
        lse = top + jnp.log(jax.lax.psum(jnp.exp(lse - top), axis))
        picked = jax.lax.psum(picked, axis)
    logprobs = jnp.zeros(mask.size).at[t.order].set((picked - lse)[: mask.size])
    return jnp.where(mask, logprobs.reshape(mask.shape), 0.0), (
        hidden,
        unembedding,
        labels,
        mask,
        lse,
    )


def _forward_saving(
    hidden: Any, unembedding: Any, labels: Any, mask: Any, axis: str | None, numbers: int
) -> tuple[Array, tuple[Any, ...]]:
    """`_forward` of arguments that say whether they are differentiated: a frozen unembedding has no gradient."""
    out, saved = _forward(hidden.value, unembedding.value, labels.value, mask.value, axis, numbers)
    return out, (*saved, () if unembedding.perturbed else None)


def _backward(
    axis: str | None, numbers: int, saved: tuple[Any, ...], g: Float[Array, "B L"]
) -> tuple[Array, Array | None, None, None]:
    hidden, unembedding, labels, mask, lse, trained = saved
    vocab, width = unembedding.shape
    size, entries = _tile(mask.size, vocab, numbers)
    t = _targets(hidden, labels, mask, size, axis, vocab)
    # a shard_map hands each of the devices with the same output its share of the gradient, and adds up what they return
    g = _whole(
        jnp.where(mask, jax.lax.psum(g, axis) if axis else g, 0.0).reshape(-1)[t.order], size
    )

    def share(d_hidden: Array, x: tuple[Array, Array]) -> tuple[Array, Array | None]:
        first, w = x

        def tile(i: Array, carry: tuple[Array, Array | None]) -> tuple[Array, Array | None]:
            d_hidden, d_w = carry
            h = _at(t.hidden, i, size)
            p = jnp.exp(_logits(h, w) - _at(lse, i, size)[:, None])
            is_label = jnp.arange(entries) == (_at(t.labels, i, size) - first)[:, None]
            d_logits = (jnp.where(is_label, 1 - p, -p) * _at(g, i, size)[:, None]).astype(
                hidden.dtype
            )
            dh = jax.lax.dot(d_logits, w, preferred_element_type=jnp.float32)
            if d_w is not None:
                d_w += jax.lax.dot_general(
                    d_logits, h, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
                )
            return _put(d_hidden, i, _at(d_hidden, i, size) + dh), d_w

        zeros = None if trained is None else jnp.zeros(w.shape, jnp.float32)
        d_hidden, d_w = jax.lax.fori_loop(0, t.tiles, tile, (d_hidden, zeros))
        return d_hidden, None if d_w is None else d_w.astype(w.dtype)

    d_hidden, d_w = jax.lax.scan(
        share,
        jnp.zeros(t.hidden.shape, jnp.float32),
        (jnp.arange(0, vocab, entries), unembedding.reshape(-1, entries, width)),
    )
    d_hidden = jnp.zeros((mask.size, width), jnp.float32).at[t.order].set(d_hidden[: mask.size])
    d_w = None if d_w is None else d_w.reshape(unembedding.shape)
    return d_hidden.astype(hidden.dtype).reshape(hidden.shape), d_w, None, None


_token_logprobs.defvjp(_forward_saving, _backward, symbolic_zeros=True)


def token_logprobs(
    hidden: Float[Array, "B L D"],
    unembedding: Float[Array, "V D"],
    labels: Int[Array, "B L"],
    mask: Bool[Array, "B L"],
    mesh: Mesh | None = None,
) -> Float[Array, "B L"]:
    """log softmax(hidden · unembeddingᵀ)[label] where `mask`, float32 nats; 0 elsewhere.

    On a mesh every device projects its own rows and columns (data, fsdp, context) on its share of the vocabulary
    (tensor); the log-sum-exps of the shares are joined once, and gradients of the unembedding are added up once, both
    behind the loops.
    """
    numbers = _NUMBERS if platform_of(mesh) == "cpu" else _ACCELERATOR
    if mesh is None or mesh.size == 1:
        return _token_logprobs(hidden, unembedding, labels, mask, None, numbers)
    axis = (
        "tensor"
        if mesh.shape["tensor"] > 1 and unembedding.shape[0] % mesh.shape["tensor"] == 0
        else None
    )
    return jax.shard_map(
        lambda *local: _token_logprobs(*local, axis, numbers),
        mesh=mesh,
        in_specs=(PartitionSpec(*BATCH, None), PartitionSpec(axis, None), BATCH, BATCH),
        out_specs=BATCH,
        check_vma=False,
    )(hidden, unembedding, labels, mask)
