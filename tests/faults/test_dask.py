"""Real processes, schedulers and a stand-in for a batch system: what is worked on, what survives, what is said, and what is left behind."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from distributed import Client

from wsiseg import errors
from wsiseg.config import ClusterConfig, RunConfig, from_mapping
from wsiseg.errors import ConfigError, RunError, SlideError, WsisegError
from wsiseg.workers import check_scheduler, clusters, map_blocks, monitor
from wsiseg.workers.tasks import group

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BLOCKS = range(24)

#: What workers import: blocks are numbers, or have an odd name that says what happens to them.
HELPER = """
    import os, pathlib, signal, time
    from wsiseg.errors import SlideError

    def setup(number):
        return {"number": number, "pid": os.getpid()}

    def setup_without_slide(number):
        raise SlideError("a.svs: no such file; pass a file that exists")

    def work(tools, blocks, stopped, seconds=0.02):
        for block in blocks:
            time.sleep(seconds)
            yield block, tools["pid"], tools["number"]
            if stopped():
                return

    def slow_work(tools, blocks, stopped):
        yield from work(tools, blocks, stopped, 0.3)

    def dies_once(tools, blocks, stopped):
        flag = pathlib.Path(os.environ["FLAG"])
        for block in blocks:
            if block == 7 and not flag.exists():
                flag.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield block, tools["pid"], tools["number"]

    def dies_always(tools, blocks, stopped):
        for block in blocks:
            time.sleep(0.1)  # no block dies at once: it is read first
            if block == 7:
                os.kill(os.getpid(), signal.SIGKILL)
            yield block

    def refuses(tools, blocks, stopped):
        for block in blocks:
            if block == 7:
                raise SlideError("a.svs: cannot be read at 7; copy it again")
            yield block

    def stumbles(tools, blocks, stopped):
        for block in blocks:
            if block == 7:
                raise LookupError(lambda: "cannot be pickled")
            yield block

    def noted(tools, blocks, stopped):
        folder = pathlib.Path(os.environ["NOTES"])
        for block in blocks:
            (folder / f"{block}.begun").touch()
            time.sleep(0.15)
            yield block
            if stopped():
                return
"""

#: A client of its own: says what came back as JSON; "ready" when the first summary is there; ends well after Ctrl-C.
CLIENT = """
    import json, os, pathlib, signal, sys
    import dask_helper
    from wsiseg.errors import WsisegError
    from wsiseg.workers import map_blocks

    def main():
        name, blocks, options = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
        asked = []
        signal.signal(signal.SIGINT, lambda *_: asked.append(1))
        options["scratch"] = pathlib.Path(options["scratch"])
        if "each" in options:
            each = options.pop("each")
            options["weight"] = lambda block: each
        back = []
        try:
            for summary in map_blocks(getattr(dask_helper, name), range(blocks), dask_helper.setup, stopped=lambda: bool(asked), **options):
                if not back:
                    import psutil
                    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
                    hosts = sorted({c.laddr.ip for p in family for c in p.net_connections() if c.status == "LISTEN"})
                    print("ready", flush=True)
                back.append(summary)
            print(json.dumps({"back": back, "hosts": hosts if back else []}), flush=True)
        except WsisegError as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)

    if __name__ == "__main__":
        main()
