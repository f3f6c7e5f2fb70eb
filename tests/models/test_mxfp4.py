"""Numbers of 4 bits with shared scales, and the tensors that hold them."""

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from deltapref_jax.models.mxfp4 import dequantise, read_matrices, whole_shapes


def tensors(experts=3, outs=6, groups=4):
    """Random blocks and scales of every size that a weight may have."""
    r = np.random.default_rng(0)
    return {
        "x_blocks": r.integers(0, 256, (experts, outs, groups, 16), np.uint8),
        "x_scales": r.integers(0, 253, (experts, outs, groups), np.uint8),
    }


def test_numbers_are_those_of_the_gguf_package():
    """GGUF has the scale before the bytes, and in a byte numbers i and i + 16 of a block."""
    held = tensors()
    blocks, scales = held["x_blocks"][0], held["x_scales"][0]
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, 32)
    theirs = np.concatenate([scales[..., None], codes[..., :16] | codes[..., 16:] << 4], axis=-1)
    expected = dequantize(theirs.reshape(len(blocks), -1), GGMLQuantizationType.MXFP4)
    np.testing.assert_array_equal(dequantise(blocks, scales).astype(np.float32), expected)


@pytest.mark.parametrize("inputs", [slice(0, 128), slice(32, 64), slice(5, 70), slice(96, 128)])
def test_a_part_is_read_without_the_other_experts_rows_and_blocks(inputs):
    held, read = tensors(), []

    def part(name, index):
        read.append((name, index))
        return held[name][index]

    whole = read_matrices(
        lambda name, index: held[name][index], "x", (slice(0, 3), slice(0, 128), slice(0, 6))
    )
    index = (slice(1, 3), inputs, slice(2, 5))
    np.testing.assert_array_equal(read_matrices(part, "x", index), whole[index])
    blocks = slice(inputs.start // 32, -(-inputs.stop // 32))
    assert [(at[0].start, at[1], at[2]) for _, at in read] == [
        (expert, slice(2, 5), blocks) for expert in (1, 1, 2, 2)
    ]


def test_shapes_are_those_of_the_matrices():
    shapes = {"x_blocks": (3, 6, 4, 16), "x_scales": (3, 6, 4), "y": (5,)}
    assert whole_shapes(shapes, "m") == {"x": (3, 128, 6), "y": (5,)}
    with pytest.raises(ValueError, match="has a tensor x_scales and no x_blocks"):
        whole_shapes({"x_scales": (3, 6, 4)}, "m")
    with pytest.raises(ValueError, match="has a tensor x_blocks and no x_scales"):
        whole_shapes({"x_blocks": (3, 6, 4, 16)}, "m")
    with pytest.raises(ValueError, match="a scale for every 16 bytes"):
        whole_shapes(shapes | {"x_scales": (3, 6, 5)}, "m")
