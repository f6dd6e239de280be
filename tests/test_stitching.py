"""Overlaps are settled by score, in one total order."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from wsiseg.config import StitchingConfig
from wsiseg.errors import RunError
from wsiseg.formats.parts import read_part, write_part
from wsiseg.records import Cells
from wsiseg.stitching.outline_store import OutlineStore
from wsiseg.stitching.overlaps import find_pairs, refine_areas
from wsiseg.stitching.resolve import resolve_overlaps
from wsiseg.stitching.stitch import StitchCounts
from wsiseg.stitching.stitch import stitch as stitch_outlines

if TYPE_CHECKING:
    from pathlib import Path

SIZE = (1000, 1000)


def cells_of(shapes: list[shapely.Polygon], scores: list[float]) -> Cells:
    return Cells(
        polygons=np.array(shapes, object),
        points_xy=np.array([s.centroid.coords[0] for s in shapes]).reshape(-1, 2),
        scores=np.array(scores, np.float32),
        descriptors=np.arange(len(shapes), dtype=np.float16)[:, None],
    )


def stitch(cells: Cells, size: tuple[int, int], min_area: float, config: StitchingConfig) -> tuple[Cells, StitchCounts]:
    """All in memory, as one part."""
    settled, counts = stitch_outlines([cells], size, min_area, config, descriptor_size=cells.descriptor_size)
    return settled.take(slice(None)), counts


def square(x: float, y: float, side: float = 10) -> shapely.Polygon:
    return shapely.box(x, y, x + side, y + side)


def test_duplicates_keep_the_better() -> None:
    out, counts = stitch(cells_of([square(10, 10), square(11, 10)], [0.7, 0.9]), SIZE, 1, StitchingConfig())
    assert out.scores.tolist() == [np.float32(0.9)]
    assert (counts.kept, counts.overlapped) == (1, 1)


def test_neighbours_that_touch_stay() -> None:
    out, _ = stitch(cells_of([square(10, 10), square(20, 10)], [0.7, 0.9]), SIZE, 1, StitchingConfig())
    assert len(out) == 2


def test_small_overlaps_are_cut_from_the_worse() -> None:
    out, counts = stitch(cells_of([square(10, 10), square(18, 10)], [0.7, 0.9]), SIZE, 1, StitchingConfig())
    by_score = dict(zip(out.scores.round(2).tolist(), shapely.area(out.polygons), strict=True))
    assert by_score[np.float32(0.9).round(2).item()] == 100
    assert by_score[np.float32(0.7).round(2).item()] == 80
    assert counts.clipped == 1


def test_a_cluster_goes_and_its_members_stay() -> None:
    """One outline over two nuclei, with the best score of the three."""
    out, counts = stitch(
        cells_of([square(10, 10, 30), square(11, 11), square(25, 25)], [0.95, 0.8, 0.8]), SIZE, 1, StitchingConfig()
    )
    assert len(out) == 2
    assert counts.clusters == 1


@pytest.mark.parametrize("scores", [[0.6, 0.9], [0.9, 0.6]])
def test_of_two_nested_outlines_the_better_stays(scores: list[float]) -> None:
    """A disc inside a disc: no cell lies in another, and no hole is filled back in."""
    centre = shapely.Point(50, 50)
    out, counts = stitch(cells_of([centre.buffer(20), centre.buffer(6)], scores), SIZE, 1, StitchingConfig())
    assert out.scores.tolist() == [np.float32(0.9)]
    assert counts.overlapped == 1


def test_a_chain_keeps_both_ends() -> None:
    """A (best) drops B, and B, being gone, drops nothing: C stays."""
    out, _ = stitch(
        cells_of([square(0, 0), square(6, 0), square(12, 0)], [0.9, 0.8, 0.7]),
        SIZE,
        1,
        StitchingConfig(max_overlap=0.15),
    )
    assert out.scores.tolist() == [np.float32(0.9), np.float32(0.7)]


def test_outlines_are_cut_at_the_slide() -> None:
    out, _ = stitch(cells_of([square(-5, 995)], [0.9]), SIZE, 1, StitchingConfig())
    assert out.polygons[0].bounds == (0, 995, 5, 1000)


def test_nothing_gives_nothing() -> None:
    out, counts = stitch(Cells.empty(3), SIZE, 1, StitchingConfig())
    assert len(out) == 0
    assert counts.outlines == 0


def brute_force(cells: Cells, config: StitchingConfig) -> set[tuple[float, float]]:
    """The rule in plain loops: which prompts survive."""
    order = sorted(range(len(cells)), key=lambda i: (-cells.scores[i], cells.points_xy[i, 1], cells.points_xy[i, 0]))
    shapes = [shapely.intersection(cells.polygons[i], shapely.box(0, 0, *SIZE)) for i in order]

    def holds(i: int) -> int:
        return sum(
            shapes[j].area < shapes[i].area
            and shapes[i].intersection(shapes[j]).area >= config.contained * shapes[j].area
            for j in range(len(shapes))
            if j != i
        )

    clusters = {i for i in range(len(shapes)) if holds(i) >= config.cluster_size}
    kept: list[int] = []
    for i in range(len(shapes)):
        shared = {j: shapes[i].intersection(shapes[j]).area for j in kept}
        nested = any(s > 0 and s >= config.nested * min(shapes[i].area, shapes[j].area) for j, s in shared.items())
        if i not in clusters and not nested and sum(shared.values()) <= config.max_overlap * shapes[i].area:
            kept.append(i)
    return {tuple(cells.points_xy[order[i]]) for i in kept}


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(2, 40))
def test_same_as_plain_loops_in_any_order(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    shapes = [square(*rng.uniform(0, 60, 2), side=rng.uniform(4, 20)) for _ in range(count)]
    cells = cells_of(shapes, rng.choice([0.5, 0.6, 0.7], count).tolist())  # many ties
    config = StitchingConfig()
    out, _ = stitch(cells, SIZE, 0, config)
    assert {tuple(p) for p in out.points_xy} == brute_force(cells, config)
    shuffled, _ = stitch(cells.take(rng.permutation(count)), SIZE, 0, config)
    assert [p.wkb for p in shuffled.polygons] == [p.wkb for p in out.polygons]
    np.testing.assert_array_equal(shuffled.scores, out.scores)
    pairs = shapely.STRtree(out.polygons).query(out.polygons, predicate="overlaps")
    shared = shapely.area(shapely.intersection(out.polygons[pairs[0]], out.polygons[pairs[1]]))
    assert (shared < 1e-6).all()


def crowd(count: int, side: float, seed: int = 0) -> Cells:
    """Noisy nuclei at random places, many of them twice."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(10, side - 10, (count, 2))
    centres[count // 2 :: 3] = centres[: len(centres[count // 2 :: 3])] + rng.normal(
        0, 2, (len(centres[count // 2 :: 3]), 2)
    )
    angle = np.linspace(0, 2 * np.pi, 16)[:-1]
    radius = rng.uniform(6, 14, (count, 1)) * rng.uniform(0.8, 1.2, (count, 15))
    polygons = shapely.polygons(centres[:, None] + np.stack([radius * np.cos(angle), radius * np.sin(angle)], 2))
    scores = rng.choice(np.linspace(0.3, 1, 50), count).astype(np.float32)
    return Cells(
        polygons=polygons, points_xy=centres, scores=scores, descriptors=rng.normal(size=(count, 3)).astype(np.float16)
    )


@pytest.mark.parametrize("cache_bytes", [0, 1 << 26])
@pytest.mark.parametrize("sides", [(1,), (90, 35), (3, 1000)])
def test_parts_do_not_show(tmp_path: Path, sides: tuple[int, ...], cache_bytes: int) -> None:
    """However the outlines are cut into parts, whatever their order, and whether parts fit the cache: the same cells, byte by byte."""
    cells = crowd(1200, 600)
    whole, counts = stitch_outlines([cells], (600, 600), 20, StitchingConfig(), descriptor_size=3)
    for side in sides:
        key = (cells.points_xy // side).astype(int) @ (1, 10_000)
        parts: list[Path | Cells] = []
        for number, k in enumerate(np.random.default_rng(1).permutation(np.unique(key))[:400]):
            parts.append(tmp_path / f"{side}-{number}.parquet")
            write_part(parts[-1], cells.take(key == k), "hash", {})
        rest = np.ones(len(cells), bool)
        rest[_rows_in(parts, cells)] = False  # what is in no file comes from memory
        settled, mine = stitch_outlines(
            [*parts, cells.take(rest)], (600, 600), 20, StitchingConfig(), descriptor_size=3, cache_bytes=cache_bytes
        )
        assert mine == counts
        assert settled.total_bounds == whole.total_bounds
        np.testing.assert_array_equal(settled.bounds, whole.bounds)
        np.testing.assert_array_equal(settled.descriptors(), whole.descriptors())
        a, b = (Cells.concatenate(list(s.chunks(100)), 3) for s in (settled, whole))
        assert [p.wkb for p in a.polygons] == [p.wkb for p in b.polygons]
        np.testing.assert_array_equal(a.scores, b.scores)
        np.testing.assert_array_equal(a.descriptors, b.descriptors)
        np.testing.assert_array_equal(settled.bounds, shapely.bounds(a.polygons))


def _rows_in(parts: list[Path | Cells], cells: Cells) -> np.ndarray:
    """Rows of ``cells`` that lie in the part files."""
    there = {tuple(p) for part in parts for p in read_part(part)[0].points_xy.tolist()}
    return np.array([i for i, p in enumerate(cells.points_xy.tolist()) if tuple(p) in there])


def test_bounds_in_place_of_areas_decide_the_same() -> None:
    """Areas of boxes stand in for shared areas only where nothing hangs on them."""
    cells = crowd(3000, 1600, seed=3)
    outlines = OutlineStore([cells], (1600, 1600), 3)
    config = StitchingConfig()
    pairs = refine_areas(outlines, find_pairs(outlines, config), config)
    exact = shapely.area(shapely.intersection(outlines.polygons(pairs.low), outlines.polygons(pairs.high)))
    assert 0.02 < np.isclose(pairs.shared, exact, rtol=1e-9).mean() < 0.9, "some are bounds, some are not"
    assert (pairs.shared >= exact * (1 - 1e-9)).all()
    full = dataclasses.replace(pairs, shared=exact)
    areas = outlines.numbers.areas
    for one, other in zip(resolve_overlaps(areas, pairs, config), resolve_overlaps(areas, full, config), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_long_chain_is_decided() -> None:
    """Each outline hangs on the one before, 2000 times over: every second one stays."""
    squares = [square(6.0 * k, 0, 10) for k in range(2000)]
    out, counts = stitch(cells_of(squares, np.linspace(1, 0.5, 2000).tolist()), (20_000, 100), 1, StitchingConfig())
    assert len(out) == 1000
    assert counts.overlapped == 1000


def test_outlines_beyond_the_slide_do_not_hide_neighbours(tmp_path: Path) -> None:
    """One of a part lies wholly outside; the duplicates across the part's border are found all the same."""
    left, right = cells_of([square(90, 10), square(-50, -50)], [0.9, 0.8]), cells_of([square(91, 10)], [0.7])
    settled, counts = stitch_outlines([left, right], SIZE, 0, StitchingConfig(), descriptor_size=1)
    assert settled.take(slice(None)).scores.tolist() == [np.float32(0.9)]
    assert counts.overlapped == 1


def test_a_part_that_changes_on_the_way_is_noticed(tmp_path: Path) -> None:
    """Another process has written the block anew, with as many cells: rows must not be mixed."""
    path = tmp_path / "part.parquet"
    write_part(path, crowd(50, 300, seed=1), "hash", {})
    settled, _ = stitch_outlines([path], (300, 300), 1, StitchingConfig(), descriptor_size=3, cache_bytes=0)
    write_part(path, crowd(50, 300, seed=2), "hash", {})
    with pytest.raises(RunError, match="was changed by another run during this one"):
        settled.take(slice(None))
