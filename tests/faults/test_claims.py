"""Claims among real processes that are killed, suspended, restarted, or out of room."""

from __future__ import annotations

import ast
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from wsiseg.errors import RunError
from wsiseg.runtime import machine
from wsiseg.runtime.claims import DEAD_AFTER_S, HEARTBEAT_S, Claims

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Run = Callable[..., "list[Process]"]

pytestmark = pytest.mark.timeout(120)
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")

BEAT, DEAD = 0.05, 1.5
NEVER = 1000.0  # dead_after_s of tests in which only the end of a process may free a name

DRIVER = """
import ctypes, os, sys, time
from pathlib import Path
from wsiseg.runtime import machine
from wsiseg.runtime.claims import Claims

def race(start, step, names):
    won = []
    for number, name in enumerate(names):
        time.sleep(max(start + number * step - time.monotonic(), 0))
        if claims.take(name):
            won.append(name)
    return won

def elsewhere():
    machine.space = lambda: "elsewhere"

with Claims(Path(sys.argv[1]), heartbeat_s=float(sys.argv[2]), dead_after_s=float(sys.argv[3])) as claims:
    print("ready", flush=True)
    for line in sys.stdin:
        print(repr(eval(line)), flush=True)
"""


class Process:
    """A process with claims that evaluates what it is sent."""

    def __init__(
        self, folder: Path, *, beat: float = BEAT, dead_after: float = DEAD, before: tuple[str, ...] = ()
    ) -> None:
        command = [*before, sys.executable, "-c", DRIVER, str(folder), str(beat), str(dead_after)]
        self.popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def tell(self, expression: str) -> None:
        self.popen.stdin.write(expression + "\n")

    def hear(self) -> object:
        return ast.literal_eval(self.popen.stdout.readline())

    def ask(self, expression: str) -> object:
        self.tell(expression)
        return self.hear()

    def send(self, number: int) -> None:
        self.popen.send_signal(number)

    def leave(self) -> None:
        self.popen.stdin.close()
        assert self.popen.wait() == 0


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., list[Process]]]:
    """Start processes on ``tmp_path``; returns when they are ready. None outlives the test."""
    started: list[Process] = []

    def begin(count: int = 1, **options: object) -> list[Process]:
        processes = [Process(tmp_path, **options) for _ in range(count)]
        started.extend(processes)
        assert all(process.popen.stdout.readline() == "ready\n" for process in processes)
        return processes

    yield begin
    for process in started:
        process.popen.kill()
        process.popen.wait()
        process.popen.stdin.close()
        process.popen.stdout.close()


def write_claim(folder: Path, name: str, **changes: object) -> Path:
    """A claim as another process writes it: of a machine elsewhere, unless told otherwise."""
    owner = {
        "host": "node7",
        "pid": 4711,
        "start": 1,
        "space": "elsewhere",
        "token": "0123456789abcdef",
        "beat": "0000000000",
    }
    path = folder / f"{name}.claim"
    path.write_text(json.dumps({**owner, **changes}))
    return path


def token(folder: Path, name: str) -> str:
    return json.loads((folder / f"{name}.claim").read_bytes())["token"]


def until(true: Callable[[], bool], limit: float = 20.0) -> float:
    """Seconds until something is so."""
    begin = time.monotonic()
    while not true():
        assert time.monotonic() - begin < limit, "did not happen"
        time.sleep(0.01)
    return time.monotonic() - begin


def brisk(folder: Path, **options: float) -> Claims:
    return Claims(folder, **{"heartbeat_s": BEAT, "dead_after_s": DEAD, **options})


def test_the_defaults_leave_time_for_caches_and_many_beats() -> None:
    assert DEAD_AFTER_S >= 60 + 4 * HEARTBEAT_S


# --- many processes, one owner ------------------------------------------------------------------------------------------------------------------


