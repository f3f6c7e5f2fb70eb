"""Training: one linear function from initial parameters to trained ones. Side effects live here."""

import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from deltapref_jax.config import OBJECTIVE_KINDS, Lora, Objective
from deltapref_jax.mesh import check_rows, is_first, place, shard
from deltapref_jax.models.lora import adapters, add_adapters
from deltapref_jax.models.sharding import BATCH, shardings
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.preemption import Preempted, PreemptionGuard
from deltapref_jax.progress import progress
from deltapref_jax.scoring.packing import max_segments
from deltapref_jax.training.checkpoint import Checkpoints, own_folder, read_metrics
from deltapref_jax.training.data import StepData
from deltapref_jax.training.guards import LikelihoodDisplacement, check_finite, check_reference
from deltapref_jax.training.monitor import MonitorConfig, TrainMonitor
from deltapref_jax.training.objectives import Hyper, kto_baseline
from deltapref_jax.training.state import (
    Optimizer,
    TrainState,
    in_memory,
    init_state,
    learning_rate,
    on_host,
)
from deltapref_jax.training.step import Programs, programs

Counts = dict[str, float]


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


class _Step(NamedTuple):
    """A step that was dispatched: its arrays are on the device and may not be there yet."""

    number: int  # from 1
    learning_rate: float
    batch: StepData
    sums: dict[str, jax.Array]  # of the metrics
    logprobs: list[jax.Array]  # [S] before the update, of micro-batches and of KTO's baseline


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
    monitor: MonitorConfig | None = None,
    base: str = "",
    check_lease: Callable[[], None] = lambda: None,
) -> tuple[nnx.State, Counts]:
    """Trains from `params`, or from the newest checkpoint in `folder`.

    What is trained are all parameters, or the adapters of `run.lora` (`models.lora.merge` joins
    them with `params`). A SIGTERM to any process of the job is answered by a checkpoint after the
    step at hand.

    Args:
      spec: of the model.
      params: initial parameters.
      data: step (0 first) to its data; a pure function, so that a resumed run continues where it
        was.
      run: objective, schedule, shapes.
      mesh: rows are spread over data and fsdp.
      folder: receives `checkpoints/` and `metrics.jsonl` (TRL's metric names, one row a step).
      label: of the progress bar.
      dtype: of the computation; what is trained is float32, the frozen base of adapters keeps its
        own.
      guard: refuse to train if the policy differs from its reference before the first step.
      monitor: trackers and profiler window.
      base: hash of the weights that adapters belong to; checkpoints of another base are refused.
      check_lease: called before every write into `folder`; raises if it is another process's now.

    Returns:
      What was trained, and counts: tokens, positions, filled positions, seconds, and the step at
      which likelihood displacement was first seen (`both_fell_at`, 0: never).

    Raises:
      ConfigError: rows do not divide over the mesh, or the guard's refusal with the likely reasons.
      FloatingPointError: the loss or gradient is not finite; the sentence names the step and its
        traces, and no checkpoint holds it.
      ArtifactError: a checkpoint cannot be read or written.
      Preempted: SIGTERM; what was done is saved.
    """
    # Shapes are checked before any device works.
    check_rows("config.training", run.rows, run.row_length, mesh)
    root = epath.Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    kind, lora = run.objective.kind, adapters(run.lora, spec)

    # Compiled programs, the trained state and the frozen parameters (the base of adapters).
    segments = max_segments(run.rows, run.row_length)
    compiled = programs(spec, dtype, kind, run.optimizer, segments, mesh, run.remat, lora)
    trained, frozen = add_adapters(spec, params, run.lora, run.seed)
    state = init_state(trained, run.optimizer, mesh)
    frozen = place(frozen, shardings(frozen, mesh))
    counts = dict.fromkeys(
        ("tokens", "positions", "filled", "seconds_first_step", "seconds_steady", "tokens_steady"),
        0.0,
    )
    # These are left in reverse order: the last save is waited for before the handler is removed.
    with (
        PreemptionGuard() as preemption,
        own_folder(final := root / "checkpoints", check_lease) as own,
        Checkpoints(own, run.keep_checkpoints, base, final) as checkpoints,
        progress(is_first()) as bar,
    ):
        # A run that was stopped continues from its newest checkpoint, which may be its last step.
        done = checkpoints.newest()
        if done:
            like = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
            )
            del state  # or the devices would hold two while one is read
            state, counts = checkpoints.restore(like)
        check_lease()  # The monitor cuts the metrics back to the steps done.
        with TrainMonitor(
            spec,
            lora,
            mesh,
            root,
            label,
            monitor or MonitorConfig(),
            bar,
            run.steps,
            done,
            check_lease,
        ) as shown:
            # Rows of the steps before are read again, because displacement looks at a window of
            # steps that a restart may have cut in two.
            report = _Report(run, counts, shown, check_lease)
            if is_first():
                report.replay(root)
            # The newest step that was dispatched and not read yet; there is at most one.
            previous: _Step | None = None
            for number in range(done + 1, run.steps + 1):
                # The step's data is a pure function of its number.
                began = time.monotonic()
                shown.before(number)
                batch = data(number - 1).drop_empty_halves(mesh.shape["data"] * mesh.shape["fsdp"])

                # The step itself. What it needs is sent explicitly: a hidden transfer is an error.
                rate = learning_rate(
                    number - 1,
                    run.steps,
                    run.objective.learning_rate,
                    run.warmup,
                    run.schedule,
                    run.floor,
                )
                with jax.transfer_guard("disallow"):
                    state, sums, logprobs = train_step(
                        compiled, state, batch, run.objective, rate, mesh, frozen, run.seed
                    )
                shown.after(number, sums)

                # The host reads the step before while the device works on this one.
                if previous:
                    report(previous)
                previous = _Step(number, rate, batch, sums, logprobs)
                if number == done + 1:
                    jax.block_until_ready(sums)  # the first step compiles: its time is kept apart
                    if guard and not done and OBJECTIVE_KINDS[kind].reference:
                        check_reference(kind, batch, jax.device_get(logprobs), dtype)

                # A checkpoint: copying the state waits for the device, so its row is read first.
                # All processes get the same answer, since a save is collective: one that stopped
                # alone would leave the others waiting.
                stop = preemption.should_stop(number)
                save = stop or number == run.steps or number % run.checkpoint_every == 0
                if save:
                    report(previous)
                    previous = None
                # Seconds of saving are not in these: `checkpoints` counts them itself.
                seconds = time.monotonic() - began
                counts["seconds_first_step" if number == done + 1 else "seconds_steady"] += seconds
                counts["tokens_steady"] += batch.tokens if number > done + 1 else 0
                # Metrics are made durable before the checkpoint: a resumed run needs a row for
                # every step that its checkpoint has done, and cuts off rows beyond it.
                if save:
                    checkpoints.wait()
                    shown.flush()
                    check_lease()  # Both may have taken longer than a lease.
                    checkpoints.save(number, state, counts)
                # The process exits after this, so the background save must be complete.
                if stop:
                    checkpoints.wait()
                    raise Preempted(
                        f"Stopped by SIGTERM after step {number} of {run.steps}, which is saved in "
                        f"{root}. Run the same command to continue."
                    )
            checkpoints.prune()
    both_fell = {"both_fell_at": float(report.displacement.step)}
    return state.params, counts | checkpoints.seconds | both_fell


