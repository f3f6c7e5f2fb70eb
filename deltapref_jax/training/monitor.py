"""Monitoring of a training run: progress bar, `metrics.jsonl`, trackers, profiler window."""

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from deltapref_jax.display import printable
from deltapref_jax.files import remote, staged_dir
from deltapref_jax.mesh import is_first
from deltapref_jax.models.flops import forward_flops, peak_flops, training_flops
from deltapref_jax.models.spec import NO_ADAPTERS, Adapters, ModelSpec
from deltapref_jax.progress import LOG_EVERY_SECONDS, log
from deltapref_jax.records import digest
from deltapref_jax.scoring.packing import PackedBatch
from deltapref_jax.training.checkpoint import Metrics
from deltapref_jax.training.data import StepData

_WINDOW = 20  # steps that the displayed speed is a mean over


@dataclasses.dataclass(frozen=True)
class MonitorConfig:
    """What a run is monitored with, besides the bar and `metrics.jsonl`."""

    trackers: tuple[str, ...] = ()  # names from config.TRACKERS
    profile: tuple[int, int] | None = None  # first and last profiled step, counted from 1


class TensorBoard:
    """Writes TensorBoard events to `tensorboard/` with tensorboardX, which needs no TensorFlow."""

    def __init__(self, folder: epath.Path, label: str, resumed: int):
        from tensorboardX import SummaryWriter

        # `purge_step` hides events after the step that a run resumes from, as they are written
        # again. The writer names its file by the second; the suffix keeps a run that resumes
        # within that second from overwriting the earlier events.
        self._writer = SummaryWriter(
            str(folder / "tensorboard"),
            filename_suffix=f".{resumed}",
            purge_step=resumed + 1 if resumed else None,
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes the metrics of one step."""
        for name, value in values.items():
            self._writer.add_scalar(f"train/{name}", value, step)

    def flush(self) -> None:
        """Flushes events to the file."""
        self._writer.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        self._writer.close()


class WandB:
    """Logs metrics to Weights & Biases; a resumed run continues under the same id."""

    def __init__(self, folder: epath.Path, label: str, resumed: int):
        import wandb

        self._run = wandb.init(
            project="deltapref",
            name=label,
            # One folder is one run, so a resumed run continues its curves.
            id=digest(str(folder)),
            resume="allow",
            dir=None if remote(folder) else str(folder),
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes the metrics of one step."""
        self._run.log({f"train/{name}": value for name, value in values.items()}, step=step)

    def flush(self) -> None:
        """Does nothing: the wandb client sends in the background."""

    def close(self) -> None:
        """Sends the remaining metrics and ends the W&B run."""
        self._run.finish()


TRACKERS: dict[str, Callable[[epath.Path, str, int], Any]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
}


def step_flops(spec: ModelSpec, data: StepData, adapters: Adapters = NO_ADAPTERS) -> float:
    """Counts the FLOPs of a step.

    Micro-batches run forward and backward, KTO's baseline rows forward only.
    """
    return sum(
        batch_flops(training_flops, spec, batch, adapters) for batch, _ in data.micros
    ) + sum(batch_flops(forward_flops, spec, batch, adapters) for batch, _, _ in data.baseline)


def batch_flops(
    count: Callable[..., float],
    spec: ModelSpec,
    batch: PackedBatch,
    adapters: Adapters = NO_ADAPTERS,
) -> float:
    """Counts the FLOPs of packed rows by `count`: `forward_flops` or `training_flops`."""
    return count(
        spec, batch.positions[batch.segments > 0], np.count_nonzero(batch.targets), adapters
    )


class TrainMonitor:
    """Logs each finished step; a context manager, on whose exit trackers and profiler are closed.

    Args:
      spec: the model, for its FLOPs.
      adapters: the adapters that are trained instead of the model, if any.
      mesh: the mesh; its devices' peak FLOP/s are what MFU is relative to.
      folder: directory of the run.
      label: name of the run.
      config: trackers and profiler window.
      bar: a started `rich` progress bar.
      steps: number of steps of the run.
      resumed: number of steps done before this process started.
      check_lease: raises if the folder is another process's now.
    """

    def __init__(
        self,
        spec: ModelSpec,
        adapters: Adapters,
        mesh: Mesh,
        folder: epath.Path,
        label: str,
        config: MonitorConfig,
        bar: Any,
        steps: int,
        resumed: int,
        check_lease: Callable[[], None] = lambda: None,
    ):
        self._spec, self._adapters, self.folder = spec, adapters, folder
        self._profile = config.profile
        peak = peak_flops(mesh.devices.flat[0].device_kind)
        self._peak = peak * mesh.devices.size if peak else None
        self._metrics = (
            Metrics(folder / "metrics.jsonl", resumed, check_lease) if is_first() else None
        )
        names = config.trackers if is_first() else ()
        self._trackers = [TRACKERS[name](folder, label, resumed) for name in names]
        self._bar = bar
        label = printable(label)
        self._task = bar.add_task(label, total=steps, completed=resumed, unit="steps", note="")
        # Time, tokens and FLOPs of the last steps. The first entry only marks where they begin.
        self._recent: collections.deque[tuple[float, float, float]] = collections.deque(
            maxlen=_WINDOW + 1
        )
        self._tracing, self._trace = False, contextlib.ExitStack()
        self._label, self._steps, self._last_log = label, steps, -LOG_EVERY_SECONDS
        if resumed and is_first():
            log(f"{label}: continues after step {resumed:,} of {steps:,}", always=True)
        # A window outside of the steps that are left would otherwise trace nothing silently.
        if config.profile and not (resumed < config.profile[1] and config.profile[0] <= steps):
            first, last = config.profile
            self.warn(
                f"--profile_steps={first}:{last} traces nothing: this run does steps "
                f"{resumed + 1} to {steps}."
            )

    def __enter__(self) -> "TrainMonitor":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._metrics:
            self._metrics.close()
        self._stop_trace()
        for tracker in self._trackers:
            with contextlib.suppress(Exception):  # A failing tracker must not fail the run.
                tracker.close()

    def before(self, step: int) -> None:
        """Starts the profiler if its window begins with `step` (from 1); call before every step."""
        if self._profile and not self._tracing and self._profile[0] <= step <= self._profile[1]:
            jax.profiler.start_trace(
                str(self._trace.enter_context(staged_dir(self.folder / "profile")))
            )
            self._tracing = True

    def after(self, step: int, sums: Any) -> None:
        """Stops the profiler if its window ends with `step`; call after every step's dispatch.

        The host then waits for `sums`, the step's result, so that the trace contains all of it.
        """
        if self._tracing and self._profile and step >= self._profile[1]:
            jax.block_until_ready(sums)
            self._stop_trace()

    def _stop_trace(self) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
            self._trace.close()

    def flush(self) -> None:
        """Flushes metrics and trackers to disk; to be called before a checkpoint is saved."""
        for sink in (*([self._metrics] if self._metrics else []), *self._trackers):
            sink.flush()

    def show(self, row: dict[str, Any], data: StepData) -> None:
        """Writes and displays the metrics of a finished step, whose data is `data`."""
        if self._metrics:
            self._metrics.write(row)
        self._recent.append(
            (time.monotonic(), data.tokens, step_flops(self._spec, data, self._adapters))
        )
        values = {"padding": 1 - data.filled / data.positions} | self._speeds()
        for tracker in self._trackers:
            tracker.write(row["step"], {k: v for k, v in row.items() if k != "step"} | values)
        self._bar.update(self._task, completed=row["step"], note=note(row | values))
        self._log_line(row["step"], note(row | values))

    def _log_line(self, step: int, text: str) -> None:
        """Prints a line now and then if no bar can be drawn, as in a scheduler's log."""
        now = time.monotonic()
        if (
            is_first()
            and not self._bar.console.is_terminal
            and (now - self._last_log >= LOG_EVERY_SECONDS or step == self._steps)
        ):
            self._last_log = now
            seconds = self._bar.tasks[self._task].time_remaining
            remaining = f", {seconds / 60:.0f} min left" if seconds else ""
            log(f"{self._label}: step {step} of {self._steps}, {text}{remaining}")

    def warn(self, sentence: str) -> None:
        """Prints a warning above the bar."""
        if is_first():
            self._bar.console.print(
                f"Warning: {sentence}", markup=False, highlight=False, soft_wrap=True
            )

    def _speeds(self) -> dict[str, float]:
        seconds = self._recent[-1][0] - self._recent[0][0]
        if seconds <= 0:
            return {}
        tokens, flops = (sum(entry[i] for entry in list(self._recent)[1:]) for i in (1, 2))
        return {"tokens_per_second": tokens / seconds} | (
            {"mfu": flops / seconds / self._peak} if self._peak else {}
        )


def note(values: dict[str, float]) -> str:
    """Formats a step's loss, margin, accuracy, speed, padding and MFU, as far as it has them."""
    formats = {
        "loss": "loss {:.4f}",
        "rewards/margins": "margin {:+.3f}",
        "rewards/accuracies": "accuracy {:.0%}",
        "tokens_per_second": "{:,.0f} tokens/s",
        "padding": "padding {:.0%}",
        "mfu": "MFU {:.1%}",
    }
    known = {name: text for name, text in formats.items() if name in values}
    return "  ".join(text.format(values[name]) for name, text in known.items())