def test_eight_processes_race_for_fifty_names_and_each_is_claimed_once(tmp_path: Path, run: Run) -> None:
    names = [f"{n:04d}-0000" for n in range(50)]
    racers = run(8, dead_after=NEVER)
    begin = time.monotonic() + 0.2
    for number, racer in enumerate(racers):  # half of them from the other end, so that they meet in the middle as well
        racer.tell(f"race({begin}, 0.002, {names[:: -1 if number % 2 else 1]})")
    won = [racer.hear() for racer in racers]
    assert sorted(chain.from_iterable(won)) == names
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.claim" for name in names}
    for racer, mine in zip(racers, won, strict=True):
        assert racer.ask(f"claims.busy({names})") == [n for n in names if n not in mine]
        assert all(
            racer.ask(f"claims.holder({n!r})") == f"{machine.host()}, process {racer.popen.pid}" for n in mine[:1]
        )
    for racer in racers:
        racer.leave()
    assert not list(tmp_path.iterdir())


@linux
@pytest.mark.parametrize("reaped", [True, False], ids=["reaped", "zombie"])
def test_the_names_of_a_killed_owner_go_at_once_to_exactly_one_of_several(
    tmp_path: Path, run: Run, reaped: bool
) -> None:
    names = [f"n{n}" for n in range(60)]
    racers = run(6, dead_after=NEVER)
    for _ in range(3):
        (owner,) = run(dead_after=NEVER)
        assert owner.ask(f"race(0, 0, {names})") == names
        for racer in racers:
            racer.tell(f"race(0, 0, {names})")
        assert [racer.hear() for racer in racers] == [[]] * 6, "the owner lives"
        owner.send(signal.SIGKILL)
        if reaped:
            owner.popen.wait()
        else:
            until(lambda pid=owner.popen.pid: machine._state(pid)[0] == "Z")
        begin = time.monotonic() + 0.1
        for racer in racers:
            racer.tell(f"race({begin}, 0.004, {names})")
        won = [racer.hear() for racer in racers]
        assert sorted(chain.from_iterable(won)) == sorted(names)
        assert len({token(tmp_path, name) for name in names}) == len(names)
        for racer, mine in zip(racers, won, strict=True):
            assert racer.ask("len(claims._held)") == len(mine)
            racer.ask(f"[claims.release(n) for n in {mine}]")
        assert not list(tmp_path.iterdir())


NURSERY = """
import os, random, signal, sys, time
from pathlib import Path
from wsiseg.runtime.claims import Claims

def work(log):
    log, chance, parent = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), random.Random(), os.getppid()
    def note(*words):
        os.write(log, (" ".join(map(str, words)) + "\\n").encode())
    with Claims(Path(sys.argv[1]), heartbeat_s=0.02, dead_after_s=1000) as claims:
        while os.getppid() == parent:  # and no longer than the test
            name = f"n{chance.randrange(8)}"
            if chance.random() < 0.05:
                claims.drop_stale()
            if claims.take(name):
                note("begin", name, time.monotonic())
                time.sleep(chance.random() * 0.01)
                assert name in claims._held
                note("end", name, time.monotonic())
                claims.release(name)

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        try:
            work(line.strip())
        finally:
            os._exit(1)
    print(pid, flush=True)
"""


