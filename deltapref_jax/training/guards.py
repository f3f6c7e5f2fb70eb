"""What stops a run, and what it warns of: a reference that is not the policy's, numbers that are not finite, a fall."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from deltapref_jax.config import OBJECTIVE_KINDS, ConfigError
from deltapref_jax.training.data import StepData

NOISE = {"float32": 1e-3, "bfloat16": 5e-2}
"""Nats by which one token's policy and reference log-probability may differ before training, per dtype; the rounding of
L tokens adds up like √L, so a completion may differ by √L times this."""

WINDOW = 10
"""Steps whose mean is held against that of as many steps before them, see `LikelihoodDisplacement`."""


def _shifts(
    kind: str, batch: StepData, s: Sequence[Float[np.ndarray, " S"]]
) -> Iterator[tuple[str, float, int]]:
    """(trace id, s - ref, target tokens) of every row of a step, mismatched ones too; `s` like `batch.traces`."""
    given = OBJECTIVE_KINDS[kind].reference
    rows: list[tuple[Any, list[tuple[int, float]]]] = []
    for packed, e in batch.micros:
        real = np.flatnonzero(e.weight)
        sides = [(e.first, e.first_ref), (e.second, e.second_ref)][
            : 2 if OBJECTIVE_KINDS[kind].unit == "pair" else 1
        ]
        rows.append((packed, [(int(at[i]), float(ref[i])) for at, ref in sides for i in real]))
    for packed, references, weight in batch.baseline:
        rows.append((packed, [(int(i), float(references[i])) for i in np.flatnonzero(weight)]))
    for k, (packed, scored) in enumerate(rows):
        got = np.asarray(s[k], np.float64)
        tokens = np.bincount(np.asarray(packed.targets).reshape(-1), minlength=len(got) + 1)
        for i, reference in scored:
            trace = batch.traces[k][i] if batch.traces else ""
            yield trace, float(got[i]) - (reference if given else 0.0), int(tokens[i + 1])


def _ids(traces: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(t for t in traces if t)) or "without ids"


def check_reference(
    kind: str, batch: StepData, s: Sequence[Float[np.ndarray, " S"]], dtype: str
) -> None:
    """Before the first update the policy is its reference: every row's log-ratio must be 0 within `NOISE`.

    Each row counts, so that one wrong shard or one truncated trace among a thousand right ones is found too.

    Args:
      kind: of the objective.
      batch: the first step.
      s: log-probabilities [S] under the initial policy, of each of `batch.micros`, then of `batch.baseline`.
      dtype: of the computation.

    Raises:
      ConfigError: the worst row, the number of wrong ones with their trace ids, and the likely reasons.
    """
    allowed = NOISE[dtype]
    rows = [
        (float(np.nan_to_num(abs(x), nan=np.inf)) / max(n, 1) ** 0.5, trace, x, n)
        for trace, x, n in _shifts(kind, batch, s)
    ]
    wrong = sorted((row for row in rows if row[0] > allowed), reverse=True)
    if wrong:
        _, _, x, n = wrong[0]
        few = _ids([row[1] for row in wrong[:8]])
        raise ConfigError(
            f"Before training the policy's log-probabilities differ from its reference's in {len(wrong)} of "
            f"{len(rows)} rows, by up to {abs(x):.3g} nats over {n} tokens (noise allowed there: "
            f"{allowed * max(n, 1) ** 0.5:.3g}; traces, worst first: {few}); likely reasons: the table was made by "
            "other weights, another chat template, another truncation or another dtype. Score again with this student "
            "as the reference."
        )


def check_finite(
    kind: str,
    step: int,
    row: Mapping[str, float],
    batch: StepData,
    s: Sequence[Float[np.ndarray, " S"]],
) -> None:
    """The loss and the gradient norm of a step must be numbers.

    Args:
      kind: of the objective.
      step: 1 first.
      row: its metrics.
      batch: its data.
      s: see `check_reference`.

    Raises:
      FloatingPointError: the step, the traces whose log-ratio is not a number, and all traces of the step.
    """
    if np.isfinite(row["loss"]) and np.isfinite(row["grad_norm"]):
        return
    shifts = list(_shifts(kind, batch, s))
    broken = [trace for trace, x, _ in shifts if not np.isfinite(x)]
    where = (
        f"{len(broken)} log-ratios are not finite ({_ids(broken)})"
        if broken
        else "all log-ratios are finite"
    )
    raise FloatingPointError(
        f"At step {step} the loss is {row['loss']} and the gradient norm {row['grad_norm']}: {where}; the "
        "checkpoints are of the steps before it; lower the learning rate, or look at that step's traces: "
        f"{_ids([trace for trace, _, _ in shifts])}."
    )


class LikelihoodDisplacement:
    """Notices that the log-probabilities of chosen and rejected fall together (a known failure, arXiv 2402.13228).

    Steps hold different traces, so what is watched are the mean log-ratios to the reference: both below 0 over the last
    `WINDOW` steps, and both lower than over the `WINDOW` before by more than three standard errors.

    Attributes:
      step: step at which that was first seen; 0: never.
    """

    def __init__(self, beta: float, reference: bool = True) -> None:
        """`beta`: of the rewards; `reference`: whether they are ratios to one, as otherwise nothing can be said."""
        self.step = 0
        self._beta, self._reference = beta, reference
        self._seen: list[tuple[float, float]] = []

    def __call__(self, row: Mapping[str, float]) -> str:
        """Takes a step's metrics; returns the warning the first time, "" otherwise. One-sided steps are passed over."""
        if (
            self.step
            or not self._reference
            or not {"rewards/chosen", "rewards/rejected"} <= row.keys()
        ):
            return ""
        self._seen = [*self._seen, (row["rewards/chosen"], row["rewards/rejected"])][-2 * WINDOW :]
        if len(self._seen) < 2 * WINDOW:
            return ""
        before, last = np.split(np.array(self._seen) / self._beta, 2)
        change = last.mean(axis=0) - before.mean(axis=0)
        error = np.sqrt((before.var(axis=0, ddof=1) + last.var(axis=0, ddof=1)) / WINDOW)
        if not ((change < -3 * error) & (last.mean(axis=0) < 0)).all():
            return ""
        self.step = int(row["step"])
        chosen, rejected = last.mean(axis=0)
        return (
            f"Up to step {self.step} the log-probabilities of chosen and rejected traces fall together (last "
            f"{WINDOW} steps: {chosen:.2f} and {rejected:.2f} nats from the reference): the policy leaves both; a "
            "lower learning rate, a higher beta, nll_weight or rejected traces of the student's own may hold it."
        )
