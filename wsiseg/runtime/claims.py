"""Claims on parts among processes that share only a folder: job-array tasks on several nodes, one command started twice.

::

    parts/<name>.claim             host, process, space (wsiseg.runtime.machine), a random token, a count of beats; renewed in place
    parts/.<name>.claim.*.partial  a claim that is being written; then linked to its name, which only one process can do
    parts/.<name>.claim.taking     the next claim, while its maker takes a dead one over; renamed to it

Claims save work and say whom to wait for. Nothing that is written depends on them: two processes that do the same part all the same write the
same bytes. Guarantee: of any number of processes that claim a name at the same moment, one gets it; a process that may be alive keeps its claim.

Whether an owner is dead is never read from a clock that two machines would have to share. A process that certainly ended on this machine is
dead at once; any other owner when its claim has not changed for ``dead_after_s`` of the observer's own time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import secrets
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from wsiseg.runtime import machine
from wsiseg.runtime.atomic import PARTIAL_PATTERN, is_abandoned, partial_name, translate_os_errors

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

HEARTBEAT_S = 15.0  #: between two renewals of a claim: a few bytes per process, which no file server notices
DEAD_AFTER_S = 120.0  #: 60 s for which a network file system may answer from its cache, and four beats

_ENDING, _TAKING = ".claim", ".taking"
_VANISHED = {errno.ENOENT, errno.ESTALE}  # removed or replaced by another node; a stale handle is how NFS says it
_NO_LINKS = {
    errno.EPERM,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.EXDEV,
    errno.EMLINK,
}  # no hard links here
_MAX_BYTES = 4096  # anything larger is not a claim


class _State(NamedTuple):
    """State of a claim file as an observer compares it: any change is a sign of life."""

    content: bytes
    mtime_ns: int


@dataclass(frozen=True, kw_only=True)
class _Owner:
    """Owner of a claim."""

    host: str
    pid: int
    start: int | None
    space: str
    token: str


@dataclass
class _Held:
    """A claim of this process."""

    owner: _Owner
    missed: int = 0  # beats in a row that did not find the file


class Claims:
    """The claims of one process on names in one folder. As a context: renews them in a thread, and releases all at the end.

    Parameters
    ----------
    folder
        Folder of the claim files; created if missing.
    heartbeat_s
        Seconds between renewals. The thread needs Python's lock: compiled code that keeps it for long delays a beat.
    dead_after_s
        Seconds without a change after which an owner that cannot be asked counts as dead; many beats, the same in all processes. Only time in
        which this process ran and the folder answered is counted: after a sleep, or a server's outage, others get their time to beat again.
    """

    def __init__(self, folder: Path, *, heartbeat_s: float = HEARTBEAT_S, dead_after_s: float = DEAD_AFTER_S) -> None:
        self.folder = folder
        self._heartbeat_s, self._dead_after_s = heartbeat_s, dead_after_s
        self._held: dict[str, _Held] = {}
        self._seen: dict[Path, tuple[_State, float]] = {}
        self._lock = (
            threading.Lock()
        )  # of the clock and of _held against the thread; never kept while the file system is asked
        self._heartbeats, self._awake_s, self._last = 0, 0.0, time.monotonic()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start renewing."""
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, name="wsiseg-claims", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Release all claims; one that cannot be removed now counts as dead when this process ends."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        for name in list(self._held):
            self.release(name)

    def take(self, name: str) -> bool:
        """Claim a name.

        Parameters
        ----------
        name
            Name of the part; ``<name>.claim`` is a file name.

        Returns
        -------
        bool
            ``False``: another process that may be alive has it.

        Raises
        ------
        RunError
            The disk is full or the folder cannot be written.
        """
        if name in self._held:
            return True
        path, pid = self._path(name), os.getpid()
        owner = _Owner(
            host=machine.host(), pid=pid, start=machine.started(pid), space=machine.space(), token=secrets.token_hex(8)
        )
        with translate_os_errors(path):
            won = self._take(path, owner)
        if won:
            with self._lock:
                self._held[name] = _Held(owner)
        return won

    def release(self, name: str) -> None:
        """Release a name. A claim that another process took over stays, and so does one that the file system keeps; neither is an error."""
        with self._lock:
            held = self._held.pop(name, None)
        if held is None:
            return
        path = self._path(name)
        with contextlib.suppress(OSError):
            if _owner(self._look(path)) == held.owner:
                path.unlink(missing_ok=True)

    def holder(self, name: str) -> str | None:
        """Holder of a name, dead or alive, this process included, as in ``node7, process 4711``; ``None`` when there is none."""
        path = self._path(name)
        with translate_os_errors(path):
            state = self._look(path)
        owner = _owner(state)
        if owner is None:
            return None if state is None else "an unknown process"
        return f"{owner.host}, process {owner.pid}"

    def busy(self, names: Iterable[str]) -> list[str]:
        """Names held by another process that may be alive, in their order; an owner is observed from the first call that finds it."""
        with translate_os_errors(self.folder):
            try:
                there = set(os.listdir(self.folder))  # noqa: PTH208 -- names are all that is needed of thousands
            except FileNotFoundError:
                return []
            return [
                name
                for name in names
                if name + _ENDING in there and name not in self._held and self._is_alive(self._path(name))
            ]

    def drop_stale(self) -> None:
        """Remove the claims of dead owners and what interrupted takeovers left, as far as the file system lets us.

        Files of other machines are removed only if they were seen, here or in :meth:`busy` and :meth:`take`, ``dead_after_s`` before.
        """
        for path in list(self.folder.glob(f"*{_ENDING}")):
            name = path.name.removesuffix(_ENDING)
            with contextlib.suppress(OSError):
                if name not in self._held and self._is_dead(path, self._look(path)) and self.take(name):
                    self.release(
                        name
                    )  # taken first: a late observer must not remove what another process has just taken
        for path in list(self.folder.glob(f".*{_ENDING}{_TAKING}")):
            with contextlib.suppress(OSError):
                if self._is_dead(path, self._look(path)):
                    path.unlink(missing_ok=True)
        for path in list(self.folder.glob(f".*{_ENDING}{PARTIAL_PATTERN[1:]}")):
            with contextlib.suppress(OSError):
                if is_abandoned(path):
                    path.unlink(missing_ok=True)

    def _take(self, path: Path, owner: _Owner) -> bool:
        for _ in range(2):  # again when what was in the way has gone in the meantime
            if self._create(path, owner):
                return True
            state = self._look(path)
            if state is not None:
                return self._is_dead(path, state) and self._take_over(path, state, owner)
        return False

    def _take_over(self, path: Path, dead: _State, owner: _Owner) -> bool:
        """Replace a dead claim by ours.

        The next claim is made beside it, which only one process can do, and renamed over it if it still is what was seen dead. So the place is
        never free for a third, and an observer that was itself suspended here finds its file gone, or renames the next one's for it. An owner
        that comes back between our last look and the rename learns of it with its next beat.
        """
        taking = path.with_name(f".{path.name}{_TAKING}")
        if not self._create(taking, owner):
            if not self._is_dead(taking, self._look(taking)):
                return False
            taking.unlink(missing_ok=True)
            if not self._create(taking, owner):
                return False
        moved = False
        try:
            if self._look(path) == dead:
                taking.replace(path)
                moved = True
        except OSError as error:
            if error.errno not in _VANISHED | {
                errno.EIO
            }:  # of a rename that took effect all the same, or of a file that another removed
                raise
        finally:
            if not moved:
                with contextlib.suppress(OSError):
                    taking.unlink(missing_ok=True)
        now = self._look(path)
        return moved if now is None else _owner(now) == owner

    def _create(self, path: Path, owner: _Owner) -> bool:
        """Make a claim file; ``False`` when there is one. It is written under another name and linked: no kill leaves one without an owner."""
        draft = self.folder / partial_name(path.name.strip("."))
        try:
            if not self._write_new(draft, owner):  # a server repeated the call that made it
                return self._write_new(path, owner)
            try:
                os.link(draft, path)
            except FileExistsError:
                return draft.stat().st_nlink > 1  # ours all the same, when the answer of a server was lost
            except OSError as error:
                if error.errno not in _NO_LINKS | _VANISHED:
                    raise
                return self._write_new(path, owner)
            return True
        finally:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)

    def _write_new(self, path: Path, owner: _Owner) -> bool:
        """Write a file that is not there yet; ``False`` when it is."""
        try:
            descriptor = self._open_new(path)
        except FileExistsError:
            return False
        made = os.fstat(descriptor)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(self._content(owner))
        except OSError:
            with contextlib.suppress(OSError):
                if path.stat().st_ino == made.st_ino:
                    path.unlink()
            raise
        return True

    def _open_new(self, path: Path) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        try:
            return os.open(path, flags, 0o666)
        except OSError as error:
            if error.errno not in _VANISHED:
                raise
        self.folder.mkdir(parents=True, exist_ok=True)
        return os.open(path, flags, 0o666)

    def _content(self, owner: _Owner) -> bytes:
        """Content of a claim, of the same length at every heartbeat: rewriting it in place needs no disk space and is never half a claim."""
        return json.dumps({**dataclasses.asdict(owner), "beat": f"{self._heartbeats:010d}"}).encode() + b"\n"

    def _is_alive(self, path: Path) -> bool:
        """Tell whether there is a claim whose owner may be alive."""
        state = self._look(path)
        return state is not None and not self._is_dead(path, state)

    def _is_dead(self, path: Path, state: _State | None) -> bool:
        """Tell whether the owner of the claim at ``path`` is dead; the first look at a state starts the observation."""
        if state is None:
            return False
        owner = _owner(state)
        if owner is not None and owner.space == machine.space() and machine.is_gone(owner.pid, owner.start):
            return True
        now = self._clock()
        known, since = self._seen.get(path, (None, now))
        if known != state:
            self._seen[path] = (state, now)
            return False
        return now - since >= self._dead_after_s

    def _clock(self) -> float:
        """Seconds in which this process was awake: no step between heartbeats or looks counts for more than two heartbeats."""
        with self._lock:
            now = time.monotonic()
            self._awake_s += min(now - self._last, 2 * self._heartbeat_s)
            self._last = now
            return self._awake_s

    @staticmethod
    def _look(path: Path) -> _State | None:
        """State of the file at ``path``; ``None``: there is none. Opened each time, so that network file systems ask the server."""
        try:
            try:
                with path.open("rb", buffering=0) as file:
                    return _State(file.read(_MAX_BYTES), os.fstat(file.fileno()).st_mtime_ns)
            except PermissionError:  # of another user and not readable: its changes are still visible
                return _State(b"", path.stat().st_mtime_ns)
        except OSError as error:
            if error.errno in _VANISHED:
                return None
            raise

    def _run(self) -> None:
        while not self._stop.wait(self._heartbeat_s):
            self._heartbeats += 1
            for name, held in list(self._held.items()):
                self._renew(name, held)
            with contextlib.suppress(OSError):
                os.close(
                    os.open(self.folder, os.O_RDONLY)
                )  # waits as long as the server is away, and our clock with it
            self._clock()

    def _renew(self, name: str, held: _Held) -> None:
        """Rewrite a claim if it is still this process's; through one descriptor, so that a claim that took its place is never written to."""
        try:
            with self._path(name).open("r+b", buffering=0) as file:
                descriptor = file.fileno()
                ours = _owner(_State(file.read(_MAX_BYTES), 0)) == held.owner
                held.missed = 0
                if ours:
                    try:
                        os.pwrite(descriptor, self._content(held.owner), 0)
                    except OSError:
                        os.utime(descriptor)
        except OSError as error:  # anything else may pass: the claim is renewed with the next beat
            if error.errno not in _VANISHED:
                return
            held.missed += 1
            ours = held.missed < 2  # once is what NFS says of a file that another node touched
        if not ours:
            with self._lock:
                if self._held.get(name) is held:  # not released in the meantime
                    del self._held[name]

    def _path(self, name: str) -> Path:
        return self.folder / (name + _ENDING)


def _owner(state: _State | None) -> _Owner | None:
    """Read the owner of a claim; ``None`` when it is damaged, as by a process killed while it wrote, on a file system without hard links."""
    try:
        found: Any = json.loads(state.content) if state else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    host, pid, start, space, token = (found.get(key) for key in ("host", "pid", "start", "space", "token"))
    texts = all(isinstance(text, str) for text in (host, space, token))
    if not texts or type(pid) is not int or pid < 1 or not (start is None or type(start) is int):
        return None
    return _Owner(host=str(host), pid=pid, start=start, space=str(space), token=str(token))
