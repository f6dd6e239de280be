"""Blocks given out to workers: a client that answers at once stands in for Dask's."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import pytest

from wsiseg import __version__
from wsiseg.errors import RunError, SlideError
from wsiseg.workers.dispatcher import AHEAD, Dispatcher
from wsiseg.workers.monitor import Pool
from wsiseg.workers.tasks import Failure, Outcome, identity

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Client:
    """Workers ``a`` and ``b``; a task waits until ``release`` is called, then is ``answer(blocks)``."""

    status = "running"

    def __init__(self, answer: Callable[[Sequence[Any]], Outcome]) -> None:
        self.answer, self.waiting, self.most, self.ended = answer, list[tuple[Any, Any]](), 0, 0
        self.scheduler = self

    def identity(self) -> dict[str, Any]:
        return {"workers": {name: {"name": name, "host": "here"} for name in "ab"}}

    def sync(self, question: Callable[[], Any]) -> Any:
        return question()

    def run(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> dict[str, Any]:
        if function.__name__ == "end":
            self.ended += 1
            return {}
        return dict.fromkeys(options["workers"], __version__)

    def submit(self, function: Callable[..., Any], *arguments: Any, key: str) -> Any:
        future: Any = Future()
        future.key = key
        if function is identity:
            return future
        self.waiting.append((future, arguments[2]))
        self.most = max(self.most, len(self.waiting))
        threading.Timer(0.01, self.release).start()
        return future

    def release(self) -> None:
        future, blocks = self.waiting.pop(0)
        try:
            future.set_result(self.answer(blocks))
        except Exception as error:  # noqa: BLE001 - as a task does
            future.set_exception(error)


def summaries(client: Client, stopped: Callable[[], bool] = lambda: False) -> list[Any]:
    pool = Pool(client=client, name="--workers 2", threads=1, workers=2, when_none="none", when_dead="they die")
    dispatcher = Dispatcher(pool, lambda *_: iter(()), lambda _: None)
    return list(dispatcher.summaries(range(40), lambda _: 8, stopped))


def test_every_block_comes_back_once_and_few_tasks_are_out_at_a_time() -> None:
    client = Client(lambda blocks: Outcome([b * 10 for b in blocks]))
    assert sorted(summaries(client)) == [b * 10 for b in range(40)]
    assert client.most <= AHEAD * 2


def test_the_error_of_a_worker_is_raised_after_what_it_had_finished() -> None:
    client = Client(lambda blocks: Outcome(["done"], Failure(SlideError, "a.svs: gone", "Traceback ...")))
    pool = Pool(client=client, name="--workers 2", threads=1, workers=2, when_none="none", when_dead="they die")
    results = Dispatcher(pool, lambda *_: iter(()), lambda _: None).summaries(range(8), None, lambda: False)
    assert next(results) == "done"
    with pytest.raises(SlideError, match=r"^a\.svs: gone$"):
        next(results)


def test_an_error_outside_of_the_work_names_the_environment() -> None:
    def broken(_: Sequence[Any]) -> Outcome:
        raise ModuleNotFoundError("No module named 'shapely'")

    with pytest.raises(
        RunError, match=r"^--workers 2: a task failed outside its blocks \(ModuleNotFoundError.*same environment"
    ):
        summaries(Client(broken))


def test_once_stopped_no_task_is_sent_and_the_workers_are_told() -> None:
    client = Client(lambda blocks: Outcome(list(blocks)))
    calls = iter(range(1000))
    done = summaries(client, lambda: next(calls) >= 2)
    assert len(done) < 40
    assert client.ended >= 1


def test_a_scheduler_that_is_gone_is_one_sentence() -> None:
    client = Client(lambda blocks: Outcome(list(blocks)))
    client.status = "closed"
    with pytest.raises(RunError, match=r"^--workers 2: the scheduler was lost; start it again"):
        summaries(client)
