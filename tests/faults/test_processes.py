"""Processes that are killed, asked to stop, started twice, or share a run: the same files in the end, or a sentence."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wsiseg.formats.geoparquet import read_geoparquet

sys.path.insert(0, str(Path(__file__).parent))
from conftest import Run, files_of, kill, wait_for


def parts(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in folder.glob("parts/*.parquet")}


def is_claimed(folder: Path) -> bool:
    """Tell whether a claim names its owner. Nobody can tell whose an empty one is: others wait two minutes for a sign of life."""
    with contextlib.suppress(FileNotFoundError):
        return any(p.stat().st_size for p in folder.glob("parts/*.claim"))
    return False


def merge(run: Run, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "wsiseg", "merge", str(folder), *more]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=run.environment)


def said(errors: str) -> list[str]:
    """Lines of stderr, less those of progress, which come every 30 s."""
    return [line for line in errors.splitlines() if not line.startswith("ihc.tiff: ")]


def unexpected(errors: str) -> list[str]:
    """Lines of stderr, less those of progress and those on clicks that could mean two classes, which are about the demo's picture."""
    return [line for line in said(errors) if not line.startswith("Warning: the clicks on ")]


def test_kill_9_at_random_moments(run: Run, undisturbed: tuple[dict[str, bytes], dict, float], tmp_path: Path) -> None:
    """Twelve kills at any moment, from the start of Python to the last rename: no finished part is repeated, and the files are the same."""
    expected, _, seconds = undisturbed
    chance = random.Random(6)
    kills, ends, out = 0, 0, tmp_path / "0"
    seen: dict[str, int] = {}
    while kills < 12:
        process = run.start(out)
        try:
            process.wait(chance.uniform(0.3, 1.0) * min(seconds, 6))
        except subprocess.TimeoutExpired:
            kill(process)
            kills += 1
        now = parts(run.folder(out))
        assert all(now.get(name) == written for name, written in seen.items()), "a finished part was written again"
        seen = now
        if process.returncode == 0:  # it was quicker: begin anew
            assert files_of(run.folder(out)) == expected
            ends, seen = ends + 1, {}
            out = tmp_path / str(ends)
    done = run(out)
    assert done.returncode == 0, done.stderr
    assert files_of(run.folder(out)) == expected
    left = [p for p in run.folder(out).rglob("*") if p.name.endswith((".partial", ".claim", ".draft"))]
    assert not left, f"leftovers of killed processes: {left}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_finishes_the_block_in_hand(
    run: Run, undisturbed: tuple[dict[str, bytes], dict, float], tmp_path: Path, number: int
) -> None:
    process = run.start(tmp_path)
    wait_for(lambda: parts(run.folder(tmp_path)) or process.poll() is not None)
    assert process.poll() is None
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 3
    assert signal.Signals(number).name in errors
    assert "run the same command again to resume" in errors
    assert "Traceback" not in errors
    before = parts(run.folder(tmp_path))
    assert 0 < len(before) < 16
    assert not [p.name for p in run.folder(tmp_path).rglob("*") if p.name.endswith((".claim", ".partial", ".part"))]
    assert json.loads((run.folder(tmp_path) / "manifest.json").read_text())["status"] == "interrupted"
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert {name: written for name, written in parts(run.folder(tmp_path)).items() if name in before} == before
    assert files_of(run.folder(tmp_path)) == undisturbed[0]


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """Processes of Python below a process that have the model: the workers, not their nannies."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            held = int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, ValueError, IndexError):
            continue
        if parent == process.pid and held > 200 << 20:
            found.append(int(folder.name))
    return found


def test_a_worker_is_killed(run: Run, undisturbed: tuple[dict[str, bytes], dict, float], tmp_path: Path) -> None:
    """Two Dask processes, one of them killed in the middle: replaced, and the same files."""
    process = run.start(tmp_path, "--workers", 2)
    wait_for(lambda: (parts(run.folder(tmp_path)) and workers_of(process)) or process.poll() is not None)
    assert process.poll() is None
    os.kill(workers_of(process)[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert unexpected(errors) == []
    assert files_of(run.folder(tmp_path)) == undisturbed[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_all_processes(run: Run, tmp_path: Path, number: int) -> None:
    """Ctrl-C reaches every process of a terminal, a walltime's warning those of a job; the current blocks are finished anyway."""
    command = run.command(tmp_path, "--workers", 2)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=run.environment, start_new_session=True
    )
    wait_for(lambda: parts(run.folder(tmp_path)) or process.poll() is not None)
    assert process.poll() is None
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 3, errors
    assert "Traceback" not in errors
    assert len(said(errors)) == 2
    assert not list(run.folder(tmp_path).rglob("*.claim"))
    assert json.loads((run.folder(tmp_path) / "manifest.json").read_text())["status"] == "interrupted"


