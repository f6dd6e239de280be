"""Measurements are those of scikit-image's regionprops; distances and densities those of a search through all pairs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import geopandas
import geopandas.testing
import numpy as np
import pytest
import shapely
from shapely import affinity
from skimage.draw import polygon2mask
from skimage.measure import regionprops

from wsiseg.formats.geojson import write_geojson
from wsiseg.formats.geoparquet import read_table, write_geoparquet, write_retyped
from wsiseg.measurements import DENSITY_UM, SHAPE, measure, measure_neighbours, measure_shapes, measure_types
from wsiseg.records import Cells, Provenance, SlideInfo, Typing

if TYPE_CHECKING:
    from pathlib import Path

PROVENANCE = Provenance(tool="wsiseg", version="0", slide="a.svs", config_hash="h")
INFO = SlideInfo(
    path="a.svs",
    reader="image",
    format="png",
    level_sizes=((3000, 3000),),
    downsamples=(1.0,),
    mpp=0.5,
    mpp_source="--mpp",
)
FINE = 16  #: px of the raster per px


def nuclei(count: int, seed: int = 0) -> np.ndarray:
    """Ellipses of all directions, every fifth with a bite taken out."""
    rng = np.random.default_rng(seed)
    found = []
    for k in range(count):
        shape = affinity.scale(shapely.Point(0, 0).buffer(1, 12), rng.uniform(5, 9), rng.uniform(3, 5))
        if k % 5 == 0:
            shape = shape.difference(shapely.Point(0, 4).buffer(2.5))
        shape = affinity.rotate(shape, rng.uniform(0, 180), origin=(0, 0))
        found.append(affinity.translate(shape, *rng.uniform(50, 2900, 2)))
    return np.array(found, object)


def cells_of(polygons: np.ndarray) -> Cells:
    return Cells(
        polygons=polygons,
        points_xy=shapely.get_coordinates(shapely.centroid(polygons)),
        scores=np.full(len(polygons), 0.5, np.float32),
        descriptors=np.zeros((len(polygons), 2), np.float16),
    )


def types_of(codes: list[int]) -> Typing:
    count = len(codes)
    return Typing(
        names=("unassigned", "tumour", "a, b"),
        colors=((1, 1, 1), (2, 2, 2), (3, 3, 3)),
        codes=np.array(codes, np.int32),
        scores=np.ones(count, np.float32),
        margins=np.ones(count, np.float32),
        prototypes=np.zeros(count, np.int32),
    )


def test_shapes_are_those_of_regionprops_on_rasterised_cells() -> None:
    polygons = nuclei(40)
    found = measure_shapes(polygons, 0.5)
    for k, polygon in enumerate(polygons):
        left, top, right, bottom = polygon.bounds
        corner = np.array([left - 1, top - 1])
        ring = (shapely.get_coordinates(polygon.exterior) - corner) * FINE
        shape = (int((bottom - top + 2) * FINE), int((right - left + 2) * FINE))
        (region,) = regionprops(polygon2mask(shape, ring[:, ::-1] - 0.5).astype(np.uint8))
        um = 0.5 / FINE
        expected = {
            "perimeter_um": region.perimeter_crofton * um,
            "circularity": 4 * np.pi * region.area / region.perimeter_crofton**2,
            "solidity": region.solidity,
            "eccentricity": region.eccentricity,
            "major_axis_um": region.axis_major_length * um,
            "minor_axis_um": region.axis_minor_length * um,
        }
        for name, value in expected.items():
            tolerance = 0.04 if name == "circularity" else 0.02  # the square of the perimeter
            assert found[name][k] == pytest.approx(value, rel=tolerance), name
        turned = (found["orientation_deg"][k] - (np.degrees(region.orientation) + 90) + 90) % 180 - 90
        assert abs(turned) < 2
        assert polygon.area == pytest.approx(region.area / FINE**2, rel=0.02)


def test_a_rectangle_by_hand() -> None:
    """Axes of a rectangle a x b are 4 a / sqrt(12) and 4 b / sqrt(12); it leans to the upper right."""
    flat = shapely.box(0, 0, 20, 10)
    leaning = affinity.rotate(flat, -30, origin=(0, 0))  # y is down
    clockwise = shapely.reverse(leaning)
    found = measure_shapes(np.array([flat, leaning, clockwise, affinity.translate(leaning, 1e6, 1e6)]), 2.0)
    assert set(found) == set(SHAPE)
    np.testing.assert_allclose(found["major_axis_um"], 2 * 4 * 20 / np.sqrt(12), rtol=1e-4)
    np.testing.assert_allclose(found["minor_axis_um"], 2 * 4 * 10 / np.sqrt(12), rtol=1e-4)
    np.testing.assert_allclose(found["eccentricity"], np.sqrt(0.75), rtol=1e-4)
    np.testing.assert_allclose(found["perimeter_um"], 120, rtol=1e-5)
    np.testing.assert_allclose(found["circularity"], 4 * np.pi * 200 / 60**2, rtol=1e-5)
    np.testing.assert_allclose(found["solidity"], 1, rtol=1e-5)
    np.testing.assert_allclose(found["orientation_deg"], [0, 30, 30, 30], atol=0.01)


def test_a_hole_changes_only_the_solidity_of_its_own_polygon() -> None:
    """Shape is that of the outer ring; one polygon with a hole must not shift the vertices of the others."""
    plain = nuclei(6)
    pierced = plain.copy()
    pierced[2] = plain[2].difference(plain[2].centroid.buffer(1))
    expected, found = measure_shapes(plain, 0.5), measure_shapes(pierced, 0.5)
    for name, values in found.items():
        same = np.arange(6) != 2 if name == "solidity" else np.ones(6, bool)
        np.testing.assert_array_equal(values[same], expected[name][same], name)


def test_what_has_no_area_has_no_shape() -> None:
    polygons = np.array(
        [shapely.Polygon(), shapely.Polygon([(0, 0), (1, 1), (2, 2)]), None, shapely.box(0, 0, 1, 1)], object
    )
    found = measure_shapes(polygons, 1.0)
    assert all(np.isnan(column[:3]).all() and np.isfinite(column[3]) for column in found.values())
    assert all(column.shape == (0,) for column in measure_shapes(np.empty(0, object), 1.0).values())


def test_distances_and_densities_are_those_of_all_pairs() -> None:
    rng = np.random.default_rng(3)
    xy = rng.uniform(0, 300, (200, 2))
    codes = rng.integers(0, 3, 200).tolist()
    apart = np.hypot(*(xy[:, None] - xy[None]).transpose(2, 0, 1))
    others = np.where(np.eye(200, dtype=bool), np.inf, apart)
    found = measure_neighbours(xy)
    np.testing.assert_allclose(found["nearest_um"], others.min(1), rtol=1e-5)
    circle_mm2 = np.pi * DENSITY_UM**2 / 1e6
    np.testing.assert_allclose(found["density_per_mm2"], (apart <= DENSITY_UM).sum(1) / circle_mm2, rtol=1e-5)
    typed = measure_types(xy, types_of(codes))
    assert list(typed) == ["nearest_um: tumour", "nearest_um: a, b"]
    for code, name in ((1, "tumour"), (2, "a, b")):
        np.testing.assert_allclose(typed[f"nearest_um: {name}"], others[:, np.array(codes) == code].min(1), rtol=1e-5)


def test_one_cell_has_no_neighbour() -> None:
    found = measure_neighbours(np.array([[5.0, 5.0]]))
    assert np.isnan(found["nearest_um"]).all()
    assert found["density_per_mm2"][0] == pytest.approx(1e6 / (np.pi * DENSITY_UM**2))
    typed = measure_types(np.array([[5.0, 5.0]]), types_of([1]))
    assert np.isnan(typed["nearest_um: tumour"]).all()
    assert np.isnan(typed["nearest_um: a, b"]).all()


def test_both_files_have_them(tmp_path: Path) -> None:
    cells, typing = cells_of(nuclei(30)), types_of([0, 1, 2] * 10)
    measured = measure(cells, typing, INFO.mpp)
    write_geoparquet(tmp_path / "cells.parquet", measured, typing, INFO, PROVENANCE)
    table = geopandas.read_parquet(tmp_path / "cells.parquet")
    for name, column in measured.columns.items():
        np.testing.assert_array_equal(table[name].to_numpy(), column)
    path = write_geojson(tmp_path / "cells.geojson", measured, typing, INFO, PROVENANCE)
    features = json.loads(path.read_text("utf-8"))["features"]
    names = {
        "Nucleus: Area µm^2": "area_um2",
        "Nucleus: Length µm": "perimeter_um",
        "Nucleus: Circularity": "circularity",
        "Nucleus: Solidity": "solidity",
        "Nucleus: Eccentricity": "eccentricity",
        "Nucleus: Major axis µm": "major_axis_um",
        "Nucleus: Minor axis µm": "minor_axis_um",
        "Nucleus: Orientation °": "orientation_deg",
        "Distance to nearest detection µm": "nearest_um",
        "Detections within 50 µm per mm^2": "density_per_mm2",
        "Distance to detection tumour µm": "nearest_um: tumour",
        "Distance to detection a, b µm": "nearest_um: a, b",
    }
    for row, feature in enumerate(features):
        written = feature["properties"]["measurements"]
        assert set(names) < set(written)
        for shown, column in names.items():
            assert written[shown] == pytest.approx(float(table[column][row]), abs=1e-3)


def test_other_types_change_the_distances_to_them_and_nothing_else(tmp_path: Path) -> None:
    cells, typing = cells_of(nuclei(30)), types_of([0, 1, 2] * 10)
    write_geoparquet(tmp_path / "a.parquet", measure(cells, typing, INFO.mpp), typing, INFO, PROVENANCE)
    other = types_of([2, 2, 0] * 10)
    write_retyped(tmp_path / "b.parquet", read_table(tmp_path / "a.parquet"), other, PROVENANCE)
    write_geoparquet(tmp_path / "c.parquet", measure(cells, other, INFO.mpp), other, INFO, PROVENANCE)
    found, expected = (geopandas.read_parquet(tmp_path / name) for name in ("b.parquet", "c.parquet"))
    assert list(found.columns) == list(expected.columns)
    geopandas.testing.assert_geodataframe_equal(found, expected, check_dtype=False)
    untyped = Typing.untyped(30)
    write_retyped(tmp_path / "d.parquet", read_table(tmp_path / "b.parquet"), untyped, PROVENANCE)
    assert not [name for name in read_table(tmp_path / "d.parquet").schema.names if ": " in name]