@linux
def test_in_a_storm_of_kills_no_two_processes_work_on_one_name(tmp_path: Path) -> None:
    """Six processes take, work and release; one of them is killed and replaced every 40 ms. Whose work overlaps another's is in their logs."""
    folder, chance, killed, running = tmp_path / "parts", random.Random(3), {}, {}
    nursery = subprocess.Popen(
        [sys.executable, "-c", NURSERY, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
    )

    def begin() -> None:
        log = tmp_path / f"{len(running) + len(killed)}.log"
        nursery.stdin.write(f"{log}\n")
        running[log] = int(nursery.stdout.readline())

    def kill(log: Path) -> None:
        killed[log] = time.monotonic()
        os.kill(running.pop(log), signal.SIGKILL)

    for _ in range(6):
        begin()
    for _ in range(100):
        time.sleep(0.04)
        kill(chance.choice(list(running)))
        begin()
    for log in list(running):
        kill(log)
    said = nursery.communicate()[1]
    assert not said, "a process ended on its own"

    work = defaultdict(list)
    for log, end in killed.items():
        since = None
        for word, name, at in map(str.split, log.read_text().splitlines() if log.exists() else ()):
            if word == "end":
                work[name].append((since, float(at)))
            since = float(at) if word == "begin" else None
        if since is not None:
            work[name].append((since, end))
    for spans in work.values():
        spans.sort()
        assert all(before[1] <= after[0] for before, after in pairwise(spans)), spans
    print(f"{sum(map(len, work.values()))} spans of work, {len(killed)} processes killed")
    assert sum(map(len, work.values())) > len(killed)

    with brisk(folder) as claims:  # at once, but for claims whose makers were killed before they wrote a word
        until(lambda: claims.drop_stale() or not list(folder.iterdir()))


# --- is the owner dead? ---------------------------------------------------------------------------------------------------------------------------


def test_an_owner_elsewhere_is_dead_by_the_observers_clock_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_claim(tmp_path, "a")
    jump = {"by": 0.0}
    true_time = time.time
    monkeypatch.setattr(time, "time", lambda: true_time() + jump["by"])
    with brisk(tmp_path) as claims:
        for jump["by"] in (0.0, 1e9, -1e9):
            assert not claims.take("a")
            assert claims.busy(["b", "a"]) == ["a"]
            assert claims.holder("a") == "node7, process 4711"
        for when in (time.time() + 1e9, 1.0):  # a node whose clock is far off
            os.utime(path, (when, when))
            begin = time.monotonic()
            assert not claims.take("a")
            jump["by"] = -1e9  # in the midst of the observation, and forward with every look
            time.sleep(DEAD / 2)
            assert not claims.take("a")
        until(lambda: jump.update(by=jump["by"] + 1e6) or claims.take("a"))
        assert time.monotonic() - begin >= DEAD
        assert claims.holder("a") == f"{machine.host()}, process {os.getpid()}"
        assert claims.busy(["a"]) == []


def test_a_claim_that_changes_is_alive_whatever_its_times_say(tmp_path: Path) -> None:
    with brisk(tmp_path) as claims:
        end = time.monotonic() + 1.5 * DEAD
        number = 0
        while time.monotonic() < end:
            number += 1
            os.utime(write_claim(tmp_path, "a", beat=f"{number:010d}"), (1.0, 1.0))
            assert not claims.take("a")
            time.sleep(DEAD / 6)


@linux
def test_a_number_that_belongs_to_another_process_by_now_is_dead(tmp_path: Path) -> None:
    pid, begun = os.getpid(), machine.started(os.getpid())
    here = {"pid": pid, "space": machine.space()}
    with brisk(tmp_path, dead_after_s=NEVER) as claims:
        for name, start, free in (("a", begun - 1, True), ("b", begun, False), ("c", None, False)):
            write_claim(tmp_path, name, start=start, **here)
            assert claims.take(name) is free
        write_claim(tmp_path, "d", start=begun - 1, pid=pid)
        assert not claims.take("d"), "of another space: the number says nothing"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 5000,
        b'{"pid": 1}',
        "pid 0",
        "pid -1",
        "pid true",
        "pid huge",
        "start text",
    ],
    ids=lambda c: str(c)[:12],
)
def test_a_damaged_claim_is_a_state_like_any_other(tmp_path: Path, content: bytes | str) -> None:
    if isinstance(content, str):
        key, value = content.split()
        write_claim(
            tmp_path,
            "a",
            space=machine.space(),
            **{key: {"0": 0, "-1": -1, "true": True, "huge": 10**30}.get(value, value)},
        )
    else:
        (tmp_path / "a.claim").write_bytes(content)
    with brisk(tmp_path, dead_after_s=0.2) as claims:
        begin = time.monotonic()
        assert not claims.take("a")
        assert claims.busy(["a"]) == ["a"]
        assert claims.holder("a") in ("an unknown process", f"node7, process {10**30}")
        until(lambda: claims.take("a"))
        assert time.monotonic() - begin >= 0.2


