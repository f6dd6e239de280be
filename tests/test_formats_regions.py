"""Regions of interest arrive as one valid shape in absolute level-0 px, or as one line that says why not."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import shapely

from wsiseg.errors import FormatError
from wsiseg.formats.outlines import Outlines, read_side
from wsiseg.formats.regions import read_regions, regions_geojson
from wsiseg.records import SlideInfo

if TYPE_CHECKING:
    from pathlib import Path

INFO = SlideInfo(
    path="/data/a.svs",
    reader="openslide",
    format="aperio",
    level_sizes=((1000, 800),),
    downsamples=(1.0,),
    mpp=0.5,
    mpp_source="--mpp",
)
SQUARE = [[10, 10], [110, 10], [110, 110], [10, 110], [10, 10]]
HOLE = [[20, 20], [30, 20], [30, 30], [20, 30], [20, 20]]


def moved(ring: list[list[int]], x: int, y: int = 0) -> list[list[int]]:
    return [[a + x, b + y] for a, b in ring]


def feature(*rings: object, kind: str = "Polygon") -> dict[str, Any]:
    return {
        "type": "Feature",
        "geometry": {"type": kind, "coordinates": list(rings)},
        "properties": {"objectType": "annotation"},
    }


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
    shape, notes = read_regions(path, INFO)
    assert notes == [f"{path}: 1 of 4 objects are not polygons and were left out; the first is features[1] (Point)"]
    assert isinstance(shape, shapely.MultiPolygon)
    assert shape.is_valid
    assert shape.area == 150 * 100 - 100 + 100 * 100
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert read_regions(path, INFO)[0].equals(shape)


@pytest.mark.parametrize(
    "document",
    [
        feature(SQUARE),
        [feature(SQUARE)],
        feature(SQUARE)["geometry"],
        {"type": "MultiPolygon", "coordinates": [[SQUARE]]},
        {"type": "GeometryCollection", "geometries": [{"type": "Polygon", "coordinates": [SQUARE]}]},
    ],
)
def test_every_form_is_read(tmp_path: Path, document: object) -> None:
    (tmp_path / "roi.json").write_text(json.dumps(document))
    shape, notes = read_regions(tmp_path / "roi.json", INFO)
    assert notes == []
    assert isinstance(shape, shapely.Polygon)
    assert shape.bounds == (10, 10, 110, 110)


def test_colours_in_the_digits_of_other_scripts(tmp_path: Path) -> None:
    drawn = feature(SQUARE)
    drawn["properties"]["classification"] = {"name": "Region", "color": "COLOR"}
    path = tmp_path / "roi.geojson"
    path.write_text(json.dumps(drawn).replace('"COLOR"', "[٢٠٠, ٠, ٠]"), encoding="utf-8")
    assert read_regions(path, INFO)[0].area == 10_000


def test_bounds_are_added_and_the_slide_is_the_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "roi.geojson", feature(SQUARE))
    assert read_regions(path, replace(INFO, bounds=(100, 50, 500, 500)))[0].bounds == (110, 60, 210, 160)
    assert read_regions(path, replace(INFO, bounds=(950, 50, 50, 50)))[0].bounds == (960, 60, 1000, 160)


BOW_TIE = [[0, 0], [100, 100], [100, 0], [0, 100], [0, 0]]
SPIKE = [[10, 10], [110, 10], [110, 110], [150, 150], [110, 110], [10, 110], [10, 10]]
EIGHT = [[0, 0], [50, 50], [0, 100], [100, 100], [50, 50], [100, 0], [0, 0]]  # touches itself in the middle
REPAIRED = "1 of 1 objects touch, cross or overlap themselves and were repaired; the first is features[0] ("


@pytest.mark.parametrize(
    ("drawn", "area", "note"),
    [
        (feature(SPIKE), 100 * 100, REPAIRED),
        (feature(BOW_TIE), 2 * 100 * 50 / 2, REPAIRED),
        (feature(EIGHT), 2 * 100 * 50 / 2, REPAIRED),
        (
            feature([SQUARE], [moved(SQUARE, 50)], kind="MultiPolygon"),
            150 * 100,
            REPAIRED,
        ),  # joined, not cut out of each other
        (feature([SQUARE], [moved(SQUARE, 100)], kind="MultiPolygon"), 200 * 100, REPAIRED),  # parts that share a side
        (feature(SQUARE, moved(HOLE, 85)), 100 * 100 - 5 * 10, REPAIRED),  # a hole across the edge
        (feature(SQUARE, moved(HOLE, 200)), 100 * 100, REPAIRED),  # a hole beside its part
        (feature(SQUARE, HOLE, moved(HOLE, 5)), 100 * 100 - 15 * 10, REPAIRED),  # holes that overlap
        (
            feature(SQUARE[:-1]),
            100 * 100,
            "1 of 1 objects have a line that was not closed; it was closed; the first is features[0]",
        ),
        (feature(SQUARE[:-1], HOLE[:-1]), 100 * 100 - 100, "1 of 1 objects have a line that was not closed"),
    ],
)
def test_what_can_be_repaired_is_and_said(tmp_path: Path, drawn: dict[str, Any], area: float, note: str) -> None:
    path = write(tmp_path / "roi.geojson", drawn)
    shape, notes = read_regions(path, INFO)
    assert shape.is_valid
    assert shape.area == area
    assert [n.startswith(f"{path}: {note}") for n in notes] == [True], notes
    outlines = read_side(path, {})  # `wsiseg evaluate` repairs alike
    assert isinstance(outlines, Outlines)
    assert [p.area for p in outlines.polygons] == [area]
    assert len(outlines.notes) == 1


def test_what_has_no_area_is_left_out_and_said(tmp_path: Path) -> None:
    path = write(tmp_path / "roi.geojson", feature(SQUARE), feature([[1, 1], [5, 5], [1, 1]]))
    shape, notes = read_regions(path, INFO)
    assert shape.area == 100 * 100
    assert notes[-1] == f"{path}: 1 of 2 objects have no area and were left out; the first is features[1]"


SPIKE = {
    "type": "Polygon",
    "coordinates": [[[10, 10], [100, 10], [100, 100], [150, 150], [100, 100], [10, 100], [10, 10]]],
}
OVERLAPPING = {
    "type": "MultiPolygon",
    "coordinates": [
        [[[10, 10], [100, 10], [100, 100], [10, 100], [10, 10]]],
        [[[50, 50], [150, 50], [150, 150], [50, 150], [50, 50]]],
    ],
}


@pytest.mark.parametrize(
    ("geometry", "area"),
    [(SPIKE, 90 * 90), (OVERLAPPING, 90 * 90 + 100 * 100 - 50 * 50)],
    ids=["spike", "overlapping-multipolygon"],
)
def test_regions_that_users_sent_are_repaired(tmp_path: Path, geometry: dict[str, Any], area: float) -> None:
    path = tmp_path / "roi.geojson"
    path.write_text(
        json.dumps(
            {"type": "FeatureCollection", "features": [{"type": "Feature", "properties": {}, "geometry": geometry}]}
        )
    )
    shape, notes = read_regions(path, INFO)
    assert shape.area == area
    assert "repaired" in notes[0]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([], "0 objects, no polygon; draw regions in QuPath"),
        ([{"type": "Feature", "geometry": None}], "1 object, no polygon"),
        ([feature()], "1 object, no polygon"),
        (
            [feature(moved(SQUARE, 2000))],
            r"the regions \(2010, 10, 2110, 110\) lie outside the slide, which has 1000 x 800 px",
        ),
        ([feature([])], r"features\[0\]\.geometry: a ring has no positions"),
        ([feature([[1, 1], [5, 5]])], r"features\[0\]\.geometry: a ring has 2 positions; 3 at least are needed"),
        ([feature([[1, 1], [5, 5], [1, 1]])], r"1 object, 1 polygon without an area"),
        (
            [{"type": "Feature", "geometry": {"type": "Point", "coordinates": [1, 2]}}],
            r"1 point, and no polygon; did you mean --seeds\?",
        ),
        ([feature([[0, 0], [None, 1], [1, 1], [0, 0]])], r"features\[0\]\.geometry: null, text or a non-finite number"),
        ([feature([[0], [1]])], r"features\[0\]\.geometry: coordinates are not rings"),
        ([feature(7)], r"features\[0\]\.geometry: coordinates are not rings"),
        ([7], r"features\[0\]: 7 is not a GeoJSON Feature"),
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


def test_true_and_false_are_not_coordinates(tmp_path: Path) -> None:
    path = write(tmp_path / "roi.geojson", feature([[0, 0], [True, 9], [9, False], [0, 0]]))
    with pytest.raises(FormatError, match=r"coordinates are not rings of \[x, y\] positions"):
        read_regions(path, INFO)


def test_written_regions_are_read_as_they_were_drawn(tmp_path: Path) -> None:
    """Also on a slide with bounds, which the file counts from."""
    rings = [[(110.25, 120), (300, 120), (300, 400.5)], [(500, 500), (600, 500), (600, 600), (500, 600)]]
    info = replace(INFO, bounds=(100, 50, 800, 700))
    (tmp_path / "r.geojson").write_text(regions_geojson(rings, info))
    region, notes = read_regions(tmp_path / "r.geojson", info)
    assert shapely.equals(region, shapely.union_all([shapely.Polygon(ring) for ring in rings]))
    assert notes == []
    assert json.loads((tmp_path / "r.geojson").read_text())["features"][0]["geometry"]["coordinates"][0][0] == [
        10.25,
        70,
    ]
