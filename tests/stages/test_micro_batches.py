"""Rows, row length and remat that a config leaves open."""

import dataclasses

import pytest

from deltapref_jax.config import MeshShape, Training
from deltapref_jax.models.memory import training_memory
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.stages.micro_batches import (
    choose_remat,
    choose_row_length,
    fill_in,
    filled_line,
)

GIB = 2**30
LLAMA_8B = ModelSpec(128_256, 4096, 32, 32, 8, 128, 14_336)
SMALL = ModelSpec(640, 128, 3, 4, 2, 32, 352)
SIZES = {"data": 1, "fsdp": 16, "tensor": 1, "context": 1}


@pytest.mark.parametrize(
    ("lengths", "context", "row_length"),
    [
        ([500] * 10, 1, 512),
        ([512] * 10, 1, 512),
        # One sequence of a hundred is longer than what the others need.
        ([100] * 99 + [4000], 1, 128),
        ([100] * 97 + [4000] * 3, 1, 4096),
        ([500] * 10, 8, 1024),
    ],
)
def test_a_row_holds_all_but_the_longest_hundredth(lengths, context, row_length):
    assert choose_row_length(lengths, context) == row_length


def test_what_is_open_is_filled_in_and_the_rest_stays():
    filled = fill_in(Training(rows=0, row_length=0), [500] * 4, SIZES, SMALL, "float32")
    assert (filled.rows, filled.row_length, filled.remat) == (32, 512, "none")
    stated = Training(rows=16, row_length=256, remat="block")
    assert fill_in(stated, [500], SIZES, SMALL, "float32") == stated


def test_remat_is_the_least_that_fits():
    t = Training(rows=16, row_length=4096, remat="auto")
    mesh = MeshShape(1, 16, 1, 1)

    def chosen(gib):
        return choose_remat(LLAMA_8B, t, "bfloat16", mesh, int(gib * GIB))

    order = [chosen(gib) for gib in (4, 15.75, 20, 40, 95)]
    assert order == ["block", "attention", "attention", "projections", "none"]
    # Moments on the host make room for what is then not computed again.
    moved = dataclasses.replace(t, offload_moments=True)
    assert choose_remat(LLAMA_8B, t, "bfloat16", mesh, 28 * GIB) == "attention"
    assert choose_remat(LLAMA_8B, moved, "bfloat16", mesh, 28 * GIB) == "projections"
    # Where the memory is not known, the size decides.
    assert chosen(0) == "attention"
    assert choose_remat(SMALL, t, "float32", mesh, 0) == "none"
    # A stronger one needs less.
    needs = [
        training_memory(LLAMA_8B, Training(rows=16, row_length=4096, remat=remat), "bfloat16", mesh)
        for remat in ("none", "projections", "attention", "block")
    ]
    assert needs == sorted(needs, reverse=True)


def test_an_empty_step_is_said():
    assert filled_line(0.85, SIZES) == ""
    line = filled_line(0.5, SIZES)
    assert line.startswith("50% of a step's positions are empty: its rows are spread over 16 ")
