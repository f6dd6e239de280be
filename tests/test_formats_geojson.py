"""cells.geojson.gz imports into QuPath: our output keeps every rule, and the validator knows the rules."""

from __future__ import annotations

import gzip
import json
import logging
import re
import zipfile
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import shapely

from wsiseg.errors import FormatError
from wsiseg.formats import geojson
from wsiseg.formats.geojson import snap_polygons, validate_geojson, write_geojson
from wsiseg.formats.geoparquet import cell_ids
from wsiseg.records import Cells, Provenance, SlideInfo, Typing

if TYPE_CHECKING:
    from pathlib import Path

INFO = SlideInfo(
    path="/data/a.svs",
    reader="openslide",
    format="aperio",
    level_sizes=((200_000, 200_000),),
    downsamples=(1.0,),
    mpp=0.5,
    mpp_source="--mpp",
)
MIRAX = replace(INFO, bounds=(1000, 500, 9000, 8000))
PROVENANCE = Provenance(
    tool="wsiseg",
    version="0.1.0",
    slide="a.svs",
    config_hash="hash",
    details={"seed": None, "nested": [None, {"a": None, "b": float("nan")}]},
)
BOW_TIE = [[0, 0], [10, 10], [10, 0], [0, 10], [0, 0]]
SQUARE = [[0, 0], [10, 0], [10, 10], [0, 10], [0, 0]]


def make_cells(count: int) -> Cells:
    rng = np.random.default_rng(count)
    centres = rng.uniform(2000, 150_000, (count, 1, 2))
    angles = np.linspace(0, 2 * np.pi, 20, endpoint=False)
    outlines = centres + np.stack([np.cos(angles), np.sin(angles)], axis=-1) * rng.uniform(8, 12, (count, 20, 1))
    return cells_of(shapely.polygons(outlines) if count else [])


def cells_of(polygons: Any) -> Cells:
    count = len(polygons)
    table = np.empty(count, object)
    table[:] = list(polygons)
    points = np.nan_to_num(shapely.bounds(table).reshape(-1, 4)[:, :2])
    return Cells(
        polygons=table,
        points_xy=points,
        scores=np.linspace(0.5, 1, count, dtype=np.float32),
        descriptors=np.zeros((count, 2), np.float16),
    )


def make_typing(count: int) -> Typing:
    names, colors = ("unassigned", 'tu"mour µ 2.0', "b"), ((128, 128, 128), (200, 0, 0), (0, 80, 200))
    codes = (np.arange(count) % 3).astype(np.int32)
    return Typing(
        names=names,
        colors=colors,
        codes=codes,
        scores=np.full(count, 0.75, np.float32),
        margins=np.full(count, 0.125, np.float32),
        prototypes=np.zeros(count, np.int32),
    )


def read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(
        gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    )
    return document


@pytest.mark.parametrize("count", [0, 1, 50])
def test_the_document(tmp_path: Path, count: int) -> None:
    cells, typing = make_cells(count), make_typing(count)
    path = write_geojson(tmp_path / "cells.geojson.gz", cells, typing, INFO, PROVENANCE)
    assert path == tmp_path / "cells.geojson.gz"
    assert validate_geojson(path) == []
    text = gzip.decompress(path.read_bytes()).decode("utf-8")
    assert "null" not in text
    assert "NaN" not in text
    document = json.loads(text)
    features = document["features"]
    assert [feature["id"] for feature in features] == cell_ids("a.svs", cells)
    expected = shapely.set_precision(cells.polygons, 0.25)
    shapes = [shapely.geometry.shape(feature["geometry"]) for feature in features]
    assert all(shapely.equals(shape, polygon) for shape, polygon in zip(shapes, expected, strict=True))
    for row, feature in enumerate(features):
        assert set(feature) == {"type", "id", "geometry", "properties"}
        properties = feature["properties"]
        assert properties["objectType"] == "detection"
        measurements = {
            "Nucleus: Area µm^2": round(cells.polygons[row].area * 0.25, 3),
            "Detection probability": round(float(cells.scores[row]), 4),
        }
        if row % 3:
            assert properties["classification"] == {
                "name": typing.names[row % 3],
                "color": list(typing.colors[row % 3]),
            }
            measurements |= {"Type score": 0.75, "Type margin": 0.125}
        else:
            assert "classification" not in properties
        assert properties["measurements"] == measurements
    note = document["wsiseg"]
    assert (note["tool"], note["version"], note["slide"], note["config_hash"]) == ("wsiseg", "0.1.0", "a.svs", "hash")
    assert note["cells"] == count
    assert "outer corner of pixel (0, 0)" in note["frame"]
    assert "bounds" not in note


