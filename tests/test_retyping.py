"""Typing a finished run again: `wsiseg type`, banks, and what can be wrong with them."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wsiseg.celltypes.assignment import assign_types, set_click_labels
from wsiseg.config import RunConfig
from wsiseg.errors import FormatError
from wsiseg.evaluation import evaluate
from wsiseg.formats.bank import read_bank, write_bank
from wsiseg.formats.geojson import validate_geojson
from wsiseg.formats.geoparquet import read_geoparquet, read_table
from wsiseg.formats.seeds import read_seeds
from wsiseg.models import load_types
from wsiseg.runs.retype import bank_of_table, type_run
from wsiseg.viewer.cells import stored_cells
from wsiseg.viewer.preview import Preview

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Command = Callable[..., tuple[int, str]]

CLICKS = {"epithelium": [[424, 112]], "immune": [[296, 280]], "stroma": [[189, 356]]}


def seeds_of(folder: Path, name: str, clicks: dict[str, list[list[float]]]) -> Path:
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"version": 1, "types": [{"name": n, "points": p} for n, p in clicks.items()]}))
    return path


@pytest.fixture(scope="module")
def finished(wsiseg: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the demo with its seeds; not to be changed."""
    folder = tmp_path_factory.mktemp("retyping")
    assert wsiseg("demo", folder / "demo")[0] == 0
    status, output = wsiseg(
        "run",
        folder / "demo/ihc.tiff",
        "--seeds",
        seeds_of(folder, "a", CLICKS),
        "--out",
        folder / "out",
        "--device",
        "cpu",
    )
    assert status == 0, output
    return folder / "out/ihc"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "ihc")


def test_the_same_clicks_give_the_same_types(wsiseg: Command, run: Path) -> None:
    before = read_geoparquet(run / "cells.parquet")
    status, output = wsiseg("type", run, "--seeds", seeds_of(run.parent, "same", CLICKS))
    assert status == 0, output
    after = read_geoparquet(run / "cells.parquet")
    np.testing.assert_array_equal(before[1].codes, after[1].codes)
    np.testing.assert_array_equal(before[0].descriptors, after[0].descriptors)
    assert (before[0].polygons == after[0].polygons).all()


def with_old_column(path: Path) -> None:
    """The table as earlier versions wrote it: its types in the column ``type``."""
    table = pq.read_table(path)
    names = ["type" if name == "cell_type" else name for name in table.column_names]
    old = pa.schema(
        [field.with_name(name) for field, name in zip(table.schema, names, strict=True)], metadata=table.schema.metadata
    )
    pq.write_table(table.rename_columns(names).cast(old), path, row_group_size=20_000)
    assert "cell_type" not in pq.read_schema(path).names


def test_a_table_with_the_old_column_is_read_scored_and_typed_again(wsiseg: Command, run: Path) -> None:
    """`type` became `cell_type`; a table of an earlier version gives the same cells, and gets the new name when it is typed again."""
    path = run / "cells.parquet"
    before, types = read_geoparquet(path), pq.read_table(path)["cell_type"].to_pylist()
    shutil.copy(path, run / "truth.parquet")
    with_old_column(path)
    after = read_geoparquet(path)
    np.testing.assert_array_equal(before[1].codes, after[1].codes)
    assert (before[0].polygons == after[0].polygons).all()
    scores = evaluate(path, run / "truth.parquet")
    assert scores.pooled["macro_f1"] == scores.pooled["type_accuracy"] == 1
    status, output = wsiseg("type", run, "--seeds", seeds_of(run.parent, "same", CLICKS))
    assert status == 0, output
    assert "type" not in pq.read_schema(path).names
    assert pq.read_table(path)["cell_type"].to_pylist() == types


def test_other_clicks_change_types_and_nothing_else(wsiseg: Command, run: Path) -> None:
    old = pq.read_table(run / "cells.parquet")
    status, output = wsiseg(
        "type", run, "--seeds", seeds_of(run.parent, "other", {"gland": CLICKS["epithelium"], "rest": CLICKS["stroma"]})
    )
    assert status == 0, output
    new = pq.read_table(run / "cells.parquet")
    assert set(new["cell_type"].to_pylist()) <= {"gland", "rest", "unassigned"}
    assert {"gland", "rest"} <= set(new["cell_type"].to_pylist())
    for name in old.schema.names:
        if name not in ("cell_type", "type_score", "type_margin", "prototype") and ": " not in name:
            assert new[name].equals(old[name]), name
    assert [name for name in new.schema.names if ": " in name] == ["nearest_um: gland", "nearest_um: rest"]
    with gzip.open(run / "cells.geojson.gz") as file:
        shown = json.load(file)["features"][0]["properties"]["measurements"]
    assert shown["Distance to detection gland µm"] == pytest.approx(new["nearest_um: gland"][0].as_py(), abs=1e-3)
    manifest = json.loads((run / "manifest.json").read_text())
    counts = {k: new["cell_type"].to_pylist().count(k) for k in ("gland", "rest", "unassigned")}
    assert manifest["types"] == {"unassigned": counts["unassigned"], "gland": counts["gland"], "rest": counts["rest"]}
    assert manifest["typing"]["types"]["gland"]["clicks"] == [[424, 112]]
    kind = manifest["typing"]["types"]["gland"]["kind"]
    assert set(kind) == {"lymphocyte", "tumour or epithelial", "stromal"}
    assert 0 < sum(kind.values()) <= 1.01  # the rest is "none of them"
    assert validate_geojson(run / "cells.geojson.gz") == []
    bank, note = read_bank(run / "bank.safetensors")
    assert bank.names == ("gland", "rest")
    assert note["slide"] == "ihc.tiff"


