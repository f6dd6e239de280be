"""Colours of cells: exact on pictures made by hand, independent of tiles, from the slide's own pixels, in every file."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely
from skimage.draw import polygon as skimage_polygon

import wsiseg
from wsiseg.formats.parts import KEY, open_part, part_is_current, read_part, write_part
from wsiseg.geometry import Box, Lattice
from wsiseg.measurements import colour_names, qupath_name
from wsiseg.records import Cells
from wsiseg.segmentation.colours import RING_UM, _crossings, _pixels_inside, measure_colours
from wsiseg.slide import read_region
from wsiseg.slide.array_reader import ArrayReader
from wsiseg.slide.stain import DYES

if TYPE_CHECKING:
    from pathlib import Path

LATTICE = Lattice(0.5, 0.25)  # two model px per level-0 px
SIZE = (200, 150)  # level-0 px


def cells_of(*polygons: shapely.Polygon) -> Cells:
    count = len(polygons)
    table = np.empty(count, object)
    table[:] = polygons
    return Cells(
        polygons=table,
        points_xy=np.zeros((count, 2)),
        scores=np.full(count, 0.5, np.float32),
        descriptors=np.zeros((count, 2), np.float16),
    )


def dyed(haematoxylin: float, other: float, dye: str = "eosin") -> np.ndarray:
    """RGB of amounts of two dyes."""
    vectors = [DYES[name] / np.linalg.norm(DYES[name]) for name in ("haematoxylin", dye)]
    return 255 * 10.0 ** -(haematoxylin * vectors[0] + other * vectors[1])


@pytest.mark.parametrize(("stain", "dye"), [("he", "eosin"), ("ihc", "dab"), ("ihc-nuclear", "dab")])
def test_amounts_that_were_painted_are_found(stain: str, dye: str) -> None:
    """A nucleus of one colour in a ring of another; half of its pixels are darker."""
    outer = Box(40, 20, 240, 220)
    pixels = np.empty((200, 200, 3))
    pixels[:] = dyed(0.1, 0.4, dye)
    nucleus = shapely.box(40, 30, 60, 50)  # level-0 px; model px 80 .. 120 and 60 .. 100
    pixels[60 - 20 : 100 - 20, 80 - 40 : 100 - 40] = dyed(0.6, 0.2, dye)
    pixels[60 - 20 : 100 - 20, 100 - 40 : 120 - 40] = dyed(0.4, 0.2, dye)
    found = measure_colours(
        cells_of(nucleus), pixels.round().astype(np.uint8), outer, LATTICE, SIZE, stain
    ).measurements
    assert tuple(found) == colour_names(stain)
    expected = {
        "nucleus_haematoxylin_mean": 0.5,
        "nucleus_haematoxylin_sd": 0.1,
        f"nucleus_{dye}_mean": 0.2,
        f"nucleus_{dye}_sd": 0.0,
        "nucleus_residual_mean": 0.0,
        "ring_haematoxylin_mean": 0.1,
        "ring_haematoxylin_sd": 0.0,
        f"ring_{dye}_mean": 0.4,
    }
    for name, value in expected.items():
        assert found[name][0] == pytest.approx(value, abs=0.01), name


def test_pixels_inside_are_those_of_scikit_image() -> None:
    rng = np.random.default_rng(1)
    angles = np.linspace(0, 2 * np.pi, 25, endpoint=False)
    rings = np.stack([np.sin(angles), np.cos(angles)], -1) * rng.uniform(3, 20, (60, 25, 1)) + rng.uniform(
        0, 100, (60, 1, 2)
    )
    polygons = shapely.polygons(rings)
    low, high = np.array([10, 20]), np.array([90, 95])
    number, place = _pixels_inside(_crossings(polygons), low, high, 100, len(polygons))
    owner = np.repeat(np.arange(len(polygons)), number)
    for k, ring in enumerate(rings):
        row, column = skimage_polygon(ring[:, 1], ring[:, 0], (90, 95))
        seen = (row >= 10) & (column >= 20)
        assert sorted(place[owner == k].tolist()) == sorted((row * 100 + column)[seen].tolist())


def test_what_lies_beyond_tile_and_slide_is_not_measured() -> None:
    """At the slide's corner the ring has no pixels outside; a cell beyond has none at all, and no colours."""
    outer = Box(-40, -40, 160, 160)
    pixels = np.zeros((200, 200, 3), np.uint8)  # black beyond the slide
    pixels[40:, 40:] = dyed(0.3, 0.3).round()
    corner, beyond = shapely.box(0, 0, 10, 10), shapely.box(-15, -15, -9, -9)
    found = measure_colours(cells_of(corner, beyond), pixels, outer, LATTICE, SIZE, "he").measurements
    for place in ("nucleus", "ring"):
        assert found[f"{place}_haematoxylin_mean"][0] == pytest.approx(0.3, abs=0.01)
        assert found[f"{place}_haematoxylin_sd"][0] == pytest.approx(0, abs=1e-3)
        assert np.isnan(found[f"{place}_haematoxylin_mean"][1])
    none = measure_colours(Cells.empty(2), pixels, outer, LATTICE, SIZE, "he")
    assert len(none) == 0


