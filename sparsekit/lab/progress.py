"""Progress on stderr for what takes longer than two seconds: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["Bar", "progress"]

EVERY_S = 15.0  # between lines, where the one that works says none of its own


@dataclass
class Bar:
    """What `progress` yields. Call it with the steps that were done.

    Attributes:
        total: steps in all; None where nobody knows.
        done: steps so far.
        lines: say in lines what is told, since there is no bar.
    """

    bar: Progress
    id: TaskID
    total: float | None
    quiet: bool
    lines: bool
    done: float = 0.0
    start: float = field(default_factory=time.monotonic)
    spoken: float = field(default_factory=time.monotonic)

    def __call__(self, steps: float, what: str | None = None, count: str | None = None) -> None:
        """That many steps were done; `what` is being done, and `count` is shown in place of the steps."""
        self.done += steps
        self.shows(what, count)

    def shows(self, what: str | None = None, count: str | None = None, total: float | None = None) -> None:
        self.total = self.total if total is None else total
        shown = count or (f"{self.done:g}" if self.total is None else f"{self.done:g}/{self.total:g}")
        self.bar.update(self.id, completed=self.done, total=self.total, description=what, count=shown)
        if time.monotonic() - self.spoken >= EVERY_S:
            self.says(f"{self.bar.tasks[0].description}: {shown}")

    def says(self, text: str, *, always: bool = False) -> None:
        """A line, with the minutes left, where there is no bar; above the bar where it is to be seen `always`."""
        self.spoken = time.monotonic()
        if self.lines:
            rate = (time.monotonic() - self.start) / self.done if self.done else 0.0
            left = f" ({rate * (self.total - self.done) / 60:.0f} min left)" if self.total and self.done else ""
            print(f"{text}{left}", file=sys.stderr, flush=True)
        elif always and not self.quiet:
            self.bar.console.print(text, markup=False)


@contextmanager
def progress(what: str, total: float | None, *, quiet: bool = False, console: Console | None = None) -> Iterator[Bar]:
    """A bar of `total` steps with the time left, that goes when the block ends. Nothing is shown where `quiet`."""
    console = console or Console(stderr=True, highlight=False)
    shown = not quiet and console.is_terminal
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not shown,
        transient=True,
    )
    with bar:
        yield Bar(bar, bar.add_task(what, total=total, count=""), total, quiet, lines=not quiet and not shown)
