"""Checks of a run: that policy and reference agree at the start, finite numbers, displacement.

The first two stop the run; likelihood displacement only warns.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from deltapref_jax.config import OBJECTIVE_KINDS, ConfigError
from deltapref_jax.training.data import StepData

NOISE = {"float32": 1e-3, "bfloat16": 5e-2}
"""Allowed difference, in nats, of one token's policy and reference log-probability before training.

It is given per dtype. Rounding errors of L tokens are independent and add up like √L, so the
log-probability of a completion may differ by √L times this.
"""

WINDOW = 10
"""Steps over which `LikelihoodDisplacement` takes a mean, to compare with the steps before."""


def _log_ratios(
    kind: str, batch: StepData, s: Sequence[Float[np.ndarray, " S"]]
) -> Iterator[tuple[str, float, int]]:
    """Yields (trace id, s - ref, target tokens) of every completion of a step.

    These include KTO's mismatched ones. `s` is in the order of `batch.traces`.
    """
    has_reference = OBJECTIVE_KINDS[kind].reference
    sides = 2 if OBJECTIVE_KINDS[kind].unit == "pair" else 1
    batches: list[tuple[Any, list[tuple[int, float]]]] = []  # packed rows, [(segment, ref), …]
    for packed, e in batch.micros:
        unpadded = np.flatnonzero(e.weight)
        columns = [(e.first, e.first_ref), (e.second, e.second_ref)][:sides]
        batches.append(
            (packed, [(int(at[i]), float(ref[i])) for at, ref in columns for i in unpadded])
        )
    for packed, ref, weight in batch.baseline:
        batches.append((packed, [(int(i), float(ref[i])) for i in np.flatnonzero(weight)]))
    for k, (packed, segments) in enumerate(batches):
        policy = np.asarray(s[k], np.float64)
        # `targets` holds segment + 1 at target positions and 0 elsewhere.
        tokens = np.bincount(np.asarray(packed.targets).reshape(-1), minlength=len(policy) + 1)
        for i, reference in segments:
            trace = batch.traces[k][i] if batch.traces else ""
            log_ratio = float(policy[i]) - (reference if has_reference else 0.0)
            yield trace, log_ratio, int(tokens[i + 1])


def _join_ids(traces: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(t for t in traces if t)) or "without ids"


def check_reference(
    kind: str, batch: StepData, s: Sequence[Float[np.ndarray, " S"]], dtype: str
) -> None:
    """Checks that the policy equals its reference before the first update.

    Every row's log-ratio must be 0 within `NOISE`. Rows are checked one by one, because a mean
    would hide one wrong shard, or one truncated trace among a thousand right ones.

    Args:
      kind: kind of the objective.
      batch: data of the first step.
      s: log-probabilities [S] in nats under the initial policy, first of every packed batch of
        `batch.micros`, then of `batch.baseline`.
      dtype: dtype of the computation.

    Raises:
      ConfigError: some rows differ. The message has the worst row, the number of wrong rows, the
        trace ids of the worst eight, and the likely reasons.
    """
    allowed = NOISE[dtype]
    # Errors are per root of the tokens; NaN counts as the largest error.
    rows = [
        (float(np.nan_to_num(abs(x), nan=np.inf)) / max(n, 1) ** 0.5, trace, x, n)
        for trace, x, n in _log_ratios(kind, batch, s)
    ]
    wrong = sorted((row for row in rows if row[0] > allowed), reverse=True)
    if wrong:
        _, _, x, n = wrong[0]
        worst = _join_ids([row[1] for row in wrong[:8]])
        raise ConfigError(
            "Before training the policy's log-probabilities differ from its reference's in "
            f"{len(wrong)} of {len(rows)} rows, by up to {abs(x):.3g} nats over {n} tokens (noise "
            f"allowed there: {allowed * max(n, 1) ** 0.5:.3g}; traces, worst first: {worst}); "
            "likely reasons: the table was made by other weights, another chat template, another "
            "truncation or another dtype. Score again with this student as the reference."
        )


def check_finite(
    kind: str,
    step: int,
    row: Mapping[str, float],
    batch: StepData,
    s: Sequence[Float[np.ndarray, " S"]],
) -> None:
    """Checks that the loss and the gradient norm of a step are finite.

    Args:
      kind: kind of the objective.
      step: number of the step, counted from 1.
      row: metrics of the step.
      batch: data of the step.
      s: log-probabilities, as in `check_reference`.

    Raises:
      FloatingPointError: one is not. The message names the step, the traces whose log-ratio is
        not finite, and all traces of the step.
    """
    if np.isfinite(row["loss"]) and np.isfinite(row["grad_norm"]):
        return
    # Log-ratios of single sequences are read only now, to name the traces.
    log_ratios = list(_log_ratios(kind, batch, s))
    nonfinite = [trace for trace, x, _ in log_ratios if not np.isfinite(x)]
    where = (
        f"{len(nonfinite)} log-ratios are not finite ({_join_ids(nonfinite)})"
        if nonfinite
        else "all log-ratios are finite"
    )
    raise FloatingPointError(
        f"At step {step} the loss is {row['loss']} and the gradient norm {row['grad_norm']}: "
        f"{where}; the checkpoints are of the steps before it; lower the learning rate, or look at "
        f"that step's traces: {_join_ids([trace for trace, _, _ in log_ratios])}."
    )


class LikelihoodDisplacement:
    """Detects likelihood displacement: chosen and rejected log-probabilities decrease together.

    It is a known failure of DPO (arXiv 2402.13228; named in arXiv 2410.08847). Steps hold
    different traces, so it is measured on the mean log-ratios to the reference: both must be below
    0 over the last `WINDOW` steps, and both lower than over the `WINDOW` steps before by more than
    three standard errors of the difference.

    Attributes:
      step: step at which it was first detected, or 0.
    """

    def __init__(self, beta: float, reference: bool = True) -> None:
        """Starts with no steps.

        Args:
          beta: by which a reward is divided to give a log-ratio.
          reference: whether rewards are log-ratios to a reference; otherwise nothing is detected.
        """
        self.step = 0
        self._beta, self._reference = beta, reference
        self._rewards: list[tuple[float, float]] = []  # chosen and rejected, of recent steps

    def __call__(self, row: Mapping[str, float]) -> str:
        """Takes a step's metrics; returns the warning at the first detection, otherwise "".

        Steps without chosen or without rejected examples, which KTO may have, are skipped.
        """
        one_sided = not {"rewards/chosen", "rewards/rejected"} <= row.keys()
        if self.step or not self._reference or one_sided:
            return ""
        self._rewards.append((row["rewards/chosen"], row["rewards/rejected"]))
        self._rewards = self._rewards[-2 * WINDOW :]
        if len(self._rewards) < 2 * WINDOW:
            return ""
        # Rewards are β times the log-ratio.
        before, last = np.split(np.array(self._rewards) / self._beta, 2)
        change = last.mean(axis=0) - before.mean(axis=0)
        # The standard error of a difference of two means of `WINDOW` steps each.
        error = np.sqrt((before.var(axis=0, ddof=1) + last.var(axis=0, ddof=1)) / WINDOW)
        if not ((change < -3 * error) & (last.mean(axis=0) < 0)).all():
            return ""
        self.step = int(row["step"])
        chosen, rejected = last.mean(axis=0)
        return (
            f"Up to step {self.step} the log-probabilities of chosen and rejected traces decrease "
            f"together (likelihood displacement; last {WINDOW} steps: {chosen:.2f} and "
            f"{rejected:.2f} nats from the reference); a lower learning rate, a higher beta, "
            "nll_weight or rejected traces of the student's own may stop it."
        )