def test_one_feature_per_line_and_short_numbers(tmp_path: Path) -> None:
    square = cells_of([shapely.Polygon([(10.01, 5), (14.5, 5), (14.5, 7.24), (10.01, 7.24)])])
    path = write_geojson(tmp_path / "cells.geojson", square, Typing.untyped(1), INFO, PROVENANCE)
    lines = path.read_text("utf-8").splitlines()
    assert len(lines) == 3
    ring = lines[1].split('"coordinates":')[1].split("}")[0]
    assert ring == "[[[10,5],[14.5,5],[14.5,7.25],[10,7.25],[10,5]]]"


def test_coordinates_are_relative_to_the_bounds(tmp_path: Path) -> None:
    cells = make_cells(20)
    plain = read(write_geojson(tmp_path / "a.geojson.gz", cells, Typing.untyped(20), INFO, PROVENANCE))
    moved = read(write_geojson(tmp_path / "b.geojson.gz", cells, Typing.untyped(20), MIRAX, PROVENANCE))
    for a, b in zip(plain["features"], moved["features"], strict=True):
        assert a["id"] == b["id"]
        np.testing.assert_array_equal(
            np.subtract(a["geometry"]["coordinates"], (1000, 500)), b["geometry"]["coordinates"]
        )
    assert moved["wsiseg"]["bounds"] == [1000, 500, 9000, 8000]
    assert "add (1000, 500) for absolute level-0 px" in moved["wsiseg"]["frame"]


def test_numbers_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    cells, typing = make_cells(2), make_typing(2)
    cells = replace(cells, scores=np.array([np.nan, 0.5], np.float32))
    typing = replace(typing, codes=np.array([1, 1], np.int32), margins=np.array([np.inf, 0.5], np.float32))
    features = read(write_geojson(tmp_path / "a.geojson.gz", cells, typing, INFO, PROVENANCE))["features"]
    assert list(features[0]["properties"]["measurements"]) == ["Nucleus: Area µm^2", "Type score"]
    assert list(features[1]["properties"]["measurements"]) == [
        "Nucleus: Area µm^2",
        "Detection probability",
        "Type score",
        "Type margin",
    ]


def test_bad_polygons_are_repaired_and_specks_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hole = shapely.Polygon(SQUARE, [[[3, 3], [6, 3], [6, 6], [3, 6], [3, 3]]])
    dumbbell = shapely.Polygon(
        [
            (0, 0),
            (10, 0),
            (10, 4.95),
            (30, 4.95),
            (30, 0),
            (34, 0),
            (34, 10),
            (30, 10),
            (30, 5.05),
            (10, 5.05),
            (10, 10),
            (0, 10),
        ]
    )
    speck, flat = shapely.box(0.01, 0.01, 0.05, 0.05), shapely.Polygon([(0, 0), (5, 5), (10, 10), (0, 0)])
    with np.errstate(invalid="ignore"):
        nan = shapely.Polygon([(0, 0), (float("nan"), 1), (1, 1), (0, 0)])
    cells = cells_of(
        [hole, shapely.Polygon(BOW_TIE), dumbbell, speck, flat, None, shapely.Polygon(), nan, shapely.Polygon(SQUARE)]
    )
    with caplog.at_level(logging.WARNING):
        path = write_geojson(tmp_path / "a.geojson.gz", cells, Typing.untyped(9), INFO, PROVENANCE)
    document = read(path)
    shapes = [shapely.geometry.shape(feature["geometry"]) for feature in document["features"]]
    assert [shape.area for shape in shapes] == [91, 25, pytest.approx(142, rel=0.02), 100]
    assert [feature["id"] for feature in document["features"]] == [cell_ids("a.svs", cells)[k] for k in (0, 1, 2, 8)]
    assert document["wsiseg"]["cells"] == 4
    assert document["wsiseg"]["cells_of_slide"] == 9
    assert validate_geojson(path) == []
    assert "5 of 9 cells vanish on the grid" in caplog.text