def test_time_in_which_the_observer_itself_did_not_run_does_not_count(tmp_path: Path, run: Run) -> None:
    write_claim(tmp_path, "a")
    (observer,) = run()
    assert observer.ask("claims.take('a')") is False
    observer.send(signal.SIGSTOP)
    time.sleep(DEAD + 0.5)
    observer.send(signal.SIGCONT)
    assert observer.ask("claims.take('a')") is False
    until(lambda: observer.ask("claims.take('a')"))


# --- the heartbeat ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["None", "elsewhere()"], ids=["same-machine", "elsewhere"])
def test_an_owner_that_is_suspended_loses_its_claim_and_leaves_the_new_one_alone(
    tmp_path: Path, run: Run, where: str
) -> None:
    owner, other = run(2)
    owner.ask(where)
    assert owner.ask("[claims.take('a'), claims.take('b')]") == [True, True]
    for _ in range(15):
        assert other.ask("claims.take('a')") is False, "it beats"
        time.sleep(DEAD / 10)
    owner.send(signal.SIGSTOP)
    last = (tmp_path / "a.claim").stat().st_mtime
    until(lambda: other.ask("claims.take('a')"))
    assert time.time() - last >= DEAD
    mine = token(tmp_path, "a")
    owner.send(signal.SIGCONT)
    until(lambda: owner.ask("list(claims._held)") == ["b"])
    assert owner.ask("claims.take('a')") is False
    assert owner.ask("claims.busy(['a', 'b'])") == ["a"]
    owner.ask("claims.release('a')")
    owner.ask("claims.release('b')")
    time.sleep(3 * BEAT)
    owner.leave()
    assert [path.name for path in tmp_path.iterdir()] == ["a.claim"]
    assert token(tmp_path, "a") == mine
    assert other.ask("list(claims._held)") == ["a"]


def test_an_owner_that_releases_before_its_next_beat_leaves_the_claim_of_another(tmp_path: Path) -> None:
    claims = brisk(tmp_path)  # no heartbeat
    assert claims.take("a")
    path = write_claim(tmp_path, "a")
    claims.release("a")
    assert path.exists()


def test_work_that_keeps_the_interpreters_lock_does_not_cost_the_claim(tmp_path: Path, run: Run) -> None:
    owner, other = run(2, dead_after=2.5)
    owner.ask("elsewhere()")
    assert owner.ask("claims.take('a')")
    owner.tell("[ctypes.PyDLL(None).usleep(200_000) for _ in range(18)] and sum(range(10_000_000)) > 0")
    end = time.monotonic() + 3.5
    while time.monotonic() < end:
        assert other.ask("claims.take('a')") is False
        time.sleep(0.05)
    assert owner.hear() is True
    assert owner.ask("list(claims._held)") == ["a"]


def test_a_claim_that_somebody_removed_is_lost_and_one_that_was_away_for_a_moment_is_not(tmp_path: Path) -> None:
    with brisk(tmp_path) as claims:
        assert claims.take("a")
        assert claims.take("b")
        (tmp_path / "a.claim").unlink()
        until(lambda: list(claims._held) == ["b"])
        assert claims.take("a")
        assert sorted(claims._held) == ["a", "b"]
        true_open, failures = Path.open, {"left": 1}

        def open_(path: Path, *arguments: object, **options: object) -> object:
            if path.name == "b.claim" and failures["left"]:
                failures["left"] -= 1
                raise OSError(errno.ESTALE, "Stale file handle")
            return true_open(path, *arguments, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "open", open_)
            until(lambda: not failures["left"])
            time.sleep(4 * BEAT)
        assert sorted(claims._held) == ["a", "b"]
        (tmp_path / "b.claim").unlink()
    assert not list(tmp_path.iterdir())


def test_a_heartbeat_changes_nothing_but_the_beat(tmp_path: Path) -> None:
    with brisk(tmp_path) as claims:
        assert claims.take("a")
        path = tmp_path / "a.claim"
        first, inode = path.read_bytes(), path.stat().st_ino
        until(lambda: path.read_bytes() != first)
        later = path.read_bytes()
        assert len(later) == len(first)
        assert path.stat().st_ino == inode
        assert json.loads(later) | {"beat": ""} == json.loads(first) | {"beat": ""}
        assert claims.take("a"), "its own"
    assert not path.exists()


