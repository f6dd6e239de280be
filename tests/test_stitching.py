"""Overlaps are settled by score, in one total order."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from wsiseg.config import StitchingConfig
from wsiseg.records import Cells
from wsiseg.stitching import stitch

SIZE = (1000, 1000)


def cells_of(shapes: list[shapely.Polygon], scores: list[float]) -> Cells:
    return Cells(
        np.array(shapes, object),
        np.array([s.centroid.coords[0] for s in shapes]).reshape(-1, 2),
        np.array(scores, np.float32),
        np.arange(len(shapes), dtype=np.float16)[:, None],
    )


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
    assert counts.trimmed == 1


def test_a_cluster_goes_and_its_members_stay() -> None:
    """One outline over two nuclei, with the best score of the three."""
    out, counts = stitch(cells_of([square(10, 10, 30), square(11, 11), square(25, 25)], [0.95, 0.8, 0.8]), SIZE, 1, StitchingConfig())
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
    out, _ = stitch(cells_of([square(0, 0), square(6, 0), square(12, 0)], [0.9, 0.8, 0.7]), SIZE, 1, StitchingConfig(max_overlap=0.15))
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
            shapes[j].area < shapes[i].area and shapes[i].intersection(shapes[j]).area >= config.contained * shapes[j].area
            for j in range(len(shapes)) if j != i
        )  # fmt: skip

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
