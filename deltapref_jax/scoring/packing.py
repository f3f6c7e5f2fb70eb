"""Many sequences in fixed rows: the one layout of every forward pass that does not decode.

    sequences ──groups──▶ packed samples ──first fit──▶ micro-batches of one shape [rows, length]

A step is a set of groups (a pair is a group of two sequences). It runs as however many
micro-batches of the fixed shape it needs, all members of a group in the same one; a micro-batch
whose second half is empty runs as half of it. The layout is a pure function of the lengths.

Sequences with the same prompt can lie behind one copy of it, which is then read once, forward and
backward (as in "Prefix Sharing", arXiv 2410.20305; here inside packed rows):

    tokens     p p p p | p c c c | p r r          p: the prompt, its last token once more in every
    branches   0 0 0 0   1 1 1 1   2 2 2             branch, where the completion's first token is
    positions  0 1 2 3   4 5 6 7   4 5 6             scored
    targets    . . . .   . 1 1 1   . 2 2          which sequence a scored token belongs to

A branch sees the trunk (branch 0) and itself.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from deltapref_jax.records import TokenSequence


class PackedSample(NamedTuple):
    """What a row holds whole: one sequence, or several behind one prompt. Arrays are [length]."""

    tokens: np.ndarray  # int32
    targets: np.ndarray  # bool: this token is scored (by the position before it)
    positions: np.ndarray  # int32, counted from the start of the token's own sequence
    branches: np.ndarray  # int32, 0 for the trunk
    members: tuple[int, ...] = (0,)  # numbers of its sequences; of several, one for each branch


class PackedBatch(NamedTuple):
    """Packed rows on the host or on devices, arrays [B, L].

    `models.attention.masks` says how segments and branches mask.
    """

    tokens: Any  # int32
    positions: Any  # int32, counted from the start of the token's own sequence
    segments: Any  # int32, from 1 within the batch, one number per sample; 0 is padding
    targets: Any  # int32: index in `Micro.order` of a scored token's sequence, plus 1; else 0
    branches: Any = None  # int32, or None where no sample has branches


class Micro(NamedTuple):
    """One micro-batch: the arrays, and the numbers of the sequences in it."""

    batch: PackedBatch
    order: np.ndarray  # [n]: tokens with target i + 1 belong to sequence order[i]


def pack_one(sequence: TokenSequence, number: int = 0) -> PackedSample:
    """A sequence as a sample of its own."""
    n = sequence.length
    tokens = np.concatenate([sequence.prompt_ids, sequence.completion_ids]).astype(np.int32)
    branches = np.zeros(n, np.int32)
    return PackedSample(tokens, sequence.targets, np.arange(n, dtype=np.int32), branches, (number,))


def share_prompt(sequences: Sequence[TokenSequence], numbers: Sequence[int]) -> PackedSample:
    """Sequences of one prompt (two tokens or more) behind one copy of it.

    Each is a branch that begins with the prompt's last token; the trunk is the prompt without it.
    """
    prompt = np.asarray(sequences[0].prompt_ids)
    trunk = len(prompt) - 1
    sizes = [1 + len(sequence.completion_ids) for sequence in sequences]
    tokens = np.concatenate(
        [prompt[:-1], *(ids for s in sequences for ids in (prompt[-1:], s.completion_ids))]
    )
    # A completion's targets begin behind its trunk; the branch's first token is a prompt token.
    targets = np.concatenate([np.zeros(trunk, bool), *(s.targets[trunk:] for s in sequences)])
    # places counted from the start of the trunk or of the branch
    within = np.concatenate([np.arange(n) for n in (trunk, *sizes)])
    branches = np.repeat(np.arange(1 + len(sizes)), (trunk, *sizes))
    return PackedSample(
        tokens.astype(np.int32),
        targets,
        # Positions in a branch continue from the trunk, as if the prompt stood directly before it.
        (within + trunk * (branches > 0)).astype(np.int32),
        branches.astype(np.int32),
        tuple(numbers),
    )


def by_prompt(sequences: Sequence[TokenSequence], length: int, most: int) -> list[list[int]]:
    """Groups of sequences of one prompt that fit a row behind it, at most `most` in a group."""
    groups: list[list[int]] = []
    # by prompt: its newest group, and the room left in it
    newest: dict[bytes, tuple[list[int], int]] = {}
    for i, sequence in enumerate(sequences):
        key = np.asarray(sequence.prompt_ids, np.int32).tobytes()
        size = 1 + len(sequence.completion_ids)
        group, room = newest.get(key, ([], 0))
        # A new group begins where the newest one of this prompt has no room; older groups are not
        # searched again.
        if size > room or len(group) == most:
            group, room = [], length - max(0, len(sequence.prompt_ids) - 1)
            groups.append(group)
        group.append(i)
        newest[key] = group, room - size
    return groups


def candidate_layouts(
    numbers: Sequence[int], sequences: Sequence[TokenSequence], length: int, share: bool
) -> list[list[PackedSample]]:
    """How a group can be packed, best first.

    Behind one prompt, if all members have the same and fit a row together; else one by one.
    """
    members = [sequences[i] for i in numbers]
    apart = [pack_one(sequence, i) for i, sequence in zip(numbers, members, strict=True)]
    prompt = members[0].prompt_ids
    # A prompt of one token would leave an empty trunk, with nothing to share.
    one_prompt = len(prompt) > 1 and all(
        np.array_equal(member.prompt_ids, prompt) for member in members[1:]
    )
    if not share or len(members) < 2 or not one_prompt:
        return [apart]
    # Both layouts are kept, since a group that does not fit a half-filled row together may fit
    # apart.
    together = share_prompt(members, numbers)
    return [[together], apart] if len(together.tokens) <= length else [apart]


def max_segments(rows: int, length: int) -> int:
    """S: sequences that one micro-batch may hold; a function of its shape alone."""
    # At least 8 tokens per sequence on average; `layout` opens another micro-batch beyond that.
    return max(rows, rows * length // 8)


def layout(
    groups: Sequence[Sequence[Sequence[PackedSample]]], rows: int, length: int
) -> list[list[list[PackedSample]]]:
    """First-fit decreasing, by a group's sum and by its longest sample, whichever needs fewer rows.

    Args:
      groups: the candidate layouts of every group; the first that fits a micro-batch is taken.
      rows: B.
      length: L.

    Returns:
      Micro-batches, each `rows` lists of samples.

    Raises:
      ValueError: a sample is longer than a row, or a group does not fit one micro-batch.
    """
    # stable sorts: ties keep the order of the groups
    # The first candidate is the one with the fewest tokens, so it is the one that is sorted by.
    by_sum = sorted(groups, key=lambda g: -sum(len(s.tokens) for s in g[0]))
    by_longest = sorted(by_sum, key=lambda g: -max(len(s.tokens) for s in g[0]))
    layouts = [_first_fit(order, rows, length) for order in (by_sum, by_longest)]

    # Fewer micro-batches win, and then fewer rows in the last one, which may be halved.
    def size(micros: list[list[list[PackedSample]]]) -> tuple[int, int]:
        return len(micros), sum(bool(row) for row in micros[-1]) if micros else 0

    return min(layouts, key=size)


def _first_fit(
    groups: Sequence[Sequence[Sequence[PackedSample]]], rows: int, length: int
) -> list[list[list[PackedSample]]]:
    micros: list[list[list[PackedSample]]] = []
    free: list[list[int]] = []  # tokens left in every row of every micro-batch
    held: list[int] = []  # sequences in every micro-batch
    most = max_segments(rows, length)
    for group in groups:
        members = sum(len(s.members) for s in group[0])
        for m, (micro, spaces) in enumerate(zip(micros, free, strict=True)):
            # The limit S is on sequences and not on tokens, because vectors [S] have one fixed
            # size.
            fits = held[m] + members <= most
            if fits and any(_insert(layout, micro, spaces) for layout in group):
                held[m] += members
                break
        else:
            micros.append([[] for _ in range(rows)])
            free.append([length] * rows)
            held.append(members)
            if not any(_insert(layout, micros[-1], free[-1]) for layout in group):
                raise ValueError(
                    f"Sequences of {[len(s.tokens) for s in group[-1]]} tokens belong together and "
                    f"do not fit {rows} rows of {length}; raise row_length or rows."
                )
    return micros


def _insert(
    samples: Sequence[PackedSample], micro: list[list[PackedSample]], spaces: list[int]
) -> bool:
    """Puts every sample into the first row with room, or none of them."""
    filled: list[int] = []
    # Longest first, as a short sample fits in more places.
    for s in sorted(samples, key=lambda s: -len(s.tokens)):
        row = next((r for r, space in enumerate(spaces) if space >= len(s.tokens)), None)
        if row is None:
            # What was inserted of this layout is taken out again, newest first.
            for r in reversed(filled):
                spaces[r] += len(micro[r].pop().tokens)
            return False
        micro[row].append(s)
        spaces[row] -= len(s.tokens)
        filled.append(row)
    return True


def pack(
    groups: Sequence[Sequence[Sequence[PackedSample]]],
    rows: int,
    length: int,
    branched: bool = False,
) -> list[Micro]:
    """Micro-batches of shape [rows, length] that hold every group once (see `layout`).

    With `branched` the batches have branches even where no sample has any, so that all of them run
    in one program.
    """
    # One batch with branches gives all of them branches, so that they share one compiled program.
    branched = branched or any(s.branches.any() for group in groups for s in group[0])
    return [_fill(micro, rows, length, branched) for micro in layout(groups, rows, length)]


def pack_sequences(
    sequences: Sequence[TokenSequence],
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
      groups: numbers of the sequences that share a micro-batch; None: sequences are free, and are
        grouped by prompt where `share` is set.
    """
    if groups is None and share:
        groups = by_prompt(sequences, length, max_segments(rows, length))
    elif groups is None:
        groups = [[i] for i in range(len(sequences))]
    candidates = [candidate_layouts(group, sequences, length, share) for group in groups]
    return pack(candidates, rows, length, share)


