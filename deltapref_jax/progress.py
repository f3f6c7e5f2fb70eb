"""One look for all progress bars: what, how far, how fast, how long still."""

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
        """Units per second."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f} {task.fields.get('unit', '')}/s" if speed else "")


class _Noted(Progress):
    def get_renderables(self) -> Iterable[RenderableType]:
        """The bars, and what each has to say below them: its parts, which two spaces divide, are never cut in two."""
        yield from super().get_renderables()
        for task in self.tasks:
            if task.fields["note"]:
                yield Columns(task.fields["note"].split("  "))


def progress(show: bool = True) -> Progress:
    """A transient bar on stderr, 80 columns wide or less; tasks have the fields `unit` and `note`."""
    return _Noted(
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
