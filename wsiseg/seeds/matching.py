"""Which cell a click means: one rule, for `run`, `type` and the preview.

The cell whose outline holds the click, of several the smallest; else the nearest outline within reach. Ties are broken by area, bounding box and
prompt, never by the order of the rows, so that the same cells in another order give the same answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import shapely

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from wsiseg.records import CellIndex, Cells


def match_clicks(points: NDArray[np.float64], cells: CellIndex, reach_px0: float) -> NDArray[np.intp]:
    """The cell of each click.

    Parameters
    ----------
    points
        (n, 2): the clicks, level-0 px.
    cells
        Of the same slide. Outlines near the clicks are read, all at once; of the others only the bounding boxes.
    reach_px0
        A click beside its cell finds it within this distance, level-0 px.

    Returns
    -------
    ndarray
        (n,): rows of ``cells``; -1 where there is no cell within reach.
    """
    bounds = cells.bounds
    near = [np.flatnonzero(_box_gaps(point, bounds) <= reach_px0) for point in points]
    wanted = np.unique(np.concatenate([np.empty(0, np.intp), *near]))
    outlines = cells.take(wanted)
    rows = np.full(len(points), -1, np.intp)
    for k, (point, candidates) in enumerate(zip(points, near, strict=True)):
        if len(candidates):
            here = outlines.take(np.searchsorted(wanted, candidates))
            best, gap = _best(point, here)
            rows[k] = candidates[best] if gap <= reach_px0 else -1
    return rows


def match_groups(groups: Sequence[NDArray[np.float64]], cells: CellIndex, reach_px0: float) -> list[NDArray[np.intp]]:
    """:func:`match_clicks` of several groups of clicks; the outlines are gone through once."""
    rows = match_clicks(np.concatenate([np.empty((0, 2)), *groups]), cells, reach_px0)
    return np.split(rows, np.cumsum([len(points) for points in groups]))[:-1]


def describe_nearest(point: tuple[float, float], cells: CellIndex, mpp: float) -> str:
    """Half a sentence on a click without a cell: where the nearest is; ``cells`` is not empty, ``mpp`` in um per px."""
    at = np.array(point, float)
    gaps = _box_gaps(at, cells.bounds)
    first = cells.take(np.array([gaps.argmin()]))
    # No outline is nearer than its box, so the nearest is among the boxes nearer than this outline.
    near = cells.take(np.flatnonzero(gaps <= shapely.distance(first.polygons[0], shapely.Point(at))))
    best, gap = _best(at, near)
    centre = near.polygons[best].centroid
    return f"the nearest is at [{centre.x:.0f}, {centre.y:.0f}], {gap * mpp:.0f} um away"


def _box_gaps(point: NDArray[np.float64], bounds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distance from a point (2,) to each bounding box (N, 4); 0 inside."""
    beside = np.maximum(np.maximum(bounds[:, :2] - point, point - bounds[:, 2:]), 0)
    gaps: NDArray[np.float64] = np.hypot(beside[:, 0], beside[:, 1])
    return gaps


def _best(point: NDArray[np.float64], cells: Cells) -> tuple[int, float]:
    """Place of the cell that ``point`` means, and its distance from it: 0 when its outline holds the point."""
    gaps = shapely.distance(cells.polygons, shapely.Point(point))
    # The last key is the first that counts.
    best = int(np.lexsort((*cells.points_xy.T, *cells.bounds.T, shapely.area(cells.polygons), gaps))[0])
    return best, float(gaps[best])
