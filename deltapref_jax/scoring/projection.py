"""Log-probabilities of target tokens without a logits tensor [B, L, V].

          vocabulary ->        The targets of a device's rows are moved to the front (other tokens
    targets | x x x x          are not projected) and multiplied by the vocabulary, one tile of
        |   | x x x x          logits [C, E] at a time (x). The outer loop runs over slices of the
        v   | . . . .          vocabulary, so that the gradient of the unembedding is written once;
                               the inner loop runs over tiles of targets and ends at the last one.

The unembedding is read as it is stored, in float32 and sharded over a mesh. A slice is cast, and
gathered over fsdp, when the outer loop reaches it, and its gradient is scattered again: no device
ever holds the whole unembedding or the whole gradient of it.

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
from deltapref_jax.models.products import gather_shards, scatter_sum
from deltapref_jax.models.sharding import BATCH
from deltapref_jax.models.spec import ModelSpec

_CPU_TILE = (3 << 17, 2048)
"""Logits, and vocabulary entries at most, of a tile on CPU: 192 targets of 2048 entries, 1.5 MiB in
float32, fit the caches."""
_TILE = (1 << 24, 8192)
"""The same on accelerators, where a tile must outweigh reading its slice of the unembedding, and a
slice must outweigh reading and writing the gradient of the hidden states."""
_LANES = 128
"""Entries of a tile are a multiple of this, a vector register's width on TPU."""
_LOG_ZERO = -1e30
"""Logarithm of an empty sum. It is finite, so that no difference of two of them is NaN."""