def drop_empty_half(batch: PackedBatch, row_shards: int) -> PackedBatch:
    """The first half of the rows, where the second is empty and the half divides over `row_shards`.

    A step's last micro-batch is half full on average, and a pair needs two rows where it fills more
    than one: half a micro-batch is what keeps padding small in small steps, for one more compiled
    shape.
    """
    half, odd = divmod(batch.tokens.shape[0], 2)
    # An odd number of rows has no half, and a half must still divide over the devices.
    if odd or half % row_shards or batch.segments[half:].any():
        return batch
    return PackedBatch(*(None if x is None else x[:half] for x in batch))


def _fill(micro: list[list[PackedSample]], rows: int, length: int, branched: bool) -> Micro:
    shape = (rows, length)
    # Zeros everywhere are padding: segment 0, no target, and token 0 whose result is not read.
    tokens, positions, segments, targets, branches = (np.zeros(shape, np.int32) for _ in range(5))
    order: list[int] = []
    number = 0
    for r, row in enumerate(micro):
        start = 0
        for s in row:
            # Segments are numbered from 1, because 0 is padding.
            number += 1
            span = (r, slice(start, start + len(s.tokens)))
            tokens[span] = s.tokens
            positions[span] = s.positions
            branches[span] = s.branches
            segments[span] = number
            # a branch is one member; a sample without branches is its only member
            member = s.branches if len(s.members) > 1 else 1
            targets[span] = np.where(s.targets, len(order) + member, 0)
            order.extend(s.members)
            start += len(s.tokens)
    batch = PackedBatch(tokens, positions, segments, targets, branches if branched else None)
    return Micro(batch, np.asarray(order, np.int32))
