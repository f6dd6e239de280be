"""Work ahead of who asks: in order, bounded, and nothing is left behind."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest

from wsiseg.runtime.prefetch import prefetch_map

if TYPE_CHECKING:
    from collections.abc import Iterator


def test_results_come_in_the_order_of_the_items_whatever_takes_longer() -> None:
    def slow_first(n: int) -> int:
        time.sleep(0.02 if n % 4 == 0 else 0)
        return n * n

    assert list(prefetch_map(slow_first, range(40), threads=4, limit=8)) == [n * n for n in range(40)]


def test_no_more_than_the_limit_is_begun_before_it_is_asked_for() -> None:
    """The bound on memory: it does not grow with the number of items."""
    begun: list[int] = []
    results = prefetch_map(begun.append, range(1000), threads=4, limit=6)
    for asked in range(1, 50):
        next(results)
        assert len(begun) <= asked + 5
    results.close()


def test_threads_work_at_the_same_time() -> None:
    barrier = threading.Barrier(3, timeout=20)
    assert len(list(prefetch_map(lambda _: barrier.wait(), range(3), threads=3, limit=3))) == 3


def test_an_exception_comes_in_its_turn_and_ends_the_work() -> None:
    begun: list[int] = []

    def fails_at_three(n: int) -> int:
        begun.append(n)
        if n == 3:
            raise ValueError("three")
        return n

    results = prefetch_map(fails_at_three, range(1000), threads=2, limit=4)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)
    assert max(begun) < 10


def test_however_it_ends_no_thread_is_left_and_the_source_is_closed() -> None:
    closed: list[bool] = []

    def source() -> Iterator[int]:
        try:
            yield from range(1000)
        finally:
            closed.append(True)

    before = threading.active_count()
    results = prefetch_map(lambda n: n, source(), threads=3, limit=5)
    next(results)
    results.close()
    assert closed == [True]
    assert threading.active_count() == before