def test_parquet_alone_leaves_no_old_types_behind(wsiseg: Command, run: Path) -> None:
    status, output = wsiseg(
        "type", run, "--seeds", seeds_of(run.parent, "p", {"gland": CLICKS["epithelium"]}), "--format", "parquet"
    )
    assert status == 0, output
    assert not (run / "cells.geojson.gz").exists()
    assert json.loads((run / "manifest.json").read_text())["files"] == ["cells.parquet", "bank.safetensors"]


def test_a_negative_click_takes_a_cell_away(wsiseg: Command, run: Path) -> None:
    cells, typing, _ = read_geoparquet(run / "cells.parquet")
    row = int(np.flatnonzero((typing.codes == 3) & (typing.scores < 1))[0])
    centre = cells.polygons[row].centroid
    seeds = run.parent / "negative.json"
    types = [{"name": n, "points": p} for n, p in CLICKS.items()]
    types[2]["negative"] = [[centre.x, centre.y]]
    seeds.write_text(json.dumps({"version": 1, "types": types}))
    status, output = wsiseg("type", run, "--seeds", seeds)
    assert status == 0, output
    assert read_geoparquet(run / "cells.parquet")[1].codes[row] != 3


def test_a_click_for_and_a_click_against_on_one_cell(wsiseg: Command, run: Path) -> None:
    """The click for the type wins; the type does not vanish."""
    seeds = run.parent / "both.json"
    types = [{"name": n, "points": p} for n, p in CLICKS.items()]
    types[0]["negative"] = [[425, 112]]
    seeds.write_text(json.dumps({"version": 1, "types": types}))
    status, output = wsiseg("type", run, "--seeds", seeds)
    assert status == 0, output
    assert json.loads((run / "manifest.json").read_text())["types"]["epithelium"] > 10


