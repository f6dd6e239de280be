"""``wsiseg check``: sound files are summarised, each fault has a line with its place, and the exit status says which."""

from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import shapely

from wsiseg.errors import FormatError
from wsiseg.formats.check import check_files
from wsiseg.formats.geojson import write_geojson
from wsiseg.formats.geoparquet import write_geoparquet
from wsiseg.records import Cells, Provenance, SlideInfo, Typing

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

INFO = SlideInfo(
    path="a.svs",
    reader="openslide",
    format="aperio",
    level_sizes=((1000, 1000),),
    downsamples=(1.0,),
    mpp=0.25,
    mpp_source="--mpp",
)


def write_folder(folder: Path, polygons: list[shapely.Polygon]) -> None:
    """The files of a run: the first cell is unassigned, the others are tumour."""
    n = len(polygons)
    cells = Cells(
        polygons=np.array(polygons, object),
        points_xy=np.array([[p.bounds[0], p.bounds[1]] for p in polygons]),
        scores=np.full(n, 0.5, np.float32),
        descriptors=np.zeros((n, 2), np.float16),
    )
    typing = Typing(
        names=("unassigned", "tumour"),
        colors=((128, 128, 128), (200, 0, 0)),
        codes=np.minimum(np.arange(n), 1).astype(np.int32),
        scores=np.ones(n, np.float32),
        margins=np.ones(n, np.float32),
        prototypes=np.zeros(n, np.int32),
    )
    note = Provenance(tool="wsiseg", version="0", slide="a.svs", config_hash="0")
    folder.mkdir()
    write_geojson(folder / "cells.geojson.gz", cells, typing, INFO, note)
    write_geoparquet(folder / "cells.parquet", cells, typing, INFO, note)


def squares(count: int) -> list[shapely.Polygon]:
    return [shapely.box(20 * k, 0, 20 * k + 10, 10) for k in range(count)]


def feature(ring: list[list[float]], **properties: Any) -> dict[str, Any]:
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"objectType": "detection"} | properties,
    }


RING = [[0.0, 0.0], [10.0, 0.0], [10.0, 10.0], [0.0, 0.0]]
BOW_TIE = [[0.0, 0.0], [10.0, 10.0], [10.0, 0.0], [0.0, 10.0], [0.0, 0.0]]


def write(path: Path, features: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def test_a_run_folder_is_summarised(tmp_path: Path, wsiseg: Callable[..., tuple[int, str]]) -> None:
    write_folder(tmp_path / "run", squares(3))
    assert wsiseg("check", tmp_path / "run") == (
        0,
        (
            f"{tmp_path / 'run/cells.geojson.gz'}: QuPath will read it: 3 detections; types: tumour 2, without class 1\n"
            f"{tmp_path / 'run/cells.parquet'}: sound: 3 cells; types: unassigned 1, tumour 2\n"
        ),
    )


def test_each_fault_has_a_line_with_its_place(tmp_path: Path, wsiseg: Callable[..., tuple[int, str]]) -> None:
    path = write(
        tmp_path / "a.geojson",
        [
            feature(RING),
            feature(RING[:-1]),
            feature(BOW_TIE),
            feature(RING, objectType="annotation", classification={"name": "T"}),
        ],
    )
    status, said = wsiseg("check", path)
    assert status == 1
    lines = said.splitlines()
    assert [line.split(": ")[2] for line in lines] == [
        "features[1].geometry",
        "features[2].geometry",
        "features[3].properties.classification",
    ]
    assert all(line.startswith(f"Error: {path}: features[") for line in lines)
    assert "a ring is not closed" in lines[0]


def test_a_table_with_a_bad_polygon_names_the_row(tmp_path: Path, wsiseg: Callable[..., tuple[int, str]]) -> None:
    write_folder(tmp_path / "run", [*squares(2), shapely.Polygon(BOW_TIE)])
    (tmp_path / "run/cells.geojson.gz").unlink()
    status, said = wsiseg("check", tmp_path / "run")
    assert status == 1
    assert f"{tmp_path / 'run/cells.parquet'}: row 2: the geometry is not a valid polygon (Self-intersection" in said


def test_one_bad_file_does_not_hide_the_others(tmp_path: Path, wsiseg: Callable[..., tuple[int, str]]) -> None:
    good = write(tmp_path / "good.geojson", [feature(RING, classification="Tumor: Positive"), feature(RING)])
    (tmp_path / "cut.geojson.gz").write_bytes(gzip.compress(b"{}" * 500)[:-9])
    status, said = wsiseg("check", tmp_path / "none.geojson", tmp_path / "cut.geojson.gz", good)
    assert status == 1
    assert f"{good}: QuPath will read it: 2 detections; types: Tumor: Positive 1, without class 1\n" in said
    assert f"Error: {tmp_path / 'none.geojson'}: no such file; give" in said
    assert f"Error: {tmp_path / 'cut.geojson.gz'}: " in said
    assert "Traceback" not in said


def test_what_cannot_be_checked_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        FormatError, match=r"none of cells\.geojson\.gz, cells\.parquet, cells\.geojson\.zip in this folder"
    ):
        check_files(tmp_path)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(FormatError, match=r"a\.txt: neither GeoJSON"):
        check_files(tmp_path / "a.txt")
    (tmp_path / "a.parquet").write_text("no table")
    (found,) = check_files(tmp_path / "a.parquet")
    assert len(found.problems) == 1
    assert "not a readable cells.parquet" in found.problems[0]
