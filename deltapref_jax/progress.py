"""The progress bar that all stages share: task, count, rate, elapsed and remaining time."""

from collections.abc import Iterable

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


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Renders the rate in the task's units per second."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f} {task.fields.get('unit', '')}/s" if speed else "")


class _ProgressWithNotes(Progress):
    def get_renderables(self) -> Iterable[RenderableType]:
        """Yields the bars, then each task's note, wrapped only where it has two spaces."""
        yield from super().get_renderables()
        for task in self.tasks:
            if task.fields["note"]:
                yield Columns(task.fields["note"].split("  "))


def progress(show: bool = True) -> Progress:
    """Returns a transient progress bar on stderr, at most 80 columns wide.

    Tasks must be added with the fields `unit`, such as "steps", and `note`, shown below the bar.
    """
    return _ProgressWithNotes(
        TextColumn("{task.description:<20}"),
        BarColumn(16),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not show,
    )
