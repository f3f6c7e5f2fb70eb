"""The loop: fetch a step's data, run the compiled step, write metrics and checkpoints. Side effects live here."""

import dataclasses
import functools
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from deltapref_jax.config import OBJECTIVE_KINDS, Lora, Objective
from deltapref_jax.host import Notice, Preempted
from deltapref_jax.mesh import check_rows, is_first, put
from deltapref_jax.models.lora import adapters, add_adapters
from deltapref_jax.models.sharding import BATCH, shardings
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.progress import progress
from deltapref_jax.scoring.packing import capacity
from deltapref_jax.training.checkpoint import Checkpoints, read_metrics
from deltapref_jax.training.data import StepData
from deltapref_jax.training.guards import Fall, check_finite, check_reference
from deltapref_jax.training.objectives import Hyper, kto_baseline
from deltapref_jax.training.state import Optimizer, TrainState, learning_rate, start
from deltapref_jax.training.step import Programs, programs
from deltapref_jax.training.watch import Live, Watch

Advance = Callable[
    [TrainState, StepData, float], tuple[TrainState, Any, Any]
]  # to state, sums, log-probabilities


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
    lora: Lora = dataclasses.field(default_factory=Lora)
    seed: int = 0  # of adapters and of the rounding of bfloat16 moments, 0 to 2³² - 1


def train(
    spec: ModelSpec,
    params: nnx.State,
    data: Callable[[int], StepData],
    run: Run,
    mesh: Mesh,
    folder: str | os.PathLike[str],
    label: str = "train",
    dtype: str = "float32",
    guard: bool = False,
    watch: Watch | None = None,
    base: str = "",
) -> tuple[nnx.State, dict[str, float]]:
    """Trains from `params`, or from the newest checkpoint in `folder`; returns what was trained and counts.

    What is trained are all parameters, or the adapters of `run.lora` (`models.lora.merge` joins them with `params`). A
    SIGTERM, or the notice of another process of the job, is answered by a checkpoint after the step at hand.

    Args:
      spec: of the model.
      params: initial parameters.
      data: step (0 first) to its data; a pure function, so that a resumed run continues where it was.
      run: objective, schedule, shapes.
      mesh: rows are spread over data and fsdp.
      folder: receives `checkpoints/` and `metrics.jsonl` (TRL's metric names, one row a step).
      label: of the progress bar.
      dtype: of the computation; what is trained is float32, the frozen base of adapters keeps its own.
      guard: refuse to train if the policy differs from its reference before the first step (`guards`).
      watch: trackers and profiler window.
      base: hash of the weights that adapters belong to; checkpoints of another base's are refused.

    Raises:
      ConfigError: rows do not divide over the mesh, or the guard's refusal with the likely reasons.
      FloatingPointError: the loss or gradient is not finite; the sentence names the step and its traces, and no
        checkpoint holds it.
      ArtifactError: a checkpoint cannot be read or written.
      Preempted: the machine is wanted back; what was done is saved.
    """
    check_rows("config.training", run.rows, run.row_length, mesh)
    place = epath.Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    state, advance = _prepare(spec, params, run, mesh, dtype)
    counts = dict.fromkeys(
        ("tokens", "positions", "filled", "seconds_first_step", "seconds_steady", "tokens_steady"),
        0.0,
    )
    with (
        Notice() as notice,
        Checkpoints(place / "checkpoints", run.keep_checkpoints, base) as checkpoints,
        progress(is_first()) as bar,
    ):
        done = checkpoints.newest()
        if done:
            state, counts = checkpoints.restore(state)
        with Live(
            spec, adapters(run.lora), mesh, place, label, watch or Watch(), bar, run.steps, done
        ) as live:
            fall = Fall(run.objective.beta, OBJECTIVE_KINDS[run.objective.kind].reference)
            for row in read_metrics(place / "metrics.jsonl") if is_first() else ():
                fall(row)
            check = (
                functools.partial(check_reference, run.objective.kind, dtype=dtype)
                if (guard and not done and OBJECTIVE_KINDS[run.objective.kind].reference)
                else None
            )
            state = _loop(
                advance,
                state,
                lambda step: data(step).trimmed(mesh.shape["data"] * mesh.shape["fsdp"]),
                run,
                done,
                counts,
                checkpoints,
                live,
                notice,
                fall,
                check,
            )
    # both_fell_at: step at which the warning came; 0: never
    return state.params, counts | checkpoints.seconds | {"both_fell_at": float(fall.at)}


def _prepare(
    spec: ModelSpec, params: nnx.State, run: Run, mesh: Mesh, dtype: str
) -> tuple[TrainState, Advance]:
    """The state before the first step, and what a step's data and learning rate make of a state."""
    segments = capacity(run.rows, run.row_length)
    steps = programs(
        spec,
        dtype,
        run.objective.kind,
        run.optimizer,
        segments,
        mesh,
        run.remat,
        adapters(run.lora),
    )
    trained, frozen = add_adapters(spec, params, run.lora, run.seed)
    state, frozen = (
        start(trained, run.optimizer, mesh),
        jax.device_put(frozen, shardings(frozen, mesh)),
    )

    def advance(state: TrainState, batch: StepData, rate: float) -> tuple[TrainState, Any, Any]:
        return run_step(steps, state, batch, run.objective, rate, mesh, frozen, run.seed)

    return state, advance