def test_spiky_shapes_stay_valid_in_float32_far_from_the_origin() -> None:
    rng = np.random.default_rng(7)
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    outlines = np.stack([np.cos(angles), np.sin(angles)], axis=-1) * rng.uniform(0.5, 12, (2000, 24, 1)) + 150_000
    outlines += rng.normal(scale=1.0, size=outlines.shape)  # many cross themselves
    snapped = snap_polygons(shapely.polygons(outlines))
    kept = snapped[~shapely.is_missing(snapped)]
    assert len(kept) > 1990
    assert shapely.is_valid(kept).all()
    xy = shapely.get_coordinates(kept)
    np.testing.assert_array_equal(xy, np.round(xy * 4) / 4)
    np.testing.assert_array_equal(xy, xy.astype(np.float32))


def test_same_input_same_bytes(tmp_path: Path) -> None:
    for name in ("cells.geojson", "cells.geojson.gz", "cells.geojson.zip"):
        (tmp_path / "x").mkdir(exist_ok=True)
        one = write_geojson(tmp_path / name, make_cells(50), make_typing(50), INFO, PROVENANCE)
        two = write_geojson(tmp_path / "x" / name, make_cells(50), make_typing(50), INFO, PROVENANCE)
        assert one.read_bytes() == two.read_bytes()


def test_the_text_does_not_depend_on_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = write_geojson(tmp_path / "a.geojson", make_cells(50), make_typing(50), INFO, PROVENANCE).read_bytes()
    monkeypatch.setattr(geojson, "BATCH", 7)
    assert write_geojson(tmp_path / "a.geojson", make_cells(50), make_typing(50), INFO, PROVENANCE).read_bytes() == one


def test_many_cells_become_a_zip_of_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geojson, "MAX_CELLS", 49)
    monkeypatch.setattr(geojson, "SHARD_CELLS", 20)
    cells = make_cells(50)
    path = write_geojson(tmp_path / "cells.geojson.gz", cells, make_typing(50), INFO, PROVENANCE)
    assert path == tmp_path / "cells.geojson.zip"
    assert list(tmp_path.iterdir()) == [path]
    assert validate_geojson(path) == []
    with zipfile.ZipFile(path) as archive:
        documents = [json.loads(archive.read(name)) for name in archive.namelist()]
        assert archive.namelist()[0] == "cells-0001-of-0003.geojson"
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    assert [len(document["features"]) for document in documents] == [20, 20, 10]
    assert [feature["id"] for document in documents for feature in document["features"]] == cell_ids("a.svs", cells)
    assert (
        documents[1]["wsiseg"] | {"shard": 2, "shards": 3, "cells": 20, "cells_of_slide": 50} == documents[1]["wsiseg"]
    )


def test_names_qupath_cannot_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"cells\.gz: QuPath does not read this name; allowed are \.geojson\.gz"):
        write_geojson(tmp_path / "cells.gz", make_cells(1), make_typing(1), INFO, PROVENANCE)
    for name in ("a:b", "a\nb", " ", "a ", "Unclassified"):
        typing = replace(make_typing(1), names=("unassigned", name, "b"))
        with pytest.raises(FormatError, match="QuPath cannot read this class name"):
            write_geojson(tmp_path / "cells.geojson", make_cells(1), typing, INFO, PROVENANCE)
    assert list(tmp_path.iterdir()) == []


# --- the validator ----------------------------------------------------------------------------------------------------------------


def feature(geometry: object = ..., properties: object = ..., **members: object) -> dict[str, Any]:
    shape = {"type": "Polygon", "coordinates": [SQUARE]} if geometry is ... else geometry
    return {
        "type": "Feature",
        "geometry": shape,
        "properties": {"objectType": "detection"} if properties is ... else properties,
        **members,
    }


def with_properties(**members: object) -> dict[str, Any]:
    return feature(properties={"objectType": "detection", **members})


def with_rings(*rings: object, kind: str = "Polygon") -> dict[str, Any]:
    return feature({"type": kind, "coordinates": list(rings)})


