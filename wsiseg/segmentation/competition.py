"""Competition of types: outlines that several passes of a detector give one cell become one cell, with a score as each type."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import shapely

if TYPE_CHECKING:
    from wsiseg.records import Cells


def compete(cells: Cells, same_cell: float) -> Cells:
    """Merge the duplicates of one tile: the same cell found as several types, or in several passes.

    Parameters
    ----------
    cells
        Each with the score of the type that it was found as in ``concept_scores``, 0 as the others.
    same_cell
        IoU from which two outlines are of one cell.

    Returns
    -------
    Cells
        The best outline of each cell, ties by place; as every type it has the best score of those that are the same cell. Independent of the order.
    """
    if cells.concept_scores is None or len(cells) < 2:
        return cells
    order = np.lexsort((*cells.concept_scores.T[::-1], cells.points_xy[:, 0], cells.points_xy[:, 1], -cells.scores))
    cells = cells.take(order)  # from the best down
    found = cells.concept_scores
    if found is None:
        return cells
    area = shapely.area(cells.polygons)
    left, right = shapely.STRtree(cells.polygons).query(cells.polygons, predicate="intersects")
    left, right = left[left < right], right[left < right]
    shared = shapely.area(shapely.intersection(cells.polygons[left], cells.polygons[right]))
    same = shared >= same_cell * (area[left] + area[right] - shared)
    left, right = left[same], right[same]
    scores = found.copy()
    np.maximum.at(scores, left, found[right])
    np.maximum.at(scores, right, found[left])
    kept = np.ones(len(cells), bool)
    for k in np.lexsort((left, right)):  # whether the better one stays is known when its turn comes
        if kept[left[k]]:
            kept[right[k]] = False
    return dataclasses.replace(cells, concept_scores=scores).take(np.flatnonzero(kept))
