"""A progress bar on the host, between chunks of compiled steps."""

import sys
from types import TracebackType
from typing import Any, Self


class Progress:
    """Show how far a run is, how fast, and how it looks; silent where the error stream is no terminal.

    Parameters
    ----------
    total : int
        Steps (or whatever is counted) in all.
    enabled : bool
        ``False`` keeps silent everywhere.
    unit : str
        What is counted.
    """

    def __init__(self, total: int, *, enabled: bool, unit: str = "steps") -> None:
        self.total, self.unit = total, unit
        self._bar: Any = None
        if enabled and sys.stderr.isatty():
            self._bar = _bar(unit)
            self._task = self._bar.add_task("compiling", total=total, note="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, phase: str, note: str = "") -> None:
        """Say how much is done, in which phase, with a short note on how it looks."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=phase, note=note)


def _bar(unit: str) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(f"{task.speed:,.0f} {unit}/s" if task.speed else "")

    return RichProgress(
        TextColumn("{task.description:<10}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
        Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    )