"""


@pytest.fixture(scope="session")
def helpers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("helpers")
    (folder / "dask_helper.py").write_text(textwrap.dedent(HELPER))
    (folder / "dask_client.py").write_text(textwrap.dedent(CLIENT))
    return folder


@pytest.fixture
def helper(helpers: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.syspath_prepend(helpers)
    monkeypatch.setenv("FLAG", str(tmp_path / "flag"))
    monkeypatch.setenv("NOTES", str(tmp_path))
    import dask_helper

    return dask_helper


@pytest.fixture
def environment(helpers: Path, tmp_path: Path) -> dict[str, str]:
    """HOME and TMPDIR are empty folders."""
    for name in ("home", "tmp"):
        (tmp_path / name).mkdir()
    path = os.pathsep.join([str(helpers), str(Path(errors.__file__).parents[1])])
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DASK", "XDG"))}
    return {
        **kept,
        "HOME": str(tmp_path / "home"),
        "TMPDIR": str(tmp_path / "tmp"),
        "PYTHONPATH": path,
        "NOTES": str(tmp_path),
    }


@pytest.fixture
def start(helpers: Path, environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """A client in a session of its own, as a terminal has one; its standard error goes to a file."""
    started: list[subprocess.Popen[str]] = []

    def launch(work: str, blocks: int, **options: object) -> subprocess.Popen[str]:
        folder = tmp_path / f"run{len(started)}"
        folder.mkdir()
        options = {"scratch": str(folder), **options}
        command = [sys.executable, str(helpers / "dask_client.py"), work, str(blocks), json.dumps(options)]
        with (tmp_path / f"stderr{len(started)}").open("w") as stderr:
            started.append(
                subprocess.Popen(
                    command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True
                )
            )
        return started[-1]

    yield launch
    for process in started:
        kill(session(process.pid))
        process.wait()


def session(leader: int) -> list[psutil.Process]:
    """Processes that run in the session of ``leader``."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.Error):
            continue
    return found


def answer(process: subprocess.Popen[str]) -> dict:
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return json.loads(out.splitlines()[-1])


def kill(processes: list[psutil.Process]) -> None:
    """Kill processes, of which some may end by themselves when others are gone."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def until(condition: Callable[[], object], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def files_below(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if not p.is_dir()]


# This process


def test_one_worker_is_this_process(helper) -> None:
    assert [s[0] for s in map_blocks(helper.work, BLOCKS, helper.setup)] == list(BLOCKS)
    context = {"pid": -1, "number": -1}
    assert {s[1] for s in map_blocks(helper.work, [3], helper.setup, workers=4, context=context)} == {-1}
    assert not list(map_blocks(helper.work, [], helper.setup, workers=4))
    asked = iter([False, False, True])
    assert [s[0] for s in map_blocks(helper.work, BLOCKS, helper.setup, stopped=lambda: next(asked))] == [0, 1, 2]


def test_one_worker_needs_no_dask(environment: dict[str, str]) -> None:
    script = (
        "import sys, dask_helper\nfrom wsiseg.workers import map_blocks\n"
        "assert len(list(map_blocks(dask_helper.work, range(3), dask_helper.setup))) == 3\n"
        "assert not {'dask', 'distributed', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


def test_tasks_have_tiles_enough_and_workers_tasks_enough() -> None:
    tiles = [16] * 1000
    assert {len(t) for t in group(tiles, int, 2)} == {4}
    assert [t for task in group(tiles, int, 2) for t in task] == tiles
    assert len(group([16] * 8, int, 2)) == 8
    assert len(group([1] * 64, int, 2)) == 8
    assert len(group([16] * 8, None, 2)) == 8
    assert group([100, 1, 1], int, 1) == [[100], [1, 1]]


# Processes of this machine


def test_two_runs_at_once(start, tmp_path: Path) -> None:
    """Each does all its blocks with two processes, listens to this machine only, says nothing and leaves nothing, anywhere."""
    both = [start("work", len(BLOCKS), workers=2) for _ in range(2)]
    for i, found in enumerate([answer(process) for process in both]):
        assert sorted(s[0] for s in found["back"]) == list(BLOCKS)
        assert {s[2] for s in found["back"]} <= {0, 1}
        assert both[i].pid not in {s[1] for s in found["back"]}
        assert found["hosts"] == ["127.0.0.1"]
        assert not (tmp_path / f"stderr{i}").read_text()
        assert not list((tmp_path / f"run{i}").iterdir())
    assert not list((tmp_path / "home").iterdir())
    assert not list((tmp_path / "tmp").iterdir())


def test_every_process_has_a_number(helper, tmp_path: Path) -> None:
    back = list(map_blocks(helper.slow_work, range(8), helper.setup, workers=2, scratch=tmp_path))
    assert {s[2] for s in back} == {0, 1}
    assert len({s[1] for s in back}) == 2
    assert "MALLOC_TRIM_THRESHOLD_" not in os.environ  # Dask's nannies set it


def test_a_dead_worker_is_replaced(helper, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    back = list(map_blocks(helper.dies_once, BLOCKS, helper.setup, workers=2, scratch=tmp_path))
    assert sorted(s[0] for s in back) == list(BLOCKS)
    assert (tmp_path / "flag").exists()
    assert not capfd.readouterr().err


def test_blocks_that_kill_every_worker_end_the_run(helper, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        RunError, match=r"^block 7: the worker died 4 times, .* finished parts are kept, run the same command again$"
    ):
        list(map_blocks(helper.dies_always, BLOCKS, helper.setup, workers=2, scratch=tmp_path))
    assert not list(tmp_path.glob("dask-*"))
    assert not capfd.readouterr().err


def test_exceptions_of_workers(helper, tmp_path: Path) -> None:
    """Ours as they are; others, even such as cannot be pickled, as a RunError. The worker's traceback is the cause."""
    back: list[int] = []
    with pytest.raises(SlideError, match=r"^a.svs: cannot be read at 7; copy it again$") as caught:
        back.extend(map_blocks(helper.refuses, BLOCKS, helper.setup, workers=2, scratch=tmp_path, weight=lambda _: 32))
    assert "in refuses" in str(caught.value.__cause__)
    assert 6 in back  # of the same task as 7
    with pytest.raises(
        RunError, match=r"^worker \d on \S+, block 7: LookupError: .* finished parts are kept"
    ) as caught:
        list(map_blocks(helper.stumbles, BLOCKS, helper.setup, workers=2, scratch=tmp_path))
    assert "in stumbles" in str(caught.value.__cause__)