# --- observers that come late ---------------------------------------------------------------------------------------------------------------------


class Interrupted(Claims):
    """Does something else the moment before it puts its claim in a dead one's place, or before it begins to."""

    before_begin: Callable[[], None] | None = None
    before_rename: Callable[[], None] | None = None
    _after_lock = False

    def _create(self, path: Path, *arguments: object) -> bool:
        if path.name.endswith(".taking") and self.before_begin:
            self.before_begin()
        made = super()._create(path, *arguments)
        self._after_lock = made and path.name.endswith(".taking")
        return made

    def _look(self, path: Path) -> object:
        state = super()._look(path)
        if self._after_lock and path.name.endswith(".claim"):
            self._after_lock = False
            if self.before_rename:
                self.before_rename()
        return state


def dead_claim(folder: Path, name: str) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    write_claim(folder, name, pid=ended.pid, space=machine.space())


@linux
def test_an_observer_that_comes_too_late_leaves_the_new_claim_alone(tmp_path: Path) -> None:
    dead_claim(tmp_path, "a")
    late, quick = Interrupted(tmp_path), brisk(tmp_path)
    late.before_begin = lambda: quick.take("a")
    assert not late.take("a")
    assert list(quick._held) == ["a"]
    assert token(tmp_path, "a") == quick._held["a"].owner.token
    assert [p.name for p in tmp_path.iterdir()] == ["a.claim"]


@linux
def test_an_observer_suspended_within_a_takeover_is_overtaken_and_harmless(tmp_path: Path) -> None:
    """Its file for the next claim is taken for dead and removed before it goes on."""
    dead_claim(tmp_path, "a")
    late, quick = Interrupted(tmp_path), brisk(tmp_path, dead_after_s=0.0)
    assert quick._is_dead(tmp_path / "a.claim", quick._look(tmp_path / "a.claim"))
    late.before_rename = lambda: until(lambda: quick.take("a"))
    assert not late.take("a")
    assert token(tmp_path, "a") == quick._held["a"].owner.token
    assert [p.name for p in tmp_path.iterdir()] == ["a.claim"]


@linux
def test_an_observer_that_renames_the_next_ones_file_has_done_it_for_him(tmp_path: Path) -> None:
    dead_claim(tmp_path, "a")
    late, quick = Interrupted(tmp_path), Interrupted(tmp_path, dead_after_s=0.0)
    made, renamed = threading.Event(), threading.Event()
    won: list[bool] = []

    def pause() -> None:
        made.set()
        assert renamed.wait(10)

    def overtake() -> None:
        quick.before_rename = pause
        until(lambda: won.append(quick.take("a")) or won[-1])

    thread = threading.Thread(target=overtake)

    def before() -> None:
        thread.start()
        assert made.wait(10)

    late.before_rename = before
    assert not late.take("a")
    renamed.set()
    thread.join()
    assert won[-1]
    assert token(tmp_path, "a") == quick._held["a"].owner.token
    assert [p.name for p in tmp_path.iterdir()] == ["a.claim"]


@linux
def test_what_a_takeover_left_that_was_killed_is_in_nobodys_way(tmp_path: Path) -> None:
    dead_claim(tmp_path, "a")
    shutil.copy(tmp_path / "a.claim", tmp_path / ".a.claim.taking")
    with brisk(tmp_path, dead_after_s=NEVER) as claims:
        assert claims.take("a")
        assert [p.name for p in tmp_path.iterdir()] == ["a.claim"]


