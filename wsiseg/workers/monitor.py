"""Monitoring of the workers from the client: those present, those that cannot work, those to request."""

from __future__ import annotations

import logging
import pkgutil
import time
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wsiseg.errors import RunError
from wsiseg.runtime.version import __version__
from wsiseg.workers.tasks import describe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

logger = logging.getLogger(__name__)

LOOK_S = 1.0  #: between two checks of the workers; sooner when there are none
WARN_S = 60.0  #: between two warnings that there is no worker, and two attempts to replace lost ones

_SAME = "use the same environment everywhere"


@dataclass(frozen=True, kw_only=True)
class Pool:
    """A pool of workers.

    Attributes
    ----------
    client
        Dask's.
    name
        The option that asked for them.
    threads
        Threads for torch, per worker; ``None``: as many as Dask gave it.
    workers
        Requested number; 0 for all that are present.
    when_none, when_dead
        Advice when there is no worker, and when workers die.
    replace_lost_workers
        Requests lost workers again, where nothing else does.
    """

    client: Any
    name: str
    threads: int | None
    workers: int
    when_none: str
    when_dead: str
    replace_lost_workers: Callable[[], object] | None = None

    def ask(self, question: Callable[..., Any], *arguments: Any, **options: Any) -> Any:  # noqa: ANN401
        """Call a method of the client; raise RunError when the scheduler is gone."""
        try:
            return question(*arguments, **options)
        except (OSError, CancelledError, AttributeError) as error:  # the last: the client has closed itself
            raise self.lost() from error

    def lost(self) -> RunError:
        """The error that the scheduler is gone."""
        return RunError(
            f"{self.name}: the scheduler was lost; start it again and run the same command again, finished parts are kept"
        )


class WorkerMonitor:
    """Monitor of the workers that are present.

    Attributes
    ----------
    numbers
        By name: the number of each among the workers of its machine, from 0. A worker that was started again gets its number again.
    """

    def __init__(self, pool: Pool, module: str) -> None:
        self.numbers: dict[str, int] = {}
        self._pool, self._module = pool, module
        self._checked: set[str] = set()
        self._next_look = self._last_seen = time.monotonic()
        self._next_warning = self._next_replacement = self._last_seen + WARN_S

    def look(self) -> None:
        """Update the list of workers when it is due.

        Raises
        ------
        RunError
            The scheduler is gone, or a worker cannot work.
        """
        now = time.monotonic()
        if self._pool.client.status != "running":
            raise self._pool.lost()
        if now < self._next_look:
            return
        workers = self._workers()
        self._next_look = now + (LOOK_S if workers else LOOK_S / 5)
        strangers = [address for address in workers if address not in self._checked]
        if strangers:
            self._check(strangers, workers)
        self._count({str(w["name"]): w["host"] for w in workers.values()})
        if workers:
            self._last_seen, self._next_warning = now, now + WARN_S
        elif now > self._next_warning:
            self._next_warning = now + WARN_S
            logger.warning("%s: no worker for %.0f s; %s", self._pool.name, now - self._last_seen, self._pool.when_none)
        if len(workers) >= self._pool.workers:
            self._next_replacement = now + WARN_S
        elif self._pool.replace_lost_workers and now > self._next_replacement:
            self._next_replacement = now + WARN_S
            self._pool.replace_lost_workers()

    def check(self) -> None:
        """Find workers that cannot work.

        Raises
        ------
        RunError
            Names the first that is found.
        """
        workers = self._workers()
        self._check(list(workers), workers)

    def _workers(self) -> dict[str, dict[str, Any]]:
        facts: dict[str, Any] = self._pool.ask(self._pool.client.sync, self._pool.client.scheduler.identity)
        workers: dict[str, dict[str, Any]] = facts["workers"]
        return workers

    def _count(self, hosts: Mapping[str, str]) -> None:
        """Number new workers with the lowest number free on their machine."""
        if len(hosts) != len(self.numbers):
            logger.info("%s: %d workers", self._pool.name, len(hosts))
        self.numbers = {name: number for name, number in self.numbers.items() if name in hosts}
        for name, host in hosts.items():
            if name not in self.numbers:
                taken = {number for other, number in self.numbers.items() if hosts[other] == host}
                self.numbers[name] = next(k for k in range(len(hosts)) if k not in taken)

    def _check(self, addresses: list[str], workers: Mapping[str, Any]) -> None:
        client = self._pool.client
        if self._pool.workers == 0:  # started by someone else, perhaps in another environment
            found = self._pool.ask(client.get_versions)
            here, others = _versions(found["client"]), {_called(workers, a): found["workers"].get(a) for a in addresses}
            for who, there in {"the scheduler": found["scheduler"], **others}.items():
                if there and _versions(there) != here:
                    raise RunError(f"{self._pool.name}: {who} has {_versions(there)}, here is {here}; {_SAME}")
        for what in ("wsiseg:__version__", f"{self._module}:__name__"):
            # what is called is of the standard library: it is there when wsiseg is not
            answers = self._pool.ask(client.run, pkgutil.resolve_name, what, workers=addresses, on_error="return")
            for address, answer in answers.items():
                who = f"{self._pool.name}: {_called(workers, address)}"
                if isinstance(answer, Exception) and not isinstance(answer, OSError):  # an OSError: it has just died
                    raise RunError(f"{who} cannot import wsiseg ({describe(answer)}); {_SAME}") from answer
                if what.startswith("wsiseg:") and answer != __version__ and isinstance(answer, str):
                    raise RunError(f"{who} has wsiseg {answer}, here is {__version__}; {_SAME}")
        self._checked.update(addresses)


def _called(workers: Mapping[str, Any], address: str) -> str:
    name = str(workers[address]["name"])
    return f"worker {address}" if name == address else f"worker {name} at {address}"


def _versions(facts: Mapping[str, Any]) -> str:
    python = ".".join(facts["host"]["python"].split(".")[:2])
    return f"python {python}, distributed {facts['packages']['distributed']}"
