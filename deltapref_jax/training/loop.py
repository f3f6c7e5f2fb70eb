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

from deltapref_jax.config import ConfigError, Objective
from deltapref_jax.mesh import is_first, put
from deltapref_jax.models.sharding import BATCH
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.progress import progress
from deltapref_jax.scoring.packing import capacity
from deltapref_jax.training.checkpoint import Checkpoints, Metrics
from deltapref_jax.training.data import StepData
from deltapref_jax.training.objectives import kto_baseline
from deltapref_jax.training.state import Optimizer, TrainState, learning_rate, start
from deltapref_jax.training.step import Hyper, Programs, programs

NOISE = {"float32": 1e-2, "bfloat16": 0.5}
"""Nats by which a completion's policy and reference log-probabilities may differ before training, per dtype."""


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
    remat: bool = False


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
      guard: refuse to train if the policy differs from its reference before the first step.

    Raises:
      ConfigError: rows do not divide over the mesh, or the guard's refusal with the likely reasons.
      FloatingPointError: the loss or gradient is not finite; the sentence names the step.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if run.rows % ways:
        raise ConfigError(f"rows is {run.rows} and the mesh spreads rows over {ways} devices (data x fsdp); "
                          "make rows a multiple of that.")
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
        task = bar.add_task(label, total=run.steps, completed=done, unit="steps", note="")
        pending: dict[str, Any] | None = None
        began = time.monotonic()
        for step in range(done, run.steps):
            batch = data(step)
            rate = learning_rate(step, run.steps, run.objective.learning_rate, run.warmup, run.schedule, run.floor)
            state, sums = run_step(steps, state, batch, run.objective, rate, mesh)
            now = {"step": step + 1, "learning_rate": rate, "epoch": batch.epoch, "sums": sums, "batch": batch}
            if pending is not None:  # the host reads step n while the device works on step n + 1
                _finish(pending, run, counts, metrics, bar, task, guard, dtype)
            pending = now
            if step == done:
                jax.block_until_ready(sums)
                counts["seconds_first_step"] = time.monotonic() - began
                began = time.monotonic()
            else:
                counts["tokens_steady"] += batch.tokens
            if (step + 1) % run.checkpoint_every == 0 and step + 1 < run.steps:
                checkpoints.save(step + 1, state)
        if pending is not None:
            _finish(pending, run, counts, metrics, bar, task, guard, dtype)
        counts["seconds_steady"] = time.monotonic() - began
        if run.steps > done:
            checkpoints.save(run.steps, state)
    return state.params, counts


def run_step(
    steps: Programs, state: TrainState, batch: StepData, objective: Objective, rate: float, mesh: Mesh
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step over however many micro-batches; returns the new state and sums of metrics, on the device."""
    baseline = jnp.zeros(())
    if batch.baseline:
        weight = sum(float(w.sum()) for _, _, w in batch.baseline)
        shifts = [jnp.vdot(steps.logprobs(state.params, put(rows, mesh, BATCH))[0] - ref, w)
                  for rows, ref, w in batch.baseline]
        baseline = kto_baseline(sum(shifts[1:], shifts[0]) / weight)
    hyper = Hyper(np.float32(objective.beta), np.float32(objective.desirable_weight),
                  np.float32(objective.undesirable_weight), baseline, np.float32(batch.total))
    grads: Any = None
    sums: dict[str, jax.Array] = {}
    for rows, examples in batch.micros:
        g, s = steps.gradient(state.params, put(rows, mesh, BATCH), put(examples, mesh, PartitionSpec()), hyper)
        grads = g if grads is None else steps.add(grads, g)
        sums = {name: sums[name] + value if name in sums else value for name, value in s.items()}
    state, norm = steps.apply(state, grads, np.float32(rate))
    return state, sums | {"grad_norm": norm, "kl": baseline}


def _finish(pending: dict[str, Any], run: Run, counts: dict[str, float], metrics: Metrics | None, bar: Any,
            task: Any, guard: bool, dtype: str) -> None:
    """Fetches a step's sums, checks them, writes its row and moves the bar."""
    step, batch = pending["step"], pending["batch"]
    row = summarise(run.objective.kind, {k: float(v) for k, v in jax.device_get(pending["sums"]).items()})
    deviation = row.pop("deviation", 0.0)
    if guard and step == 1 and deviation > NOISE[dtype]:
        raise ConfigError(
            f"Before training the policy's log-probabilities differ from its reference's by {deviation:.3g} nats a "
            f"completion (noise allowed: {NOISE[dtype]}); likely reasons: the table was made by other weights, another "
            "chat template, another truncation or another dtype. Score again with this student as the reference.")
    if not (np.isfinite(row["loss"]) and np.isfinite(row["grad_norm"])):
        raise FloatingPointError(f"At step {step} the loss is {row['loss']} and the gradient norm {row['grad_norm']}; "
                                 "lower the learning rate, or look at that step's traces.")
    counts["tokens"] += batch.tokens
    counts["positions"] += (len(batch.micros) + len(batch.baseline)) * run.rows * run.row_length
    if metrics:
        metrics.write(row | {"step": step, "epoch": round(pending["epoch"], 6),
                             "learning_rate": pending["learning_rate"], "num_tokens": batch.tokens})
    note = f"loss {row['loss']:.4f}"
    if "rewards/margins" in row:
        note += f"  margin {row['rewards/margins']:+.3f}"
    bar.update(task, completed=step, note=note)


def summarise(kind: str, sums: dict[str, float]) -> dict[str, float]:
    """A step's metrics under TRL's names, from the sums over its micro-batches."""
    row = {name: value for name, value in sums.items() if not name.startswith("count/")}
    if kind != "kto":
        row.pop("kl")
    for side in ("chosen", "rejected"):
        if f"count/{side}" in sums:
            for name in (f"rewards/{side}", f"logps/{side}"):
                if name in row:
                    count = sums[f"count/{side}"]
                    row[name] = row[name] / count if count else float("nan")
    if kind == "kto":
        row["rewards/margins"] = row["rewards/chosen"] - row["rewards/rejected"]
    return row
