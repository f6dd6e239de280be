"""Files appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from wsiseg.errors import ConfigError, RunError
from wsiseg.formats import FILE_NAMES, FORMATS, load_writer
from wsiseg.runtime import machine
from wsiseg.runtime.atomic import atomic_folder, atomic_path, is_abandoned, write_json

if TYPE_CHECKING:
    from collections.abc import Callable


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


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "cells.zarr"
    for content in ("old", "new"):
        with atomic_folder(folder) as partial:
            partial.mkdir()
            (partial / "a").write_text(content)
    assert (folder / "a").read_text() == "new"
    with pytest.raises(FileNotFoundError), atomic_folder(folder):
        pass  # nothing was made, so nothing can take its place
    assert [p.name for p in tmp_path.iterdir()] == ["cells.zarr"]
    assert (folder / "a").read_text() == "new"


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
    from wsiseg.runs.folder import RunFolder, drop_stale_files

    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / "parts").mkdir()
    left = [
        tmp_path / f"{folder}.cells.parquet.{machine.label()}.{dead.pid}.ab12cd34.partial" for folder in ("", "parts/")
    ]
    kept = [
        tmp_path / f".cells.parquet.{who}.ab12cd34.partial"
        for who in (f"{machine.label()}.{os.getpid()}", f"elsewhere.{dead.pid}")
    ]
    kept += [tmp_path / "parts/0000-0000.parquet", tmp_path / "mine.txt"]
    stale = tmp_path / "parts/0009-0009.parquet"
    for path in (*left, *kept, stale):
        path.touch()
    drop_stale_files(RunFolder(tmp_path), {"0000-0000"})
    assert not any(p.exists() for p in (*left, stale))
    assert all(p.exists() for p in kept)


def test_a_writer_of_another_container_with_the_same_host_name_is_not_thought_dead(tmp_path: Path) -> None:
    """Its number is that of no process here, or of another; a name of old that tells the host alone is not enough to know."""
    with atomic_path(tmp_path / "a") as mine:
        assert mine.name.split(".")[-4] == machine.label()
        assert not mine.exists()
        assert not is_abandoned(mine)
        mine.touch()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = machine.label().rpartition("-")[0]
    here = tmp_path / f".a.{machine.label()}.{dead.pid}.ab12cd34.partial"
    others = [
        tmp_path / f".a.{who}.ab12cd34.partial"
        for who in (f"{host}-00000000.{dead.pid}", f"{host}.{dead.pid}", f"{machine.label()}.0", "x")
    ]
    for path in (here, *others):
        path.touch()
    assert is_abandoned(here)
    assert not any(map(is_abandoned, others))
    long_ago = time.time() - 2 * 86_400
    for path in others:
        os.utime(path, (long_ago, long_ago))
    assert all(map(is_abandoned, others))
    assert not is_abandoned(tmp_path / ".gone.elsewhere.1.ab12cd34.partial"), (
        "another process cleaned up at the same moment"
    )


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ESTALE, errno.EIO, errno.EACCES])
def test_a_rename_that_took_effect_is_a_success_whatever_the_server_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    true_replace = Path.replace

    def replace(source: Path, target: Path) -> None:
        true_replace(source, target)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "replace", replace)
    with atomic_path(tmp_path / "a") as partial:
        partial.write_text("new")
    assert (tmp_path / "a").read_text() == "new"
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def _leave(source: Path, target: Path) -> None:
    """Do nothing."""


def _lose(source: Path, target: Path) -> None:
    source.unlink()


def _replace_by_another(source: Path, target: Path) -> None:
    """Of the same size."""
    target.write_text("NEW")
    source.unlink()


@pytest.mark.parametrize("instead", [_leave, _lose, _replace_by_another])
@pytest.mark.parametrize("there", [True, False])
def test_a_rename_that_did_not_take_effect_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instead: Callable[[Path, Path], None], there: bool
) -> None:
    if there:
        (tmp_path / "a").write_text("old")

    def replace(source: Path, target: Path) -> None:
        instead(source, target)
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(OSError, match="Stale file handle"), atomic_path(tmp_path / "a") as partial:
        partial.write_text("new")
    left = {"old"} if there else set()
    assert {p.read_text() for p in tmp_path.iterdir()} == ({"NEW"} if instead is _replace_by_another else left)


FILL = """
import resource, sys
from pathlib import Path
from wsiseg.errors import RunError
from wsiseg.runtime.atomic import atomic_path
if len(sys.argv) > 2:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
folder = Path(sys.argv[1])
(folder / "a").write_text("old")
for buffering in (0, -1):
    try:
        with atomic_path(folder / "a") as partial, partial.open("wb", buffering=buffering) as file:
            for _ in range(300):
                file.write(bytes(8192))
    except RunError as error:
        print(error)
print((folder / "a").read_text(), [p.name for p in folder.iterdir()])
"""


def _said(path: Path, reason: str) -> list[str]:
    return [f"{path}: cannot be written ({reason}); make room, or choose a folder you may write with --out"] * 2 + [
        f"old ['{path.name}']"
    ]


def test_a_disk_that_is_full_keeps_the_old_file_and_no_half_of_the_new_one(tmp_path: Path) -> None:
    mount = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size=1m tmpfs "{tmp_path}" && exec "$0" "$@"']
    try:
        if subprocess.run([*mount, "true"], capture_output=True, check=False).returncode:
            pytest.skip("no mount of one's own is permitted here")
    except OSError:
        pytest.skip("no mount of one's own on this system")
    done = subprocess.run([*mount, sys.executable, "-c", FILL, tmp_path], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == _said(tmp_path / "a", "No space left on device"), done.stderr


def test_a_file_larger_than_the_system_allows_is_one_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FILL, tmp_path, "1000000"], capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == _said(tmp_path / "a", "File too large"), done.stderr


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_only_at_the_sync_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Network file systems say so no earlier."""

    def fsync(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with (
        pytest.raises(RunError, match=r"a: cannot be written \(.*\); make room"),
        atomic_path(tmp_path / "a") as partial,
    ):
        partial.write_text("new")
    assert not list(tmp_path.iterdir())
