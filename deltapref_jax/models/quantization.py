"""Weight-only quantisation: matrices of one byte a weight, with a scale for every output channel.

    w [in, out] ≈ q [in, out] * scale [out]        q int8 or float8, scale float32
    y = (x q) * scale                              x q in x's dtype, summed in float32

A channel's scale is its largest absolute weight over the largest number of the format, so nothing
is clipped, 0 stays 0, and no zero point is needed (LLM.int8(), arXiv 2208.07339, section 2.1, has
the vector-wise form of it). Activations are not quantised: q is converted to the computation's
dtype, which holds every q exactly, where it is multiplied. So a chip needs no units for int8 or
float8, and gains nothing from them; what is saved is memory, and the time of reading it.

Matrices of layers are quantised. Norms, biases, the router of experts, the embedding and the
unembedding are not; docs/decisions/0051-weight-only-quantisation.md has what the unembedding would
cost.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class Format(NamedTuple):
    """How a quantised weight is stored."""

    dtype: np.dtype
    largest: float  # number that the largest weight of a channel becomes


FORMATS = {
    "int8": Format(np.dtype(np.int8), 127.0),
    # e4m3: four bits of exponent and three of mantissa, without infinities (arXiv 2209.05433).
    "fp8": Format(np.dtype(jnp.float8_e4m3fn), 448.0),
}
"""Formats by the name that `config.QUANTIZATIONS` has."""


class Quantised(NamedTuple):
    """A quantised matrix for products; both arrays belong to one layer."""

    values: Array  # [*in, *out], or [E, *in, *out]
    scale: Array  # [*out], or [E, *out], float32


def in_dtype(values: Array, x: Array) -> Array:
    """Converts quantised weights to the dtype of the activations that they are multiplied by.

    XLA on CPU would convert the matrices of all layers before the first step of a decoding loop,
    and keep them. There a choice that depends on `x` comes first, so that one matrix after another
    is converted. XLA on TPU converts inside the product.
    """

    def after(values: Array, x: Array) -> Array:
        first = x.reshape(-1)[0]
        # The product with an activation that is NaN is NaN, whatever the weights are.
        stored = jax.lax.bitcast_convert_type(values, jnp.int8)
        chosen = jnp.where(first != first, jnp.int8(0), stored)
        return jax.lax.bitcast_convert_type(chosen, values.dtype).astype(x.dtype)

    return jax.lax.platform_dependent(
        values, x, cpu=after, default=lambda values, x: values.astype(x.dtype)
    )


def quantised_linear(x: Float[Array, "*n D"], matrix: Quantised) -> Array:
    """Matrix product x * w of a quantised w [D, *out], [*n, *out] in the dtype of `x`.

    The product is summed and scaled in float32 and rounded once. It has no gradient rule for the
    weights, which are not trained.
    """
    y = jnp.tensordot(x, in_dtype(matrix.values, x), 1, preferred_element_type=jnp.float32)
    return (y * matrix.scale).astype(x.dtype)


def channel_scales(w: np.ndarray, axes: tuple[int, ...], form: Format) -> np.ndarray:
    """Returns the float32 scales of channels, where `axes` are those that a product sums over.

    Scales are at least the smallest normal number, so that a channel of zeros is divided by one.
    """
    largest = np.max(np.abs(w), axis=axes)
    return np.maximum(largest / np.float32(form.largest), np.finfo(np.float32).tiny)


def quantise(w: np.ndarray, scale: np.ndarray, form: Format) -> np.ndarray:
    """Returns float32 weights over their scales, rounded to the format, ties to even.

    |w - q * scale| is at most scale / 2 in int8; in float8 at most |w| / 16, or scale / 1024 where
    that is more.
    """
    q = np.clip(w / scale, -form.largest, form.largest)
    return (np.rint(q) if form.dtype.kind == "i" else q).astype(form.dtype)


class QuantisedMatrix:
    """A matrix of all layers that is read and quantised part by part, on the host.

    It is indexed by slices as its source is (`stored.StoredParameter`), and reads one matrix of one
    layer or expert at a time. The scale of a channel is that of the whole channel, whatever part is
    asked for, so that weights do not depend on the mesh; a part without all inputs of its channels
    reads the others too, once.
    """

    def __init__(self, source: Any, batch: int, inputs: int, form: Format, name: str):
        """Reads nothing.

        Args:
          source: float32 weights [layers, *batch, *inputs, *outputs], an array or indexed as one.
          batch: axes between the layers and the inputs, such as that of experts.
          inputs: axes that a product sums over.
          form: the format.
          name: what the matrix is called in messages.
        """
        self.shape, self.ndim, self.dtype = source.shape, len(source.shape), form.dtype
        self._source, self._form, self._name = source, form, name
        self._lead, self._inputs = 1 + batch, inputs
        self._scales: dict[tuple[Any, ...], np.ndarray] = {}
        self.scales = ChannelScales(self)

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Quantises a part.

        Raises:
          ValueError: a weight is not finite.
        """
        parts = _bounds(index, self.shape)
        whole = np.empty([stop - start for start, stop in parts], self.dtype)
        lead, rest = parts[: self._lead], parts[self._lead :]
        for place, at in _positions(lead):
            w = self._read(at, rest)
            scale = self.scale(at, rest[self._inputs :], w if self._has_inputs(rest) else None)
            whole[place] = quantise(w, scale, self._form)
        return whole

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Quantises all of it."""
        array = self[(slice(None),) * self.ndim]
        return array.astype(dtype or array.dtype, copy=False)

    def scale(
        self, at: tuple[int, ...], outputs: tuple[tuple[int, int], ...], w: np.ndarray | None = None
    ) -> np.ndarray:
        """Returns the scales of some channels of one matrix, which are read once.

        Args:
          at: layer, and expert if there are any.
          outputs: start and stop on the axes of the channels.
          w: the channels, if they have been read.

        Raises:
          ValueError: a weight is not finite.
        """
        key = (at, outputs)
        if key not in self._scales:
            if w is None:
                inputs = self.shape[self._lead :][: self._inputs]
                w = self._read(at, (*((0, size) for size in inputs), *outputs))
            scale = channel_scales(w, tuple(range(self._inputs)), self._form)
            if not np.isfinite(scale).all():
                raise ValueError(
                    f"{self._name} has a weight that is not finite in layer {at[0]} and cannot be "
                    "quantised; check the model's weights, or fetch it again."
                )
            self._scales[key] = scale
        return self._scales[key]

    def _read(self, at: tuple[int, ...], rest: tuple[tuple[int, int], ...]) -> np.ndarray:
        """Reads a part of one matrix, in float32 and without the axes of layers and experts."""
        index = (*(slice(i, i + 1) for i in at), *(slice(*part) for part in rest))
        array = np.asarray(self._source[index], np.float32)
        return array.reshape(array.shape[self._lead :])

    def _has_inputs(self, rest: tuple[tuple[int, int], ...]) -> bool:
        sizes = self.shape[self._lead :][: self._inputs]
        return rest[: self._inputs] == tuple((0, size) for size in sizes)


class ChannelScales:
    """The scales of a `QuantisedMatrix`, float32 [layers, *batch, *outputs], indexed by slices."""

    def __init__(self, matrix: QuantisedMatrix):
        """Reads nothing."""
        lead, inputs = matrix._lead, matrix._inputs
        self._matrix, self._lead = matrix, lead
        self.shape = (*matrix.shape[:lead], *matrix.shape[lead + inputs :])
        self.ndim, self.dtype = len(self.shape), np.dtype(np.float32)

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Returns a part; see `QuantisedMatrix.scale`."""
        parts = _bounds(index, self.shape)
        whole = np.empty([stop - start for start, stop in parts], np.float32)
        for place, at in _positions(parts[: self._lead]):
            whole[place] = self._matrix.scale(at, parts[self._lead :])
        return whole

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Returns all of it."""
        array = self[(slice(None),) * self.ndim]
        return array.astype(dtype or array.dtype, copy=False)


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Start and stop of slices without a step."""
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _positions(
    bounds: tuple[tuple[int, int], ...],
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yields every position within bounds, counted from their starts and from 0."""
    starts = [start for start, _ in bounds]
    for place in itertools.product(*(range(stop - start) for start, stop in bounds)):
        yield place, tuple(start + i for start, i in zip(starts, place, strict=True))