def collection(*features: object, **members: object) -> dict[str, object]:
    return {"type": "FeatureCollection", "features": list(features), **members}


UUID = "0f8b6c5e-1c3e-5a55-9d0e-2f4f2c8a7b11"
CELL = {"objectType": "cell"}
FAR = [
    [x + 150_000, y + 150_000]
    for x, y in [(0, 0), (10, 0), (10, 0.001), (5, 0.0005), (10, 0.0011), (10, 10), (0, 10), (0, 0)]
]
BROKEN: list[tuple[str, object, str]] = [
    ("no type", {"features": [feature()]}, "type: None gives no objects"),
    ("other spelling", {"type": "featureCollection", "features": []}, "type: 'featureCollection' gives no objects"),
    ("type is a list", {"type": [], "features": []}, "type: .* gives no objects"),
    ("no features", {"type": "FeatureCollection"}, "features: missing or not a list"),
    ("features null", {"type": "FeatureCollection", "features": None}, "features: missing or not a list"),
    ("no JSON", "x", "document: not JSON, it starts with 'x'"),
    ("number", "7", "document: not JSON, it starts with '7'"),
    ("truncated", json.dumps(collection(feature()))[:-20], "document: not JSON"),
    ("missing comma", '{"type":"FeatureCollection" "features":[]}', "document: not JSON"),
    ("key without quotes", '{type:"FeatureCollection"}', "document: not JSON"),
    (
        "newline-delimited",
        json.dumps(feature()) + "\n" + json.dumps(feature()),
        "text after its end; one JSON document",
    ),
    ("RFC 8142", "\x1e" + json.dumps(feature()) + "\n", "document: not JSON"),
    ("no Feature", collection({"a": 1}), r"features\[0\]: not an object of type 'Feature'"),
    ("null Feature", collection(None), r"features\[0\]: not an object of type 'Feature'"),
    (
        "objectType missing",
        collection(feature(properties={})),
        r"properties\.objectType: missing: the object becomes an annotation",
    ),
    (
        "objectType unknown",
        collection(with_properties(objectType="nucleus")),
        "'nucleus': the object becomes an annotation",
    ),
    ("objectType null", collection(with_properties(objectType=None)), "objectType: null aborts"),
    ("tmaCore", collection(with_properties(objectType="tmaCore")), "'tmaCore' is skipped"),
    ("id null", collection(feature(id=None)), r"features\[0\]\.id: null aborts"),
    ("id number", collection(feature(id=17)), r"features\[0\]\.id: 17 is not a UUID"),
    ("id text", collection(feature(id="cell_5")), "'cell_5' is not a UUID"),
    ("id twice", collection(feature(id=UUID), feature(id=UUID)), r"features\[1\]\.id: .* appears twice"),
    (
        "geometry missing",
        collection({"type": "Feature", "properties": CELL}),
        r"features\[0\]\.geometry: missing or null aborts",
    ),
    ("geometry null", collection(feature(geometry=None)), "missing or null aborts"),
    ("geometry type", collection(feature({"type": "Circle", "coordinates": [1, 2]})), "type 'Circle' aborts"),
    (
        "collection",
        collection(feature({"type": "GeometryCollection", "geometries": []})),
        "type 'GeometryCollection' aborts",
    ),
    ("no coordinates", collection(feature({"type": "Polygon"})), "no list of coordinates"),
    ("empty coordinates", collection(with_rings()), "no coordinates: the object has an empty shape"),
    ("empty ring", collection(with_rings([])), "a ring is"),
    (
        "null coordinate",
        collection(with_rings([[0, 0], [None, 1], [1, 1], [0, 0]])),
        "null, text or a non-finite number",
    ),
    (
        "NaN coordinate",
        collection(with_rings([[0, 0], [float("nan"), 1], [1, 1], [0, 0]])),
        "null, text or a non-finite number",
    ),
    (
        "text coordinate",
        collection(with_rings([["0", "0"], ["5", "0"], ["5", "5"], ["0", "0"]])),
        "null, text or a non-finite number",
    ),
    ("null point", collection(feature({"type": "Point", "coordinates": [None, 1]})), r"position \[None, 1\] aborts"),
    ("not closed", collection(with_rings(SQUARE[:-1])), "a ring is not closed"),
    ("two points", collection(with_rings([[0, 0], [1, 1], [0, 0], [0, 0]])), "fewer than 3 distinct points"),
    ("no area", collection(with_rings([[0, 0], [1, 1], [2, 2], [0, 0]])), "the polygon has no area"),
    ("bow-tie", collection(with_rings(BOW_TIE)), r"the polygon is invalid \(Self-intersection.* 0.6\+ aborts"),
    (
        "hole outside",
        collection(with_rings(SQUARE, [[20, 20], [30, 20], [30, 30], [20, 20]])),
        "the polygon is invalid",
    ),
    ("single part", collection(with_rings([SQUARE], kind="MultiPolygon")), "MultiPolygon with a single part aborts"),
    (
        "overlapping parts",
        collection(with_rings([SQUARE], [[[x + 5, y] for x, y in SQUARE]], kind="MultiPolygon")),
        "the polygon is invalid",
    ),
    ("float32", collection(with_rings(FAR)), "becomes invalid in float32"),
    (
        "nucleus null",
        collection(feature(properties=CELL, nucleusGeometry=None)),
        r"features\[0\]\.nucleusGeometry: null aborts",
    ),
    (
        "nucleus bow-tie",
        collection(feature(properties=CELL, nucleusGeometry={"type": "Polygon", "coordinates": [BOW_TIE]})),
        "nucleusGeometry: the polygon is invalid",
    ),
    (
        "class without color",
        collection(with_properties(classification={"name": "a"})),
        "an object without 'color' aborts",
    ),
    ("color text", collection(with_properties(classification={"name": "a", "color": "#f00"})), "color '#f00' aborts"),
    ("class number", collection(with_properties(classification=3)), "3 aborts the import"),
    ("class empty", collection(with_properties(classification="")), "class name '' aborts"),
    (
        "class blank",
        collection(with_properties(classification={"name": " ", "color": [1, 2, 3]})),
        "class name ' ' aborts",
    ),
    (
        "class newline",
        collection(with_properties(classification={"name": "a\nb", "color": [1, 2, 3]})),
        "line break, which aborts",
    ),
    (
        "old derived class",
        collection(with_properties(classification={"name": "A: B", "colorRGB": -1})),
        "'colorRGB' with ':'",
    ),
    ("measurement text", collection(with_properties(measurements={"a": "high"})), "'a' is 'high': text aborts"),
    ("measurement NaN", collection(with_properties(measurements={"a": float("nan")})), "'a' is nan: QuPath 0.4 aborts"),
    (
        "measurement infinite",
        collection(with_properties(measurements=[{"name": "a", "value": float("inf")}])),
        "'a' is inf",
    ),
    ("measurement null", collection(with_properties(measurements={"a": None})), "'a' is None"),
    ("measurement bool", collection(with_properties(measurements={"a": True})), "'a' is True"),
    ("measurement nested", collection(with_properties(measurements={"a": {"b": 1}})), "anything else is dropped"),
    ("name null", collection(with_properties(name=None)), r"properties\.name: null aborts"),
    ("properties null", collection(feature(properties=None)), r"features\[0\]\.properties: None aborts"),
    (
        "broken child",
        collection(with_properties(childObjects=[feature(geometry=None)])),
        r"childObjects\[0\]\.geometry: missing",
    ),
    ("in an array", [feature(), feature(id=None)], r"\[1\]\.id: null aborts"),
    ("single Feature", feature(id=None), r"Feature\.id: null aborts"),
    ("bare geometry", {"type": "Polygon", "coordinates": [BOW_TIE]}, "geometry: the polygon is invalid"),
]


