"""The quick way to outlines on the grid gives what the slow one gives, for any polygon; so does the quick way to WKB."""

from __future__ import annotations

import json
from itertools import groupby
from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from wsiseg.formats.qupath import coordinates
from wsiseg.formats.qupath.coordinates import _are_stars, outline_texts, snap_polygons


def table_of(polygons: Any) -> np.ndarray:
    table = np.empty(len(polygons), object)
    table[:] = list(polygons)
    return table


def expected(polygons: np.ndarray, origin: tuple[float, float]) -> list[Any]:
    """The coordinates of the snapped polygons, without repeated vertices."""
    with np.errstate(invalid="ignore"):
        snapped = snap_polygons(polygons)
    rings = [None if p is None else [p.exterior, *p.interiors] for p in snapped]
    return [
        None
        if r is None
        else [
            [[x - origin[0], y - origin[1]] for (x, y), _ in groupby(shapely.get_coordinates(ring).tolist())]
            for ring in r
        ]
        for r in rings
    ]


def assert_same(polygons: Any, origin: tuple[float, float] = (0.0, 0.0)) -> list[Any]:
    table = table_of(polygons)
    texts = outline_texts(table, origin)
    assert not any(b".0" in text for text in texts)
    found = [json.loads(b"[[" + text + b"]]") if text else None for text in texts]
    assert found == expected(table, origin)
    return found


def noisy(seed: int, radius: float, noise: float, centre: float, vertices: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    angles = np.linspace(0, 2 * np.pi, vertices, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    middles = centre + rng.uniform(-50, 50, (300, 1, 2))
    return np.asarray(shapely.polygons(middles + radius * circle + rng.normal(scale=noise, size=(300, vertices, 2))))


@pytest.mark.parametrize("vertices", [3, 5, 25])
@pytest.mark.parametrize(("radius", "noise"), [(12, 0.3), (12, 1.5), (12, 6), (1, 0.3), (0.2, 0.1), (300, 10)])
@pytest.mark.parametrize("centre", [0.0, 987.0, 150_000.0, 2_000_000.0, -5_000_000.0])
def test_noisy_outlines_of_any_size_and_place(radius: float, noise: float, centre: float, vertices: int) -> None:
    """Round ones, others that cross themselves, specks that vanish; numbers with one to seven digits and both signs."""
    assert_same(noisy(int(radius * 10 + vertices), radius, noise, centre, vertices), (1000.0, 500.0))


def test_most_nuclei_are_proved_and_none_is_lost() -> None:
    outlines = noisy(0, 12, 0.3, 5000, 25)
    called = []
    slow = coordinates.snap_polygons
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coordinates, "snap_polygons", lambda polygons: called.append(len(polygons)) or slow(polygons))
        texts = outline_texts(outlines, (0.0, 0.0))
    assert all(texts)
    assert sum(called) < 5


def test_halves_of_the_grid_are_rounded_as_geos_does() -> None:
    """Vertices in the middle between two places of the grid, and a rounding error beside it."""
    eighths = np.arange(-40, 41) / 8
    corners = [
        shapely.Polygon([(a, b), (a + 7, b), (a + 7.125, b + 9.375), (a, b + 6)])
        for a in eighths
        for b in (-0.125, 0.125, 0.375)
    ]
    beside = [shapely.Polygon([(np.nextafter(a, 9), a), (a + 7, np.nextafter(a, -9)), (a + 3, a + 9)]) for a in eighths]
    assert_same(corners + beside)


def test_what_is_no_single_ring() -> None:
    square = shapely.box(0, 0, 10, 10)
    with np.errstate(invalid="ignore"):
        nan, endless = (shapely.Polygon([(0, 0), (float(word), 1), (1, 1), (0, 0)]) for word in ("nan", "inf"))
    holes = shapely.Polygon(square.exterior, [shapely.box(1, 1, 3, 3).exterior, shapely.box(5, 5, 6.1, 6.1).exterior])
    parts = shapely.MultiPolygon([square, shapely.box(20, 20, 50, 50)])
    spiral = shapely.LineString(
        [(0, 0), (40, 0), (40, 40), (5, 40), (5, 5), (30, 5), (30, 30), (15, 30), (15, 15)]
    ).buffer(1.5)
    huge = shapely.Polygon([(0, 0), (2.0**21, 1), (3, 2.0**21)])
    far = shapely.Polygon([(2.0**45, 0), (2.0**45 + 8, 0), (2.0**45, 8)])
    high = shapely.Polygon([(0, 0, 1), (9, 0, 2), (9, 9, 3)])
    turns = np.arange(0, 4 * np.pi, 0.5)
    twice_round = shapely.Polygon(np.stack([np.cos(turns), np.sin(turns)], 1) * (10 + turns[:, None] / 3))
    polygons = [
        square,
        None,
        shapely.Polygon(),
        nan,
        endless,
        holes,
        parts,
        spiral,
        huge,
        far,
        high,
        twice_round,
        shapely.Point(1, 2),
        shapely.LineString([(0, 0), (1, 1)]),
        shapely.MultiPolygon(),
        shapely.Polygon([(0, 0), (5, 5), (10, 10)]),
        shapely.box(0, 0, 0.3, 0.3),
        shapely.Polygon([(0, 0), (10, 10), (10, 0), (0, 10)]),
        shapely.Polygon([(0, 0), (0, 0), (5, 0), (5.01, 0), (5, 5), (0, 0.01)]),
    ]
    found = assert_same(polygons, (7.0, -3.0))
    assert [len(rings) if rings else 0 for rings in found[:12]] == [
        1,
        0,
        0,
        0,
        0,
        3,
        1,
        1,
        1,
        1,
        1,
        2,
    ]  # the last one around a hole
    for count in (0, 1):
        assert len(assert_same([None] * count)) == count


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 24), st.integers(0, 24)), min_size=3, max_size=9), min_size=1, max_size=6
    )
)
def test_few_vertices_on_a_small_grid(rings: list[list[tuple[int, int]]]) -> None:
    """Every way in which a ring can touch, cross or repeat itself."""
    assert_same([shapely.Polygon(np.array(ring) / 8) for ring in rings])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=3, max_size=8))