@linux
def test_drop_stale_removes_what_the_dead_left_and_nothing_else(tmp_path: Path) -> None:
    dead_claim(tmp_path, "dead")
    shutil.copy(tmp_path / "dead.claim", tmp_path / ".x.claim.taking")
    write_claim(tmp_path, "elsewhere")
    write_claim(tmp_path, ".y").rename(tmp_path / ".y.claim.taking")
    write_claim(tmp_path, "alive", pid=os.getpid(), start=machine.started(os.getpid()), space=machine.space())
    for name in ("0000-0000.parquet", ".cells.parquet.node7-12345678.1.ab.partial", "claim"):
        (tmp_path / name).touch()
    with brisk(tmp_path) as claims:
        assert claims.take("mine")
        kept = {"elsewhere.claim", ".y.claim.taking", "alive.claim", "mine.claim", "0000-0000.parquet", "claim"}
        kept.add(".cells.parquet.node7-12345678.1.ab.partial")
        begun = time.monotonic()
        claims.drop_stale()
        assert {p.name for p in tmp_path.iterdir()} == kept

        def clean() -> bool:
            os.utime(tmp_path / "alive.claim")
            claims.drop_stale()
            return {p.name for p in tmp_path.iterdir()} == kept - {"elsewhere.claim", ".y.claim.taking"}

        until(clean)
        assert time.monotonic() - begun >= DEAD
    Claims(tmp_path / "nowhere").drop_stale()


# --- what the file system refuses ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that any user may reach (pytest's own are the user's alone)."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


UNPRIVILEGED = """
import os, sys, time
from pathlib import Path
from wsiseg.runtime import machine
from wsiseg.runtime.claims import Claims

def drop_root(*paths):
    machine.space()  # what is read late of Python may be root's
    if os.getuid() == 0:
        for path in paths:
            os.chown(path, 65534, 65534)
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
"""


