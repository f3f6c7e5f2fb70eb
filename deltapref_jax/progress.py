"""The progress bar that all stages share: task, count, rate, elapsed and remaining time."""

import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Iterable
from typing import Any

from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from deltapref_jax.display import printable

LOG_EVERY_SECONDS = 30.0  # between lines about work at hand, where no bar can be drawn


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Renders the rate in the task's units per second."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f} {task.fields.get('unit', '')}/s" if speed else "")


class _PlainConsole(Console):
    def render_str(self, text: str, **options: Any) -> Text:
        """Renders text, in tables and titles too, without control characters."""
        return super().render_str(printable(text), **options)


def plain_console(stderr: bool = False, width: int | None = None) -> Console:
    """A console that shows text as it is: no markup and no emoji codes are read out of it."""
    return _PlainConsole(stderr=stderr, width=width, markup=False, emoji=False)


def say(console: Console, sentence: str) -> None:
    """Prints a sentence, which a terminal wraps between words; in a log it remains one line."""
    console.print(sentence, highlight=False, soft_wrap=not console.is_terminal)


class _ProgressWithNotes(Progress):
    def get_renderables(self) -> Iterable[RenderableType]:
        """Yields the bars, then each task's note, wrapped only where it has two spaces."""
        yield from super().get_renderables()
        for task in self.tasks:
            if task.fields["note"]:
                yield Columns(task.fields["note"].split("  "))


def progress(show: bool = True) -> Progress:
    """A transient bar on stderr, 80 columns wide or less; tasks have the fields `unit` and `note`.

    Where stderr is no terminal nothing is drawn: a scheduler's log gets lines instead (`log`).
    """
    console = plain_console(stderr=True)
    return _ProgressWithNotes(
        TextColumn("{task.description:<20}", markup=False),
        BarColumn(16),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not show or not console.is_terminal,
    )


def log(sentence: str, always: bool = False) -> None:
    """Prints a line with date and time if stderr is a log; with `always` in a terminal too.

    A terminal's line is wrapped between words.
    """
    terminal = sys.stderr.isatty()
    if always or not terminal:
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {printable(sentence)}"
        if terminal:
            line = textwrap.fill(line, shutil.get_terminal_size().columns, break_long_words=False)
        print(line, file=sys.stderr, flush=True)


class Counter:
    """Counts units of work: a bar in a terminal, and a line every half a minute in a log.

    Args:
      label: of the work.
      total: units in all; None hides the time left.
      unit: in the plural, such as "traces".
      show: whether anything is shown.
      stood: units that are done already, which no rate counts.
    """

    def __init__(self, label: str, total: int | None, unit: str, show: bool = True, stood: int = 0):
        label = printable(label)
        self._label, self._total, self._unit = label, total, unit
        self._stood = self._done = stood
        self._began = time.monotonic()
        self._ended = threading.Event()
        self._logs = show and not sys.stderr.isatty()
        self._bar = progress(show)
        self._task = self._bar.add_task(label, total=total, completed=stood, unit=unit, note="")

    def __enter__(self) -> "Counter":
        self._bar.start()
        if self._logs:
            threading.Thread(target=self._keep_logging, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._bar.stop()

    def advance(self, units: int) -> None:
        """So many units more are done."""
        self._done += units
        self._bar.advance(self._task, units)

    def _keep_logging(self) -> None:
        # A thread writes the lines, so that a log grows while a model is loaded or compiled too.
        while not self._ended.wait(LOG_EVERY_SECONDS):
            rate = (self._done - self._stood) / (time.monotonic() - self._began)
            of = f" of {self._total:,}" if self._total else ""
            left = (
                f", {(self._total - self._done) / rate:.0f} s left" if self._total and rate else ""
            )
            log(f"{self._label}: {self._done:,}{of} {self._unit}, {rate:,.1f} {self._unit}/s{left}")
