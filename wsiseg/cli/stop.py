"""Signals: the first asks the run to finish the current block, the second ends it immediately."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import FrameType

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
)  # the last: a batch system's warning


class Stop:
    """Context that handles the signals; its call returns True once one has been received."""

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[int, object] = {}

    def __call__(self) -> bool:
        """Tell whether a signal has been received."""
        return self._asked

    def __enter__(self) -> Self:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._asked:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)  # the next run removes half-written files
        self._asked = True
        with contextlib.suppress(
            OSError
        ):  # not through Python's streams: they may be in use, and who reads them may be gone
            os.write(2, _new_line() + f"{name}: finishing the current block; repeat to stop immediately\n".encode())


def _new_line() -> bytes:
    """Bytes that move a terminal to the start of an empty line: the current one holds the progress bar and the typed ``^C``."""
    if not os.isatty(2):
        return b""
    return b"\n" if os.environ.get("TERM", "dumb") == "dumb" else b"\r\x1b[2K"