def unprivileged(script: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", UNPRIVILEGED + script, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_folder_that_may_not_be_written_is_one_sentence(open_folder: Path) -> None:
    script = """
drop_root()
with Claims(Path(sys.argv[1]), heartbeat_s=0.02, dead_after_s=0.1) as claims:
    print(claims.busy(["a", "b"]), claims.holder("a"))
    claims.drop_stale()
    for name in ("a", "b"):
        try:
            claims.take(name)
        except Exception as error:
            print(type(error).__name__, error)
        claims.release(name)
"""
    write_claim(open_folder, "a", pid=os.getpid(), space=machine.space(), start=-1)  # dead, but it cannot be replaced
    open_folder.chmod(0o555)
    lines = unprivileged(script, open_folder).splitlines()
    said = "{}: cannot be written (Permission denied); make room, or choose a folder you may write with --out"
    expected = [f"RunError {said.format(open_folder / f'{name}.claim')}" for name in "ab"]
    assert lines[1:] == expected
    assert lines[0] == f"[] node7, process {os.getpid()}"
    assert [p.name for p in open_folder.iterdir()] == ["a.claim"]


def test_a_claim_that_loses_its_folders_permission_is_renewed_and_released_in_silence(open_folder: Path) -> None:
    script = """
folder = Path(sys.argv[1])
folder.mkdir()
drop_root(folder)
with Claims(folder, heartbeat_s=0.02) as claims:
    assert claims.take("a") and claims.take("b")
    folder.chmod(0o555)
    (folder / "b.claim").chmod(0o000)
    first = (folder / "a.claim").read_bytes()
    end = time.monotonic() + 20
    while (folder / "a.claim").read_bytes() == first:
        assert time.monotonic() < end, "not renewed"
        time.sleep(0.02)
    assert sorted(claims._held) == ["a", "b"]
    with Claims(folder) as other:
        assert other.busy(["a", "b"]) == ["a", "b"]
        assert other.holder("b") == "an unknown process"
print(sorted(p.name for p in folder.iterdir()))
folder.chmod(0o755)
"""
    assert unprivileged(script, open_folder / "parts") == "['a.claim', 'b.claim']\n"


def test_another_users_closed_claim_is_alive_while_its_time_changes(open_folder: Path) -> None:
    """Nobody may read it: taken over after ``dead_after_s`` without a change, not before."""
    script = """
folder = Path(sys.argv[1])
drop_root()
with Claims(folder, heartbeat_s=0.02, dead_after_s=0.5) as claims:
    end = time.monotonic() + 1.2
    while time.monotonic() < end:
        assert not claims.take("a")
        os.utime(folder / "a.claim")
        time.sleep(0.02)
    begin = time.monotonic()
    while not claims.take("a"):
        time.sleep(0.02)
    assert time.monotonic() - begin > 0.4
"""
    path = write_claim(open_folder, "a")
    path.chmod(0o000)
    if os.getuid() == 0:
        os.chown(path, 65534, 65534)
    open_folder.chmod(0o777)
    unprivileged(script, open_folder)


def permitted(*command: str) -> bool:
    try:
        return subprocess.run(["unshare", *command, "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@linux
def test_a_full_disk_is_one_sentence_and_claims_held_live_on(tmp_path: Path) -> None:
    if not permitted("-rm"):
        pytest.skip("no mount of one's own is permitted here")
    script = """
import os, sys, time
from pathlib import Path
from wsiseg.runtime.claims import Claims
folder = Path(sys.argv[1])
with Claims(folder, heartbeat_s=0.02, dead_after_s=0.2) as claims:
    assert claims.take("a")
    (folder / "b.claim").write_bytes(b"{}")
    claims.take("b")
    with open(folder / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    time.sleep(0.5)
    for name in ("b", "c"):  # one to take over, one that is free
        try:
            claims.take(name)
        except Exception as error:
            print(type(error).__name__, error)
    claims.drop_stale()
    first = (folder / "a.claim").read_bytes()
    end = time.monotonic() + 20
    while (folder / "a.claim").read_bytes() == first:
        assert time.monotonic() < end, "not renewed"
        time.sleep(0.02)
    print(sorted(p.name for p in folder.iterdir()), sorted(claims._held))
    (folder / "filler").unlink()
    assert claims.take("c")
"""
    mount = f'mount -t tmpfs -o size=1m tmpfs "{tmp_path}" && exec "$0" "$@"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount, sys.executable, "-c", script, tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = "RunError {}: cannot be written (No space left on device); make room, or choose a folder you may write with --out"
    assert done.stdout.splitlines() == [
        *(said.format(tmp_path / f"{n}.claim") for n in "bc"),
        "['a.claim', 'b.claim', 'filler'] ['a']",
    ]


def test_surprises_of_network_file_systems_are_no_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claims = brisk(tmp_path / "parts")
    assert claims.busy(["a"]) == []
    assert claims.holder("a") is None
    assert claims.take("a"), "the folder is made"
    true_open, true_replace, failures = os.open, Path.replace, {errno.ESTALE: 1, errno.EIO: 1}

    def open_(path: object, flags: int, *arguments: object, **options: object) -> int:
        if flags & os.O_EXCL and failures[errno.ESTALE]:
            failures[errno.ESTALE] -= 1
            raise OSError(errno.ESTALE, "Stale file handle")
        return true_open(path, flags, *arguments, **options)

    def replace(source: Path, target: Path) -> None:
        true_replace(source, target)
        failures[errno.EIO] -= 1
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "open", open_)
    assert claims.take("b")
    monkeypatch.setattr(Path, "replace", replace)
    write_claim(tmp_path / "parts", "c")
    others = brisk(tmp_path / "parts", dead_after_s=0.0)
    assert not others.take("c")
    assert others.take("c"), "the rename took effect, whatever was answered"
    assert failures == {errno.ESTALE: 0, errno.EIO: 0}


def test_a_claim_has_its_owner_from_the_first_moment(tmp_path: Path) -> None:
    """A process killed at any moment of claiming leaves either no claim, or one whose owner is known to be dead at once."""
    script = """
import os, signal, sys
from pathlib import Path
from wsiseg.runtime.claims import Claims
before, calls = int(sys.argv[2]), 0
def step(frame, event, argument):
    global calls
    if frame.f_code.co_filename.endswith("claims.py"):
        calls += 1
        if calls == before:
            os.kill(os.getpid(), signal.SIGKILL)
    return step
claims = Claims(Path(sys.argv[1]))
sys.settrace(step)
claims.take("a")
sys.settrace(None)
print(calls)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "whole", "0"], capture_output=True, text=True, check=True
    )
    steps = int(done.stdout)
    assert steps > 20
    for before in range(1, steps + 1, 2):
        folder = tmp_path / str(before)
        killed = subprocess.run([sys.executable, "-c", script, folder, str(before)], capture_output=True, check=False)
        assert killed.returncode == -signal.SIGKILL
        with brisk(folder, dead_after_s=60.0) as claims:
            assert claims.take("a"), f"waits for a process killed at step {before}"
            claims.drop_stale()
            assert [path.name for path in folder.iterdir()] == ["a.claim"]


@pytest.mark.parametrize("fault", [errno.EPERM, errno.EOPNOTSUPP])
def test_without_hard_links_claims_are_exclusive_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: int
) -> None:
    def link(*_: object) -> None:
        raise OSError(fault, "no links")

    monkeypatch.setattr(os, "link", link)
    first, second = brisk(tmp_path), brisk(tmp_path)
    assert first.take("a")
    assert not second.take("a")
    assert [path.name for path in tmp_path.iterdir()] == ["a.claim"]
    assert first.holder("a") == f"{machine.host()}, process {os.getpid()}"


def test_a_link_whose_answer_was_lost_is_a_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true_link = os.link

    def link(source: object, target: object) -> None:
        true_link(source, target)
        raise FileExistsError(errno.EEXIST, "File exists")

    claims = brisk(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", link)
        assert claims.take("a")
    assert not brisk(tmp_path).take("a")


def test_a_folder_in_the_place_of_a_claim_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.claim").mkdir()
    with brisk(tmp_path) as claims, pytest.raises(RunError, match=r"a\.claim: cannot be written \(Is a directory\)"):
        claims.take("a")


# --- pid namespaces --------------------------------------------------------------------------------------------------------------------------------


@linux
@pytest.mark.parametrize("own_proc", [True, False])
def test_a_process_of_another_pid_namespace_is_judged_by_its_beats(tmp_path: Path, run: Run, own_proc: bool) -> None:
    """A container: the same host, the same kernel, other numbers; with and without a /proc of its own."""
    before = ("unshare", "-rpf", "--kill-child", *(["--mount-proc"] if own_proc else []))
    if not permitted(*before[1:]):
        pytest.skip("no pid namespace of one's own is permitted here")
    (outside,), (inside,) = run(), run(before=before)
    assert inside.ask("os.getpid()") < 10
    assert inside.ask("machine.space()") != machine.space()
    assert (inside.ask("machine.started(os.getpid())") is not None) is own_proc
    assert inside.ask("machine.is_gone(os.getpid(), 1)") is own_proc
    assert inside.ask("machine.is_gone(os.getpid(), None)") is False
    assert inside.ask("machine.is_gone(99999, None)") is True
    assert inside.ask("claims.take('a')")
    assert outside.ask("claims.take('b')")
    end = time.monotonic() + 1.5 * DEAD
    while time.monotonic() < end:
        assert outside.ask("claims.take('a')") is False
        assert inside.ask("claims.take('b')") is False
        time.sleep(BEAT)
    inside.popen.kill()
    inside.popen.wait()
    last = (tmp_path / "a.claim").stat().st_mtime
    until(lambda: outside.ask("claims.take('a')"))
    assert time.time() - last >= DEAD


@linux
def test_processes_that_end(monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    begun = machine.started(process.pid)
    assert not machine.is_gone(process.pid, begun)
    assert not machine.is_gone(process.pid, None)
    assert machine.is_gone(process.pid, begun + 1)
    assert machine.is_gone(1, 10**9), "another user's, but not that one"
    process.kill()
    until(lambda: machine.is_gone(process.pid, begun))  # a zombie
    process.communicate()
    assert machine.is_gone(process.pid, None)
    assert not machine.is_gone(10**30, None)
    monkeypatch.setattr(machine, "_PROC", Path("/nowhere"))
    assert machine.started(os.getpid()) is None
    assert not machine.is_gone(os.getpid(), 1)


def test_a_space_is_this_machines_or_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    same = [sys.executable, "-c", "from wsiseg.runtime import machine; print(machine.space())"]
    assert subprocess.run(same, capture_output=True, text=True, check=True).stdout.strip() == machine.space()
    monkeypatch.setattr(machine, "_PROC", Path("/nowhere"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert machine.space.__wrapped__() != machine.space.__wrapped__()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert machine.space.__wrapped__() == machine.space.__wrapped__()