@pytest.mark.parametrize(("document", "message"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_a_broken_file_has_one_problem(tmp_path: Path, document: object, message: str) -> None:
    path = tmp_path / "a.geojson"
    path.write_text(document if isinstance(document, str) else json.dumps(document), "utf-8")
    problems = validate_geojson(path)
    assert len(problems) == 1, problems
    assert re.search(message, problems[0]), problems[0]


FINE: list[tuple[str, object]] = [
    ("collection", collection(feature(id=UUID), wsiseg={"a": [1, {}]})),
    ("features first", {"features": [feature()], "type": "FeatureCollection"}),
    ("empty", collection()),
    ("array", [feature(), feature()]),
    ("empty array", []),
    ("Feature", feature()),
    ("geometry", {"type": "Polygon", "coordinates": [SQUARE]}),
    (
        "clockwise, 3-D, repeated points",
        collection(with_rings([[x, y, 1] for x, y in [*SQUARE[:2], *SQUARE[1:]][::-1]])),
    ),
    ("hole", collection(with_rings(SQUARE, [[2, 2], [4, 2], [4, 4], [2, 2]]))),
    ("two parts", collection(with_rings([SQUARE], [[[x + 50, y] for x, y in SQUARE]], kind="MultiPolygon"))),
    (
        "points",
        collection(
            feature({"type": "MultiPoint", "coordinates": [[1, 2], [1, 2]]}),
            feature({"type": "Point", "coordinates": [1, 2]}),
        ),
    ),
    ("outside the image", collection(with_rings([[x - 50, y - 50] for x, y in SQUARE]))),
    ("class text", collection(with_properties(classification="Tumor: Positive"))),
    ("class names", collection(with_properties(classification={"names": ["Tumor", "Positive"], "color": [1, 2, 3]}))),
    (
        "color null, alpha",
        collection(
            with_properties(classification={"name": "a", "color": None}),
            with_properties(classification={"name": "a", "color": [1, 2, 3, 4]}),
        ),
    ),
    ("old class", collection(with_properties(classification={"name": "a", "colorRGB": -3670016}))),
    ("null class and measurements", collection(with_properties(classification=None, measurements=None))),
    ("old measurements", collection(with_properties(measurements=[{"name": "a", "value": 1}]))),
    ("old object type", collection(feature(properties={"object_type": "detection"}))),
    ("empty nucleus", collection(feature(properties=CELL, nucleusGeometry={}))),
]


@pytest.mark.parametrize("document", [case[1] for case in FINE], ids=[case[0] for case in FINE])
def test_what_qupath_reads_is_accepted(tmp_path: Path, document: object) -> None:
    (tmp_path / "a.geojson").write_text("\ufeff" + json.dumps(document, indent=1), "utf-8")
    assert validate_geojson(tmp_path / "a.geojson") == []


@pytest.mark.parametrize("name", ["cells.gz", "cells.geojsonl", "cells.txt"])
def test_a_name_that_qupath_ignores(tmp_path: Path, name: str) -> None:
    text = json.dumps(collection(feature())).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    assert validate_geojson(tmp_path / name) == [
        f"name: QuPath reads nothing from '{name}'; call it .geojson or .geojson.gz"
    ]


def test_entries_that_a_zip_import_would_lose(tmp_path: Path) -> None:
    path, good = tmp_path / "a.zip", json.dumps(collection(feature(id=UUID)))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("good.geojson", good)
        archive.writestr("cut.geojson", good[:-30])
        archive.writestr("notes.md", "x")
        archive.writestr("again.geojson", good)
    problems = validate_geojson(path)
    assert len(problems) == 3
    assert problems[0] == "notes.md: QuPath skips this entry; call it .geojson"
    assert problems[1].startswith("cut.geojson: document: not JSON")
    assert problems[2] == f"again.geojson: features[0].id: {UUID} appears twice; ids must be unique"


def test_files_that_cannot_be_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "a.geojson.gz"
    assert "No such file" in validate_geojson(path)[0]
    path.write_bytes(gzip.compress(b"[]" * 1000)[:-12])
    assert "damaged compressed data" in validate_geojson(path)[0]
    path.write_bytes(b"")
    assert "the file is empty" in validate_geojson(path)[0]
    path.write_bytes(b"\xff\xfe[]")
    assert "not UTF-8" in validate_geojson(path)[0]
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04")
    assert "damaged or encrypted zip" in validate_geojson(tmp_path / "a.zip")[0]


def test_the_list_of_problems_ends(tmp_path: Path) -> None:
    (tmp_path / "a.geojson").write_text(json.dumps(collection(*[feature(id=None)] * 500)))
    problems = validate_geojson(tmp_path / "a.geojson")
    assert len(problems) == 101
    assert "only the first 100" in problems[-1]
