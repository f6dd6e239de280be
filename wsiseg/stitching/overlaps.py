"""Overlapping outlines: the pairs that share area, and how much of it the rules need to know.

Pairs are searched part by part, then between neighbouring parts, so that polygons come and go. The parts only say where polygons lie: pairs
are sorted by rank before anything is decided, so the result does not depend on them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import shapely

from wsiseg.runtime.prefetch import parallel_map

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsiseg.config import StitchingConfig
    from wsiseg.stitching.outline_store import OutlineStore, OutlineTable


@dataclass(frozen=True)
class OverlapPairs:
    """N pairs of overlapping outlines, sorted by the rank of the worse, then of the better.

    Attributes
    ----------
    low, high
        (N,): rows of the worse and of the better outline.
    shared
        (N,): area that both cover, level-0 px squared.

    Notes
    -----
    Where nothing depends on the exact area, ``shared`` is the area that their bounding boxes share, cut to the smaller outline: an upper bound.
    An intersection of polygons takes a hundred times as long.
    """

    low: NDArray[np.intp]
    high: NDArray[np.intp]
    shared: NDArray[np.float64]

    def take(self, chosen: NDArray[np.bool_] | NDArray[np.intp] | slice) -> OverlapPairs:
        """Select the chosen pairs, in order."""
        return OverlapPairs(self.low[chosen], self.high[chosen], self.shared[chosen])

    @staticmethod
    def concatenate(groups: list[OverlapPairs]) -> OverlapPairs:
        """All groups in order."""
        none = np.empty(0, np.intp)
        everything = [OverlapPairs(none, none, np.empty(0)), *groups]
        return OverlapPairs(
            *(np.concatenate([getattr(p, name) for p in everything]) for name in ("low", "high", "shared"))
        )


def find_pairs(outlines: OutlineStore, config: StitchingConfig) -> OverlapPairs:
    """Find all pairs of outlines that touch; ``shared`` is an upper bound. Fills ``outlines.numbers`` on the way."""
    inside: dict[int, OverlapPairs] = {}

    def within(source: int, polygons: NDArray[np.object_], numbers: OutlineTable) -> None:
        left, right = shapely.STRtree(polygons).query(polygons)
        once = left < right
        inside[source] = _touching(polygons, numbers, left[once], right[once], config)

    outlines.survey(within)
    starts = outlines.starts
    found = [replace(p, low=p.low + starts[k], high=p.high + starts[k]) for k, p in sorted(inside.items())]
    found += parallel_map(partial(_candidate_pairs, outlines, config), _neighbours(outlines))
    pairs = OverlapPairs.concatenate(found)
    rank = _rank(outlines.numbers)
    return pairs.take(np.lexsort((rank[pairs.high], rank[pairs.low])))


def refine_areas(outlines: OutlineStore, pairs: OverlapPairs, config: StitchingConfig) -> OverlapPairs:
    """Compute the exact shared areas where the upper bounds do not decide, and drop the pairs that only touch.

    Exact ones are needed where a bound would suppress (more than ``max_overlap`` claimed, or ``nested``) or make a cluster (``contained``
    by an outline that may hold ``cluster_size`` others).
    """
    numbers = outlines.numbers
    area, low, high = numbers.areas, pairs.low, pairs.high
    smaller = np.minimum(area[low], area[high])
    unsure = ~certainly_suppressed(numbers, low, high, config)
    much = np.bincount(low[unsure], weights=pairs.shared[unsure], minlength=len(area)) > config.max_overlap * area
    needed = unsure & (much[low] | (pairs.shared >= config.nested * smaller))
    held = pairs.shared >= config.contained * smaller
    holder = np.where(area[low] < area[high], high, low)
    needed |= held & (np.bincount(holder[held], minlength=len(area)) >= config.cluster_size)[holder]
    inexact = np.flatnonzero(needed)
    inexact = inexact[np.argsort(low[inexact], kind="stable")]  # by row, so by part
    edges = np.searchsorted(low[inexact], outlines.starts)
    shared = pairs.shared.copy()

    def measure(here: NDArray[np.intp]) -> None:
        shared[here] = shapely.area(shapely.intersection(outlines.polygons(low[here]), outlines.polygons(high[here])))

    for _ in parallel_map(measure, [inexact[a:b] for a, b in itertools.pairwise(edges) if b > a]):
        pass
    return replace(pairs, shared=shared).take(shared > 0)


def certainly_suppressed(
    numbers: OutlineTable, low: NDArray[np.intp], high: NDArray[np.intp], config: StitchingConfig
) -> NDArray[np.bool_]:
    """Find the pairs whose worse outline is suppressed if the better stays, from areas and bounding boxes alone.

    |A and B| = |A| + |B| - |A or B|, and the union lies in the box round both: if that bound alone exceeds ``config.max_overlap``, no
    intersection of polygons is needed.

    Parameters
    ----------
    numbers
        Areas and bounds of the outlines.
    low, high
        (N,): rows of the worse and of the better outline.
    config
        The rules.

    Returns
    -------
    certain
        bool of shape (N,).
    """
    box, area = numbers.bounds, numbers.areas
    union = (np.maximum(box[low, 2:], box[high, 2:]) - np.minimum(box[low, :2], box[high, :2])).prod(1)
    certain: NDArray[np.bool_] = area[low] + area[high] - union > config.max_overlap * area[low]
    return certain


def _rank(numbers: OutlineTable) -> NDArray[np.intp]:
    """Place of each outline from the best down; a total order, the same within a part as among all."""
    order = np.lexsort((numbers.points_xy[:, 0], numbers.points_xy[:, 1], -numbers.scores))
    rank = np.empty(len(order), np.intp)
    rank[order] = np.arange(len(order))
    return rank


def _neighbours(outlines: OutlineStore) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Per source: its rows, and those of later ones, that may meet across their border."""
    bounds, starts = outlines.numbers.bounds, outlines.starts
    filled = np.flatnonzero(np.diff(starts))
    if not len(filled):
        return []
    firsts = starts[filled]
    boxes = np.hstack(
        [np.fmin.reduceat(bounds[:, :2], firsts), np.fmax.reduceat(bounds[:, 2:], firsts)]
    )  # NaN: nothing of it is on the slide
    left, right = shapely.STRtree(shapely.box(*boxes.T)).query(shapely.box(*boxes.T))
    found = []
    for k in range(len(filled)):
        own = np.arange(starts[filled[k]], starts[filled[k] + 1])
        facing: list[NDArray[np.bool_]] = []
        others: list[NDArray[np.intp]] = []
        for other in np.sort(right[(left == k) & (right > k)]):
            facing.append(_meets(bounds[own], boxes[other]))
            rows = np.arange(starts[filled[other]], starts[filled[other] + 1])
            others.append(rows[_meets(bounds[rows], boxes[k])])
        if any(len(rows) for rows in others):
            found.append((own[np.logical_or.reduce(facing)], np.concatenate(others)))
    return found


