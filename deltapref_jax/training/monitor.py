"""What is seen of a run while it trains: the bar, `metrics.jsonl`, trackers, a profiler window."""

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

from deltapref_jax.files import remote, staged_dir
from deltapref_jax.mesh import is_first
from deltapref_jax.models.flops import forward_flops, peak_flops, training_flops
from deltapref_jax.models.spec import NO_ADAPTERS, Adapters, ModelSpec
from deltapref_jax.records import digest
from deltapref_jax.scoring.packing import PackedBatch
from deltapref_jax.training.checkpoint import Metrics
from deltapref_jax.training.data import StepData

_WINDOW = 20  # steps that a speed is the mean of
LOG_EVERY_SECONDS = 30.0  # seconds between lines where a bar cannot be drawn


@dataclasses.dataclass(frozen=True)
class MonitorConfig:
    """What is asked for besides the bar and `metrics.jsonl`."""

    trackers: tuple[str, ...] = ()  # of config.TRACKERS
    profile: tuple[int, int] | None = None  # first and last step (from 1) traced by JAX's profiler


class TensorBoard:
    """Scalars as TensorBoard events in `tensorboard/` (written by tensorboardX, which needs no TensorFlow)."""

    def __init__(self, folder: epath.Path, label: str, resumed: int):
        from tensorboardX import SummaryWriter

        # events after the step that a run resumes from are taken back: they come again. The writer names its file by
        # the second: the step keeps a run that resumes within it from writing over the first one's events
        self._writer = SummaryWriter(
            str(folder / "tensorboard"),
            filename_suffix=f".{resumed}",
            purge_step=resumed + 1 if resumed else None,
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        """One step."""
        for name, value in values.items():
            self._writer.add_scalar(f"train/{name}", value, step)

    def flush(self) -> None:
        """What was written is safe."""
        self._writer.flush()

    def close(self) -> None:
        """The last events."""
        self._writer.close()


class WandB:
    """Scalars to Weights & Biases; a resumed run continues under its id."""

    def __init__(self, folder: epath.Path, label: str, resumed: int):
        import wandb

        self._run = wandb.init(
            project="deltapref",
            name=label,
            id=digest(str(folder)),
            resume="allow",
            dir=None if remote(folder) else str(folder),
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        """One step."""
        self._run.log({f"train/{name}": value for name, value in values.items()}, step=step)

    def flush(self) -> None:
        """W&B writes by itself."""

    def close(self) -> None:
        """The last values."""
        self._run.finish()


TRACKERS: dict[str, Callable[[epath.Path, str, int], Any]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
}


def step_flops(spec: ModelSpec, data: StepData, adapters: Adapters = NO_ADAPTERS) -> float:
    """FLOPs of a step: forward and backward of its micro-batches, forward only of KTO's baseline rows."""
    return sum(
        batch_flops(training_flops, spec, batch, adapters) for batch, _ in data.micros
    ) + sum(batch_flops(forward_flops, spec, batch, adapters) for batch, _, _ in data.baseline)


def batch_flops(
    count: Callable[..., float],
    spec: ModelSpec,
    batch: PackedBatch,
    adapters: Adapters = NO_ADAPTERS,
) -> float:
    """FLOPs of packed rows; `count`: `forward_flops` or `training_flops`."""
    return count(
        spec, batch.positions[batch.segments > 0], np.count_nonzero(batch.targets), adapters
    )


class TrainMonitor:
    """Shows each finished step; use as a context manager, so that trackers and the profiler end.

    Args:
      spec: of the model, for MFU.
      adapters: that are trained instead of it, if any.
      mesh: whose devices' peak MFU is a share of.
      folder: of the run.
      label: of the run.
      watch: what is asked for.
      bar: a started `rich` progress bar.
      steps: of the run.
      resumed: steps done before.
    """

    def __init__(
        self,
        spec: ModelSpec,
        adapters: Adapters,
        mesh: Mesh,
        folder: epath.Path,
        label: str,
        watch: MonitorConfig,
        bar: Any,
        steps: int,
        resumed: int,
    ):
        self._spec, self._adapters, self.folder, self._profile = (
            spec,
            adapters,
            folder,
            watch.profile,
        )
        peak = peak_flops(mesh.devices.flat[0].device_kind)
        self._peak = peak * mesh.devices.size if peak else None
        self._metrics = Metrics(folder / "metrics.jsonl", resumed) if is_first() else None
        self._trackers = (
            [TRACKERS[name](folder, label, resumed) for name in watch.trackers]
            if is_first()
            else []
        )
        self._bar, self._task = (
            bar,
            bar.add_task(label, total=steps, completed=resumed, unit="steps", note=""),
        )
        self._recent: collections.deque[tuple[float, float, float]] = collections.deque(
            maxlen=_WINDOW + 1
        )
        self._tracing, self._trace = False, contextlib.ExitStack()
        self._label, self._steps, self._said = label, steps, -LOG_EVERY_SECONDS
        if watch.profile and not (resumed < watch.profile[1] and watch.profile[0] <= steps):
            first, last = watch.profile
            self.warn(
                f"--profile_steps={first}:{last} traces nothing: this run does steps {resumed + 1} to {steps}."
            )

    def __enter__(self) -> "TrainMonitor":
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop_trace()
        for tracker in self._trackers:
            with contextlib.suppress(Exception):  # a tracker's trouble is not the run's
                tracker.close()

    def before(self, step: int) -> None:
        """Step `step` (from 1) is about to start."""
        if self._profile and not self._tracing and self._profile[0] <= step <= self._profile[1]:
            jax.profiler.start_trace(
                str(self._trace.enter_context(staged_dir(self.folder / "profile")))
            )
            self._tracing = True

    def after(self, step: int, sums: Any) -> None:
        """Step `step` is on its way to `sums`, for which the host waits at the end of a profiler window."""
        if self._tracing and self._profile and step >= self._profile[1]:
            jax.block_until_ready(sums)
            self._stop_trace()

    def _stop_trace(self) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
            self._trace.close()

    def flush(self) -> None:
        """What was shown so far is safe: to be called before a checkpoint."""
        for place in (*([self._metrics] if self._metrics else []), *self._trackers):
            place.flush()

    def show(self, row: dict[str, Any], data: StepData) -> None:
        """A finished step's row of metrics."""
        if self._metrics:
            self._metrics.write(row)
        self._recent.append(
            (time.monotonic(), data.tokens, step_flops(self._spec, data, self._adapters))
        )
        values = {"padding": 1 - data.filled / data.positions} | self._speeds()
        for tracker in self._trackers:
            tracker.write(row["step"], {k: v for k, v in row.items() if k != "step"} | values)
        self._bar.update(self._task, completed=row["step"], note=note(row | values))
        self._line(row["step"], note(row | values))

    def _line(self, step: int, words: str) -> None:
        """Where a bar cannot be drawn (a scheduler's log), a line at times."""
        now = time.monotonic()
        if (
            is_first()
            and not self._bar.console.is_terminal
            and (now - self._said >= LOG_EVERY_SECONDS or step == self._steps)
        ):
            self._said = now
            left = self._bar.tasks[self._task].time_remaining
            more = f", {left / 60:.0f} min left" if left else ""
            self._bar.console.print(
                f"{self._label}: step {step} of {self._steps}, {words}{more}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )

    def warn(self, sentence: str) -> None:
        """Above the bar."""
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
    """The bar's words for a step: what is known of loss, margin, accuracy, speed, padding and MFU."""
    forms = {
        "loss": "loss {:.4f}",
        "rewards/margins": "margin {:+.3f}",
        "rewards/accuracies": "accuracy {:.0%}",
        "tokens_per_second": "{:,.0f} tokens/s",
        "padding": "padding {:.0%}",
        "mfu": "MFU {:.1%}",
    }
    return "  ".join(form.format(values[name]) for name, form in forms.items() if name in values)
