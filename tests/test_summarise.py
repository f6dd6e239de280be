"""``wsiseg summarise``: numbers that can be counted by hand, regions, cohorts of unlike slides, wrong inputs."""

from __future__ import annotations

import csv
import io
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import shapely
from click.testing import CliRunner

from wsiseg.cli import main

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    RunMaker = Callable[..., Path]

MPP = 0.5
#: Corner and side of each square cell, px, and its type.
CELLS = [
    (10, 10, 4, "tumour"),
    (30, 10, 8, "tumour"),
    (50, 10, 6, "immune"),
    (110, 10, 4, "unassigned"),
    (130, 10, 4, "tumour"),
]


def rows_of(*arguments: object, status: int = 0) -> list[dict[str, str]]:
    done = CliRunner().invoke(main, ["summarise", *map(str, arguments)])
    assert done.exit_code == status, done.output
    return list(csv.DictReader(io.StringIO(done.stdout)))


def region(name: str, *boxes: tuple[int, int, int, int]) -> dict[str, Any]:
    shape = shapely.multipolygons([shapely.box(*box) for box in boxes])
    return {
        "type": "Feature",
        "geometry": json.loads(shapely.to_geojson(shape)),
        "properties": {"objectType": "annotation", "classification": {"name": name, "color": [1, 2, 3]}},
    }


def test_counts_densities_and_areas(make_run: RunMaker, tmp_path: Path) -> None:
    (row,) = rows_of(make_run(tmp_path / "s", CELLS, ("tumour", "immune")))
    areas = [side * side * MPP**2 for _, _, side, _ in CELLS]
    assert row["slide"] == "s.svs"
    assert row["region"] == "searched"
    assert float(row["area_mm2"]) == 0.02
    assert int(row["cells"]) == 5
    assert float(row["cells_per_mm2"]) == 5 / 0.02
    assert float(row["mean_area_um2"]) == pytest.approx(np.mean(areas), abs=1e-3)
    assert float(row["median_area_um2"]) == pytest.approx(np.median(areas), abs=1e-3)
    assert {name: int(row[f"{name}: cells"]) for name in ("tumour", "immune", "unassigned")} == {
        "tumour": 3,
        "immune": 1,
        "unassigned": 1,
    }
    assert float(row["tumour: cells_per_mm2"]) == 3 / 0.02
    assert float(row["tumour: share"]) == 0.6
    assert float(row["tumour: mean_area_um2"]) == (4 + 16 + 4) / 3
    assert float(row["tumour: median_area_um2"]) == 4.0
    assert list(row)[-5].startswith("unassigned")


@pytest.mark.parametrize("bounds", [None, [0, 0, 1000, 400], [5, 0, 900, 300]])
def test_a_row_per_class_of_region(make_run: RunMaker, tmp_path: Path, bounds: list[int] | None) -> None:
    """Polygons of one class are one region; a cell counts where its centroid lies; QuPath's frame has its corner at the bounds."""
    run = make_run(tmp_path / "s", CELLS, ("tumour", "immune"), bounds=bounds)
    shift = bounds[0] if bounds else 0
    left = region("left", (0 - shift + 5, 0, 36 - shift, 40), (40 - shift, 0, 60 - shift, 40))
    right = region("right", (100 - shift, 0, 200 - shift, 100))
    path = tmp_path / "roi.geojson"
    path.write_text(
        json.dumps(
            {"type": "FeatureCollection", "features": [left, right, region("left", (40 - shift, 0, 60 - shift, 40))]}
        )
    )
    first, second = rows_of(run, "--roi", path)
    assert [first["region"], second["region"]] == ["left", "right"]
    assert float(first["area_mm2"]) == pytest.approx((31 * 40 + 20 * 40) * (MPP / 1000) ** 2, abs=1e-6)
    assert float(second["area_mm2"]) == pytest.approx(100 * 100 * (MPP / 1000) ** 2, abs=1e-6)
    assert [first["tumour: cells"], first["immune: cells"], first["unassigned: cells"]] == ["2", "1", "0"]
    assert [second["tumour: cells"], second["immune: cells"], second["unassigned: cells"]] == ["1", "0", "1"]
    assert float(second["tumour: cells_per_mm2"]) == pytest.approx(1 / (1e4 * (MPP / 1000) ** 2), abs=0.01)
    assert second["immune: mean_area_um2"] == ""


def test_a_cohort_of_slides_with_other_types(make_run: RunMaker, tmp_path: Path) -> None:
    """One column per type of any slide; empty where a slide was not typed with it, 0 where it was and has none."""
    make_run(tmp_path / "a", CELLS, ("tumour", "immune"))
    make_run(tmp_path / "b", CELLS[:1], ("tumour",))
    make_run(tmp_path / "c", [], ("tumour", "fat, brown"))
    out = tmp_path / "cohort.csv"
    done = CliRunner().invoke(main, ["summarise", *(str(tmp_path / name) for name in "abc"), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert done.output == f"{out}: 3 rows\n"
    a, b, c = csv.DictReader(io.StringIO(out.read_text()))
    assert [row["tumour: cells"] for row in (a, b, c)] == ["3", "1", "0"]
    assert [row["immune: cells"] for row in (a, b, c)] == ["1", "", ""]
    assert [row["fat, brown: cells"] for row in (a, b, c)] == ["", "", "0"]
    assert (c["cells"], c["mean_area_um2"], c["tumour: share"]) == ("0", "", "")
    assert list(a)[-1] == "unassigned: median_area_um2"
    again = CliRunner().invoke(main, ["summarise", str(tmp_path / "a"), "--out", str(out)])
    assert again.exit_code == 1
    assert "pass --overwrite" in again.output
    for name in "ac":
        (tmp_path / f"{name}.geojson").write_text(json.dumps(region("r", (0, 0, 70, 70))))
    (tmp_path / "b.geojson").write_text(json.dumps(region("r", (0, 0, 20, 20))))
    rows = rows_of(*(tmp_path / name for name in "abc"), "--roi", f"{tmp_path}/{{slide}}.geojson")
    assert [row["cells"] for row in rows] == ["3", "1", "0"]


def test_what_cannot_be_summarised_is_one_line(make_run: RunMaker, tmp_path: Path) -> None:
    good = make_run(tmp_path / "a", CELLS, ("tumour", "immune"))
    running = make_run(tmp_path / "b", CELLS, ("tumour", "immune"))
    manifest = json.loads((running / "manifest.json").read_text())
    (running / "manifest.json").write_text(json.dumps(manifest | {"status": "running"}))
    bare = make_run(tmp_path / "c", CELLS, ("tumour", "immune"))
    (bare / "cells.parquet").unlink()
    (tmp_path / "roi.geojson").write_text(json.dumps(region("r", (2000, 0, 2100, 100))))
    cases = [
        ([tmp_path], "no manifest.json of wsiseg in it"),
        ([running], "the run is not finished (status running)"),
        ([bare], "no cells.parquet in it"),
        ([good, "--roi", tmp_path / "roi.geojson"], "lie outside the slide"),
        ([good, "--roi", tmp_path / "none.geojson"], "cannot be read"),
        ([good, bare, "--roi", tmp_path / "roi.geojson"], "write {slide} for the name of a run's folder"),
    ]
    for arguments, message in cases:
        done = CliRunner().invoke(main, ["summarise", *map(str, arguments)])
        assert done.exit_code == 1, done.output
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
        assert done.stdout == ""
    assert len(rows_of(good, bare, status=3)) == 1
