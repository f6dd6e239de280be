"""The part of a run's page about tiles: a fault at their borders shows, missing ones are marked, and earlier runs have a page as well."""

from __future__ import annotations

import base64
import io
import json
import re
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from wsiseg.formats.geoparquet import read_geoparquet
from wsiseg.formats.parts import write_part
from wsiseg.report.seams import border_profile, seam_distance
from wsiseg.slide.tiling import TileGrid

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    RunMaker = Callable[..., Path]

GRID = TileGrid(500.0, (-200.0, 0.0), 2)
SIZE = (4100, 3700)  # the last tiles are cut
MPP = 0.5
TILES = {"side_px0": 100.0, "origin_px0": [-50.0, 0.0], "block_tiles": 4, "failed_px0": [], "missing_blocks": []}


@pytest.fixture(scope="module")
def tissue() -> np.ndarray:
    """Places of 20,000 nuclei, denser to the right and nowhere in a third of the slide."""
    xy = np.random.default_rng(3).random((40_000, 2)) ** (0.7, 1) * SIZE
    return xy[xy[:, 1] > 1300]


def test_the_distance_is_that_of_the_nearest_border_between_tiles() -> None:
    xy = np.array([[10.0, 10.0], [310.0, 250.0], [790.0, 495.0], [4099.0, 3699.0]])
    np.testing.assert_allclose(seam_distance(xy, GRID, SIZE), [290, 10, 5, 199])


def test_cells_that_no_seam_disturbs_are_inconspicuous(tissue: np.ndarray) -> None:
    profile = border_profile(tissue, GRID, SIZE, MPP)
    assert profile is not None
    assert abs(profile.near - 1) < 3 * profile.error < 0.15
    assert not profile.conspicuous
    np.testing.assert_allclose(profile.ratios, 1, atol=0.15)


def test_lost_and_doubled_cells_at_the_seams_show(tissue: np.ndarray) -> None:
    distance = seam_distance(tissue, GRID, SIZE) * MPP
    lost = border_profile(tissue[distance > 3], GRID, SIZE, MPP)
    twice = border_profile(np.concatenate([tissue, tissue[distance < 4]]), GRID, SIZE, MPP)
    assert lost is not None
    assert lost.conspicuous
    assert lost.ratios[0] < 0.35 < 0.85 < lost.ratios[1]
    assert twice is not None
    assert twice.conspicuous
    assert twice.ratios[0] > 1.7 > 1.2 > twice.ratios[1]


def page_with(run: Path, wsiseg: Callable[..., tuple[int, str]], **change: object) -> str:
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | change))
    status, output = wsiseg("report", run)
    assert status == 0, output
    text = (run / "report.html").read_text("utf-8")
    return text[text.index('id="tiles"') : text.index('id="run"')]


@pytest.fixture
def run(make_run: RunMaker, tmp_path: Path) -> Path:
    """Cells of 10 px, 20 px apart, on a slide of 1000 x 400 px; some reach over x = 50, 150, ... and y = 100, 200, 300."""
    cells = [(x, y, 10, "tumour") for x in range(5, 990, 20) for y in range(5, 390, 20)]
    return make_run(tmp_path / "run", cells, ("tumour",))


def test_missing_tiles_and_blocks_are_marked(run: Path, wsiseg: Callable[..., tuple[int, str]]) -> None:
    tiles = TILES | {"failed_px0": [[450.0, 300.0]], "missing_blocks": ["0000-0002"]}
    page = page_with(run, wsiseg, tiles=tiles, counts={"tiles": 44, "tiles_failed": 13})
    assert "44 tiles, 13 missing (1 whole block)" in page
    assert "Map of the tiles: 13 of 44 missing" in page
    data = re.search(r"data:image/png;base64,([^\"]+)", page)[1]
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"), int)
    side = pixels.shape[0] // 4
    assert pixels.shape[:2] == (4 * side, 11 * side)
    orange = np.abs(pixels[side // 4 :: side, side // 2 :: side] - (217, 95, 2)).sum(-1) < 60
    expected = np.zeros((4, 11), bool)
    expected[3, 5] = expected[:, 8:] = True  # rows are four: a block holds all of them
    np.testing.assert_array_equal(orange, expected)


def test_cells_over_a_seam_are_counted(run: Path, wsiseg: Callable[..., tuple[int, str]]) -> None:
    page = page_with(run, wsiseg, tiles=TILES, counts={"tiles": 44, "tiles_failed": 0})
    assert "44 tiles, 0 missing." in page
    over = sum(any(x < edge < x + 10 for edge in range(50, 1000, 100)) for x in range(5, 990, 20)) * 20
    over += sum(any(y < edge < y + 10 for edge in (100, 200, 300)) for y in range(5, 390, 20)) * 50
    assert over == 200
    assert re.search(r"Outlines over a seam</th><td>200<", page)


@pytest.mark.parametrize(("found", "compared"), [(1000, True), (999, False)])
def test_outlines_of_the_tiles_are_compared_though_a_click_added_one(
    run: Path, wsiseg: Callable[..., tuple[int, str]], found: int, compared: bool
) -> None:
    cells = read_geoparquet(run / "cells.parquet")[0]
    (run / "parts").mkdir()
    write_part(run / "parts" / "a.parquet", cells.take(np.arange(found)), "p", {"tiles": 44})
    counts = {"tiles": 44, "tiles_failed": 0, "outlines": 1001, "from_clicks": 1}
    page = page_with(run, wsiseg, tiles=TILES, counts=counts, parts_hash="p")
    assert ("Dropped for a better outline" in page) == compared


@pytest.mark.parametrize(
    "tiles", [{}, {"side_px0": "wide"}, None, {"side_px0": 0, "origin_px0": [0, 0], "block_tiles": 1}]
)
def test_runs_that_did_not_note_their_tiles(run: Path, wsiseg: Callable[..., tuple[int, str]], tiles: object) -> None:
    assert "Not known: the run was made by a version" in page_with(run, wsiseg, tiles=tiles)


def test_a_slide_of_one_tile_has_no_seam(run: Path, wsiseg: Callable[..., tuple[int, str]]) -> None:
    tiles = TILES | {"side_px0": 1024.0, "origin_px0": [0.0, 0.0]}
    page = page_with(run, wsiseg, tiles=tiles, counts={"tiles": 1, "tiles_failed": 0})
    assert "1 tile, 0 missing" in page
    assert "No cell lies near a seam between tiles." in page
    assert "<svg" not in page
