"""Folders of runs: who may use which."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from wsiseg.errors import RunError
from wsiseg.runs.folder import RunFolder, _create, check_folder, claim_folder, find_folder
from wsiseg.runs.manifest import Manifest, Status

if TYPE_CHECKING:
    from pathlib import Path


def manifest(slide: str, run_hash: str = "a", **config: object) -> Manifest:
    return Manifest(slide={"path": slide}, config=config, run_hash=run_hash)


def test_two_slides_of_one_name(tmp_path: Path) -> None:
    first = claim_folder(tmp_path, manifest("/x/HE.svs"), overwrite=False)
    second = claim_folder(tmp_path, manifest("/y/HE.svs"), overwrite=False)
    assert first.path.name == "HE"
    assert second.path.name.startswith("HE-")
    assert find_folder(tmp_path, "/x/HE.svs") == first
    assert find_folder(tmp_path, "/y/HE.svs") == second


def test_the_slower_of_two_that_start_together_gives_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """B saw no manifest, then A's came into being: B moves on to its own folder, A's is untouched."""
    claim_folder(tmp_path, manifest("/x/HE.svs"), overwrite=False)
    assert _create(RunFolder(tmp_path / "HE"), manifest("/y/HE.svs"), exclusive=True) is False
    assert RunFolder(tmp_path / "HE").manifest() == manifest("/x/HE.svs")
    assert sorted(p.name for p in (tmp_path / "HE").iterdir()) == ["manifest.json", "parts"]


@pytest.mark.parametrize(
    ("slide", "folder"),
    [("a/s.svs", "s"), ("a/s.ome.tif", "s"), ("a/s.ome.tiff", "s"), ("a/s.v2.ndpi", "s.v2"), ("s3://b/k.svs", "k")],
)
def test_names_of_folders(slide: str, folder: str, tmp_path: Path) -> None:
    assert find_folder(tmp_path, slide).path.name == folder


def test_another_run_is_refused_and_named(tmp_path: Path) -> None:
    folder = claim_folder(tmp_path, manifest("/x/s.svs"), overwrite=False)
    check_folder(folder, "a", overwrite=False)
    with pytest.raises(RunError, match="holds a run with another configuration"):
        check_folder(folder, "b", overwrite=False)
    check_folder(folder, "b", overwrite=True)


def test_overwriting_removes_the_final_files_of_the_old_run(tmp_path: Path) -> None:
    folder = claim_folder(tmp_path, manifest("/x/s.svs"), overwrite=False)
    (folder.path / "cells.parquet").write_text("old")
    claim_folder(tmp_path, manifest("/x/s.svs"), overwrite=True)
    assert (folder.path / "cells.parquet").exists()
    claim_folder(tmp_path, manifest("/x/s.svs", "b"), overwrite=True)
    assert not (folder.path / "cells.parquet").exists()


def test_the_slower_of_two_with_other_settings_is_refused(tmp_path: Path) -> None:
    """Both saw an empty folder; the manifest of the first stays."""
    claim_folder(tmp_path, manifest("/x/s.svs"), overwrite=False)
    with pytest.raises(RunError, match="holds a run with another configuration"):
        _create(RunFolder(tmp_path / "s"), manifest("/x/s.svs", "b"), exclusive=True)
    assert RunFolder(tmp_path / "s").manifest() == manifest("/x/s.svs")


def test_the_refusal_names_the_settings_that_differ(tmp_path: Path) -> None:
    held = {
        "method": "apg",
        "mpp": None,
        "workers": 1,
        "masks": {"min_score": 0.5, "thin_um": 0.1},
        "formats": ["parquet"],
    }
    folder = claim_folder(tmp_path, manifest("/x/s.svs", **held), overwrite=False)
    wanted = held | {"method": "cop", "mpp": 0.25, "workers": 8, "masks": {"min_score": 0.4, "thin_um": 0.1}}
    with pytest.raises(RunError) as refused:
        check_folder(folder, "b", overwrite=False, config=wanted)
    differs = "method apg there, cop here; mpp none there, 0.25 here; masks.min_score 0.5 there, 0.4 here"
    assert f"another configuration ({differs}); pass another --out" in str(refused.value)
    many = held | {"method": "cop", "mpp": 0.25, "masks": {"min_score": 0.4, "thin_um": 0.2}}
    with pytest.raises(RunError, match="1 more"):
        check_folder(folder, "b", overwrite=False, config=many)
    with pytest.raises(RunError, match="the same settings, but another scale, seeds file"):
        check_folder(folder, "b", overwrite=False, config=held | {"workers": 8})


def test_a_manifest_comes_back_as_it_was_written(tmp_path: Path) -> None:
    """Results once there are any; keys of another version stay; what is not of the file does not get into it."""
    path = tmp_path / "manifest.json"
    begun = manifest("/x/s.svs", mpp=0.5)
    begun.write(path)
    assert Manifest.read(path) == begun
    assert "counts" not in json.loads(path.read_text())
    ended = replace(
        begun,
        status=Status.COMPLETE,
        counts={"cells": 3},
        seconds={"total": 1.5},
        files=("cells.parquet",),
        other={"comment": "kept"},
        already=True,
    )
    ended.write(path)
    content = json.loads(path.read_text())
    assert (content["counts"], content["files"], content["failures"]) == ({"cells": 3}, ["cells.parquet"], [])
    assert content["comment"] == "kept"
    assert not {"already", "other", "retyped", "status_before"} & set(content)
    assert Manifest.read(path) == replace(ended, already=False)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"run_hash": 1, "slide": {}, "config": {}}', '{"run_hash": "a", "slide": []}']
)
def test_somebody_elses_manifest_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    assert Manifest.read(tmp_path / "manifest.json") is None
    assert RunFolder(tmp_path).manifest() is None
