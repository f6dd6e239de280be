"""Outlines of all tiles -> cells: overlaps are settled once, for the whole slide, in an order that does not depend on the tiling.

Every tile hands over the outlines whose prompt lies in its core, each exactly once. Here they are visited from the best score down (ties: by
prompt position, a total order); an outline goes when too much of it is already claimed, when it lies in a better one or round it, or when
it is a cluster of others; what little overlap
remains is cut from the lower-scored outline. This is the score-ordered merge of APG v2, on polygons instead of a label image: it needs no
pixels, no tile order, and no special case at tile borders.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import shapely

from wsiseg.geometry import largest_part

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsiseg.config import StitchingConfig
    from wsiseg.records import Cells


@dataclass(frozen=True)
class StitchCounts:
    """What became of the outlines: ``kept + overlapped + clusters + slivers = outlines``."""

    outlines: int
    kept: int
    overlapped: int
    clusters: int
    slivers: int
    trimmed: int


def stitch(cells: Cells, size_px0: tuple[int, int], min_area_px0: float, config: StitchingConfig) -> tuple[Cells, StitchCounts]:
    """Settle overlaps.

    Parameters
    ----------
    cells
        Outlines of all tiles, any order.
    size_px0
        Slide size; outlines are cut at its border.
    min_area_px0
        What is smaller after trimming is dropped, level-0 px squared.
    config
        Overlap rules.

    Returns
    -------
    cells
        No two overlap by more than rounding; sorted along a Z-order curve of their prompts, so that equal sets give equal files.
    counts
        For the manifest.
    """
    rank = np.lexsort((cells.points_xy[:, 0], cells.points_xy[:, 1], -cells.scores))
    cells = cells.take(rank)  # row number = rank from here on
    polygons = _clip(cells.polygons, size_px0)
    area = shapely.area(polygons)
    low, high, shared = _overlaps(polygons)
    kept, clusters = _choose(area, low, high, shared, config)
    overlapped = len(cells) - int(kept.sum()) - clusters
    polygons, trimmed = _trim(polygons, kept, low, high, shared)
    big = kept & (shapely.area(polygons) >= min_area_px0)
    counts = StitchCounts(len(cells), int(big.sum()), overlapped, clusters, int(kept.sum() - big.sum()), trimmed)
    rows = np.flatnonzero(big)
    rows = rows[_z_order(cells.points_xy[rows])]
    out = cells.take(rows)
    return dataclasses.replace(out, polygons=polygons[rows]), counts


def _clip(polygons: NDArray[np.object_], size_px0: tuple[int, int]) -> NDArray[np.object_]:
    width, height = size_px0
    bounds = shapely.bounds(polygons)
    out = (bounds[:, 0] < 0) | (bounds[:, 1] < 0) | (bounds[:, 2] > width) | (bounds[:, 3] > height)
    if out.any():
        polygons = polygons.copy()
        polygons[out] = [largest_part(g) for g in shapely.intersection(polygons[out], shapely.box(0, 0, width, height))]
    return polygons


def _overlaps(polygons: NDArray[np.object_]) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]:
    """Pairs that share area: worse row, better row, shared area. Sorted by worse row."""
    left, right = shapely.STRtree(polygons).query(polygons, predicate="intersects")
    pair = left > right
    low, high = left[pair], right[pair]
    shared = shapely.area(shapely.intersection(polygons[low], polygons[high]))
    order = np.lexsort((high, low))
    order = order[shared[order] > 0]
    return low[order], high[order], shared[order]


def _choose(
    area: NDArray[np.float64], low: NDArray[np.intp], high: NDArray[np.intp], shared: NDArray[np.float64], config: StitchingConfig
) -> tuple[NDArray[np.bool_], int]:
    """Which rows stay, and how many were clusters."""
    inside = np.zeros(len(area), int)  # how many others each outline holds
    np.add.at(inside, high, (shared >= config.contained * area[low]) & (area[low] < area[high]))
    np.add.at(inside, low, (shared >= config.contained * area[high]) & (area[high] < area[low]))
    cluster = inside >= config.cluster_size
    kept = ~cluster
    rows, starts = np.unique(low, return_index=True)
    for row, start, stop in zip(rows, starts, np.r_[starts, len(low)][1:], strict=True):
        if kept[row]:
            better = kept[high[start:stop]]
            claimed, sizes = shared[start:stop][better], area[high[start:stop]][better]
            nested = (claimed >= config.nested * np.minimum(sizes, area[row])).any()
            kept[row] = claimed.sum() <= config.max_overlap * area[row] and not nested
    return kept, int(cluster.sum())


def _trim(
    polygons: NDArray[np.object_], kept: NDArray[np.bool_], low: NDArray[np.intp], high: NDArray[np.intp], shared: NDArray[np.float64]
) -> tuple[NDArray[np.object_], int]:
    """Cut from each kept outline what better kept outlines hold."""
    both = kept[low] & kept[high] & (shared > 1e-6)
    polygons = polygons.copy()
    rows = np.unique(low[both])
    for row in rows:
        better = polygons[high[_span(low, both, row)]]
        polygons[row] = largest_part(shapely.difference(polygons[row], shapely.union_all(better)))
    return polygons, len(rows)


def _span(low: NDArray[np.intp], both: NDArray[np.bool_], row: int) -> NDArray[np.intp]:
    """Positions of ``row`` in the sorted ``low`` where ``both`` holds."""
    start, stop = np.searchsorted(low, [row, row + 1])
    return np.arange(start, stop)[both[start:stop]]


def _z_order(points_xy: NDArray[np.float64]) -> NDArray[np.intp]:
    """Order along a Z-order (Morton) curve of 16-px cells; ties by y, then x."""
    key = np.zeros(len(points_xy), np.uint64)
    cells = np.clip(points_xy / 16, 0, 2**20).astype(np.uint64)
    for bit in range(21):
        for axis in (0, 1):
            key |= ((cells[:, axis] >> np.uint64(bit)) & np.uint64(1)) << np.uint64(2 * bit + axis)
    return np.lexsort((points_xy[:, 0], points_xy[:, 1], key))