def _loop(
    advance: Advance,
    state: TrainState,
    data: Callable[[int], StepData],
    run: Run,
    done: int,
    counts: dict[str, float],
    checkpoints: Checkpoints,
    live: Live,
    notice: Notice,
    fall: Fall,
    check: Callable[[StepData, Any], None] | None,
) -> TrainState:
    pending: dict[str, Any] | None = None
    for step in range(done, run.steps):
        began = time.monotonic()
        live.before(step + 1)
        batch = data(step)
        rate = learning_rate(
            step, run.steps, run.objective.learning_rate, run.warmup, run.schedule, run.floor
        )
        state, sums, s = advance(state, batch, rate)
        live.after(step + 1, sums)
        if pending is not None:  # the host reads step n while the device works on step n + 1
            _finish(pending, run, counts, live, fall)
        pending = {
            "step": step + 1,
            "learning_rate": rate,
            "epoch": batch.epoch,
            "sums": sums,
            "s": s,
            "batch": batch,
        }
        if step == done:
            jax.block_until_ready(sums)
            if check:
                check(batch, jax.device_get(s))
        leave = notice.reached(step + 1)
        save = leave or step + 1 == run.steps or (step + 1) % run.checkpoint_every == 0
        if save:  # copying the state waits for the device anyway
            _finish(pending, run, counts, live, fall)
            pending = None
        counts["seconds_first_step" if step == done else "seconds_steady"] += (
            time.monotonic() - began
        )
        counts["tokens_steady"] += batch.tokens if step > done else 0
        if save:
            live.flush()
            checkpoints.save(step + 1, state, counts)
        if leave:
            checkpoints.wait()
            raise Preempted(
                f"Stopped by SIGTERM after step {step + 1} of {run.steps}, which is saved in "
                f"{live.folder}. Run the same command to continue."
            )
    checkpoints.wait()
    return state


def run_step(
    steps: Programs,
    state: TrainState,
    batch: StepData,
    objective: Objective,
    rate: float,
    mesh: Mesh,
    frozen: nnx.State | None = None,
    seed: int = 0,
) -> tuple[TrainState, dict[str, jax.Array], list[jax.Array]]:
    """One optimizer step over however many micro-batches; all that is returned is on the device.

    `frozen` are the parameters that are not trained, if any; `seed` is that of `Run`.

    Returns:
      The new state; sums of metrics; log-probabilities [S] before the update, of micro-batches and of KTO's baseline.
    """
    frozen = nnx.State({}) if frozen is None else frozen
    baseline, drifts = (
        jnp.zeros(()),
        [
            steps.logprobs(nnx.merge_state(state.params, frozen), put(rows, mesh, BATCH))[0]
            for rows, _, _ in batch.baseline
        ],
    )
    if drifts:
        weight = sum(float(w.sum()) for _, _, w in batch.baseline)
        shifts = [
            jnp.vdot(s - ref, w) for s, (_, ref, w) in zip(drifts, batch.baseline, strict=True)
        ]
        baseline = kto_baseline(sum(shifts[1:], shifts[0]) / weight)
    o = objective
    hyper = Hyper(
        *map(
            np.float32,
            (
                o.beta,
                o.label_smoothing,
                o.gamma,
                o.nll_weight,
                o.desirable_weight,
                o.undesirable_weight,
                0,
                batch.total,
                batch.chosen_tokens,
            ),
        )
    )._replace(z0=baseline)
    grads: Any = None
    sums: dict[str, jax.Array] = {}
    scored: list[jax.Array] = []
    for rows, examples in batch.micros:
        g, more, s = steps.gradient(
            state.params,
            frozen,
            put(rows, mesh, BATCH),
            put(examples, mesh, PartitionSpec()),
            hyper,
        )
        grads = g if grads is None else steps.add(grads, g)
        sums = {name: sums[name] + value if name in sums else value for name, value in more.items()}
        scored.append(s)
    state, norm = steps.apply(state, grads, np.float32(rate), np.uint32(seed))
    return state, sums | {"grad_norm": norm, "kl": baseline}, scored + drifts


def _finish(
    pending: dict[str, Any], run: Run, counts: dict[str, float], live: Live, fall: Fall
) -> None:
    """Fetches a step's sums, checks them and shows its row."""
    step, batch = pending["step"], pending["batch"]
    row = summarise(
        run.objective.kind, {k: float(v) for k, v in jax.device_get(pending["sums"]).items()}
    )
    check_finite(run.objective.kind, step, row, batch, pending["s"])
    counts["tokens"] += batch.tokens
    counts["positions"] += batch.positions
    counts["filled"] += batch.filled
    row |= {
        "step": step,
        "epoch": round(pending["epoch"], 6),
        "learning_rate": pending["learning_rate"],
        "num_tokens": int(counts["tokens"]),
    }
    live.show(row, batch)
    if warning := fall(row):
        live.warn(warning)


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
            for name in [
                n for n in (f"rewards/{side}", f"logps/{side}") if n in row
            ]:  # in this order in the file
                total = row.pop(name)
                if count:
                    row[name] = total / count
    if (
        OBJECTIVE_KINDS[kind].unit == "example"
        and {"rewards/chosen", "rewards/rejected"} <= row.keys()
    ):
        row["rewards/margins"] = row["rewards/chosen"] - row["rewards/rejected"]
    return row
