"""The loop: fetch a step's data, run the compiled step, write metrics and checkpoints. Side effects live here."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from deltapref_jax.config import OBJECTIVE_KINDS, ConfigError, Objective
from deltapref_jax.mesh import is_first, put
from deltapref_jax.models.sharding import BATCH
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.progress import progress
from deltapref_jax.scoring.packing import capacity
from deltapref_jax.training.checkpoint import Checkpoints, Metrics, read_metrics
from deltapref_jax.training.data import StepData
from deltapref_jax.training.guards import Fall, check_finite, check_reference
from deltapref_jax.training.objectives import Hyper, kto_baseline
from deltapref_jax.training.state import Optimizer, TrainState, learning_rate, start
from deltapref_jax.training.step import Programs, programs


@dataclasses.dataclass(frozen=True)
class Run:
    """How one policy is trained; the fields of `Training` and `Objective` that reach the loop."""

    objective: Objective
    steps: int
    rows: int
    row_length: int
    warmup: float = 0.1
    schedule: str = "linear"
    floor: float = 0.0
    optimizer: Optimizer = Optimizer()
    checkpoint_every: int = 10
    keep_checkpoints: int = 1
    remat: str = "none"


def train(
    spec: ModelSpec,
    params: nnx.State,
    data: Callable[[int], StepData],
    run: Run,
    mesh: Mesh,
    folder: Path,
    label: str = "train",
    dtype: str = "float32",
    guard: bool = False,
) -> tuple[nnx.State, dict[str, float]]:
    """Trains from `params`, or from the newest checkpoint in `folder`; returns the parameters and counts.

    Args:
      spec: of the model.
      params: initial parameters.
      data: step (0 first) to its data; a pure function, so that a resumed run continues where it was.
      run: objective, schedule, shapes.
      mesh: rows are spread over data and fsdp.
      folder: receives `checkpoints/` and `metrics.jsonl` (TRL's metric names, one row a step).
      label: of the progress bar.
      dtype: of the computation; parameters and moments are float32.
      guard: refuse to train if the policy differs from its reference before the first step (`guards`).

    Raises:
      ConfigError: rows do not divide over the mesh, or the guard's refusal with the likely reasons.
      FloatingPointError: the loss or gradient is not finite; the sentence names the step and its traces, and no
        checkpoint holds it.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if run.rows % ways:
        raise ConfigError(f"rows is {run.rows} and the mesh spreads rows over {ways} devices (data x fsdp); "
                          "make rows a multiple of that.")
    if run.row_length % mesh.shape["context"]:
        raise ConfigError(f"row_length is {run.row_length} and the mesh splits each row over {mesh.shape['context']} "
                          "devices (context); make row_length a multiple of that.")
    segments = capacity(run.rows, run.row_length)
    steps = programs(spec, dtype, run.objective.kind, run.optimizer, segments, mesh, run.remat)
    folder.mkdir(parents=True, exist_ok=True)
    state = start(params, run.optimizer, mesh)
    counts = {"tokens": 0.0, "positions": 0.0, "seconds_first_step": 0.0, "seconds_steady": 0.0, "tokens_steady": 0.0}
    with Checkpoints(folder / "checkpoints", run.keep_checkpoints) as checkpoints, progress(is_first()) as bar:
        done = checkpoints.newest()
        if done:
            state = checkpoints.restore(state)
        metrics = Metrics(folder / "metrics.jsonl", done) if is_first() else None
        fall = Fall(run.objective.beta)
        for row in read_metrics(folder / "metrics.jsonl") if metrics else ():
            fall(row)
        task = bar.add_task(label, total=run.steps, completed=done, unit="steps", note="")
        pending: dict[str, Any] | None = None
        began = time.monotonic()
        for step in range(done, run.steps):
            batch = data(step)
            rate = learning_rate(step, run.steps, run.objective.learning_rate, run.warmup, run.schedule, run.floor)
            state, sums, s = run_step(steps, state, batch, run.objective, rate, mesh)
            now = {"step": step + 1, "learning_rate": rate, "epoch": batch.epoch, "sums": sums, "s": s, "batch": batch}
            if pending is not None:  # the host reads step n while the device works on step n + 1
                _finish(pending, run, counts, metrics, bar, task, fall)
            pending = now
            if step == done:
                jax.block_until_ready(sums)
                if guard and not done and OBJECTIVE_KINDS[run.objective.kind].reference:
                    check_reference(run.objective.kind, batch, jax.device_get(s), dtype)
                counts["seconds_first_step"] = time.monotonic() - began
                began = time.monotonic()
            else:
                counts["tokens_steady"] += batch.tokens
            if (step + 1) % run.checkpoint_every == 0 and step + 1 < run.steps:
                _finish(now, run, counts, metrics, bar, task, fall)  # what is saved has been checked
                pending = None
                checkpoints.save(step + 1, state)
        if pending is not None:
            _finish(pending, run, counts, metrics, bar, task, fall)
        counts["seconds_steady"] = time.monotonic() - began
        if run.steps > done:
            checkpoints.save(run.steps, state)
    counts["both_fell_at"] = float(fall.at)  # step at which the warning came; 0: never
    return state.params, counts


def run_step(
    steps: Programs, state: TrainState, batch: StepData, objective: Objective, rate: float, mesh: Mesh
) -> tuple[TrainState, dict[str, jax.Array], list[jax.Array]]:
    """One optimizer step over however many micro-batches; all that is returned is on the device.

    Returns:
      The new state; sums of metrics; log-probabilities [S] before the update, of micro-batches and of KTO's baseline.
    """
    baseline, drifts = jnp.zeros(()), [steps.logprobs(state.params, put(rows, mesh, BATCH))[0]
                                       for rows, _, _ in batch.baseline]
    if drifts:
        weight = sum(float(w.sum()) for _, _, w in batch.baseline)
        shifts = [jnp.vdot(s - ref, w) for s, (_, ref, w) in zip(drifts, batch.baseline, strict=True)]
        baseline = kto_baseline(sum(shifts[1:], shifts[0]) / weight)
    o = objective
    hyper = Hyper(*map(np.float32, (o.beta, o.label_smoothing, o.gamma, o.nll_weight, o.desirable_weight,
                                    o.undesirable_weight, 0, batch.total, batch.chosen_tokens)))._replace(z0=baseline)
    grads: Any = None
    sums: dict[str, jax.Array] = {}
    scored: list[jax.Array] = []
    for rows, examples in batch.micros:
        g, more, s = steps.gradient(state.params, put(rows, mesh, BATCH), put(examples, mesh, PartitionSpec()), hyper)
        grads = g if grads is None else steps.add(grads, g)
        sums = {name: sums[name] + value if name in sums else value for name, value in more.items()}
        scored.append(s)
    state, norm = steps.apply(state, grads, np.float32(rate))
    return state, sums | {"grad_norm": norm, "kl": baseline}, scored + drifts


def _finish(pending: dict[str, Any], run: Run, counts: dict[str, float], metrics: Metrics | None, bar: Any,
            task: Any, fall: Fall) -> None:
    """Fetches a step's sums, checks them, writes its row and moves the bar."""
    step, batch = pending["step"], pending["batch"]
    row = summarise(run.objective.kind, {k: float(v) for k, v in jax.device_get(pending["sums"]).items()})
    check_finite(run.objective.kind, step, row, batch, pending["s"])
    counts["tokens"] += batch.tokens
    counts["positions"] += (len(batch.micros) + len(batch.baseline)) * run.rows * run.row_length
    row |= {"step": step, "epoch": round(pending["epoch"], 6), "learning_rate": pending["learning_rate"],
            "num_tokens": batch.tokens}
    if metrics:
        metrics.write(row)
    warning = fall(row)
    if warning and metrics:
        bar.console.print(f"Warning: {warning}", markup=False, highlight=False, soft_wrap=True)
    note = f"loss {row['loss']:.4f}"
    if "rewards/margins" in row:
        note += f"  margin {row['rewards/margins']:+.3f}"
    bar.update(task, completed=step, note=note)


def summarise(kind: str, sums: dict[str, float]) -> dict[str, float]:
    """A step's metrics under TRL's names, from the sums over its micro-batches.

    A step of examples may be one-sided: its loss and gradient are right as they are (`objectives.kto`); the means of
    the side that is not there would be 0/0, so they and the margin are left out of its row.
    """
    row = {name: value for name, value in sums.items() if not name.startswith("count/")}
    if not OBJECTIVE_KINDS[kind].baseline:
        row.pop("kl")
    for side in ("chosen", "rejected"):
        count = sums.get(f"count/{side}")
        if count is not None:
            for name in {f"rewards/{side}", f"logps/{side}"} & row.keys():
                total = row.pop(name)
                if count:
                    row[name] = total / count
    if OBJECTIVE_KINDS[kind].unit == "example" and {"rewards/chosen", "rewards/rejected"} <= row.keys():
        row["rewards/margins"] = row["rewards/chosen"] - row["rewards/rejected"]
    return row
