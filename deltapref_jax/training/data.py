"""What a policy is trained on: sequences with their references, drawn into steps.

    groups ──seeded epochs──▶ groups of a step ──first fit──▶ micro-batches of one shape
                                                              (and KTO's baseline rows)

All of it is a pure function of (groups, seed, shape): a step's number is its position in the data,
and resuming needs nothing else.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from deltapref_jax.config import OBJECTIVE_KINDS, ConfigError, Training
from deltapref_jax.records import TokenSequence
from deltapref_jax.scoring.packing import (
    Micro,
    PackedBatch,
    candidate_layouts,
    drop_empty_half,
    max_segments,
    pack_sequences,
)
from deltapref_jax.training.step import Examples


class ReferencedSequence(NamedTuple):
    """A sequence with its reference."""

    sequence: TokenSequence
    reference: float = 0.0  # log-probability of the targets under the reference model, nats


class Group(NamedTuple):
    """One term of the loss: chosen and rejected of a pair, or the one sequence of an example."""

    rows: tuple[ReferencedSequence, ...]
    desirable: float = 1.0  # KTO's label, 1 or 0
    # KTO's baseline: the completion behind another prompt
    mismatched: ReferencedSequence | None = None

    @property
    def all_rows(self) -> tuple[ReferencedSequence, ...]:
        """The mismatched row last, if there is one."""
        return self.rows if self.mismatched is None else (*self.rows, self.mismatched)


class StepData(NamedTuple):
    """One step, packed."""

    micros: Sequence[tuple[PackedBatch, Examples]]
    # KTO's mismatched rows, with their references [S] and weights [S]
    baseline: Sequence[tuple[PackedBatch, np.ndarray, np.ndarray]]
    total: float  # pairs, examples or target tokens
    tokens: int  # of all sequences, baseline rows included; a shared prompt counts for each of them
    epoch: float  # passes over the data after this step
    chosen_tokens: float = 1.0  # target tokens of the first rows of all groups
    # trace ids in the order of `Micro.order`, for every batch of `micros` and then of `baseline`
    traces: Sequence[Sequence[str]] = ()

    @property
    def positions(self) -> int:
        """Computed, real or padding."""
        return sum(batch.tokens.size for batch in self.batches)

    @property
    def filled(self) -> int:
        """Positions that hold a token; a shared prompt counts as often as it is read."""
        return sum(int(np.count_nonzero(batch.segments)) for batch in self.batches)

    @property
    def batches(self) -> list[PackedBatch]:
        """Of `micros`, then of `baseline`."""
        return [*(batch for batch, _ in self.micros), *(batch for batch, _, _ in self.baseline)]

    def drop_empty_halves(self, row_shards: int) -> "StepData":
        """Micro-batches without empty halves, for rows that lie over `row_shards` devices."""
        return self._replace(
            micros=[
                (drop_empty_half(batch, row_shards), examples) for batch, examples in self.micros
            ],
            baseline=[
                (drop_empty_half(batch, row_shards), ref, w) for batch, ref, w in self.baseline
            ],
        )


class Data:
    """Groups to steps; call it with a step's number.

    Attributes:
      dropped: groups left out because one of their rows is longer than a packed row.
      dropped_mismatched: KTO examples that are trained on without a mismatched row, because it is
        longer than a packed row or than what was scored; the baseline is measured on the others.
      steps: of the run that `training` asks for.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        kind: str,
        training: Training,
        seed: int,
        baseline_fraction: float = 1.0,
        share: bool = False,
    ):
        """Drops what is too long.

        Args:
          groups: of the whole data set.
          kind: of the objective, one of `config.OBJECTIVE_KINDS`.
          training: shapes and budget; `pairs_per_step` pairs are twice as many examples of KTO.
          seed: of the order.
          baseline_fraction: share of a step's rows that KTO's baseline is measured on.
          share: reads a prompt once for the sequences of a step that have it (see `packing`).

        Raises:
          ConfigError: a row is longer than `row_length` and `over_length` is "error", or all are; a
            pair needs two rows where a micro-batch has one; a step of KTO holds one example, or one
            prompt only.
        """
        self.kind, self._training, self._seed = kind, training, seed
        self._fraction, self._share = baseline_fraction, share
        # A group is trained on whole or not at all: a pair without one side has no margin. A
        # mismatched row only measures z0, so it can be left out alone.
        fits = [group for group in groups if all(map(self._fits, group.rows))]
        self.groups = [
            group
            if group.mismatched is None or self._fits(group.mismatched)
            else group._replace(mismatched=None)
            for group in fits
        ]
        self.dropped = len(groups) - len(self.groups)
        # With one row in a micro-batch a pair must fit that row, because it may not be split.
        wide = sum(map(self._wide, self.groups)) if training.rows == 1 else 0
        if wide:
            raise ConfigError(
                f"{wide} of {len(self.groups)} pairs have more tokens in both sequences together "
                f"than config.training.row_length ({training.row_length}), and "
                "config.training.rows is 1; a pair lies in one micro-batch: make rows 2."
            )
        if self.dropped and training.over_length == "error":
            raise ConfigError(
                f"{self.dropped} of {len(groups)} groups are longer than "
                f"config.training.row_length ({training.row_length} tokens); raise it, "
                "or set over_length to 'drop'."
            )
        # KTO counts examples, of which a pair gives two. A step is at most the whole data set.
        self.batch = min(
            training.pairs_per_step * (2 if OBJECTIVE_KINDS[kind].unit == "example" else 1),
            len(self.groups),
        )
        if not self.batch:
            raise ConfigError(
                f"All {self.dropped} groups are longer than config.training.row_length "
                f"({training.row_length} tokens); raise it."
            )
        # Rounded up: the last step may reach into one more epoch.
        epochs = -(-int(training.epochs * len(self.groups)) // self.batch)
        self.steps = training.steps if training.budget == "steps" else max(1, epochs)
        self.dropped_mismatched = 0
        if OBJECTIVE_KINDS[kind].baseline:
            self._check_baseline(fits)

    def _fits(self, row: ReferencedSequence) -> bool:
        return row.sequence.length <= self._training.row_length

    def _wide(self, group: Group) -> bool:
        sequences = [row.sequence for row in group.rows]
        numbers, length = range(len(sequences)), self._training.row_length
        best = candidate_layouts(numbers, sequences, length, self._share)
        return sum(len(s.tokens) for s in best[0]) > self._training.row_length

    def _check_baseline(self, fits: Sequence[Group]) -> None:
        """Refuses data that z0 cannot be measured on; counts the rows that are missing."""
        self._mismatched = [group.mismatched for group in self.groups if group.mismatched]
        # Both examples without a mismatched row and those whose row is too long count here.
        self.dropped_mismatched = len(self.groups) - len(self._mismatched)
        long = sum(group.mismatched is not None for group in fits) - len(self._mismatched)
        if long and self._training.over_length == "error":
            raise ConfigError(
                f"{long} of {len(fits)} mismatched rows (a completion behind another prompt, for "
                f"KTO's baseline) are longer than config.training.row_length "
                f"({self._training.row_length} tokens); raise it, or set over_length to 'drop'."
            )
        if not self._mismatched:
            raise ConfigError(
                f"None of the {len(fits)} KTO examples has a mismatched row for the baseline; "
                "raise config.training.row_length and config.scoring.row_length, or give the rows."
            )
        if self.batch < 2:
            raise ConfigError(
                "A step of KTO would hold one example, and its baseline would be that example's "
                "own log-ratio, so that the loss compares it with itself; give at least two "
                "examples."
            )
        # Prompts become small numbers, so that whole steps can be compared at once.
        ids: dict[tuple[int, ...], int] = {}
        prompts = np.array(
            [
                ids.setdefault(tuple(map(int, g.rows[0].sequence.prompt_ids)), len(ids))
                for g in self.groups
            ]
        )
        # The order of the whole run is drawn in advance, to refuse it before the first step and not
        # hours later.
        epochs = -(-self.steps * self.batch // len(self.groups))
        order = np.concatenate([self._order(epoch) for epoch in range(epochs)])[
            : self.steps * self.batch
        ]
        drawn = prompts[order].reshape(self.steps, self.batch)
        # A step is refused if all its prompts equal its first.
        alone = np.flatnonzero((drawn == drawn[:, :1]).all(axis=1))
        if len(alone):
            raise ConfigError(
                f"Step {alone[0] + 1} of KTO ({len(alone)} of {self.steps} steps) would hold "
                f"{self.batch} examples of one prompt; its baseline would follow these very "
                "completions instead of the policy's drift elsewhere: raise "
                "config.training.pairs_per_step, or use more prompts."
            )

    def _order(self, epoch: int) -> np.ndarray:
        # The generator is seeded by both numbers, so that an epoch's order needs no earlier draw.
        return np.random.default_rng([self._seed, epoch]).permutation(len(self.groups))

    def members(self, step: int) -> list[int]:
        """Groups of a step: epochs are seeded permutations laid end to end."""
        n = len(self.groups)
        members: list[int] = []
        orders: dict[int, np.ndarray] = {}
        for draw in range(step * self.batch, (step + 1) * self.batch):
            epoch, position = divmod(draw, n)
            if epoch not in orders:
                orders[epoch] = self._order(epoch)
            members.append(int(orders[epoch][position]))
        return members

    def __call__(self, step: int) -> StepData:
        """The step's micro-batches, and KTO's baseline rows."""
        groups = [self.groups[i] for i in self.members(step)]
        return pack_step(
            groups,
            self.kind,
            self._training.rows,
            self._training.row_length,
            (step + 1) * self.batch / len(self.groups),
            self._baseline_rows(step, groups) if OBJECTIVE_KINDS[self.kind].baseline else None,
            self._share,
        )

    def _baseline_rows(self, step: int, groups: Sequence[Group]) -> list[ReferencedSequence]:
        """The mismatched rows that z0 of a step is measured on, drawn by (seed, step).

        A step none of whose mismatched rows fits takes others of the data: every row samples the
        same drift.
        """
        rows = [group.mismatched for group in groups if group.mismatched] or self._mismatched
        # The count is rounded up, so that a small fraction still measures on one row.
        count = min(len(rows), -int(-self._fraction * len(groups) // 1))
        # The third number keeps this stream apart from that of `_order`, whose seed has two.
        drawn = np.random.default_rng([self._seed, step, 1]).choice(len(rows), count, replace=False)
        # Sorted indices keep the rows in the order of the step, whatever the draw's.
        return [rows[i] for i in np.sort(drawn)]


def pack_step(
    groups: Sequence[Group],
    kind: str,
    rows: int,
    length: int,
    epoch: float = 0.0,
    mismatched: Sequence[ReferencedSequence] | None = None,
    share: bool = False,
) -> StepData:
    """A step's groups in micro-batches of [rows, length], every group whole in one of them.

    Args:
      groups: of the step.
      kind: of the objective.
      rows: B.
      length: L.
      epoch: passes over the data after this step.
      mismatched: rows that KTO's baseline is measured on; None: those of all groups.
      share: reads a prompt once for a pair, or for the examples of the step that have it.
    """
    # Sequences are numbered through the step; `indices` holds every group's numbers.
    flat = [row for group in groups for row in group.rows]
    starts = np.cumsum([0] + [len(group.rows) for group in groups])
    indices = [list(range(a, b)) for a, b in zip(starts[:-1], starts[1:], strict=True)]
    pairs = OBJECTIVE_KINDS[kind].unit == "pair"
    # Both members of a pair must lie in one micro-batch, because the loss needs both; other
    # sequences are free to go wherever they fit.
    packed = pack_sequences(
        [row.sequence for row in flat], rows, length, share, indices if pairs else None
    )
    # The padded size depends on the shape alone, so all steps run in one compiled program.
    size = max_segments(rows, length)
    batches = [(micro.batch, _examples(micro.order, indices, groups, size)) for micro in packed]
    # KTO's mismatched rows, packed apart, because they run forward only.
    if mismatched is None:
        mismatched = [group.mismatched for group in groups if group.mismatched]
    if not OBJECTIVE_KINDS[kind].baseline:
        mismatched = []
    others = pack_sequences([row.sequence for row in mismatched], rows, length, share)
    # At least 1, so that the loss of a step without targets is 0 and not 0/0.
    chosen = float(max(1, sum(int(group.rows[0].sequence.targets.sum()) for group in groups)))
    total = chosen if OBJECTIVE_KINDS[kind].unit == "token" else float(len(groups))
    tokens = sum(row.sequence.length for row in (*flat, *mismatched))
    # The ids follow the packed order, so that a guard can name the trace of a bad row.
    traces = [
        [source[i].sequence.trace_id for i in micro.order]
        for source, micros in ((flat, packed), (mismatched, others))
        for micro in micros
    ]
    return StepData(
        batches,
        [_baseline(micro, mismatched, size) for micro in others],
        total,
        tokens,
        epoch,
        chosen,
        traces,
    )


def _examples(
    order: np.ndarray, indices: list[list[int]], groups: Sequence[Group], size: int
) -> Examples:
    # Where each sequence of the step lies in this micro-batch's vector [S].
    segment = {int(i): s for s, i in enumerate(order)}
    columns: Any = np.zeros((4, size), np.float32)  # first_ref, second_ref, desirable, weight
    places = np.zeros((2, size), np.int32)
    # Groups of other micro-batches are left out; a group is here if its first sequence is.
    here = [(group, at) for group, at in zip(groups, indices, strict=True) if at[0] in segment]
    for k, (group, at) in enumerate(here):
        for side, (row, i) in enumerate(zip(group.rows, at, strict=True)):
            places[side, k], columns[side, k] = segment[i], row.reference
        columns[2, k], columns[3, k] = group.desirable, 1.0
    return Examples(places[0], places[1], *columns)


def _baseline(
    micro: Micro, mismatched: Sequence[ReferencedSequence], size: int
) -> tuple[PackedBatch, np.ndarray, np.ndarray]:
    reference, weight = np.zeros(size, np.float32), np.zeros(size, np.float32)
    reference[: len(micro.order)] = [mismatched[i].reference for i in micro.order]
    weight[: len(micro.order)] = 1.0
    return micro.batch, reference, weight