def _meets(bounds: NDArray[np.float64], box: NDArray[np.float64]) -> NDArray[np.bool_]:
    met: NDArray[np.bool_] = np.logical_and.reduce((bounds[:, :2] <= box[2:]) & (bounds[:, 2:] >= box[:2]), axis=1)
    return met


def _candidate_pairs(
    outlines: OutlineStore, config: StitchingConfig, rows: tuple[NDArray[np.intp], NDArray[np.intp]]
) -> OverlapPairs:
    """Pairs of one of the first rows with one of the second."""
    first, both = len(rows[0]), np.concatenate(rows)
    polygons = outlines.polygons(both)
    right, left = shapely.STRtree(polygons[:first]).query(polygons[first:])
    pairs = _touching(polygons, outlines.numbers.take(both), left, right + first, config)
    return replace(pairs, low=both[pairs.low], high=both[pairs.high])


def _touching(
    polygons: NDArray[np.object_],
    numbers: OutlineTable,
    left: NDArray[np.intp],
    right: NDArray[np.intp],
    config: StitchingConfig,
) -> OverlapPairs:
    """Keep the pairs that touch, of those whose boxes do; the overlap of the boxes bounds the shared area."""
    rank, box, area = _rank(numbers), numbers.bounds, numbers.areas
    worse = rank[left] > rank[right]
    low, high = np.where(worse, left, right), np.where(worse, right, left)
    sides = np.minimum(box[low, 2:], box[high, 2:]) - np.maximum(box[low, :2], box[high, :2])
    shared = np.minimum(np.maximum(sides, 0).prod(1), np.minimum(area[low], area[high]))
    touch = certainly_suppressed(numbers, low, high, config)
    rest = np.flatnonzero(~touch)
    touch[rest] = shapely.intersects(polygons[low[rest]], polygons[high[rest]])
    return OverlapPairs(low, high, shared).take(touch & (shared > 0))