def test_a_stopped_type_is_seen_and_done_again(wsiseg: Command, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    seeds = seeds_of(run.parent, "s", {"gland": CLICKS["epithelium"]})
    with monkeypatch.context() as patch:
        patch.setattr("wsiseg.formats.geojson.write_geojson", stop)
        with pytest.raises(KeyboardInterrupt):
            type_run(run, seeds=seeds)
    assert json.loads((run / "manifest.json").read_text())["status"] == "retyping"
    status, output = wsiseg("type", run, "--seeds", seeds)
    assert status == 0, output
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["status"] == "complete"
    assert set(manifest["types"]) == {"unassigned", "gland"}


@pytest.mark.parametrize("formats", ["parquet", "geojson,parquet"])
def test_a_damaged_outline_is_found_before_anything_is_written(wsiseg: Command, run: Path, formats: str) -> None:
    group = pq.read_metadata(run / "cells.parquet").row_group(0)
    column = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == "geometry")
    content = bytearray((run / "cells.parquet").read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    content[middle : middle + 40] = bytes(40)
    (run / "cells.parquet").write_bytes(content)
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    status, output = wsiseg("type", run, "--seeds", seeds_of(run.parent, "d", CLICKS), "--format", formats)
    assert status == 1
    assert "not a readable cells.parquet" in output
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_the_runs_own_warnings_and_settings_stay(wsiseg: Command, run: Path, tmp_path: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["warnings"].insert(0, "the scale is doubtful")
    manifest["config"]["typing"]["background_weight"] = 0.7
    (run / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "c.toml").write_text("[typing]\nmin_score = 0.6\n")
    status, output = wsiseg("type", run, "--seeds", seeds_of(tmp_path, "w", CLICKS), "--config", tmp_path / "c.toml")
    assert status == 0, output
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["warnings"][0] == "the scale is doubtful"
    assert manifest["config"]["typing"]["background_weight"] == 0.7
    assert manifest["config"]["typing"]["min_score"] == 0.6


def test_a_bank_is_not_used_up(wsiseg: Command, run: Path, finished: Path) -> None:
    """A run's own bank is refused for it, by `type` and by `run`, and stays; the other runs of the command are typed."""
    bank = run / "bank.safetensors"
    other = shutil.copytree(finished, run.parent / "other")
    status, output = wsiseg("type", run, other, "--bank", bank)
    assert status == 3
    assert "is the bank of" in output
    assert json.loads((other / "manifest.json").read_text())["config"]["bank"] == str(bank)
    slide = finished.parent.parent / "demo/ihc.tiff"
    status, output = wsiseg("run", slide, "--bank", bank, "--out", run.parent, "--overwrite")
    assert status == 1
    assert "is the bank of" in output
    assert read_bank(bank)[0].names == ("epithelium", "immune", "stroma")


def test_a_file_format_left_out_leaves_no_old_file(wsiseg: Command, finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "out" / "ihc")
    slide, seeds = finished.parent.parent / "demo/ihc.tiff", finished.parent.parent / "a.json"
    status, output = wsiseg(
        "run", slide, "--seeds", seeds, "--out", tmp_path / "out", "--format", "geojson", "--device", "cpu"
    )
    assert status == 0, output
    assert not (run / "cells.parquet").exists()
    status, output = wsiseg("type", run, "--seeds", seeds)
    assert status == 1
    assert "no cells.parquet in it; run the slide again" in output


def test_a_flag_beats_the_clicks_in_a_config_file(wsiseg: Command, finished: Path, tmp_path: Path) -> None:
    slide = finished.parent.parent / "demo/ihc.tiff"
    arguments = (
        "run",
        slide,
        "--config",
        finished / "manifest.json",
        "--bank",
        finished / "bank.safetensors",
        "--out",
        tmp_path,
    )
    status, output = wsiseg(*arguments)
    assert status == 0, output


def test_a_bank_types_another_run(wsiseg: Command, run: Path, finished: Path) -> None:
    """As a foreign bank, on the very slide it was made from: nearly the same types as from the clicks."""
    status, output = wsiseg("type", run, "--bank", finished / "bank.safetensors")
    assert status == 0, output
    clicked, carried = (read_geoparquet(r / "cells.parquet")[1] for r in (finished, run))
    assert carried.names == clicked.names
    assert (carried.codes == clicked.codes).mean() > 0.8
    assert json.loads((run / "manifest.json").read_text())["config"]["bank"] == str(finished / "bank.safetensors")
    assert not (run / "bank.safetensors").exists()


def test_run_takes_a_bank(wsiseg: Command, finished: Path, tmp_path: Path) -> None:
    slide = finished.parent.parent / "demo/ihc.tiff"
    for method in ("apg", "cop"):
        status, output = wsiseg(
            "run",
            slide,
            "--bank",
            finished / "bank.safetensors",
            "--out",
            tmp_path,
            "--method",
            method,
            "--device",
            "cpu",
        )
        if method == "cop":
            assert status == 1
            assert "has no prototypes for --method cop" in output
        else:
            assert status == 0, output
            types = json.loads((tmp_path / "ihc/manifest.json").read_text())["types"]
            assert types["epithelium"] > 10
            assert types["stroma"] > 10


def test_a_bank_of_cop_serves_cop(wsiseg: Command, finished: Path, tmp_path: Path) -> None:
    slide, seeds = finished.parent.parent / "demo/ihc.tiff", finished.parent.parent / "a.json"
    status, output = wsiseg(
        "run", slide, "--seeds", seeds, "--method", "cop", "--out", tmp_path / "a", "--device", "cpu"
    )
    assert status == 0, output
    bank = tmp_path / "a/ihc/bank.safetensors"
    status, output = wsiseg("run", slide, "--bank", bank, "--method", "cop", "--out", tmp_path / "b", "--device", "cpu")
    assert status == 0, output
    counts = [json.loads((tmp_path / f"{k}/ihc/manifest.json").read_text())["counts"]["prompts"] for k in "ab"]
    assert counts[0] == counts[1] > 0
    status, output = wsiseg("type", tmp_path / "a/ihc", "--seeds", seeds)
    assert status == 1
    assert "run the slide with --method apg" in output


def test_a_bank_comes_back_as_written(finished: Path, tmp_path: Path) -> None:
    bank, note = read_bank(finished / "bank.safetensors")
    assert bank.from_other_slide
    write_bank(tmp_path / "again", bank, note["slide"], note["weights"])
    again, _ = read_bank(tmp_path / "again")
    for a, b in zip(*([of.clicked for of in found.types] for found in (bank, again)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [len(of.clicked) for of in bank.types] == [1, 1, 1]


@pytest.mark.parametrize("content", [b"", b"hello", b"\x08\0\0\0\0\0\0\0{}      "])
def test_what_is_no_bank_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bank.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"not a bank of wsiseg .*; give the bank\.safetensors of a run"):
        read_bank(path)


@pytest.mark.parametrize(
    ("name", "message"), [("a ", "leading or trailing blanks"), ("Unclassified", "is reserved"), ("b: c", "has a ':'")]
)
def test_a_bank_with_a_name_that_qupath_changes_is_refused(
    finished: Path, tmp_path: Path, name: str, message: str
) -> None:
    bank, note = read_bank(finished / "bank.safetensors")
    types = (dataclasses.replace(bank.types[0], name=name), *bank.types[1:])
    path = tmp_path / "bank.safetensors"
    write_bank(path, dataclasses.replace(bank, types=types), note["slide"], note["weights"])
    with pytest.raises(FormatError, match=rf"types\[0\]\.name: .*{message}.*make the bank again"):
        read_bank(path)


def test_wrong_inputs_are_one_line_and_change_nothing(wsiseg: Command, run: Path, tmp_path: Path) -> None:
    good = seeds_of(tmp_path, "good", CLICKS)
    damaged = json.loads((run / "manifest.json").read_text())
    before = (run / "cells.parquet").read_bytes()
    cases = [
        (["type", run], "pass one of the first two, or the last alone"),
        (
            ["type", run, "--seeds", good, "--bank", run / "bank.safetensors"],
            "pass one of the first two, or the last alone",
        ),
        (["type", tmp_path, "--seeds", good], "no manifest.json of wsiseg in it"),
        (
            ["type", run, "--seeds", seeds_of(tmp_path, "glass", {"a": [[5, 300]]})],
            "no cell there; the nearest is at [",
        ),
        (
            ["type", run, "--seeds", seeds_of(tmp_path, "twice", {"a": [[424, 112]], "b": [[425, 112]]})],
            "hits the same cell as types[0].points[0]",
        ),
        (["type", run, "--bank", tmp_path / "none.safetensors"], "no such file; give the bank.safetensors"),
        (["type", run, run, "--seeds", good], "clicks belong to one slide"),
        (["type", run, "--seeds", good, "--format", "csv"], "unknown format 'csv'"),
    ]
    for arguments, sentence in cases:
        status, output = wsiseg(*arguments)
        assert status == 1, output
        assert sentence in output
        assert output.count("\n") == 1
    assert (run / "cells.parquet").read_bytes() == before
    (run / "manifest.json").write_text(json.dumps(damaged | {"status": "running"}))
    assert "the run is not finished" in wsiseg("type", run, "--seeds", good)[1]
    (run / "manifest.json").write_text(json.dumps(damaged | {"model": {"sha256": "0"}}))
    assert "was made with other weights" in wsiseg("type", run, "--seeds", good)[1]
    (run / "manifest.json").write_text(json.dumps({k: v for k, v in damaged.items() if k != "seconds"}))
    assert "damaged (no 'seconds' in it)" in wsiseg("type", run, "--seeds", good)[1]
    (run / "manifest.json").write_text(json.dumps(damaged))
    (run / "cells.parquet").write_bytes(before[:-9])
    assert "not a readable cells.parquet" in wsiseg("type", run, "--seeds", good)[1]


def test_the_slides_stain_reaches_the_types(wsiseg: Command, demo: tuple[Path, Path], tmp_path: Path) -> None:
    """The demo slide is immunohistochemistry: `run`, `type` and the click page trust the model's classes less there."""
    slide, seeds = demo
    assert wsiseg("run", slide, "--seeds", seeds, "--out", tmp_path, "--device", "cpu", "--no-report")[0] == 0
    run = tmp_path / slide.stem
    cells, typing, _ = read_geoparquet(run / "cells.parquet")
    config = dataclasses.replace(RunConfig(), stain="ihc")
    bank, rows = bank_of_table(read_table(run / "cells.parquet"), read_seeds(seeds), config, 0.5)
    as_it_is, as_he = (
        set_click_labels(
            assign_types(
                cells.descriptors, cells.points_xy * 0.5, bank, load_types(config.model), config.typing, stain
            )[0],
            rows,
        )
        for stain in ("ihc", "he")
    )
    np.testing.assert_array_equal(typing.codes, as_it_is.codes)
    assert (as_it_is.codes != as_he.codes).any()
    assert wsiseg("type", run, "--seeds", seeds, "--no-report")[0] == 0
    np.testing.assert_array_equal(read_geoparquet(run / "cells.parquet")[1].codes, as_it_is.codes)
    store = stored_cells(run / "cells.parquet", (512, 512), 0.5)
    opened = Preview(store, load_types(config.model), config)
    np.testing.assert_array_equal(opened.whole(read_seeds(seeds).types)[0].codes, as_it_is.codes)
