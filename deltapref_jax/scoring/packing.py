"""Many sequences in fixed rows: the one layout of every forward pass that does not decode.

    sequences (prompt, completion) ──groups──▶ samples ──first fit──▶ micro-batches of one shape [rows, length]

A step is a set of groups (a pair is a group of two sequences). It runs as however many micro-batches of the fixed shape
it needs, all members of a group in the same one; one whose second half is empty runs as half of it. The layout is a
pure function of the lengths.

Sequences with the same prompt can lie behind one copy of it, which is then read once, forward and backward (as in
"Prefix Sharing", arXiv 2410.20305; here inside packed rows):

    tokens     p p p p | p c c c | p r r          p: the prompt, its last token once more in every branch, from where
    branches   0 0 0 0   1 1 1 1   2 2 2          the completion's first token is scored
    positions  0 1 2 3   4 5 6 7   4 5 6          a branch sees the trunk (branch 0) and itself
    targets    . . . .   . 1 1 1   . 2 2          which sequence a scored token belongs to
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Sample(NamedTuple):
    """What a row holds whole: one sequence, or several behind one prompt; all arrays have its length."""

    tokens: np.ndarray  # int32
    targets: np.ndarray  # bool: this token is scored (by the position before it)
    positions: np.ndarray  # int32, in its own sequence
    branches: np.ndarray  # int32, 0 for the trunk
    members: tuple[int, ...] = (
        0,
    )  # its sequences by number; of several, each is the branch at its place


class PackedBatch(NamedTuple):
    """Packed rows, each array [B, L], on the host or on devices; see `models.attention.masks` for segments and branches."""

    tokens: Any  # int32
    positions: Any  # int32, in the token's own sequence
    segments: Any  # int32, 1 upward within the batch, a number per sample; 0 is padding
    targets: Any  # int32: of a scored token its sequence's place in `Micro.order`, from 1; 0 is not scored
    branches: Any = None  # int32, or None where no sample has branches


class Micro(NamedTuple):
    """One micro-batch: the arrays, and the numbers of the sequences in it."""

    batch: PackedBatch
    order: np.ndarray  # [n]: tokens with target i + 1 are of sequence order[i]


Pieces = tuple[Sequence[int], Sequence[int]]  # a sequence's prompt and completion, token ids


def sample(prompt: Sequence[int], completion: Sequence[int], number: int = 0) -> Sample:
    """A prompt with its completion, whose tokens are the targets; a first token is none, having nothing before it."""
    n = len(prompt) + len(completion)
    return Sample(
        np.asarray([*prompt, *completion], np.int32),
        np.arange(n) >= max(1, len(prompt)),
        np.arange(n, dtype=np.int32),
        np.zeros(n, np.int32),
        (number,),
    )


def shared(
    prompt: Sequence[int], completions: Sequence[Sequence[int]], numbers: Sequence[int]
) -> Sample:
    """Several completions behind one prompt (of two tokens or more), each a branch of the prompt but its last token."""
    trunk, sizes = len(prompt) - 1, [1 + len(completion) for completion in completions]
    tokens = [
        *prompt[:-1],
        *(token for completion in completions for token in (prompt[-1], *completion)),
    ]
    within = np.concatenate(
        [np.arange(n) for n in (trunk, *sizes)]
    )  # the place in the trunk or in the branch
    branches = np.repeat(np.arange(1 + len(sizes)), (trunk, *sizes))
    behind = branches > 0
    return Sample(
        np.asarray(tokens, np.int32),
        behind & (within > 0),
        (within + trunk * behind).astype(np.int32),
        branches.astype(np.int32),
        tuple(numbers),
    )


def by_prompt(sequences: Sequence[Pieces], length: int, most: int) -> list[list[int]]:
    """The numbers of sequences that have one prompt, as many as fit a row behind it, and `most` at most."""
    found: list[list[int]] = []
    newest: dict[
        bytes, tuple[list[int], int]
    ] = {}  # by prompt: its last group, and the room left in it
    for i, (prompt, completion) in enumerate(sequences):
        key, size = np.asarray(prompt, np.int32).tobytes(), 1 + len(completion)
        group, room = newest.get(key, ([], 0))
        if size > room or len(group) == most:
            group, room = [], length - max(0, len(prompt) - 1)
            found.append(group)
        group.append(i)
        newest[key] = group, room - size
    return found


def ways(
    numbers: Sequence[int], sequences: Sequence[Pieces], length: int, share: bool
) -> list[list[Sample]]:
    """How a group can be packed, the best first: behind one prompt, if all have the same and fit a row; one by one."""
    each = [sample(*sequences[i], i) for i in numbers]
    prompt = list(sequences[numbers[0]][0])
    if (
        not share
        or len(numbers) < 2
        or len(prompt) < 2
        or any(list(sequences[i][0]) != prompt for i in numbers[1:])
    ):
        return [each]
    together = shared(prompt, [sequences[i][1] for i in numbers], numbers)
    return [[together], each] if len(together.tokens) <= length else [each]


def capacity(rows: int, length: int) -> int:
    """Sequences that one micro-batch may hold: S, fixed by the shape so that one program serves all batches."""
    return max(rows, rows * length // 8)


def layout(
    groups: Sequence[Sequence[Sequence[Sample]]], rows: int, length: int
) -> list[list[list[Sample]]]:
    """First-fit decreasing, by a group's sum and by its longest sample, whichever needs fewer rows.

    Args:
      groups: the ways of every group (see `ways`): samples that share a micro-batch. The first way that fits a
        micro-batch is taken there.
      rows: B.
      length: L.

    Returns:
      Micro-batches, each `rows` lists of samples.

    Raises:
      ValueError: a sample is longer than a row, or a group does not fit one micro-batch.
    """
    by_sum = sorted(
        groups, key=lambda g: -sum(len(s.tokens) for s in g[0])
    )  # stable: ties keep their order
    by_longest = sorted(by_sum, key=lambda g: -max(len(s.tokens) for s in g[0]))
    found = [_first_fit(order, rows, length) for order in (by_sum, by_longest)]
    return min(
        found,
        key=lambda micros: (len(micros), sum(bool(row) for row in micros[-1]) if micros else 0),
    )


def _first_fit(
    groups: Sequence[Sequence[Sequence[Sample]]], rows: int, length: int
) -> list[list[list[Sample]]]:
    micros: list[list[list[Sample]]] = []
    free: list[list[int]] = []
    held: list[int] = []
    most = capacity(rows, length)
    for group in groups:
        members = sum(len(s.members) for s in group[0])
        for m, (places, spaces) in enumerate(zip(micros, free, strict=True)):
            if held[m] + members <= most and any(_place(way, places, spaces) for way in group):
                held[m] += members
                break
        else:
            micros.append([[] for _ in range(rows)])
            free.append([length] * rows)
            held.append(members)
            if not any(_place(way, micros[-1], free[-1]) for way in group):
                raise ValueError(
                    f"Sequences of {[len(s.tokens) for s in group[-1]]} tokens belong together and do "
                    f"not fit {rows} rows of {length}; raise row_length or rows."
                )
    return micros


def _place(way: Sequence[Sample], places: list[list[Sample]], spaces: list[int]) -> bool:
    """Puts every sample into the first row with room, or none of them."""
    done: list[int] = []
    for s in sorted(way, key=lambda s: -len(s.tokens)):
        row = next((r for r, space in enumerate(spaces) if space >= len(s.tokens)), None)
        if row is None:
            for r in reversed(done):
                spaces[r] += len(places[r].pop().tokens)
            return False
        places[row].append(s)
        spaces[row] -= len(s.tokens)
        done.append(row)
    return True


def pack(
    groups: Sequence[Sequence[Sequence[Sample]]], rows: int, length: int, branched: bool = False
) -> list[Micro]:
    """Micro-batches of shape [rows, length] that hold every group once (see `layout`).

    `branched`: branches are told even where no sample has any, so that all batches run in one program.
    """
    branched = branched or any(s.branches.any() for group in groups for s in group[0])
    return [_fill(micro, rows, length, branched) for micro in layout(groups, rows, length)]


def pack_sequences(
    sequences: Sequence[Pieces],
    rows: int,
    length: int,
    share: bool,
    groups: Sequence[Sequence[int]] | None = None,
) -> list[Micro]:
    """Micro-batches that hold every sequence once.

    Args:
      sequences: no longer than a row.
      rows: B.
      length: L.
      share: reads a prompt once for the sequences of a group that have it in common.
      groups: numbers of the sequences that share a micro-batch; None: sequences are free, and shared by prompt.
    """
    if groups is None:
        groups = (
            by_prompt(sequences, length, capacity(rows, length))
            if share
            else [[i] for i in range(len(sequences))]
        )
    return pack([ways(group, sequences, length, share) for group in groups], rows, length, share)


def trimmed(batch: PackedBatch, ways: int) -> PackedBatch:
    """The first half of the rows where the second is empty and the half divides over `ways` devices; else all.

    A step's last micro-batch is half full on average, and a pair needs two rows where it fills more than one: half of
    it is what keeps padding small in small steps, for one more compiled shape.
    """
    half, odd = divmod(batch.tokens.shape[0], 2)
    if odd or half % ways or batch.segments[half:].any():
        return batch
    return PackedBatch(*(None if x is None else x[:half] for x in batch))


def _fill(micro: list[list[Sample]], rows: int, length: int, branched: bool) -> Micro:
    tokens, positions, segments, targets, branches = (
        np.zeros((rows, length), np.int32) for _ in range(5)
    )
    order: list[int] = []
    number = 0
    for r, row in enumerate(micro):
        start = 0
        for s in row:
            number += 1
            span = (r, slice(start, start + len(s.tokens)))
            tokens[span], positions[span], branches[span], segments[span] = (
                s.tokens,
                s.positions,
                s.branches,
                number,
            )
            member = s.branches if len(s.members) > 1 else 1
            targets[span] = np.where(s.targets, len(order) + member, 0)
            order.extend(s.members)
            start += len(s.tokens)
    batch = PackedBatch(tokens, positions, segments, targets, branches if branched else None)
    return Micro(batch, np.asarray(order, np.int32))
