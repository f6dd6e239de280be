"""Masks -> polygons in slide level-0 px.

Marching squares on the mask's own logits (sub-pixel; no upsampled mask is ever made). This is the one place where pixel centres become the
corner frame: logit (row, column) lies at ``((column + 0.5) * mask_stride_px, (row + 0.5) * mask_stride_px)`` of its window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import shapely

from wsiseg.geometry import largest_part
from wsiseg.records import Cells
from wsiseg.segmentation.contours import ragged, zero_rings

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsiseg.config import MaskConfig
    from wsiseg.geometry import Box, Lattice
    from wsiseg.records import WindowMasks


GRID = 64  #: vertices lie on 1/64 level-0 px, far below the mask's own precision: last-bit noise of the network does not reach the files


def trace(masks: WindowMasks, outer: Box, lattice: Lattice, config: MaskConfig) -> tuple[Cells, int]:
    """Outline masks.

    Parameters
    ----------
    masks
        Masks of one tile, on the CPU.
    outer
        The tile's outer box, model px of the slide.
    lattice
        Between model px and level-0 px.
    config
        ``min_area_um2``, ``convex_above`` and ``simplify_um``.

    Returns
    -------
    cells
        One polygon per mask that has an outline: the connected part that holds the prompt (else the largest), without holes. Masks that
        come out too small are left out; order is kept.
    touching
        Number that touch the border of their window: nuclei larger than the model's window, cut there, or things larger than the halo, left out.
    """
    logits = masks.logits.numpy()
    prompts = masks.points_xy.numpy().astype(np.float64)
    rows, xy, count = _outlines(logits, (prompts - masks.origin_xy.numpy()) / masks.mask_stride_px)
    touches = _at_border(xy, count, logits.shape[1:])
    touching = int(touches.sum())
    if masks.full_tile:  # what reaches the end of the whole tile is larger than the halo, so no cell
        xy, rows, count = xy[~np.repeat(touches, count)], rows[~touches], count[~touches]
    if not len(rows):
        return Cells.empty(masks.descriptors.shape[1]), touching
    corners = masks.origin_xy.numpy()[rows] + (outer.x0, outer.y0)
    points = lattice.to_level0(xy * masks.mask_stride_px + np.repeat(corners, count, 0))
    points = np.round(points * GRID) / GRID
    polygons = shapely.polygons(shapely.linearrings(points, indices=np.repeat(np.arange(len(rows)), count)))
    # The plain form of Douglas and Peucker takes a tenth of the time of the one that keeps polygons valid; the few that become invalid are repaired.
    polygons = _valid(shapely.simplify(polygons, config.simplify_um / lattice.slide_mpp, preserve_topology=False))
    polygons = _convexified(polygons, config.convex_above)
    big = shapely.area(polygons) * lattice.slide_mpp**2 >= config.min_area_um2
    cells = Cells(
        polygons=polygons,
        points_xy=lattice.to_level0(prompts[rows] + (outer.x0, outer.y0)),
        scores=(masks.predicted_iou * masks.stability).numpy()[rows],
        descriptors=masks.descriptors.numpy()[rows],
        concept_scores=None if masks.concept_scores is None else masks.concept_scores.numpy()[rows],
    )
    return cells.take(big), touching


def _outlines(
    logits: NDArray[np.float32], prompts: NDArray[np.float64]
) -> tuple[NDArray[np.intp], NDArray[np.float64], NDArray[np.intp]]:
    """The outline around each mask's prompt (cells, corner frame), else its largest.

    Returns rows (n,) of the masks that have one, all vertices (V, 2) in cells, corner frame, and each outline's count of them (n,).
    """
    # Logits saturate far from the border; unclipped, the crossing would lean towards the steeper side.
    padded = np.clip(np.pad(logits, ((0, 0), (1, 1), (1, 1)), mode="edge"), -4, 4)
    for rim in (padded[:, 0], padded[:, -1], padded[:, :, 0], padded[:, :, -1]):
        rim[:] = -np.abs(rim)  # crosses zero on the window's border
    rings = zero_rings(padded)
    whole = 2.0 * logits.shape[1] * logits.shape[2]  # more than any ring encloses
    rank = np.where(rings.enclose(prompts + 0.5), whole, 0) + rings.area  # + 1 for the rim, - 0.5 for the pixel centre
    good = (rings.area >= 1) & (rings.count >= 3)
    best = np.lexsort((-rank, rings.image))
    best = best[good[best]]
    best = best[np.flatnonzero(np.diff(rings.image[best], prepend=-1))]
    count = rings.count[best]
    return rings.image[best], rings.xy[ragged(rings.first[best], count)] - 0.5, count


def _at_border(xy: NDArray[np.float64], count: NDArray[np.intp], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Find outlines (n,) of windows of ``shape`` grid pixels that run along the window's border, beyond the centre of the last pixel."""
    if not len(count):
        return np.empty(0, bool)
    first = np.cumsum(count) - count
    beyond = (np.minimum.reduceat(xy, first) < 0.5) | (np.maximum.reduceat(xy, first) > np.array(shape)[::-1] - 0.5)
    touches: NDArray[np.bool_] = np.logical_or.reduce(beyond, axis=1)
    return touches


def _convexified(polygons: NDArray[np.object_], convex_above: float) -> NDArray[np.object_]:
    """Outlines that fill at least ``convex_above`` of their convex hull become the hull."""
    hull = shapely.convex_hull(polygons)
    return np.where(shapely.area(polygons) >= convex_above * shapely.area(hull), hull, polygons)


def _valid(polygons: NDArray[np.object_]) -> NDArray[np.object_]:
    """The largest polygonal part of each, valid."""
    bad = ~shapely.is_valid(polygons)
    if bad.any():
        polygons = polygons.copy()
        polygons[bad] = [largest_part(g) for g in shapely.make_valid(polygons[bad])]
    return polygons