def train_step(
    compiled: Programs,
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
      The new state; sums of metrics; log-probabilities [S] before the update, of micro-batches and
      of KTO's baseline.
    """
    everywhere = PartitionSpec()
    frozen = nnx.State({}) if frozen is None else frozen
    offloaded = on_host(state.moments)
    if offloaded:
        # While they are copied to the host, after the step before, the devices hold them too.
        jax.block_until_ready(state.moments)

    # KTO's z0 is measured first, over the mismatched rows of the whole step.
    # The whole parameters are merged only for the baseline: micro-batches get both parts, because
    # gradients are taken of the trained one alone.
    whole = nnx.merge_state(state.params, frozen) if batch.baseline else None
    drifts = [
        compiled.logprobs(whole, shard(rows, mesh, BATCH))[0] for rows, _, _ in batch.baseline
    ]
    z0 = shard(np.zeros((), np.float32), mesh, everywhere)
    if drifts:
        # The weight is summed over all mismatched batches first: z0 is the mean over the step, and
        # not a mean of the batches' means.
        weight = np.float32(sum(float(w.sum()) for _, _, w in batch.baseline))
        shifts = [
            jnp.vdot(s - shard(ref, mesh, everywhere), shard(w, mesh, everywhere))
            for s, (_, ref, w) in zip(drifts, batch.baseline, strict=True)
        ]
        z0 = _clamp(sum(shifts[1:], shifts[0]) / shard(weight, mesh, everywhere))

    # Gradients of the micro-batches add up to the step's.
    hyper = _hyper(objective, batch, z0, mesh)
    grads: Any = None
    sums: dict[str, jax.Array] = {}
    logprobs: list[jax.Array] = []
    for rows, examples in batch.micros:
        so_far = grads if compiled.in_place and grads is not None else compiled.zeros()
        more_grads, more_sums, s = compiled.gradient(
            state.params,
            frozen,
            shard(rows, mesh, BATCH),
            shard(examples, mesh, everywhere),
            hyper,
            so_far,
        )
        # The running sum is donated, so no more than two gradients exist at a time.
        apart = not compiled.in_place and grads is not None
        grads = compiled.add(grads, more_grads) if apart else more_grads
        sums = {name: sums[name] + x if name in sums else x for name, x in more_sums.items()}
        logprobs.append(s)

    # One update.
    # Rate and seed are arrays, since Python numbers would be transferred implicitly, which the
    # transfer guard forbids.
    rate_and_seed = shard((np.float32(rate), np.uint32(seed)), mesh, everywhere)
    if offloaded:
        # Copies begin when they are dispatched, and would find the activations there.
        jax.block_until_ready(grads)
        state = _moved(state, "device")
    state, norm = compiled.apply(state, grads, *rate_and_seed)
    if offloaded:
        state = _moved(state, "pinned_host")
    return state, sums | {"grad_norm": norm, "kl": z0}, logprobs + drifts


def _moved(state: TrainState, kind: str) -> TrainState:
    """The state with its moments in another memory (`state.in_memory`); no copy stays behind."""
    moments = jax.device_put(state.moments, in_memory(kind, state.moments))
    # JAX cannot donate across memories. What is deleted is freed when it has been copied.
    jax.tree.map(lambda x: x.delete(), state.moments)
    return state._replace(moments=moments)


# It is compiled once here. Clamping operation by operation would send the constant 0 to the device,
# which is a hidden transfer.
_clamp = jax.jit(kto_baseline)


def _hyper(objective: Objective, batch: StepData, z0: jax.Array, mesh: Mesh) -> Hyper:
    """The scalars of a step on the devices."""
    o = objective
    scalars = (
        o.beta,
        o.label_smoothing,
        o.gamma,
        o.nll_weight,
        o.desirable_weight,
        o.undesirable_weight,
        # z0 is on the devices already, so its place is filled with 0 and replaced below.
        0,
        batch.total,
        batch.chosen_tokens,
    )
    hyper = Hyper(*shard(tuple(map(np.float32, scalars)), mesh, PartitionSpec()))
    return hyper._replace(z0=z0)


class _Report:
    """Fetches finished steps, checks them and shows their metrics."""

    def __init__(
        self, run: Run, counts: Counts, monitor: TrainMonitor, check_lease: Callable[[], None]
    ):
        objective = run.objective
        self._kind, self._counts, self._monitor = objective.kind, counts, monitor
        self._check_lease = check_lease
        self.displacement = LikelihoodDisplacement(
            objective.beta, OBJECTIVE_KINDS[objective.kind].reference
        )

    def replay(self, folder: epath.Path) -> None:
        """Reads the metrics of the steps before a restart, so that warnings are as without it."""
        for row in read_metrics(folder / "metrics.jsonl"):
            self.displacement(row)

    def __call__(self, step: _Step) -> None:
        """Waits for the step.

        Raises:
          FloatingPointError: its loss or gradient is not finite.
        """
        sums = {name: float(x) for name, x in jax.device_get(step.sums).items()}
        row = summarise(self._kind, sums)
        # The check comes before anything is counted or written, so that no row of a broken step is
        # kept.
        check_finite(self._kind, step.number, row, step.batch, jax.device_get(step.logprobs))
        self._counts["tokens"] += step.batch.tokens
        self._counts["positions"] += step.batch.positions
        self._counts["filled"] += step.batch.filled
        row |= {
            "step": step.number,
            # Rounding hides binary fractions such as 0.30000000000000004 in the file.
            "epoch": round(step.batch.epoch, 6),
            "learning_rate": step.learning_rate,
            "num_tokens": int(self._counts["tokens"]),
        }
        # After a long stall another process may own the folder and write the same rows.
        self._check_lease()
        self._monitor.show(row, step.batch)
        if warning := self.displacement(row):
            self._monitor.warn(warning)


def summarise(kind: str, sums: dict[str, float]) -> dict[str, float]:
    """A step's metrics under TRL's names, from the sums over its micro-batches.

    A step of examples may be one-sided: its loss and gradient are right as they are
    (`objectives.kto`); the means of the side that is not there would be 0/0, so they and the margin
    are left out of its row.
    """
    row = {name: value for name, value in sums.items() if not name.startswith("count/")}
    if not OBJECTIVE_KINDS[kind].baseline:
        # The program returns z0 for every objective; without a baseline it is a constant 0 that
        # says nothing.
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
