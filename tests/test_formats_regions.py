"""Regions of interest arrive as one valid shape in absolute level-0 px, or as one line that says why not."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import shapely

from wsiseg.errors import FormatError
from wsiseg.formats.regions import read_regions
from wsiseg.records import SlideInfo

if TYPE_CHECKING:
    from pathlib import Path

INFO = SlideInfo("/data/a.svs", "openslide", "aperio", ((1000, 800),), (1.0,), 0.5, "--mpp")
SQUARE = [[10, 10], [110, 10], [110, 110], [10, 110], [10, 10]]
HOLE = [[20, 20], [30, 20], [30, 30], [20, 30], [20, 20]]


def moved(ring: list[list[int]], x: int, y: int = 0) -> list[list[int]]:
    return [[a + x, b + y] for a, b in ring]


def feature(*rings: object, kind: str = "Polygon") -> dict[str, Any]:
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": list(rings)}, "properties": {"objectType": "annotation"}}


def write(path: Path, *features: object) -> Path:
    path.write_text(json.dumps({"type": "FeatureCollection", "features": list(features)}))
    return path


def test_annotations_are_joined(tmp_path: Path) -> None:
    point = {"type": "Feature", "geometry": {"type": "Point", "coordinates": [1, 2]}}
    path = write(
        tmp_path / "roi.geojson",
        feature(SQUARE, HOLE),
        point,
        feature(moved(SQUARE, 50)),
        feature([moved(SQUARE, 500)], kind="MultiPolygon"),
    )
    shape = read_regions(path, INFO)
    assert isinstance(shape, shapely.MultiPolygon)
    assert shape.is_valid
    assert shape.area == 150 * 100 - 100 + 100 * 100
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert read_regions(path, INFO).equals(shape)


@pytest.mark.parametrize(
    "document",
    [
        feature(SQUARE), [feature(SQUARE)], feature(SQUARE)["geometry"], {"type": "MultiPolygon", "coordinates": [[SQUARE]]},
        {"type": "GeometryCollection", "geometries": [{"type": "Polygon", "coordinates": [SQUARE]}]},
    ],
)  # fmt: skip
def test_every_form_is_read(tmp_path: Path, document: object) -> None:
    (tmp_path / "roi.json").write_text(json.dumps(document))
    shape = read_regions(tmp_path / "roi.json", INFO)
    assert isinstance(shape, shapely.Polygon)
    assert shape.bounds == (10, 10, 110, 110)


def test_bounds_are_added_and_the_slide_is_the_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "roi.geojson", feature(SQUARE))
    assert read_regions(path, replace(INFO, bounds=(100, 50, 500, 500))).bounds == (110, 60, 210, 160)
    assert read_regions(path, replace(INFO, bounds=(950, 50, 50, 50))).bounds == (960, 60, 1000, 160)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([], "0 objects, no polygon; draw regions in QuPath"),
        ([{"type": "Feature", "geometry": None}], "1 object, no polygon"),
        ([feature()], "1 object, no polygon"),
        ([feature(moved(SQUARE, 2000))], r"the regions \(2010, 10, 2110, 110\) lie outside the slide, which has 1000 x 800 px"),
        (
            [feature([[0, 0], [10, 10], [10, 0], [0, 10], [0, 0]])],
            r"features\[0\]\.geometry: invalid polygon \(Self-intersection.*draw the region again",
        ),
        ([feature(SQUARE[:-1])], r"features\[0\]\.geometry: a ring is not closed"),
        ([feature([])], r"features\[0\]\.geometry: a ring is not closed|null, text"),
        ([feature([[0, 0], [None, 1], [1, 1], [0, 0]])], r"features\[0\]\.geometry: null, text or a non-finite number"),
        ([feature([[0], [1]])], r"features\[0\]\.geometry: coordinates are no rings"),
        ([feature(7)], r"features\[0\]\.geometry: coordinates are no rings"),
        ([7], r"features\[0\]: 7 is no GeoJSON Feature"),
    ],
)
def test_mistakes(tmp_path: Path, features: list[object], message: str) -> None:
    path = write(tmp_path / "roi.geojson", *features)
    with pytest.raises(FormatError, match=message) as caught:
        read_regions(path, INFO)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_geojson(tmp_path: Path) -> None:
    path = tmp_path / "roi.geojson"
    with pytest.raises(FormatError, match="cannot be read"):
        read_regions(path, INFO)
    path.write_text("")
    with pytest.raises(FormatError, match="the file is empty"):
        read_regions(path, INFO)
    path.write_text("{")
    with pytest.raises(FormatError, match="not JSON at line 1"):
        read_regions(path, INFO)
    path.write_text('{"type": "Topology"}')
    with pytest.raises(FormatError, match="not GeoJSON"):
        read_regions(path, INFO)
