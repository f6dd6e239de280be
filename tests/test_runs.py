"""Folders of runs: who may use which."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from wsiseg.errors import RunError
from wsiseg.runs.folder import RunFolder, _create, check_folder, claim_folder, find_folder

if TYPE_CHECKING:
    from pathlib import Path


def manifest(slide: str, run_hash: str = "a") -> dict[str, object]:
    return {"slide": {"path": slide}, "config": {}, "run_hash": run_hash}


def test_two_slides_of_one_name(tmp_path: Path) -> None:
    first = claim_folder(tmp_path, "/x/HE.svs", manifest("/x/HE.svs"), overwrite=False)
    second = claim_folder(tmp_path, "/y/HE.svs", manifest("/y/HE.svs"), overwrite=False)
    assert first.path.name == "HE"
    assert second.path.name.startswith("HE-")
    assert find_folder(tmp_path, "/x/HE.svs") == first
    assert find_folder(tmp_path, "/y/HE.svs") == second


def test_the_slower_of_two_that_start_together_gives_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """B saw no manifest, then A's came into being: B moves on to its own folder, A's is untouched."""
    claim_folder(tmp_path, "/x/HE.svs", manifest("/x/HE.svs"), overwrite=False)
    assert _create(RunFolder(tmp_path / "HE"), manifest("/y/HE.svs"), exclusive=True) is False
    assert RunFolder(tmp_path / "HE").read_manifest() == manifest("/x/HE.svs")
    assert sorted(p.name for p in (tmp_path / "HE").iterdir()) == ["manifest.json", "parts"]


@pytest.mark.parametrize(
    ("slide", "folder"),
    [("a/s.svs", "s"), ("a/s.ome.tif", "s"), ("a/s.ome.tiff", "s"), ("a/s.v2.ndpi", "s.v2"), ("s3://b/k.svs", "k")],
)
def test_names_of_folders(slide: str, folder: str, tmp_path: Path) -> None:
    assert find_folder(tmp_path, slide).path.name == folder


def test_another_run_is_refused_and_named(tmp_path: Path) -> None:
    folder = claim_folder(tmp_path, "/x/s.svs", manifest("/x/s.svs"), overwrite=False)
    check_folder(folder, "a", overwrite=False)
    with pytest.raises(RunError, match="holds a run with another configuration"):
        check_folder(folder, "b", overwrite=False)
    check_folder(folder, "b", overwrite=True)


def test_overwriting_removes_the_final_files_of_the_old_run(tmp_path: Path) -> None:
    folder = claim_folder(tmp_path, "/x/s.svs", manifest("/x/s.svs"), overwrite=False)
    (folder.path / "cells.parquet").write_text("old")
    claim_folder(tmp_path, "/x/s.svs", manifest("/x/s.svs"), overwrite=True)
    assert (folder.path / "cells.parquet").exists()
    claim_folder(tmp_path, "/x/s.svs", manifest("/x/s.svs", "b"), overwrite=True)
    assert not (folder.path / "cells.parquet").exists()


def test_the_slower_of_two_with_other_settings_is_refused(tmp_path: Path) -> None:
    """Both saw an empty folder; the manifest of the first stays."""
    claim_folder(tmp_path, "/x/s.svs", manifest("/x/s.svs"), overwrite=False)
    with pytest.raises(RunError, match="holds a run with another configuration"):
        _create(RunFolder(tmp_path / "s"), manifest("/x/s.svs", "b"), exclusive=True)
    assert RunFolder(tmp_path / "s").read_manifest() == manifest("/x/s.svs")