def _tile_shape(tokens: int, vocab: int, limits: tuple[int, int]) -> tuple[int, int]:
    """Returns targets and vocabulary entries of a tile within `limits` (see `_TILE`).

    A vocabulary need not be a multiple of the entries: its last slice begins earlier, and the
    entries that the slice before it had are masked.
    """
    logits, most = limits
    slices = -(-vocab // most)
    # Slices of equal width overlap least.
    entries = min(most, -(-vocab // slices // _LANES) * _LANES) if slices > 1 else vocab
    return max(1, min(tokens, logits // entries)), entries


class _Targets(NamedTuple):
    """The tokens of a device with its targets first, padded to whole tiles (M tokens)."""

    order: Array  # int32 [T]: the token at each index of the new order
    tiles: Array  # int32 []: number of tiles that hold targets
    hidden: Array  # [M, D]
    labels: Array  # int32 [M], counted from the first entry of this device's vocabulary shard


def _targets_first(
    hidden: Array, labels: Array, mask: Array, tile: int, split: bool, vocab: int
) -> _Targets:
    # A stable sort keeps the tokens' order; False sorts before True, so targets come first.
    order = jnp.argsort(~mask.reshape(-1), stable=True)
    # Labels count from the device's first entry: those of another shard fall outside its range and
    # match no column.
    first_entry = jax.lax.axis_index("tensor") * vocab if split else 0
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


def projection_trips(spec: ModelSpec, rows: int, length: int, mesh: Mesh) -> int:
    """Tiles of targets of one device where every token of packed rows is a target: the most."""
    shape = mesh.shape
    tokens = rows * length // (shape["data"] * shape["fsdp"] * shape["context"])
    vocab = spec.vocab // (1 if spec.vocab % shape["tensor"] else shape["tensor"])
    limits = _CPU_TILE if platform_of(mesh) == "cpu" else _TILE
    return -(-tokens // _tile_shape(tokens, vocab, limits)[0])


class _Setting(NamedTuple):
    """What is static of a projection on one device."""

    tensor: bool  # whether the vocabulary is sharded over `tensor`
    fsdp: bool  # whether the width is sharded over `fsdp`
    limits: tuple[int, int]  # of a tile (see `_TILE`)
    cap: float  # of the logits


class _Slice(NamedTuple):
    """Entries of a device's vocabulary, as they are computed with."""

    start: Array  # int32 []: the first entry
    new: Array | None  # bool [E]: not in the slice before; None where no two slices overlap
    rows: Array  # [E, D], in the dtype of the hidden states


def _slices(unembedding: Array, entries: int) -> Array:
    """The first new entry of every slice."""
    return jnp.arange(0, unembedding.shape[0], entries)


def _get_slice(
    unembedding: Array, first: Array, entries: int, dtype: jnp.dtype, setting: _Setting
) -> _Slice:
    vocab = unembedding.shape[0]
    start = jnp.minimum(first, vocab - entries)
    rows = jax.lax.dynamic_slice_in_dim(unembedding, start, entries)
    rows = gather_shards(rows, 1 if setting.fsdp else None, dtype)
    overlap = vocab % entries > 0
    return _Slice(start, start + jnp.arange(entries) >= first if overlap else None, rows)


def _add_slice(total: Array, d_rows: Float[Array, "E D"], part: _Slice, setting: _Setting) -> Array:
    """Writes a slice's gradient into that of the device's shard, [V, D/f] in float32."""
    if setting.fsdp:
        d_rows = scatter_sum(d_rows, 1)
    if part.new is not None:  # entries of the slice before have a gradient already
        d_rows += jax.lax.dynamic_slice_in_dim(total, part.start, d_rows.shape[0])
    return jax.lax.dynamic_update_slice_in_dim(total, d_rows, part.start, 0)


def _label_columns(labels: Array, part: _Slice) -> Bool[Array, "C E"]:
    """Whether a column of a tile is its target's label; a comparison is fused, unlike a gather."""
    is_label = part.start + jnp.arange(part.rows.shape[0]) == labels[:, None]
    return is_label if part.new is None else is_label & part.new


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _token_logprobs(
    hidden: Array, unembedding: Array, labels: Array, mask: Array, setting: _Setting
) -> Array:
    """`token_logprobs` on one device, of its shard of the unembedding."""
    return _forward(hidden, unembedding, labels, mask, setting)[0]


def _forward(
    hidden: Array, unembedding: Array, labels: Array, mask: Array, setting: _Setting
) -> tuple[Array, tuple[Array, ...]]:
    vocab = unembedding.shape[0]
    # Shapes of tiles are static; only the number of tiles that are computed depends on the data.
    size, entries = _tile_shape(mask.size, vocab, setting.limits)
    t = _targets_first(hidden, labels, mask, size, setting.tensor, vocab)

    def vocab_slice(carry: tuple[Array, Array], first: Array) -> tuple[tuple[Array, Array], None]:
        part = _get_slice(unembedding, first, entries, hidden.dtype, setting)

        def tile(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            label_logits, lse = carry
            logits = _logits(_get_tile(t.hidden, i, size), part.rows, setting.cap)
            is_label = _label_columns(_get_tile(t.labels, i, size), part)
            label_logit = jnp.where(is_label, logits, 0.0).sum(axis=1)
            if part.new is not None:
                logits = jnp.where(part.new, logits, _LOG_ZERO)
            slice_lse = jax.nn.logsumexp(logits, axis=1)
            return (
                _set_tile(label_logits, i, _get_tile(label_logits, i, size) + label_logit),
                _set_tile(lse, i, jnp.logaddexp(_get_tile(lse, i, size), slice_lse)),
            )

        return jax.lax.fori_loop(0, t.tiles, tile, carry), None

    # Running sums: the label's logit adds up from 0, the log-sum-exp from the logarithm of 0.
    init = jnp.zeros(t.labels.shape), jnp.full(t.labels.shape, _LOG_ZERO)
    (label_logits, lse), _ = jax.lax.scan(vocab_slice, init, _slices(unembedding, entries))
    if setting.tensor:
        # Joins the log-sum-exps of the vocabulary shards; one of them alone holds the label.
        max_lse = jax.lax.pmax(lse, "tensor")
        lse = max_lse + jnp.log(jax.lax.psum(jnp.exp(lse - max_lse), "tensor"))
        label_logits = jax.lax.psum(label_logits, "tensor")
    # The order is inverted by a scatter, and padding behind the tokens is cut off.
    logprobs = jnp.zeros(mask.size).at[t.order].set((label_logits - lse)[: mask.size])
    # Logits are not saved: the backward pass computes them again, tile by tile.
    saved = (hidden, unembedding, labels, mask, lse)
    return jnp.where(mask, logprobs.reshape(mask.shape), 0.0), saved


def _forward_for_vjp(
    hidden: Any, unembedding: Any, labels: Any, mask: Any, setting: _Setting
) -> tuple[Array, tuple[Any, ...]]:
    """`_forward` of arguments that say whether they are differentiated (`symbolic_zeros`).

    A frozen unembedding has no gradient. That is static, so it is saved as () or None.
    """
    out, saved = _forward(hidden.value, unembedding.value, labels.value, mask.value, setting)
    return out, (*saved, () if unembedding.perturbed else None)


def _backward(
    setting: _Setting, saved: tuple[Any, ...], g: Float[Array, "B L"]
) -> tuple[Array, Array | None, None, None]:
    """Gradients by d logits = g * (onehot(label) - softmax(logits)), tile by tile."""
    hidden, unembedding, labels, mask, lse, trained = saved
    vocab, width = unembedding.shape[0], hidden.shape[-1]
    size, entries = _tile_shape(mask.size, vocab, setting.limits)
    # The same order as in the forward pass, because it depends on the mask alone.
    t = _targets_first(hidden, labels, mask, size, setting.tensor, vocab)
    # Devices along `tensor` have the same output: shard_map hands each of them its share of the
    # gradient, and adds up what they return.
    g = _pad_to_tiles(
        jnp.where(mask, jax.lax.psum(g, "tensor") if setting.tensor else g, 0.0).reshape(-1)[
            t.order
        ],
        size,
    )

    def vocab_slice(
        carry: tuple[Array, Array | None], first: Array
    ) -> tuple[tuple[Array, Array | None], None]:
        part = _get_slice(unembedding, first, entries, hidden.dtype, setting)

        def tile(i: Array, carry: tuple[Array, Array | None]) -> tuple[Array, Array | None]:
            d_hidden, d_w = carry
            h = _get_tile(t.hidden, i, size)
            # The softmax of a tile from the saved log-sum-exp, without a second reduction.
            logits = _logits(h, part.rows, setting.cap)
            p = jnp.exp(logits - _get_tile(lse, i, size)[:, None])
            is_label = _label_columns(_get_tile(t.labels, i, size), part)
            # The gradient of the logits is cast, so that both products run in the inputs' dtype.
            d_logits = jnp.where(is_label, 1 - p, -p) * _get_tile(g, i, size)[:, None]
            if setting.cap:
                # The derivative of tanh is 1 - tanh².
                d_logits *= 1 - jnp.square(logits / setting.cap)
            if part.new is not None:
                d_logits = jnp.where(part.new, d_logits, 0.0)
            d_logits = d_logits.astype(hidden.dtype)
            d_h = jax.lax.dot(d_logits, part.rows, preferred_element_type=jnp.float32)
            if d_w is not None:
                d_w += jax.lax.dot_general(
                    d_logits, h, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
                )
            return _set_tile(d_hidden, i, _get_tile(d_hidden, i, size) + d_h), d_w

        # The slice's gradient stays in the loop's carry and is written once, after all tiles of
        # targets.
        d_hidden, total = carry
        zeros = None if total is None else jnp.zeros(part.rows.shape, jnp.float32)
        d_hidden, d_w = jax.lax.fori_loop(0, t.tiles, tile, (d_hidden, zeros))
        if total is not None and d_w is not None:
            total = _add_slice(total, d_w, part, setting)
        return (d_hidden, total), None

    zeros = None if trained is None else jnp.zeros(unembedding.shape, jnp.float32)
    (d_hidden, d_w), _ = jax.lax.scan(
        vocab_slice,
        (jnp.zeros(t.hidden.shape, jnp.float32), zeros),
        _slices(unembedding, entries),
    )
    # Gradients return to the tokens' own order.
    d_hidden = jnp.zeros((mask.size, width), jnp.float32).at[t.order].set(d_hidden[: mask.size])
    d_w = None if d_w is None else d_w.astype(unembedding.dtype)
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
    once, after the loops. Slices of the unembedding are gathered over fsdp in the dtype of the
    hidden states, and their gradients are added up in float32.

    Args:
      hidden: hidden states after the final norm.
      unembedding: rows of the output projection as they are stored (`Decoder.output_rows`).
      labels: the token that each position predicts; read where `mask` alone.
      mask: positions to project.
      mesh: the mesh over which the batch lies; None means one device.
      cap: logits z become cap * tanh(z / cap) before the softmax; 0 leaves them.
    """
    limits = _CPU_TILE if platform_of(mesh) == "cpu" else _TILE
    if mesh is None or mesh.size == 1:
        setting = _Setting(False, False, limits, cap)
        return _token_logprobs(hidden, unembedding, labels, mask, setting)
    # A vocabulary that does not divide over `tensor`, or a width that does not over `fsdp`, is on
    # every device.
    vocab, width = (
        axis if size % mesh.shape[axis] == 0 and mesh.shape[axis] > 1 else None
        for axis, size in zip(("tensor", "fsdp"), unembedding.shape, strict=True)
    )
    setting = _Setting(vocab is not None, width is not None, limits, cap)
    return jax.shard_map(
        lambda *local: _token_logprobs(*local, setting),
        mesh=mesh,
        in_specs=(PartitionSpec(*BATCH, None), PartitionSpec(vocab, width), BATCH, BATCH),
        out_specs=BATCH,
        check_vma=False,
    )(hidden, unembedding, labels, mask)