def test_a_worker_that_cannot_begin(helper, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"^worker \d on \S+: cannot begin \(a.svs: no such file; .*the output folder"):
        list(map_blocks(helper.work, BLOCKS, helper.setup_without_slide, workers=2, scratch=tmp_path))


@pytest.mark.parametrize(
    "kind",
    [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, WsisegError)],
    ids=lambda e: e.__name__,
)
def test_errors_survive_pickling(kind: type[WsisegError]) -> None:
    again = pickle.loads(pickle.dumps(kind("a.svs: something; do that")))
    assert type(again) is kind
    assert str(again) == "a.svs: something; do that"


def test_stop_lets_the_blocks_in_hand_end(helper, tmp_path: Path) -> None:
    back: list[int] = []
    options = {"workers": 2, "scratch": tmp_path, "weight": lambda _: 8}  # tasks of several blocks
    for summary in map_blocks(helper.noted, range(200), helper.setup, stopped=lambda: len(back) > 4, **options):
        back.append(summary)  # noqa: PERF402
    assert sorted(back) == sorted(int(p.stem) for p in tmp_path.glob("*.begun"))
    assert len(back) < 50


def test_ctrl_c_reaches_all_and_the_client_decides(start, tmp_path: Path) -> None:
    process = start("noted", 200, workers=2)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    back = answer(process)["back"]
    assert sorted(back) == sorted(int(p.stem) for p in tmp_path.glob("*.begun"))
    assert len(back) < 100
    assert not (tmp_path / "stderr0").read_text()


def test_nothing_survives_a_killed_client(start, tmp_path: Path) -> None:
    process = start("slow_work", 200, workers=2)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    assert len(session(process.pid)) >= 3
    process.kill()
    process.wait()
    until(lambda: not session(process.pid))
    assert not (tmp_path / "stderr0").read_text()


# Somebody's scheduler


