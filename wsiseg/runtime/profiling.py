"""Cost of a run: seconds per stage, and peak memory."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
import threading
import time
from collections import defaultdict, deque
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_largest = [0]  # of the peaks that were read and reset


class Clock:
    """Wall seconds summed by stage name, from any thread."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time the body of a ``with`` under ``stage``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add({stage: time.perf_counter() - start})

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add another clock's seconds."""
        with self._lock:
            for stage, value in seconds.items():
                self.seconds[stage] += value

    def take(self) -> dict[str, float]:
        """Return the seconds added since the last call."""
        with self._lock:
            seconds = dict(self.seconds)
            self.seconds.clear()
        return seconds


class BusyClock:
    """Seconds in which a model's device works, added to a clock as the stage ``busy``.

    A GPU is measured by its own events: a call returns before its work is done, so that the clock around it says little. What other devices do is
    done when the call returns.

    Parameters
    ----------
    clock
        Clock that gets the seconds.
    device
        Device of the model.
    mark
        Puts an event into the device's queue; for tests.
    """

    def __init__(self, clock: Clock, device: torch.device, mark: Callable[[], torch.cuda.Event] | None = None) -> None:
        self._clock = clock
        self._mark = partial(_mark, device) if mark is None and device.type == "cuda" else mark
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Measure the work of the body of a ``with``."""
        if self._mark is None:
            with self._clock("busy"):
                yield
            return
        begin = self._mark()
        try:
            yield
        finally:
            self._pending.append((begin, self._mark()))
            while self._pending and self._pending[0][1].query():
                begin, end = self._pending.popleft()
                self._clock.add({"busy": begin.elapsed_time(end) / 1000})


def _mark(device: torch.device) -> torch.cuda.Event:
    import torch

    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))  # the model's GPU need not be the current one
    return event


def peak_bytes() -> int:
    """Largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(peak if sys.platform == "darwin" else peak * 1024, _largest[0])


def trim_memory() -> None:
    """Return freed memory to the system where possible, so that the network's does not add to that of stitching and writing."""
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def peak_bytes_lately() -> int:
    """Largest resident set since the last call; where the system cannot tell, since the start."""
    peak = peak_bytes()
    with contextlib.suppress(OSError, ValueError, StopIteration):
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        peak = int(line.split()[1]) * 1024
        _largest[0] = max(_largest[0], peak)
        _CLEAR.write_text("5")  # Linux: reset the high-water mark
    return peak
