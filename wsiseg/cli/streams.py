"""Standard output and error whose failure does not end the work: a full disk, a closed pipe or descriptor."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from typing_extensions import Buffer


class _Lossy(io.RawIOBase):
    """A stream that drops what ``raw`` cannot take, and keeps the first reason in ``problem``."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw = raw
        self.problem: OSError | None = None

    def write(self, data: Buffer, /) -> int | None:
        try:
            return self._raw.write(data)
        except OSError as error:
            self.problem = self.problem or error
            return memoryview(data).nbytes

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._raw.isatty()

    def fileno(self) -> int:
        return self._raw.fileno()


class _Output:
    """State of standard output.

    Attributes
    ----------
    extra
        The command has written files: what it prints is not what it was called for.
    """

    def __init__(self) -> None:
        self.extra = False
        self._raw: _Lossy | None = None

    def begin(self) -> None:
        """Prepare both streams for a call of the command line: they cannot fail, and names that are not text are printed with escapes."""
        self.extra = False
        if self._raw is not None:
            self._raw.problem = None
        _open_descriptors()
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is None:  # closed by who called us
                setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123 - as long as the process
            elif isinstance(stream, io.TextIOWrapper) and stream is getattr(sys, f"__{name}__"):
                lossy = _Lossy(cast("io.RawIOBase", getattr(stream.buffer, "raw", stream.buffer)))
                buffered = io.BufferedWriter(lossy)
                again = io.TextIOWrapper(
                    buffered,
                    stream.encoding,
                    "backslashreplace",
                    line_buffering=stream.line_buffering or name == "stderr",
                )
                setattr(sys, name, again)
                if name == "stdout":
                    self._raw = lossy
            elif isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")

    def lost(self) -> str:
        """Reason why the command's output was lost; empty when it was not, or when its reader closed the pipe."""
        problem = self._raw.problem if self._raw else None
        if problem is None or self.extra or problem.errno == errno.EPIPE:
            return ""
        return problem.strerror or str(problem)


OUTPUT = _Output()


def one_line(text: str) -> str:
    """Lines joined by spaces: a name may hold a line break, a message must not."""
    return " ".join(line.strip() for line in text.splitlines())


def _open_descriptors() -> None:
    """Open the standard descriptors that were closed: the next file would get the number, and messages would be written into it."""
    while True:
        descriptor = os.open(os.devnull, os.O_RDWR)
        if descriptor > 2:
            os.close(descriptor)
            return
