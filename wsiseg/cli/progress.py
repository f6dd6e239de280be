"""A progress bar on a terminal; nothing in a pipe."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

if TYPE_CHECKING:
    from types import TracebackType


class Progress:
    """``update(done, total, cells)`` draws tiles (or what ``unit`` says) done, their rate, cells and time left."""

    def __init__(self, title: str, *, hidden: bool, unit: str = "tiles") -> None:
        console = Console(stderr=True)
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TextColumn("{task.fields[detail]}"),
            TimeRemainingColumn(),
            console=console,
            disable=hidden or not console.is_terminal,
            transient=True,
        )
        self._task = self._bars.add_task(title, total=None, detail="planning")
        self._start: tuple[float, int] | None = None
        self._unit = unit

    def retitle(self, title: str) -> None:
        """Restart for another slide."""
        self._start = None
        self._bars.reset(self._task, description=title, total=None, detail="planning")

    def update(self, done: int, total: int, cells: int) -> None:
        """Draw the state; the rate counts from the first call, so that resumed tiles do not inflate it."""
        now = time.monotonic()
        self._start = self._start or (now, done)
        rate = (done - self._start[1]) / max(now - self._start[0], 1e-6)
        self._bars.update(self._task, completed=done, total=total, detail=f"{rate:.2f} {self._unit}/s, {cells} cells")

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
