"""What the fault tests share: a small real slide, the command that runs it in many small blocks, and its undisturbed result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

FILES = ("cells.parquet", "cells.geojson.gz", "bank.safetensors")
SETTINGS = {
    "stain": "ihc",
    "tiling": {"tile_um": 64, "block_tiles": 1},
}  # the stain given: nothing has to be said about it


def files_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


@dataclass(frozen=True)
class Run:
    """``wsiseg run`` of one slide as a process: 16 blocks of a tile each."""

    slide: Path
    seeds: Path
    settings: Path
    env: dict[str, str] = field(default_factory=dict)

    def command(self, out: Path, *more: object) -> list[str]:
        start = [
            sys.executable,
            "-m",
            "wsiseg",
            "run",
            str(self.slide),
            "--seeds",
            str(self.seeds),
            "--config",
            str(self.settings),
        ]
        return [*start, "--out", str(out), *map(str, more)]

    def start(self, out: Path, *more: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(out, *more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self.environment
        )

    def __call__(self, out: Path, *more: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(out, *more), capture_output=True, text=True, check=False, env=self.environment, timeout=300
        )

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "OMP_NUM_THREADS": "1", **self.env}

    def folder(self, out: Path) -> Path:
        return out / self.slide.stem


@pytest.fixture(scope="session")
def run(demo: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    settings = tmp_path_factory.mktemp("settings") / "settings.json"
    settings.write_text(json.dumps(SETTINGS))
    return Run(*demo, settings)


@pytest.fixture(scope="session")
def undisturbed(
    run: Run, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, bytes], dict[str, object], float]:
    """Final files, manifest, and how long the process took."""
    out = tmp_path_factory.mktemp("undisturbed")
    begin = time.monotonic()
    done = run(out)
    assert done.returncode == 0, done.stderr
    return (
        files_of(run.folder(out)),
        json.loads((run.folder(out) / "manifest.json").read_text()),
        time.monotonic() - begin,
    )


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def kill(process: subprocess.Popen[str], number: int = signal.SIGKILL) -> None:
    process.send_signal(number)
    process.wait()
