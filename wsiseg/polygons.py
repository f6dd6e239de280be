"""Masks -> polygons in slide level-0 px.

Marching squares on the mask's own logits (sub-pixel; no upsampled mask is ever made). This is the one place where pixel centres become the
corner frame: logit (row, column) stands at ``((column + 0.5) * cell_px, (row + 0.5) * cell_px)`` of its window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import shapely
from skimage.measure import find_contours

from wsiseg.geometry import largest_part
from wsiseg.records import Cells

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
        Of one tile, on the CPU.
    outer
        The tile's outer box, model px of the slide.
    lattice
        Between model px and level-0 px.
    config
        ``min_area_um2``, ``convex_above`` and ``simplify_um``.

    Returns
    -------
    cells
        One polygon per mask: the connected part that holds the prompt (else the largest), without holes. Masks that come out too small are
        left out; order is kept.
    touching
        How many touch the border of their window: nuclei larger than the model's window, cut there, or things larger than the halo, left out.
    """
    rings, rows, touching = [], [], 0
    logits = masks.logits.numpy()
    prompts = masks.points_xy.numpy()
    origins = masks.origin_xy.numpy()
    for i, logit in enumerate(logits):
        inside = logit > 0
        columns, lines = np.flatnonzero(inside.any(0)), np.flatnonzero(inside.any(1))
        if not len(columns):
            continue
        x0, x1, y0, y1 = columns[0], columns[-1] + 1, lines[0], lines[-1] + 1
        touches = bool(x0 == 0 or y0 == 0 or x1 == logit.shape[1] or y1 == logit.shape[0])
        touching += touches
        if touches and masks.whole:
            continue  # larger than the halo, so no cell
        ring = _outline(logit, (x0, y0, x1, y1), (prompts[i] - origins[i]) / masks.cell_px)
        if ring is not None:
            rings.append(ring * masks.cell_px + origins[i])
            rows.append(i)
    if not rings:
        return Cells.empty(masks.descriptors.shape[1]), touching
    points = lattice.to_level0(np.concatenate(rings) + (outer.x0, outer.y0))
    points = np.round(points * GRID) / GRID
    offsets = np.repeat(np.arange(len(rings)), [len(r) for r in rings])
    polygons = shapely.polygons(shapely.linearrings(points, indices=offsets))
    polygons = shapely.simplify(polygons, config.simplify_um / lattice.slide_mpp)
    polygons = _rounded(_valid(polygons), config.convex_above)
    big = shapely.area(polygons) * lattice.slide_mpp**2 >= config.min_area_um2
    cells = Cells(
        polygons=polygons,
        points_xy=lattice.to_level0(prompts[rows].astype(np.float64) + (outer.x0, outer.y0)),
        scores=(masks.quality * masks.stability).numpy()[rows],
        descriptors=masks.descriptors.numpy()[rows],
    )
    return cells.take(big), touching


def _outline(logit: NDArray[np.float32], box: tuple[int, int, int, int], prompt: NDArray[np.float32]) -> NDArray[np.float64] | None:
    """The outline around ``prompt`` (cells, corner frame), else the largest one -> (K, 2) xy in cells, corner frame, closed."""
    x0, y0, x1, y1 = box
    padded = np.pad(logit, 1, mode="edge")
    for rim in (padded[0], padded[-1], padded[:, 0], padded[:, -1]):
        rim[:] = -np.abs(rim)  # crosses zero on the window's border
    crop = padded[y0 : y1 + 2, x0 : x1 + 2]
    # Logits saturate far from the border; unclipped, the crossing would lean towards the steeper side.
    contours = find_contours(np.clip(crop, -4, 4), 0.0)
    best, best_area = None, 0.0
    for contour in contours:
        xy = contour[:, ::-1] + (x0 - 0.5, y0 - 0.5)  # -1 for the rim, +0.5 for the pixel centre
        area = _signed_area(xy)
        if abs(area) < 1.0 or len(xy) < 4:
            continue
        area = abs(area) + (1e9 if _encloses(xy, prompt) else 0)
        if area > best_area:
            best, best_area = xy, area
    return best


def _signed_area(xy: NDArray[np.float64]) -> float:
    x, y = xy[:, 0], xy[:, 1]
    return float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum() / 2)


def _encloses(xy: NDArray[np.float64], point: NDArray[np.float32]) -> bool:
    """Even-odd rule."""
    x, y = xy[:, 0] - point[0], xy[:, 1] - point[1]
    crosses = (y[:-1] > 0) != (y[1:] > 0)
    if not crosses.any():
        return False
    xa, xb, ya, yb = x[:-1][crosses], x[1:][crosses], y[:-1][crosses], y[1:][crosses]
    return bool(((xa - ya * (xb - xa) / (yb - ya)) > 0).sum() % 2)


def _rounded(polygons: NDArray[np.object_], convex_above: float) -> NDArray[np.object_]:
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
