"""Distribution of blocks to a pool of workers, and collection of their summaries."""

from __future__ import annotations

import logging
import queue
import time
import uuid
import warnings
from collections import deque
from concurrent.futures import CancelledError
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from wsiseg.errors import RunError
from wsiseg.workers.monitor import WorkerMonitor
from wsiseg.workers.tasks import WorkerSetup, describe, end, group, identity, names, work_through

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from wsiseg.workers.monitor import Pool
    from wsiseg.workers.tasks import Outcome

logger = logging.getLogger(__name__)

AHEAD = 2  #: tasks assigned per worker: one in progress, and one queued
POLL_S = 0.2  #: how late the wish to stop may be noticed
FETCH_S = 5.0  #: a result is some counts; when it takes longer, the worker that had it is dead


class WorkerTraceback(Exception):  # noqa: N818 - as in concurrent.futures: the cause of an error, whose text is the traceback
    """Traceback of an exception in a worker."""


class Dispatcher:
    """Dispatcher of one run's blocks to a pool."""

    def __init__(self, pool: Pool, work: Callable[..., Iterator[Any]], setup: Callable[[int], Any]) -> None:
        self._pool = pool
        self._setup = WorkerSetup(f"wsiseg-{uuid.uuid4().hex}", work, setup, pool.threads)
        self._monitor = WorkerMonitor(pool, getattr(work, "__module__", "wsiseg"))
        self._sent: dict[
            str, tuple[Any, Sequence[Any]]
        ] = {}  # by key, in the order of sending: the future, and the blocks
        self._back: queue.SimpleQueue[Any] = queue.SimpleQueue()  # futures that are done
        self._sent_setup: Any = None

    def summaries(
        self, blocks: Sequence[Any], weight: Callable[[Any], int] | None, stopped: Callable[[], bool]
    ) -> Iterator[Any]:
        """Yield the summary of every block as tasks finish; once ``stopped`` is true, only of those in progress."""
        waiting: deque[list[Any]] | None = None
        stopping, next_end = False, 0.0
        try:
            while waiting is None or waiting or self._sent:
                stopping = stopping or stopped()
                if (
                    stopping and time.monotonic() > next_end
                ):  # again and again: a worker that was born just now does not know
                    waiting, next_end = deque(), time.monotonic() + 1
                    self._end()
                self._monitor.look()
                if waiting is None and self._monitor.numbers:
                    waiting = deque(group(blocks, weight, max(self._pool.workers, len(self._monitor.numbers))))
                while waiting and len(self._sent) < AHEAD * len(self._monitor.numbers):
                    self._send(waiting.popleft())
                with suppress(queue.Empty):
                    yield from self._take(self._back.get(timeout=POLL_S))
                if stopping and not self._monitor.numbers:
                    return  # the workers with blocks in progress are gone
        finally:
            if (
                self._pool.workers == 0 and self._pool.client.status == "running"
            ):  # these workers stay, but need not continue
                with suppress(RunError):  # whatever ended the run is what the caller should hear of
                    self._end()

    def _send(self, blocks: list[Any]) -> None:
        client = self._pool.client
        if self._sent_setup is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a large bank, which goes to each worker only once
                self._sent_setup = client.submit(identity, self._setup, key=f"recipe-{self._setup.run}")
        key = f"blocks-{self._setup.run}-{uuid.uuid4().hex}"
        future = client.submit(work_through, self._sent_setup, self._monitor.numbers, blocks, key=key)
        self._sent[key] = future, blocks
        future.add_done_callback(self._back.put)

    def _take(self, future: Any) -> Iterator[Any]:  # noqa: ANN401
        """The summaries of a task that is done; raises what it raised."""
        from distributed import KilledWorker

        try:
            outcome: Outcome = future.result(timeout=FETCH_S)
        except TimeoutError:  # Dask repeats the task: its blocks are finished, and cheap
            future.add_done_callback(self._back.put)
            return
        except KilledWorker as error:
            time.sleep(
                POLL_S
            )  # a task that waited on the same workers fails with it: the one in progress was sent before
            blocks = next(blocks for sent, blocks in self._sent.values() if sent.status == "error")
            what = f"{names(blocks)}: the worker died {error.allowed_failures + 1} times, usually out of memory"
            raise RunError(
                f"{what}; {self._pool.when_dead}; finished parts are kept, run the same command again"
            ) from error
        except (CancelledError, OSError) as error:
            raise self._pool.lost() from error
        except Exception as error:
            self._monitor.check()
            text = f"a task failed outside its blocks ({describe(error)})"
            raise RunError(f"{self._pool.name}: {text}; use the same environment everywhere") from error
        del self._sent[future.key]
        yield from outcome.summaries
        if outcome.failure:
            kind, text, trace = outcome.failure
            logger.info("%s\n%s", text, trace)
            raise kind(text) from WorkerTraceback(f"\n{trace}")

    def _end(self) -> None:
        self._pool.ask(self._pool.client.run, end, self._setup.run, on_error="ignore")
