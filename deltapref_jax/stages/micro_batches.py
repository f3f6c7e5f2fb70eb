"""What a config leaves open of a training step: rows, row length, and what is recomputed."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from deltapref_jax.config import MeshShape, Training
from deltapref_jax.mesh import rows_of
from deltapref_jax.models.memory import FROZEN, training_memory
from deltapref_jax.models.spec import ModelSpec

MOST_EMPTY = 0.15
"""Share of a step's positions that may be padding before it is said."""
_PERCENTILE = 99  # of the lengths that a chosen row length holds
_LANES = 128  # a chosen row length is a multiple of an attention tile
_ROOM = 0.9  # of a device's memory
_ACTIVATIONS = 1.5  # compiled programs need up to so many times what the formula says of them
_SMALL = 1_000_000_000  # parameters below which nothing is recomputed where memory is not known


def fill_in(
    t: Training,
    lengths: Sequence[int],
    mesh: Mapping[str, int],
    spec: ModelSpec,
    dtype: str,
    memory: int = 0,
    frozen: str = FROZEN,
) -> Training:
    """Returns the training config with rows, row length and remat that are no longer open.

    Args:
      t: rows or row_length of 0, or the remat "auto", are chosen.
      lengths: tokens of the sequences that are trained on.
      mesh: devices along every axis.
      spec: of the student.
      dtype: of the computation.
      memory: bytes of a device; 0: not known.
      frozen: dtype of the base of adapters.
    """
    t = dataclasses.replace(
        t,
        rows=rows_of(t.rows, mesh),
        row_length=t.row_length or choose_row_length(lengths, mesh["context"]),
    )
    remat = choose_remat(spec, t, dtype, MeshShape(**mesh), memory, frozen)
    return dataclasses.replace(t, remat=remat)


def choose_row_length(lengths: Sequence[int], context: int = 1) -> int:
    """The shortest row that holds 99% of the sequences, in whole tiles of attention.

    A row is split over `context` devices, in equal parts of whole tiles.
    """
    part = _LANES * context
    # The shortest length that 99% of the sequences do not exceed.
    wanted = int(np.percentile(lengths, _PERCENTILE, method="inverted_cdf"))
    return -(-wanted // part) * part


def choose_remat(
    spec: ModelSpec,
    t: Training,
    dtype: str,
    mesh: MeshShape,
    memory: int,
    frozen: str = FROZEN,
) -> str:
    """What the backward pass recomputes: `t.remat`, or by size and memory where it is "auto".

    The least with which weights, gradients, moments and 1.5 times the activations of the formula
    need at most 90% of a device (`models.memory`; the factor covers what the formula leaves out, as
    compiled programs of 1B and 8B show). Where the memory is not known: nothing below a billion
    parameters, and else all products but attention.
    """
    if t.remat != "auto":
        return t.remat
    if not memory:
        return "none" if spec.parameters < _SMALL else "attention"
    for remat in ("none", "projections", "attention"):
        tried = dataclasses.replace(t, remat=remat)
        if training_memory(spec, tried, dtype, mesh, _ACTIVATIONS, frozen) < _ROOM * memory:
            return remat
    return "block"


def device_memory() -> int:
    """Bytes of one of this process's devices; 0: not known, as on CPU."""
    return int((jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0))


def filled_line(filled: float, mesh: Mapping[str, int]) -> str:
    """A sentence on a step with too many empty positions; "" of one that is full enough."""
    if filled >= 1 - MOST_EMPTY:
        return ""
    shards = mesh["data"] * mesh["fsdp"]
    return (
        f"{1 - filled:.0%} of a step's positions are empty: its rows are spread over {shards} "
        f"device{'s' * (shards > 1)} (data x fsdp). More pairs in a step "
        "(config.training.pairs_per_step), fewer rows (config.training.rows), shorter ones "
        "(config.training.row_length), or tensor instead of fsdp would fill more."
    )