class Cluster:
    """A scheduler and workers that are started by hand."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._folder, self._environment = folder, environment
        self._processes: list[subprocess.Popen[bytes]] = []
        file = folder / "scheduler.json"
        self.scheduler = self._start(
            "dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)
        )
        until(lambda: file.exists() and file.read_text())
        self.address: str = json.loads(file.read_text())["address"]

    def add_worker(self, *options: str) -> subprocess.Popen[bytes]:
        return self._start(
            "dask_worker", self.address, "--no-dashboard", "--local-directory", str(self._folder), *options
        )

    def workers(self) -> set[str]:
        with Client(self.address, set_as_default=False) as client:
            return {str(w["name"]) for w in client.scheduler_info(n_workers=-1)["workers"].values()}

    def _start(self, program: str, *options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"distributed.cli.{program}", "--dashboard-address", "127.0.0.1:0", *options]
        with (self._folder / "cluster.log").open("ab") as log:
            process = subprocess.Popen(
                command, env=self._environment, stdout=log, stderr=log, start_new_session=True, cwd=self._folder
            )
        self._processes.append(process)
        return process

    def close(self) -> None:
        for process in self._processes:
            kill(session(process.pid))
            process.wait()


@pytest.fixture
def remote(environment: dict[str, str], tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path, environment)
    yield cluster
    cluster.close()


def test_workers_of_a_scheduler(
    remote: Cluster,
    helper,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """None at first; then two, of which one has threads; they serve one run after another, and end when told to."""
    monkeypatch.setattr(monitor, "WARN_S", 0.1)
    run = map_blocks(helper.slow_work, BLOCKS, helper.setup, scheduler=remote.address, scratch=tmp_path)
    monkeypatch.setattr(monitor, "LOOK_S", 0.5)
    caplog.set_level("WARNING")
    late = threading.Timer(2, remote.add_worker, ("--nworkers", "2", "--nthreads", "3"))
    late.start()
    back = list(run)
    late.join()
    said = caplog.records[0].getMessage()
    assert re.match(rf"--scheduler {remote.address}: no worker for \d+ s; start some: `dask worker tcp://", said)
    assert sorted(s[0] for s in back) == list(BLOCKS)
    assert {s[2] for s in back} == {0, 1}

    begun: list[int] = []
    for summary in map_blocks(
        helper.noted,
        range(200),
        helper.setup,
        scheduler=remote.address,
        stopped=lambda: len(begun) > 2,
        weight=lambda _: 8,
    ):
        begun.append(summary)  # noqa: PERF402
    assert sorted(begun) == sorted(int(p.stem) for p in tmp_path.glob("*.begun"))

    assert not capfd.readouterr().err


def test_workers_of_another_environment(remote: Cluster, helper, tmp_path: Path) -> None:
    """One without wsiseg is refused before a block is given out; one of another version also when it comes later."""
    (tmp_path / "halt.py").write_text("import sys\nsys.modules['wsiseg'] = None\n")
    bare = remote.add_worker("--name", "bare", "--preload", str(tmp_path / "halt.py"))
    remote.add_worker("--name", "good")
    until(lambda: remote.workers() == {"bare", "good"})
    with pytest.raises(
        RunError,
        match=r"worker bare at tcp://.* cannot import wsiseg \(ModuleNotFoundError: .*; use the same environment",
    ):
        list(map_blocks(helper.noted, range(200), helper.setup, scheduler=remote.address))
    assert not list(tmp_path.glob("*.begun"))

    kill(session(bare.pid))
    until(lambda: remote.workers() == {"good"})
    (tmp_path / "old.py").write_text("import wsiseg\nwsiseg.__version__ = '0.0.1'\n")
    run = map_blocks(helper.noted, range(200), helper.setup, scheduler=remote.address)
    next(run)
    remote.add_worker("--name", "old", "--preload", str(tmp_path / "old.py"))
    with pytest.raises(
        RunError, match=r"worker old at tcp://.* has wsiseg 0\.0\.1, here is .*; use the same environment"
    ):
        list(run)


def test_a_lost_client_and_a_lost_scheduler_end_the_run(remote: Cluster, start, tmp_path: Path) -> None:
    """The workers begin no block any more; the client says one sentence."""
    remote.add_worker("--nthreads", "1")
    process = start("noted", 200, scheduler=remote.address, each=1)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    process.kill()
    begun = [0, len(list(tmp_path.glob("*.begun")))]

    def none_for_a_second() -> bool:  # all 200 would take 30 s
        time.sleep(1)
        begun.append(len(list(tmp_path.glob("*.begun"))))
        return begun[-1] == begun[-2]

    until(none_for_a_second)
    assert begun[-1] < 200

    process = start("slow_work", 200, scheduler=remote.address)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    killed = time.monotonic()
    remote.scheduler.kill()
    said = answer(process)["error"]
    assert said.startswith(f"RunError: --scheduler {remote.address}: the scheduler was lost; ")
    assert time.monotonic() - killed < 30
    assert not (tmp_path / "stderr1").read_text()


def test_nobody_answers(helper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "CONNECT_S", 1.0)
    with pytest.raises(
        RunError, match=r"^--scheduler tcp://127.0.0.1:9: no answer within 1 s; start `dask scheduler` there"
    ):
        list(map_blocks(helper.work, BLOCKS, helper.setup, scheduler="tcp://127.0.0.1:9"))
    with pytest.raises(
        ConfigError,
        match=r"^--scheduler smoke://signal: is neither an address nor a batch system; pass tcp://host:port",
    ):
        list(map_blocks(helper.work, BLOCKS, helper.setup, scheduler="smoke://signal"))


# Batch systems

SBATCH = """#!/bin/sh
    echo "$@" >>"$BATCH/submitted"
    cp "$1" "$BATCH/$$.sh"
    setsid sh "$BATCH/$$.sh" >>"$BATCH/log" 2>&1 &
    echo "Submitted batch job $!"
