"""Arrays on the host on their way between files and devices: copies, casts and a check."""

import math
import mmap
from typing import Any

import ml_dtypes
import numpy as np

_ALIGNMENT = 64  # bytes; JAX uses memory on the CPU as it is where it begins at such an address
_HUGE = 4 << 20  # bytes above which NumPy asks for huge pages
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_RUN = 32  # bytes that are written side by side; with more, the lines of a column leave the cache
_BF16 = np.dtype(ml_dtypes.bfloat16)
_INFINITY = {_BF16: 0x7F80, np.dtype(np.float16): 0x7C00, np.dtype(np.float32): 0x7F800000}
"""The bits of infinity; those of a NaN are above them, and the sign is the bit above all."""


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that a CPU device takes over without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size >= _HUGE:
        # NumPy would ask for huge pages. Where a virtual machine's memory is given to it as it is
        # touched, whole untouched ones cost more than the pages that other programs have freed.
        memory = mmap.mmap(-1, size, flags=_PRIVATE)
        return np.frombuffer(memory, dtype).reshape(shape)
    array = np.empty(size + _ALIGNMENT, np.uint8)
    first = -array.ctypes.data % _ALIGNMENT
    return array[first : first + size].view(dtype).reshape(shape)


def finite(array: np.ndarray) -> bool:
    """Whether an array, whose axes lie in order, holds neither NaN nor infinity.

    The bits are compared as integers, at the speed of memory: `numpy.isfinite` takes 20 times as
    long in bfloat16.
    """
    bits = _INFINITY.get(array.dtype)
    if bits is None:
        return bool(np.isfinite(array).all()) if array.dtype.kind == "f" else True
    if not array.size:
        return True
    unsigned = array.view(f"u{array.itemsize}")
    sign = 1 << (8 * array.itemsize - 1)
    # As signed integers negative numbers are below all positive ones, and as unsigned ones above.
    return bool(unsigned.view(f"i{array.itemsize}").max() < bits and unsigned.max() < (bits | sign))


def not_finite(tensor: str, where: str) -> str:
    """The sentence about a tensor with NaN or infinity in it."""
    return (
        f"Tensor {tensor} in {where} holds NaN or infinity; fetch it again, or choose another "
        "model."
    )


def cast(array: np.ndarray, dtype: Any) -> np.ndarray:
    """Numbers in another dtype; bfloat16 to float32 is a shift of its bits."""
    dtype = np.dtype(dtype)
    if array.dtype == _BF16 and dtype == np.float32:
        wide = array.view(np.uint16).astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return array.astype(dtype, copy=False)


def copy_transposed(out: np.ndarray, array: np.ndarray) -> None:
    """Writes the transpose of `array` [n, m] to `out` [m, n], in the dtype of `out`.

    It goes by `_RUN` bytes of each row of `out`, which is several times as fast as NumPy's copy of
    a transposed array.
    """
    step = max(1, _RUN // out.itemsize)
    same = out.dtype == array.dtype
    # NumPy copies integers faster than its extension dtypes. The transpose goes to memory that
    # stays in the cache first, and from there in long runs to `out`.
    bits = np.dtype(f"u{out.itemsize}")
    block = np.empty(out.shape, bits)
    for first in range(0, len(array), step):
        rows = array[first : first + step]
        block[:, first : first + step] = (rows if same else cast(rows, out.dtype)).view(bits).T
    out.view(bits)[...] = block
