"""Masks become polygons in the corner frame, without shift or bias."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
import torch

from wsiseg.config import MaskConfig
from wsiseg.geometry import Box, Lattice, largest_part
from wsiseg.records import WindowMasks
from wsiseg.segmentation.polygons import trace

SIMPLIFY_NOTHING = MaskConfig(min_area_um2=0.0, simplify_um=0.0)


def masks_of(
    logits: np.ndarray, origin: tuple[int, int] = (0, 0), prompt: tuple[float, float] | None = None
) -> WindowMasks:
    n = len(logits)
    middle = prompt or (origin[0] + logits.shape[2], origin[1] + logits.shape[1])
    return WindowMasks(
        logits=torch.from_numpy(logits.astype(np.float32)),
        origin_xy=torch.tensor([origin] * n),
        mask_stride_px=2,
        predicted_iou=torch.full((n,), 0.9),
        stability=torch.full((n,), 0.8),
        descriptors=torch.zeros(n, 4, dtype=torch.half),
        points_xy=torch.tensor([middle] * n, dtype=torch.float32),
    )


def disc(radius: float, centre: tuple[float, float] = (32.0, 32.0), size: int = 64) -> np.ndarray:
    """Signed distance to a circle, in cells, at the cells' centres."""
    y, x = np.mgrid[:size, :size] + 0.5
    return (radius - np.hypot(x - centre[0], y - centre[1]))[None]


@pytest.mark.parametrize("radius", [3.0, 6.0, 15.0])
@pytest.mark.parametrize("centre", [(32.0, 32.0), (30.3, 33.9)])
def test_a_disc_keeps_its_centre_and_area(radius: float, centre: tuple[float, float]) -> None:
    """No half-pixel shift (0.05 px at most) and no area bias beyond that of a polygon of this few vertices."""
    cells, touching = trace(masks_of(disc(radius, centre)), Box(0, 0, 128, 128), Lattice(0.25, 0.25), SIMPLIFY_NOTHING)
    assert touching == 0
    (polygon,) = cells.polygons
    np.testing.assert_allclose(polygon.centroid.coords[0], (centre[0] * 2, centre[1] * 2), atol=0.05)
    assert polygon.area == pytest.approx(np.pi * (2 * radius) ** 2, rel=0.03 if radius < 5 else 0.006)


def test_tile_and_window_offsets_and_scale() -> None:
    """Window at (20, 30) of a tile at (1000, 2000), slide of 0.5 um/px: level-0 px are half of model px."""
    cells, _ = trace(masks_of(disc(5.0), (20, 30)), Box(1000, 2000, 1500, 2500), Lattice(0.5, 0.25), SIMPLIFY_NOTHING)
    np.testing.assert_allclose(
        cells.polygons[0].centroid.coords[0], ((1000 + 20 + 64) / 2, (2000 + 30 + 64) / 2), atol=0.05
    )
    np.testing.assert_allclose(cells.points_xy[0], ((1000 + 20 + 64) / 2, (2000 + 30 + 64) / 2))
    assert cells.scores[0] == pytest.approx(0.72)


def test_the_part_with_the_prompt_is_kept() -> None:
    both = np.maximum(disc(8.0, (45.0, 32.0)), disc(4.0, (20.0, 32.0)))
    cells, _ = trace(masks_of(both, prompt=(40.0, 64.0)), Box(0, 0, 128, 128), Lattice(0.25, 0.25), SIMPLIFY_NOTHING)
    np.testing.assert_allclose(cells.polygons[0].centroid.coords[0], (40, 64), atol=0.1)


def test_holes_are_filled() -> None:
    ring = np.minimum(disc(10.0), -disc(4.0))
    cells, _ = trace(masks_of(ring, prompt=(64.0, 80.0)), Box(0, 0, 128, 128), Lattice(0.25, 0.25), SIMPLIFY_NOTHING)
    assert cells.polygons[0].area == pytest.approx(np.pi * 400, rel=0.01)


def test_masks_cut_by_the_window_are_counted_and_closed() -> None:
    cells, touching = trace(
        masks_of(disc(10.0, (2.0, 32.0))), Box(0, 0, 128, 128), Lattice(0.25, 0.25), SIMPLIFY_NOTHING
    )
    assert touching == 1
    assert cells.polygons[0].is_valid
    assert cells.polygons[0].bounds[0] == pytest.approx(0, abs=1e-6)


def test_small_and_empty_masks_are_left_out() -> None:
    logits = np.concatenate([disc(1.0), np.full((1, 64, 64), -3.0), disc(8.0)])
    cells, _ = trace(masks_of(logits), Box(0, 0, 128, 128), Lattice(0.25, 0.25), MaskConfig(min_area_um2=5))
    assert len(cells) == 1


def test_small_dents_are_filled_and_deep_ones_stay() -> None:
    """A disc with a notch: 4 % of its hull is filled; a crescent, three fifths of its hull, keeps its shape. At 1 nothing is filled."""
    y, x = np.mgrid[:64, :64] + 0.5
    notch = np.minimum(disc(10.0)[0], np.hypot(x - 42, y - 32) - 4)[None]
    crescent = np.minimum(disc(12.0)[0], np.hypot(x - 40, y - 32) - 10)[None]
    for shape, rounded in ((notch, True), (crescent, False)):
        masks = masks_of(shape, prompt=(48.0, 64.0))
        as_it_is, settled = (
            trace(
                masks,
                Box(0, 0, 128, 128),
                Lattice(0.25, 0.25),
                MaskConfig(min_area_um2=0.0, simplify_um=0.0, convex_above=share),
            )[0].polygons[0]
            for share in (1.0, 0.8)
        )
        assert as_it_is.area < 0.98 * as_it_is.convex_hull.area
        assert settled.equals(as_it_is.convex_hull if rounded else as_it_is)


def test_simplifying_costs_less_than_half_a_percent() -> None:
    shape = disc(8.0)
    plain, _ = trace(masks_of(shape), Box(0, 0, 128, 128), Lattice(0.25, 0.25), SIMPLIFY_NOTHING)
    thin, _ = trace(masks_of(shape), Box(0, 0, 128, 128), Lattice(0.25, 0.25), MaskConfig())
    a, b = plain.polygons[0], thin.polygons[0]
    assert shapely.intersection(a, b).area / shapely.union(a, b).area > 0.99
    assert shapely.get_num_coordinates(b) < 0.7 * shapely.get_num_coordinates(a)


def test_largest_part() -> None:
    collection = shapely.GeometryCollection(
        [shapely.box(0, 0, 1, 1), shapely.MultiPolygon([shapely.box(5, 5, 9, 9)]), shapely.Point(0, 0)]
    )
    assert largest_part(collection).equals(shapely.box(5, 5, 9, 9))
    assert largest_part(shapely.LineString([(0, 0), (1, 1)])).is_empty


def test_no_masks_give_no_cells() -> None:
    none = masks_of(disc(10)).take(torch.zeros(1, dtype=torch.bool))
    cells, touching = trace(none, Box(0, 0, 128, 128), Lattice(0.25, 0.25), MaskConfig())
    assert len(cells) == 0
    assert touching == 0
