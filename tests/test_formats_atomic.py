"""Files appear whole or not at all."""

from __future__ import annotations

import errno
import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from wsiseg.errors import ConfigError, RunError
from wsiseg.formats import FILE_NAMES, FORMATS, load_writer
from wsiseg.formats.atomic import atomic_path, write_json

if TYPE_CHECKING:
    from pathlib import Path


def test_a_finished_block_leaves_only_the_file(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.txt"
    with atomic_path(target) as partial:
        assert partial.parent == target.parent
        partial.write_text("one")
        assert not target.exists()
    assert target.read_text() == "one"
    assert list(target.parent.iterdir()) == [target]


def test_an_exception_keeps_the_old_file_and_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_path(target) as partial:  # noqa: PT012
        partial.write_text("half")
        1 / 0  # noqa: B018
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_two_writers_do_not_share_a_name(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a") as first, atomic_path(tmp_path / "a") as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "a").read_text() == "first"


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    with (
        pytest.raises(RunError, match=r"a\.txt: cannot be written \(No space left on device\); make room"),
        atomic_path(tmp_path / "a.txt"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_block_that_writes_nothing_is_a_bug_not_a_run_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="partial"), atomic_path(tmp_path / "a.txt"):
        pass


def test_json_is_sorted_indented_and_finite(tmp_path: Path) -> None:
    write_json(tmp_path / "m.json", {"b": np.float32(0.5), "a": [1, float("nan")], "µ": np.arange(2)})
    text = (tmp_path / "m.json").read_text("utf-8")
    assert text.startswith('{\n  "a": [')
    assert json.loads(text) == {"a": [1, None], "b": 0.5, "µ": [0, 1]}


def test_every_registered_writer_loads_and_has_a_file_name() -> None:
    assert set(FORMATS) == set(FILE_NAMES)
    assert all(callable(load_writer(name)) for name in FORMATS)
    with pytest.raises(ConfigError, match="unknown format 'gpkg'; allowed are geojson, parquet"):
        load_writer("gpkg")


def test_leftovers_of_dead_writers_are_removed_and_live_ones_kept(tmp_path: Path) -> None:
    """What a killed process left goes; what a running one is writing stays, as do files that are not ours."""
    import os
    import subprocess
    import sys

    from wsiseg.formats.atomic import _host
    from wsiseg.runs import RunFolder, drop_stale_files

    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / "parts").mkdir()
    left = [tmp_path / f"{folder}.cells.parquet.{_host()}.{dead.pid}.ab12cd34.partial" for folder in ("", "parts/")]
    kept = [tmp_path / f".cells.parquet.{who}.ab12cd34.partial" for who in (f"{_host()}.{os.getpid()}", f"elsewhere.{dead.pid}")]
    kept += [tmp_path / "parts/0000-0000.parquet", tmp_path / "mine.txt"]
    stale = tmp_path / "parts/0009-0009.parquet"
    for path in (*left, *kept, stale):
        path.touch()
    drop_stale_files(RunFolder(tmp_path), {"0000-0000"})
    assert not any(p.exists() for p in (*left, stale))
    assert all(p.exists() for p in kept)
