"""Tasks and the worker's side of them. Its functions are found by name in the worker, so it imports next to nothing."""

from __future__ import annotations

import socket
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from wsiseg.errors import RunError, WsisegError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

Item = TypeVar("Item")

TASK_TILES = 64  #: a task has at least this many tiles: at 20 ms each, giving it out costs below 1 % (benchmarks/results/scheduling.md)
TASKS_PER_WORKER = 4  #: but little work is cut finer, or the last task would keep everyone waiting
SETTLE_S = 0.01  #: before a task begins: Dask sends the result of the one before within 2 ms, and a worker that dies sooner takes it along


class WorkerSetup(NamedTuple):
    """Setup sent once to every worker. ``threads`` is for torch; ``None``: as many as Dask gave the worker."""

    run: str
    work: Callable[[Any, Sequence[Any], Callable[[], bool]], Iterator[Any]]
    setup: Callable[[int], Any]
    threads: int | None


class Failure(NamedTuple):
    """An exception of a worker. It travels as text: not every exception can be pickled."""

    kind: type[WsisegError]
    text: str
    trace: str


class Outcome(NamedTuple):
    """Result of a task."""

    summaries: list[Any]
    failure: Failure | None = None


def group(blocks: Sequence[Item], weight: Callable[[Item], int] | None, workers: int) -> list[list[Item]]:
    """Consecutive blocks with together at least ``TASK_TILES`` tiles; with fewer when there would not be ``TASKS_PER_WORKER`` tasks for everyone."""
    weights = [weight(b) if weight else TASK_TILES for b in blocks]
    enough = min(TASK_TILES, -(-sum(weights) // (TASKS_PER_WORKER * workers)))
    tasks: list[list[Item]] = [[]]
    gathered = 0
    for block, tiles in zip(blocks, weights, strict=True):
        if gathered >= enough:
            tasks.append([])
            gathered = 0
        tasks[-1].append(block)
        gathered += tiles
    return tasks


_tools: dict[str, Any] = {}  # by run
_ended: set[str] = set()  # runs of which no block is to be started here
_one_at_a_time = threading.Lock()  # a worker of several threads is given several tasks, but the tools are for one


def work_through(recipe: WorkerSetup, numbers: Mapping[str, int], blocks: Sequence[Any]) -> Outcome:
    """Run a task: some blocks, with the context that this worker has or now builds."""
    from distributed import get_worker

    worker = get_worker()
    key, name = worker.get_current_task(), str(worker.name)
    where = f"worker {name} on {socket.gethostname()}"

    def stopped() -> bool:
        # Dask cannot end a task that runs; it marks it when no client waits for it any more, for example because the client was killed.
        task = worker.state.tasks.get(key)
        return recipe.run in _ended or task is None or task.state == "cancelled"

    summaries: list[Any] = []
    with _one_at_a_time:
        time.sleep(SETTLE_S)
        try:
            if stopped():
                return Outcome(summaries)
            if recipe.run not in _tools:
                if torch := sys.modules.get("torch"):
                    torch.set_num_threads(recipe.threads or worker.state.nthreads)
                for old in list(_tools)[:-1]:  # two runs may take turns; earlier runs were not reported as ended
                    _drop(old)
                _tools[recipe.run] = recipe.setup(numbers.get(name, len(numbers)))
        except Exception as error:  # noqa: BLE001 - any of them ends the run, in the client
            text = f"{where}: cannot begin ({describe(error)}); it needs the slide, the model and the output folder under the same paths as here"
            return Outcome(summaries, Failure(RunError, text, traceback.format_exc()))
        try:
            for summary in recipe.work(_tools[recipe.run], blocks, stopped):
                summaries.append(summary)  # noqa: PERF402 - those before an exception are wanted
        except WsisegError as error:
            return Outcome(summaries, Failure(type(error), str(error), traceback.format_exc()))
        except Exception as error:  # noqa: BLE001 - as above
            text = f"{where}, {names(blocks)}: {describe(error)}; finished parts are kept, run again with -v to see where it was"
            return Outcome(summaries, Failure(RunError, text, traceback.format_exc()))
        finally:
            if recipe.run in _ended:
                _drop(recipe.run)
    return Outcome(summaries)


def end(run: str) -> None:
    """Stop starting blocks of a run here, and release its context, now or after the current block."""
    _ended.add(run)
    if _one_at_a_time.acquire(blocking=False):
        try:
            _drop(run)
        finally:
            _one_at_a_time.release()


def _drop(run: str) -> None:
    close = getattr(_tools.pop(run, None), "close", None)
    if close:
        close()


def identity(value: Any) -> Any:  # noqa: ANN401
    """Return the value. As a task, so that Dask can rebuild it when every worker that had it is dead, unlike scattered data."""
    return value


def describe(error: BaseException) -> str:
    """Describe an exception in one line; a WsisegError is its own description."""
    text = " ".join(str(error).split())
    return text if isinstance(error, WsisegError) else f"{type(error).__name__}: {text}".rstrip(": ")


def names(blocks: Sequence[Any]) -> str:
    """Name of a task, for messages."""
    first, last = (getattr(b, "name", b) for b in (blocks[0], blocks[-1]))
    return f"block {first}" if len(blocks) == 1 else f"blocks {first} to {last}"
