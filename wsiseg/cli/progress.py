"""The state of a run: a bar on a terminal, a line a minute elsewhere."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Self

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bars

if TYPE_CHECKING:
    from types import TracebackType

LINE_SECONDS = 60.0  #: between lines, where there is no terminal: the log of a job of a day has some 1400
RATE_SECONDS = 60.0  #: over which the rate is taken: several blocks of tiles
FEWEST_SECONDS = 2.0  #: from which on there is a rate


class Progress:
    """Names the phases of the work and, while tiles are processed, their number, rate and time left.

    Parameters
    ----------
    title
        Name of the slide.
    hidden
        Show nothing.
    unit
        What is counted.
    """

    def __init__(self, title: str, *, hidden: bool, unit: str = "tiles") -> None:
        console = Console(stderr=True)
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TextColumn("{task.fields[detail]}"),
            console=console,
            disable=hidden or not console.is_terminal,
            transient=True,
        )
        self._hidden, self._lines = hidden, not hidden and not console.is_terminal
        self._title, self._unit = title, unit
        self._task = self._bars.add_task(title, total=None, detail="planning")
        self._line = time.monotonic()
        self._seen: deque[tuple[float, int]] = deque()

    def retitle(self, title: str) -> None:
        """Restart for another slide."""
        self._title = title
        self._seen.clear()
        self._bars.reset(self._task, description=title, total=None, detail="planning")

    def phase(self, name: str) -> None:
        """Show what is done now, when it is not tiles."""
        self._bars.update(self._task, detail=name)
        self._say(name)

    def update(self, done: int, total: int, cells: int | str) -> None:
        """Show the state; ``cells``: their number, or other words.

        The first call sets where counting begins: tiles of an earlier start do not count for the rate.
        """
        now = time.monotonic()
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[1][0] > RATE_SECONDS:
            self._seen.popleft()
        since, before = self._seen[0]
        detail = cells if isinstance(cells, str) else f"{cells} cells"
        if now - since >= FEWEST_SECONDS and done > before:
            rate = (done - before) / (now - since)
            detail = f"{rate:.2f} {self._unit}/s, {detail}, {duration((total - done) / rate)} left"
        self._bars.update(self._task, completed=done, total=total, detail=detail)
        self._say(f"{done} of {total} {self._unit}, {detail}")

    def _say(self, text: str) -> None:
        """A line, unless the last one is recent."""
        now = time.monotonic()
        if self._lines and now - self._line >= LINE_SECONDS:
            self._line = now
            click.echo(f"{self._title}: {text}", err=True)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()


def duration(seconds: float) -> str:
    """A time in the unit that suits it.

    Examples
    --------
    >>> duration(8.2), duration(90), duration(5400), duration(100_000)
    ('8 s', '2 min', '1.5 h', '28 h')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{max(round(seconds / 60), 1)} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 10 else f"{hours:.0f} h"
