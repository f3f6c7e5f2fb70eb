"""What a policy is trained on: rows with their references, drawn into steps; a step's number is its place in the data.

    groups ──seeded epochs──▶ the groups of a step ──first fit──▶ micro-batches of one shape (and KTO's baseline rows)

All of it is a pure function of (groups, seed, shape), so resuming needs nothing but the step number.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from deltapref_jax.config import ConfigError, Training
from deltapref_jax.scoring.packing import PackedBatch, Sample, capacity, pack, sample
from deltapref_jax.training.step import Examples


class Row(NamedTuple):
    """One prompt with one completion."""

    prompt: Sequence[int]  # token ids
    completion: Sequence[int]  # token ids; the targets
    reference: float = 0.0  # log-probability of the completion under the reference, nats

    @property
    def tokens(self) -> int:
        """Of both."""
        return len(self.prompt) + len(self.completion)

    def sample(self) -> Sample:
        """The packed form's input."""
        return sample(self.prompt, self.completion)


class Group(NamedTuple):
    """What one term of the loss is made of: the chosen and the rejected row of a pair, or the row of an example."""

    rows: tuple[Row, ...]
    desirable: float = 1.0  # KTO's label, 1 or 0
    mismatched: Row | None = None  # KTO: the completion of `rows[0]` behind another prompt


class StepData(NamedTuple):
    """One step, packed."""

    micros: Sequence[tuple[PackedBatch, Examples]]
    baseline: Sequence[tuple[PackedBatch, np.ndarray, np.ndarray]]  # KTO: mismatched rows, reference [S], weight [S]
    total: float  # pairs, examples or target tokens
    tokens: int  # real tokens, baseline rows included
    epoch: float  # passes over the data after this step


class Data:
    """Groups to steps; call it with a step's number.

    Attributes:
      dropped: groups left out because one of their rows is longer than a packed row.
      steps: of the run that `training` asks for.
    """

    def __init__(self, groups: Sequence[Group], kind: str, training: Training, seed: int):
        """Drops what is too long.

        Args:
          groups: of the whole data set.
          kind: of the objective, one of `config.OBJECTIVE_KINDS`.
          training: shapes and budget; `pairs_per_step` pairs are twice as many examples of KTO.
          seed: of the order.

        Raises:
          ConfigError: a row is longer than `row_length` and `over_length` is "error", or all are.
        """
        self.kind, self._training, self._seed = kind, training, seed
        self.groups = [group for group in groups if self._fits(group)]
        self.dropped = len(groups) - len(self.groups)
        if self.dropped and training.over_length == "error":
            raise ConfigError(f"{self.dropped} of {len(groups)} groups are longer than config.training.row_length "
                              f"({training.row_length} tokens); raise it, or set over_length to 'drop'.")
        self.batch = min(training.pairs_per_step * (2 if kind == "kto" else 1), len(self.groups))
        if not self.batch:
            raise ConfigError(f"All {self.dropped} groups are longer than config.training.row_length "
                              f"({training.row_length} tokens); raise it.")
        epochs = -(-int(training.epochs * len(self.groups)) // self.batch)
        self.steps = training.steps if training.budget == "steps" else max(1, epochs)

    def _fits(self, group: Group) -> bool:
        rows = group.rows + ((group.mismatched,) if group.mismatched else ())
        return all(row.tokens <= self._training.row_length for row in rows)

    def members(self, step: int) -> list[int]:
        """Groups of a step: epochs are seeded permutations laid end to end."""
        n, found = len(self.groups), []
        orders: dict[int, np.ndarray] = {}
        for place in range(step * self.batch, (step + 1) * self.batch):
            epoch, at = divmod(place, n)
            if epoch not in orders:
                orders[epoch] = np.random.default_rng([self._seed, epoch]).permutation(n)
            found.append(int(orders[epoch][at]))
        return found

    def __call__(self, step: int) -> StepData:
        """The step's micro-batches, and KTO's baseline rows."""
        groups = [self.groups[i] for i in self.members(step)]
        return pack_step(groups, self.kind, self._training.rows, self._training.row_length,
                         (step + 1) * self.batch / len(self.groups))


def pack_step(groups: Sequence[Group], kind: str, rows: int, length: int, epoch: float = 0.0) -> StepData:
    """A step's groups in micro-batches of [rows, length], every group whole in one of them."""
    samples = [row.sample() for group in groups for row in group.rows]
    starts = np.cumsum([0] + [len(group.rows) for group in groups])
    indices = [list(range(a, b)) for a, b in zip(starts[:-1], starts[1:], strict=True)]
    micros = [(m.batch, _examples(m.order, indices, groups, capacity(rows, length)))
              for m in pack(samples, indices, rows, length)]
    mismatched = [group.mismatched for group in groups if group.mismatched] if kind == "kto" else []
    total = sum(int(s.targets.sum()) for s in samples) if kind == "sft" else len(groups)
    tokens = sum(len(s.tokens) for s in samples) + sum(row.tokens for row in mismatched)
    return StepData(micros, _baseline(mismatched, rows, length), float(total), tokens, epoch)


def _examples(order: np.ndarray, indices: list[list[int]], groups: Sequence[Group], size: int) -> Examples:
    segment = {int(i): s for s, i in enumerate(order)}
    columns: Any = np.zeros((4, size), np.float32)  # first_ref, second_ref, desirable, weight
    places = np.zeros((2, size), np.int32)
    here = [(group, at) for group, at in zip(groups, indices, strict=True) if at[0] in segment]
    for k, (group, at) in enumerate(here):
        for side, (row, i) in enumerate(zip(group.rows, at, strict=True)):
            places[side, k], columns[side, k] = segment[i], row.reference
        columns[2, k], columns[3, k] = group.desirable, 1.0
    return Examples(places[0], places[1], *columns)


def _baseline(mismatched: list[Row], rows: int, length: int) -> list[tuple[PackedBatch, np.ndarray, np.ndarray]]:
    size, found = capacity(rows, length), []
    for m in pack([row.sample() for row in mismatched], [[i] for i in range(len(mismatched))], rows, length):
        reference, weight = np.zeros(size, np.float32), np.zeros(size, np.float32)
        reference[: len(m.order)] = [mismatched[i].reference for i in m.order]
        weight[: len(m.order)] = 1.0
        found.append((m.batch, reference, weight))
    return found