def test_twice_is_now(run: Run, tmp_path: Path) -> None:
    process = run.start(tmp_path)
    wait_for(lambda: parts(run.folder(tmp_path)) or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    assert process.stderr
    assert any(
        "SIGTERM: finishing the current block" in line for line in process.stderr
    )  # signals that nobody took merge
    process.send_signal(signal.SIGTERM)
    process.wait(10)
    assert process.returncode == -signal.SIGTERM


def test_five_shards_in_any_order_and_a_merge(
    run: Run, undisturbed: tuple[dict[str, bytes], dict, float], tmp_path: Path
) -> None:
    """Two at a time, one of them killed and submitted again; the merge refuses until all is there or it is told to, and can be repeated."""
    folder = run.folder(tmp_path)
    numbers = random.Random(1).sample(range(1, 6), 5)
    done = run(tmp_path, "--shard", f"{numbers[0]}/5")
    assert done.returncode == 0, done.stderr
    assert f"shard {numbers[0]}/5: " in done.stdout
    refused = merge(run, folder)
    assert refused.returncode == 1
    assert "blocks are missing" in refused.stderr
    assert f"they belong to shards {', '.join(f'{k}/5' for k in range(1, 6) if k != numbers[0])}" in refused.stderr
    assert not (folder / "cells.parquet").exists()
    finished = len(parts(folder))
    done = merge(run, folder, "--allow-missing")
    assert done.returncode == 3
    assert re.search(r"Missing: block \d{4}-\d{4}: none of its tiles was worked on \(1\)", done.stderr)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["status"] == "incomplete"
    assert manifest["counts"]["blocks_missing"] == manifest["counts"]["tiles_failed"] == 16 - finished
    assert 0 < manifest["counts"]["cells"] < undisturbed[1]["counts"]["cells"]
    victim = run.start(tmp_path, "--shard", f"{numbers[1]}/5")
    wait_for(lambda: is_claimed(folder) or victim.poll() is not None)
    kill(victim)
    for k in (1, 3):
        both = [run.start(tmp_path, "--shard", f"{n}/5") for n in numbers[k : k + 2]]
        assert [p.wait(200) for p in both] == [0, 0], [p.communicate()[1] for p in both]
    assert merge(run, folder).returncode == 0
    assert files_of(folder) == undisturbed[0]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["status"] == "complete"
    assert manifest["seconds"]["encode"] > 0
    assert merge(run, folder).returncode == 0
    assert files_of(folder) == undisturbed[0]
    assert manifest["counts"] == undisturbed[1]["counts"] | {"blocks_resumed": 16}
    again = run(tmp_path)
    assert again.returncode == 0
    assert "already complete" in again.stdout


def test_two_runs_on_one_folder_share_the_work(
    run: Run, undisturbed: tuple[dict[str, bytes], dict, float], tmp_path: Path
) -> None:
    """The same command twice at once: no block is done twice, one writes, both end well."""
    both = [run.start(tmp_path, "--log-json", tmp_path / f"{k}.log") for k in range(2)]
    said = [p.communicate(timeout=200) for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert files_of(run.folder(tmp_path)) == undisturbed[0]
    events = [[json.loads(line) for line in (tmp_path / f"{k}.log").read_text().splitlines()] for k in range(2)]
    done = [{e["block"] for e in mine if e["event"] == "block"} for mine in events]
    assert len(done[0] | done[1]) == 16
    assert not done[0] & done[1], "a block was done twice"
    assert sum(e["event"] == "slide" for mine in events for e in mine) == 1


def test_the_second_run_goes_on_when_the_first_is_killed(
    run: Run, undisturbed: tuple[dict[str, bytes], dict, float], tmp_path: Path
) -> None:
    first = run.start(tmp_path)
    wait_for(lambda: parts(run.folder(tmp_path)) or first.poll() is not None)
    second = run.start(tmp_path)
    time.sleep(2)
    kill(first)
    _, errors = second.communicate(timeout=200)
    assert second.returncode == 0, errors
    assert files_of(run.folder(tmp_path)) == undisturbed[0]


@pytest.mark.parametrize("more", [("--workers", "2"), ("--shard", "1/1")])
def test_nothing_is_written_elsewhere(run: Run, tmp_path: Path, more: tuple[str, ...]) -> None:
    """No file in the home folder, the folder for temporary files, the current one or beside the slide."""
    home, temporary, here, out = (tmp_path / name for name in ("home", "tmp", "here", "out"))
    for folder in (home, temporary, here):
        folder.mkdir()
    beside = sorted(run.slide.parent.rglob("*"))
    env = {**run.environment, "HOME": str(home), "TMPDIR": str(temporary), "PYTHONDONTWRITEBYTECODE": "1"}
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "DASK_CONFIG"):
        env.pop(name, None)
    done = subprocess.run(run.command(out, *more), capture_output=True, text=True, check=False, env=env, cwd=here)
    assert done.returncode == 0, done.stderr
    assert unexpected(done.stderr) == []
    assert [p for folder in (home, temporary, here) for p in folder.rglob("*")] == []
    assert sorted(run.slide.parent.rglob("*")) == beside
    assert not [p for p in run.folder(out).rglob("*") if p.is_dir() and p.name != "parts"], "a scratch folder was left"


def test_a_list_of_slides(run: Run, tmp_path: Path) -> None:
    """A bad row in the middle stops nothing; the same call repeats only that one."""
    (tmp_path / "bad.svs").write_bytes(b"no slide")
    rows = [
        "path;seeds;name",
        f"{run.slide};{run.seeds};first",
        "bad.svs;;",
        f"{run.slide.resolve().parent / '.' / run.slide.name};;second",
    ]
    listed = tmp_path / "list.csv"
    listed.write_text("\n".join(rows[:3]) + "\n")
    start = [
        sys.executable,
        "-m",
        "wsiseg",
        "run",
        "--slides",
        str(listed),
        "--config",
        str(run.settings),
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(start, capture_output=True, text=True, check=False, env=run.environment)
    assert done.returncode == 3, done.stderr
    assert "1 of 2 slides complete" in done.stdout
    assert "bad.svs: not a slide" in done.stderr or "bad.svs" in done.stderr
    summary = (tmp_path / "out" / "summary.csv").read_text().splitlines()
    assert [line.split(",")[1] for line in summary] == ["status", "complete", "failed"]
    _, typing, _ = read_geoparquet(tmp_path / "out" / "first" / "cells.parquet")
    assert len(typing.names) == 4
    (tmp_path / "bad.svs").write_bytes(run.slide.read_bytes())
    before = parts(tmp_path / "out" / "first")
    done = subprocess.run(start, capture_output=True, text=True, check=False, env=run.environment)
    assert done.returncode == 0, done.stderr
    assert "already complete" in done.stdout
    assert parts(tmp_path / "out" / "first") == before
    assert "2 of 2 slides complete" in done.stdout


def test_a_list_in_shards(run: Run, tmp_path: Path) -> None:
    for name in "abc":
        os.link(run.slide, tmp_path / f"{name}.tiff") if run.slide.stat().st_dev == tmp_path.stat().st_dev else None
        if not (tmp_path / f"{name}.tiff").exists():
            (tmp_path / f"{name}.tiff").write_bytes(run.slide.read_bytes())
    (tmp_path / "list.csv").write_text("path\na.tiff\nb.tiff\nc.tiff\n")
    start = [
        sys.executable,
        "-m",
        "wsiseg",
        "run",
        "--slides",
        str(tmp_path / "list.csv"),
        "--out",
        str(tmp_path / "out"),
        "--shard",
        "slurm",
    ]
    array = {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "2", "SLURM_ARRAY_TASK_COUNT": "2"}
    both = [
        subprocess.Popen(
            start, stdout=subprocess.PIPE, text=True, env={**run.environment, **array, "SLURM_ARRAY_TASK_ID": str(k)}
        )
        for k in (1, 2)
    ]
    said = [p.communicate(timeout=200)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0]
    assert "2 of 2 slides complete" in said[0]
    assert "1 of 1 slide complete" in said[1]
    assert sorted(p.parent.name for p in (tmp_path / "out").glob("*/cells.parquet")) == ["a", "b", "c"]