def test_what_is_called_a_star_is_valid(ring: list[tuple[int, int]]) -> None:
    closed = np.array([*ring, ring[0]]) / 4
    closed = closed[np.concatenate([[True], (closed[1:] != closed[:-1]).any(axis=1)])]
    areas = np.array([shapely.Polygon(closed).area if len(closed) > 3 else 0.0])
    if _are_stars(np.ascontiguousarray(closed.T), np.array([0, len(closed)]), areas)[0]:
        assert shapely.Polygon(closed).is_valid


def test_a_ring_that_goes_round_twice_is_no_star() -> None:
    twice = np.array([(4, 0), (0, 4), (-4, 0), (0, -4), (5, 0), (0, 5), (-5, 0), (0, -5), (4, 0)], float)
    once = np.array([(4, 0), (0, 4), (-4, 0), (0, -4), (4, 0)], float)
    for direction in (1, -1):
        rings = [twice[::direction], once[::direction]]
        starts = np.cumsum([0, *(len(ring) for ring in rings)])
        areas = np.array([shapely.Polygon(ring).area for ring in rings])
        assert _are_stars(np.concatenate(rings).T.copy(), starts, areas).tolist() == [False, True]


def test_a_cell_that_falls_apart_on_the_grid_keeps_its_parts() -> None:
    """A neck thinner than the grid is widened; what was joined has the area of the outline."""
    for angle in (0, 30, 45, 77, 90, 140, 171):
        left, right = shapely.Point(0, 0).buffer(4), shapely.Point(11, 0).buffer(3)
        neck = shapely.box(3, -0.04, 9, 0.04)
        cell = shapely.affinity.rotate(shapely.union_all([left, neck, right]), angle, origin=(3.3, 7.7))
        assert cell.geom_type == "Polygon"
        (snapped,) = snap_polygons(table_of([cell]))
        assert snapped.is_valid
        assert snapped.geom_type == "Polygon"
        assert snapped.area == pytest.approx(cell.area, rel=0.02)
        assert shapely.area(snapped.intersection(cell)) > 0.93 * cell.area
        assert_same([cell])


def test_small_outlines_keep_their_area() -> None:
    """Rounding changes one in ten of such outlines by more than 2 %; afterwards none."""
    cells = noisy(3, 2.5, 0.2, 5000, 12)
    rounded = shapely.set_precision(cells, 0.25, mode="pointwise")
    assert (np.abs(shapely.area(rounded) / shapely.area(cells) - 1) > 0.02).mean() > 0.1
    snapped = snap_polygons(cells)
    assert (np.abs(shapely.area(snapped) / shapely.area(cells) - 1) <= 0.02).all()
    assert (shapely.hausdorff_distance(snapped, cells) < 0.5).all()
    assert_same(cells)


@pytest.mark.parametrize("tip", [(40.0, 0.25), (60.25, 0.5), (100.0, 0.75)])
def test_needles_thinner_than_qupaths_grid_are_cut_off(tip: tuple[float, float]) -> None:
    """QuPath moves an edge to a vertex that is nearer than its grid of 0.01 px; nothing is left for it to move."""
    needle = shapely.Polygon(
        [(0, 0), tip, (tip[0] / 2 // 0.25 * 0.25, tip[1] / 2 // 0.25 * 0.25 + 0.25), (0, 12), (-9, 6)]
    )
    for polygon in (needle, shapely.affinity.translate(needle, 150_000, 3)):
        (snapped,) = snap_polygons(table_of([polygon]))
        again = shapely.set_precision(snapped, 0.01)
        assert snapped.is_valid
        assert shapely.get_num_coordinates(again) == shapely.get_num_coordinates(
            shapely.remove_repeated_points(snapped)
        )
        assert snapped.area == pytest.approx(polygon.area, rel=0.02)
        assert_same([polygon])