"""
SCANCEL = """#!/bin/sh
    echo "$1" >>"$BATCH/cancelled"
    kill -- -"$1"
"""


@pytest.fixture
def batch(tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A stand-in for slurm: starts the job script here."""
    folder = tmp_path / "batch"
    folder.mkdir()
    for name, text in {"sbatch": SBATCH, "scancel": SCANCEL}.items():
        (folder / name).write_text(textwrap.dedent(text))
        (folder / name).chmod(0o755)
    changes = {"BATCH": str(folder), "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    environment |= changes
    for name, value in {**environment, **changes}.items():
        monkeypatch.setenv(name, value)
    yield folder
    kill(jobs(folder))


def jobs(folder: Path) -> list[psutil.Process]:
    """Processes that the stand-in has started and that still run."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("BATCH") == str(folder) and os.getsid(process.pid) != os.getsid(0):
                found.append(process)
        except (ProcessLookupError, psutil.Error):
            continue
    return found


SETTINGS = ClusterConfig(
    cores=2, memory="1GB", queue="short", interface="lo", directives=("--gres=gpu:1",), prologue=("export SEEN=1",)
)


def test_jobs_of_slurm(helper, batch: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    scratch = tmp_path / "run"
    scratch.mkdir()
    back = list(
        map_blocks(
            helper.slow_work, BLOCKS, helper.setup, workers=2, scheduler="slurm", cluster=SETTINGS, scratch=scratch
        )
    )
    assert sorted(s[0] for s in back) == list(BLOCKS)
    assert {s[2] for s in back} == {0, 1}
    script = next(batch.glob("*.sh")).read_text()
    for line in (
        "#SBATCH -p short",
        "#SBATCH --cpus-per-task=2",
        "#SBATCH --mem=954M",
        "#SBATCH --gres=gpu:1",
        "\nexport SEEN=1\n",
        str(scratch),
    ):
        assert line in script
    assert "#SBATCH -t" not in script
    until(lambda: not jobs(batch))
    assert not list(scratch.iterdir())
    assert not capfd.readouterr().err
    assert not files_below(tmp_path / "home")
    assert not files_below(tmp_path / "tmp")


def test_lost_jobs_are_submitted_again(helper, batch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dask

    monkeypatch.setattr(monitor, "WARN_S", 0.5)
    monkeypatch.setattr(monitor, "LOOK_S", 0.2)
    options = {"scheduler": "slurm", "cluster": SETTINGS, "scratch": tmp_path}
    back = []
    with dask.config.set({"distributed.deploy.lost-worker-timeout": "500ms"}):
        for summary in map_blocks(helper.slow_work, range(8), helper.setup, **options):
            if not back:
                kill(jobs(batch))
            back.append(summary)
    assert sorted(s[0] for s in back) == list(range(8))
    assert len((batch / "submitted").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("system", "command", "said"),
    [
        (
            "pbs",
            "qsub",
            [
                "#PBS -q short",
                "#PBS -A us",
                "#PBS -l select=1:ncpus=2:mem=954MB",
                "#PBS -l walltime=01:00",
                "#PBS --gres=gpu:1",
            ],
        ),
        ("lsf", "bsub", ["#BSUB -q short", '#BSUB -P "us"', "#BSUB -n 2", "#BSUB -W 01:00", "#BSUB --gres=gpu:1"]),
        ("sge", "qsub", ["#$ -q short", "#$ -P us", "#$ -l h_rt=01:00", "#$ --gres=gpu:1"]),
    ],
)
def test_jobs_of_others(helper, batch: Path, tmp_path: Path, system: str, command: str, said: list[str]) -> None:
    """What their jobs say; here they are refused."""
    (batch / command).write_text(f"#!/bin/sh\ncat $1 >{batch}/job\nexit 1\n")
    (batch / command).chmod(0o755)
    settings = dataclasses.replace(SETTINGS, account="us", walltime="01:00")
    with pytest.raises(RunError, match=rf"^--scheduler {system}: {command} refuses the job"):
        list(map_blocks(helper.work, BLOCKS, helper.setup, scheduler=system, cluster=settings, scratch=tmp_path))
    lines = (batch / "job").read_text().splitlines()
    assert set(said) | {"export SEEN=1"} <= set(lines)
    assert any("distributed.cli.dask_worker tcp://" in line for line in lines)


def test_jobs_end_when_the_client_is_killed(start, batch: Path) -> None:
    process = start("slow_work", 200, scheduler="slurm")
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    process.kill()
    until(lambda: not jobs(batch), 30)


def test_what_is_wrong_with_a_batch_system(
    helper, batch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_scheduler(None)
    check_scheduler("tcp://10.0.0.1:8786")
    check_scheduler("slurm", SETTINGS)
    with pytest.raises(
        ConfigError, match=r"^--scheduler moab: is neither an address nor a batch system; .* slurm, pbs, lsf, sge$"
    ):
        check_scheduler("moab")
    with pytest.raises(
        ConfigError, match=r"^--scheduler pbs: the command qsub is not on PATH; run wsiseg where jobs are submitted"
    ):
        check_scheduler("pbs")
    with pytest.raises(ConfigError, match=r"^cluster.memory is 'lots'; it must be a size such as 8GB$"):
        check_scheduler("slurm", ClusterConfig(memory="lots"))
    (batch / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: short' >&2\nexit 1\n")
    with pytest.raises(
        RunError,
        match=r"^--scheduler slurm: sbatch refuses the job \(sbatch: error: invalid partition specified: short\); see",
    ):
        list(
            map_blocks(
                helper.work, BLOCKS, helper.setup, workers=2, scheduler="slurm", cluster=SETTINGS, scratch=tmp_path
            )
        )
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    with pytest.raises(
        ConfigError, match=r'^--scheduler slurm: needs dask-jobqueue; in the checkout, pip install "\.\[hpc\]"$'
    ):
        check_scheduler("slurm")


def test_where_the_work_is_done_does_not_change_the_run() -> None:
    config = from_mapping(
        {"scheduler": "slurm", "cluster": {"cores": 8, "queue": "gpu", "directives": ["--gres=gpu:1"]}}, "here"
    )
    assert config.cluster.directives == ("--gres=gpu:1",)
    assert config.hash() == RunConfig().hash()
    with pytest.raises(ConfigError, match=r"^here: cluster.cores is 0; it must lie between 1 and 1024$"):
        from_mapping({"cluster": {"cores": 0}}, "here")
