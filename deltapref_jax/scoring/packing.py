"""Many sequences in fixed rows: the one layout of every forward pass that does not decode.

A step is a set of groups (a pair is a group of two sequences). It runs as however many micro-batches of the fixed shape
[rows, length] it needs, all members of a group in the same one; one whose second half is empty runs as half of it. The
layout is a pure function of the lengths.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Sample(NamedTuple):
    """One sequence before packing; all arrays have its length."""

    tokens: np.ndarray  # int32
    targets: np.ndarray  # bool: this token is scored (by the position before it)
    positions: np.ndarray  # int32
    branches: np.ndarray  # int32, 0 for the trunk


class PackedBatch(NamedTuple):
    """Packed rows, each array [B, L], on the host or on devices; see `models.attention` for segments and branches."""

    tokens: Any  # int32
    positions: Any  # int32
    segments: Any  # int32, 1 upward within the batch; 0 is padding
    targets: Any  # bool
    branches: Any = None  # int32, or None where no sequence has branches


class Micro(NamedTuple):
    """One micro-batch: the arrays, and which sequence became which segment."""

    batch: PackedBatch
    order: np.ndarray  # [n] indices into the sequences; sequence order[i] is segment i + 1


def sample(prompt: Sequence[int], completion: Sequence[int]) -> Sample:
    """A prompt with its completion, whose tokens are the targets; a first token is none, having nothing before it."""
    n = len(prompt) + len(completion)
    return Sample(np.asarray([*prompt, *completion], np.int32), np.arange(n) >= max(1, len(prompt)),
                  np.arange(n, dtype=np.int32), np.zeros(n, np.int32))


def capacity(rows: int, length: int) -> int:
    """Segments that one micro-batch may hold: S, fixed by the shape so that one program serves all batches."""
    return max(rows, rows * length // 8)


def layout(lengths: Sequence[int], groups: Sequence[Sequence[int]], rows: int, length: int) -> list[list[list[int]]]:
    """First-fit decreasing, by a group's sum and by its longest member, whichever needs fewer rows.

    Args:
      lengths: tokens of every sequence.
      groups: indices of sequences that share a micro-batch.
      rows: B.
      length: L.

    Returns:
      Micro-batches, each `rows` lists of sequence indices.

    Raises:
      ValueError: a sequence is longer than a row, or a group does not fit one micro-batch.
    """
    by_sum = sorted(groups, key=lambda g: -sum(lengths[i] for i in g))  # stable: ties keep their order
    by_longest = sorted(by_sum, key=lambda g: -max(lengths[i] for i in g))
    found = [_first_fit(lengths, order, rows, length) for order in (by_sum, by_longest)]
    return min(found, key=lambda micros: (len(micros), sum(bool(row) for row in micros[-1]) if micros else 0))


def _first_fit(lengths: Sequence[int], groups: Sequence[Sequence[int]], rows: int,
               length: int) -> list[list[list[int]]]:
    micros: list[list[list[int]]] = []
    free: list[list[int]] = []
    most = capacity(rows, length)
    for group in groups:
        for places, spaces in zip(micros, free, strict=True):
            if sum(map(len, places)) + len(group) <= most and _place(lengths, group, places, spaces):
                break
        else:
            micros.append([[] for _ in range(rows)])
            free.append([length] * rows)
            if not _place(lengths, group, micros[-1], free[-1]):
                raise ValueError(f"Sequences of {[lengths[i] for i in group]} tokens belong together and do not fit "
                                 f"{rows} rows of {length}; raise row_length or rows.")
    return micros


def _place(lengths: Sequence[int], group: Sequence[int], places: list[list[int]], spaces: list[int]) -> bool:
    """Puts every member of `group` into the first row with room, or none of them."""
    done: list[tuple[int, int]] = []
    for i in sorted(group, key=lambda i: -lengths[i]):
        row = next((r for r, space in enumerate(spaces) if space >= lengths[i]), None)
        if row is None:
            for r, j in done:
                places[r].remove(j)
                spaces[r] += lengths[j]
            return False
        places[row].append(i)
        spaces[row] -= lengths[i]
        done.append((row, i))
    return True


def pack(samples: Sequence[Sample], groups: Sequence[Sequence[int]], rows: int, length: int) -> list[Micro]:
    """Micro-batches of shape [rows, length] that hold every sequence once (see `layout`)."""
    return [_fill(samples, micro, rows, length)
            for micro in layout([len(s.tokens) for s in samples], groups, rows, length)]


def trimmed(batch: PackedBatch, ways: int) -> PackedBatch:
    """The first half of the rows where the second is empty and the half divides over `ways` devices; else all.

    A step's last micro-batch is half full on average, and a pair needs two rows where it fills more than one: half of
    it is what keeps padding small in small steps, for one more compiled shape.
    """
    half, odd = divmod(batch.tokens.shape[0], 2)
    if odd or half % ways or batch.segments[half:].any():
        return batch
    return PackedBatch(*(None if x is None else x[:half] for x in batch))


def _fill(samples: Sequence[Sample], micro: list[list[int]], rows: int, length: int) -> Micro:
    branched = any(samples[i].branches.any() for row in micro for i in row)
    tokens, positions, segments, branches = (np.zeros((rows, length), np.int32) for _ in range(4))
    targets = np.zeros((rows, length), bool)
    order: list[int] = []
    for r, row in enumerate(micro):
        start = 0
        for i in row:
            s = samples[i]
            span = (r, slice(start, start + len(s.tokens)))
            order.append(i)
            tokens[span], positions[span], targets[span], branches[span] = s.tokens, s.positions, s.targets, s.branches
            segments[span] = len(order)
            start += len(s.tokens)
    batch = PackedBatch(tokens, positions, segments, targets, branches if branched else None)
    return Micro(batch, np.asarray(order, np.int32))
