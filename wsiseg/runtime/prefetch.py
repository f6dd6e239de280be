"""Overlapping stages with bounded queues: the one way in which threads are used here."""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from wsiseg.runtime import machine

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable
    from concurrent.futures import Future

Item = TypeVar("Item")
Result = TypeVar("Result")

THREADS = min(machine.cores(), 8)  #: of :func:`parallel_map`; with more, memory grows faster than speed


def prefetch_map(
    function: Callable[[Item], Result], items: Iterable[Item], *, threads: int = 1, limit: int = 2
) -> Generator[Result, None, None]:
    """``map(function, items)``, computed ahead of the consumer.

    Parameters
    ----------
    function
        Called in ``threads`` threads; reading, decompression, shapely and numpy let go of the interpreter's lock.
    items
        Taken from the caller's thread, one by one, no more than ``limit`` before their turn.
    threads
        Number of items processed concurrently.
    limit
        Items that are being worked on or wait to be taken: the bound on memory, whatever the number of items.

    Yields
    ------
    Result
        In the order of the items. An exception of ``function`` is raised when its item's turn comes; no item is started after that. However it
        ends, no thread is left at work, and ``items`` is closed if it is a generator.
    """
    pool = ThreadPoolExecutor(threads)
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= limit:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        close = getattr(items, "close", None)  # a stage before this one must not work on after it
        if close:
            close()


def parallel_map(function: Callable[[Item], Result], items: Iterable[Item]) -> Generator[Result, None, None]:
    """``map(function, items)`` on all cores, for work that has the machine to itself; otherwise like :func:`prefetch_map`."""
    return prefetch_map(function, items, threads=THREADS, limit=2 * THREADS)