def test_the_ring_is_two_microns_wide() -> None:
    assert RING_UM == 2
    pixels = np.full((200, 200, 3), 255, np.uint8)
    pixels[80 - 8 : 120 + 8, 80 - 8 : 120 + 8] = 1  # 8 px of 0.25 um beyond the nucleus
    square = shapely.box(40, 40, 60, 60)
    found = measure_colours(cells_of(square), pixels, Box(0, 0, 200, 200), LATTICE, SIZE, "he").measurements
    assert found["ring_haematoxylin_sd"][0] == pytest.approx(0, abs=1e-6)
    pixels[72] = pixels[:, 127] = 255
    found = measure_colours(cells_of(square), pixels, Box(0, 0, 200, 200), LATTICE, SIZE, "he").measurements
    assert found["ring_haematoxylin_sd"][0] > 0.1


def test_clicks_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    """A run begun by it is resumed: its blocks are made again, its clicks are there."""
    write_part(tmp_path / "clicks.cells", cells_of(shapely.box(0, 0, 5, 5)), "h", {"tiles": 0})
    table = pq.read_table(tmp_path / "clicks.cells")
    note = json.loads(table.schema.metadata[KEY])
    del note["measurements"]
    note["format"] = 1
    pq.write_table(table.replace_schema_metadata({KEY: json.dumps(note)}), tmp_path / "clicks.cells")
    assert len(read_part(tmp_path / "clicks.cells")[0]) == 1
    assert not part_is_current(tmp_path / "clicks.cells", "h")


def test_parts_keep_them_and_cells_without_are_nan(tmp_path: Path) -> None:
    cells = cells_of(shapely.box(0, 0, 5, 5), shapely.box(9, 9, 15, 15))
    coloured = replace(cells, measurements={name: np.arange(2, dtype=np.float32) for name in colour_names("he")})
    counts = {"tiles": 1, "tiles_failed": 0}
    write_part(tmp_path / "a.parquet", coloured, "h", counts)
    again, _ = read_part(tmp_path / "a.parquet")
    assert again.measurement_names == colour_names("he")
    np.testing.assert_array_equal(again.measurements["ring_eosin_sd"], [0, 1])
    assert open_part(tmp_path / "a.parquet", ("score",)).table.column_names == ["score"]
    joined = Cells.concatenate([Cells.empty(2), cells, coloured], 2)
    np.testing.assert_array_equal(joined.measurements["ring_eosin_sd"], [np.nan, np.nan, 0, 1])


@pytest.mark.parametrize(("mpp", "tolerance"), [(0.25, 0), (0.2, 0), (0.499, 5e-4)])
def test_they_do_not_depend_on_the_tiles(mpp: float, tolerance: float) -> None:
    """The same outlines in two tiles that overlap have the same numbers; resampling by an odd factor rounds a few grey levels otherwise."""
    rng = np.random.default_rng(4)
    slide = ArrayReader(rng.integers(0, 256, (700, 700, 3)).astype(np.uint8), mpp)
    lattice = Lattice(mpp, 0.25)
    angles = np.linspace(0, 2 * np.pi, 20, endpoint=False)
    middles = lattice.to_level0(rng.uniform(240, 330, (30, 1, 2)))
    outlines = middles + lattice.to_level0(np.stack([np.cos(angles), np.sin(angles)], -1) * 12)
    cells = cells_of(*shapely.polygons(outlines))
    found = []
    for outer in (Box(0, 0, 384, 384), Box(208, 192, 512, 512)):
        pixels = read_region(slide, outer, lattice)
        found.append(measure_colours(cells, pixels, outer, lattice, slide.info.size_px0, "he").measurements)
    for name in colour_names("he"):
        assert np.isfinite(found[0][name]).all()
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=0, atol=tolerance)


def test_a_brown_slide_is_measured_as_it_is(demo: tuple[Path, Path], tmp_path: Path) -> None:
    """The demo is immunohistochemistry: what the network is shown has eosin and no brown, what is measured is the slide."""
    slide, seeds = demo
    run = wsiseg.segment_slide(slide, seeds=seeds, out=tmp_path)
    table = run.cells().to_geodataframe()
    measured = [name for name in table if name.startswith(("nucleus_", "ring_"))]
    assert measured == list(colour_names("ihc"))
    brown = table["ring_dab_mean"].groupby(table["cell_type"], observed=True).median()
    assert brown["epithelium"] > brown["stroma"] + 0.03
    features = json.loads(gzip.decompress((run.path / "cells.geojson.gz").read_bytes()))["features"]
    shown = features[0]["properties"]["measurements"]
    assert {qupath_name(name) for name in measured} <= set(shown)
    assert qupath_name("nucleus_haematoxylin_sd") == "Nucleus: Hematoxylin OD std dev"
    assert shown["Ring: DAB OD mean"] == pytest.approx(float(table["ring_dab_mean"].iloc[0]), abs=1e-3)
