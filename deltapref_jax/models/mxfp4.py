"""Experts' matrices in MXFP4, as the released files of gpt-oss hold them.

Thirty-two numbers of 4 bits (E2M1) share a scale of 8 bits, a power of two (E8M0; OCP Microscaling
Formats, version 1.0, section 5.3). The matrices X [experts, in, out] lie as

    X_blocks  [experts, out, in / 32, 16]  two numbers to a byte, the first in the low half
    X_scales  [experts, out, in / 32]      exponents of the scales, plus 127

They are read as bfloat16, which has the range of the scales and more digits than the numbers, so
that nothing is rounded.
"""

import math
from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np

BLOCKS, SCALES = "_blocks", "_scales"
"""Ends of the names of both tensors."""
_BLOCK = 32  # numbers of one scale
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NUMBERS = np.asarray([*_MAGNITUDES, *(-x for x in _MAGNITUDES)], np.float32)
_PAIRS = np.stack([_NUMBERS[np.arange(256) % 16], _NUMBERS[np.arange(256) // 16]], axis=1)
"""Both numbers of every byte, [256, 2]."""


def whole_shapes(shapes: Mapping[str, tuple[int, ...]], where: str) -> dict[str, tuple[int, ...]]:
    """Returns shapes in which every pair of tensors is the matrices that they hold.

    Args:
      shapes: of the stored tensors, by their names.
      where: the model, for messages.

    Raises:
      ValueError: blocks have no scales, or the reverse, or the two do not fit.
    """
    found = dict(shapes)
    for name in {
        n.removesuffix(end) for n in shapes for end in (BLOCKS, SCALES) if n.endswith(end)
    }:
        blocks, scales = (found.pop(name + end, None) for end in (BLOCKS, SCALES))
        if blocks is None or scales is None:
            there, missing = (BLOCKS, SCALES) if scales is None else (SCALES, BLOCKS)
            raise ValueError(
                f"{where} has a tensor {name}{there} and no {name}{missing}; fetch it again."
            )
        if len(blocks) != 4 or blocks != (*scales, _BLOCK // 2):
            raise ValueError(
                f"Tensor {name}{BLOCKS} of {where} has the shape {blocks} and {name}{SCALES} "
                f"{scales}; MXFP4 has a scale for every {_BLOCK // 2} bytes."
            )
        if name in found:
            raise ValueError(
                f"{where} has a tensor {name} beside {name}{BLOCKS}, which holds the same weights; "
                "leave one of the two out."
            )
        experts, out, groups, _ = blocks
        found[name] = (experts, groups * _BLOCK, out)
    return found


def read_matrices(
    read: Callable[[str, tuple[slice, ...]], np.ndarray], name: str, index: tuple[slice, ...]
) -> np.ndarray:
    """Reads a part of X [experts, in, out], bfloat16, expert by expert.

    Args:
      read: reads a part of a stored tensor.
      name: X.
      index: slices of X's axes with a step of 1.
    """
    experts, inputs, outs = index
    first = inputs.start // _BLOCK
    groups = slice(first, math.ceil(inputs.stop / _BLOCK))
    inner = slice(inputs.start - first * _BLOCK, inputs.stop - first * _BLOCK)
    shape = (inputs.stop - inputs.start, outs.stop - outs.start)
    matrices = np.empty((experts.stop - experts.start, *shape), ml_dtypes.bfloat16)
    for i in range(len(matrices)):
        at = (slice(experts.start + i, experts.start + i + 1), outs, groups)
        numbers = dequantise(read(name + BLOCKS, at)[0], read(name + SCALES, at)[0])
        matrices[i] = numbers[:, inner].T
    return matrices


def dequantise(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Numbers [out, in], bfloat16, of blocks [out, in / 32, 16] and scales [out, in / 32]."""
    powers = np.exp2(scales.astype(np.float32) - 127)
    numbers = _PAIRS[blocks].reshape(*blocks.shape[:-1], _BLOCK) * powers[..., None]
    return numbers.reshape(len(blocks), -1).astype(ml_dtypes.bfloat16)
