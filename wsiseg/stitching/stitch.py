"""Outlines of all tiles -> cells: overlaps are resolved once, for the whole slide, in an order that does not depend on the tiling.

Every tile hands over the outlines whose prompt lies in its core, each exactly once. Here they are ranked from the best score down (ties: by
prompt position, a total order); an outline goes when too much of it is already claimed, when it lies in a better one or round it, or when
it is a cluster of others; what little overlap remains is cut from the lower-ranked outline. This is the score-ordered merge of APG v2, on
polygons instead of a label image: it needs no pixels, no tile order, and no special case at tile borders.

Steps:   pairs that share area   part by part, then between neighbouring parts; polygons come and go
         who stays               on numbers alone, for the whole slide
         cutting                 part by part
         reading in file order   a few thousand cells at a time (``StitchedCells``)

The parts only say where polygons lie: pairs are sorted before anything is decided, so the result does not depend on them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import shapely

from wsiseg.geometry import largest_part
from wsiseg.records import Cells
from wsiseg.runtime.prefetch import prefetch_map
from wsiseg.stitching.outline_store import CACHE_BYTES, THREADS, OutlineStore

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from wsiseg.config import StitchingConfig
    from wsiseg.stitching.outline_store import OutlineTable

_LEAST_CUT = 1e-6  #: px squared; outlines that share less only touch
_ROUNDS = 50  #: of deciding many outlines at once; what depends on a longer chain of others is decided one by one


@dataclass(frozen=True)
class StitchCounts:
    """Counts of the outlines: ``kept + overlapped + clusters + slivers = outlines``."""

    outlines: int
    kept: int
    overlapped: int
    clusters: int
    slivers: int
    trimmed: int


@dataclass(frozen=True)
class Pairs:
    """Outlines that touch: row of the worse, row of the better, shared area. Sorted by the rank of the worse, then of the better.

    Where nothing depends on the exact area, ``shared`` is the area that their bounding boxes share, cut to the smaller outline: an upper bound.
    An intersection of polygons takes a hundred times as long.
    """

    low: NDArray[np.intp]
    high: NDArray[np.intp]
    shared: NDArray[np.float64]

    def take(self, chosen: NDArray[np.bool_] | NDArray[np.intp] | slice) -> Pairs:
        """Select the chosen pairs, in order."""
        return Pairs(self.low[chosen], self.high[chosen], self.shared[chosen])

    @staticmethod
    def concatenate(groups: list[Pairs]) -> Pairs:
        """All groups in order."""
        none = np.empty(0, np.intp)
        everything = [Pairs(none, none, np.empty(0)), *groups]
        return Pairs(*(np.concatenate([getattr(p, name) for p in everything]) for name in ("low", "high", "shared")))


@dataclass(frozen=True)
class StitchedCells:
    """Stitched cells in the order of the files, read from the parts when asked for (a :class:`~wsiseg.records.CellSource`).

    Attributes
    ----------
    outlines
        Outlines of all tiles.
    rows
        Row of each cell among them.
    bounds
        (N, 4): xmin, ymin, xmax, ymax of each cell, level-0 px.
    areas
        (N,): of each cell, level-0 px squared.
    cut_rows, cut_wkb
        Rows that lost an overlap, sorted, and what is left of them.
    """

    outlines: OutlineStore
    rows: NDArray[np.intp]
    bounds: NDArray[np.float64]
    areas: NDArray[np.float64]
    cut_rows: NDArray[np.intp]
    cut_wkb: pa.Array

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def descriptor_size(self) -> int:
        """Size of a descriptor."""
        return self.outlines.descriptor_size

    @property
    def total_bounds(self) -> tuple[float, float, float, float] | None:
        """xmin, ymin, xmax, ymax of all cells, level-0 px."""
        if not len(self):
            return None
        low, high = self.bounds[:, :2].min(0), self.bounds[:, 2:].max(0)
        return float(low[0]), float(low[1]), float(high[0]), float(high[1])

    @cached_property
    def points_xy(self) -> NDArray[np.float64]:
        """Prompts (N, 2), level-0 px."""
        return self.outlines.numbers.points_xy[self.rows]

    def descriptors(self) -> NDArray[np.float16]:
        """(N, D), all in memory."""
        out = np.empty((len(self), self.descriptor_size), np.float16)
        here = np.argsort(self.rows, kind="stable")  # part by part
        edges = np.searchsorted(self.rows[here], self.outlines.starts)
        for a, b in itertools.pairwise(edges):
            out[here[a:b]] = self.outlines.descriptors(self.rows[here[a:b]])
        return out

    def take(self, places: NDArray[np.intp] | slice) -> Cells:
        """The cells at ``places`` of the files' order."""
        rows = self.rows[places]
        polygons = self.outlines.polygons(rows)
        at = np.searchsorted(self.cut_rows, rows)
        cut = np.flatnonzero(at < len(self.cut_rows))
        cut = cut[self.cut_rows[at[cut]] == rows[cut]]
        if len(cut):
            polygons[cut] = shapely.from_wkb(self.cut_wkb.take(pa.array(at[cut])).to_numpy(zero_copy_only=False))
        numbers = self.outlines.numbers
        return Cells(polygons, numbers.points_xy[rows], numbers.scores[rows], self.outlines.descriptors(rows))

    def chunks(self, rows: int) -> Iterator[Cells]:
        """All cells in order, ``rows`` at a time; the next ones are read meanwhile."""
        return prefetch_map(
            self.take, (slice(start, start + rows) for start in range(0, len(self), rows)), threads=1, limit=2
        )


def stitch(
    sources: Sequence[Path | Cells],
    size_px0: tuple[int, int],
    min_area_px0: float,
    config: StitchingConfig,
    *,
    descriptor_size: int,
    cache_bytes: int = CACHE_BYTES,
) -> tuple[StitchedCells, StitchCounts]:
    """Resolve overlaps.

    Parameters
    ----------
    sources
        Outlines of all tiles: part files, or cells in memory; any order.
    size_px0
        Slide size; outlines are cut at its border.
    min_area_px0
        Smallest area to keep after clipping, level-0 px squared.
    config
        Overlap rules.
    descriptor_size
        D.
    cache_bytes
        Cache of the :class:`~wsiseg.stitching.outline_store.OutlineStore`.

    Returns
    -------
    settled
        No two cells overlap by more than rounding; sorted along a Z-order curve of their prompts, so that equal sets give equal files.
    counts
        Counts for the manifest.
    """
    outlines = OutlineStore(sources, size_px0, descriptor_size, cache_bytes)
    pairs = find_pairs(outlines, config)
    numbers = outlines.numbers
    kept, clusters = resolve_overlaps(numbers.areas, pairs, config)
    cut_rows, cut_wkb, cut_bounds, cut_areas = _cut(
        outlines, pairs.take(kept[pairs.low] & kept[pairs.high] & (pairs.shared > _LEAST_CUT))
    )
    areas, bounds = numbers.areas.copy(), numbers.bounds.copy()
    areas[cut_rows], bounds[cut_rows] = cut_areas, cut_bounds
    big = kept & (areas >= min_area_px0) & (areas > 0)
    rows = np.flatnonzero(big)
    rows = rows[_z_order(numbers.points_xy[rows])]
    overlapped = len(outlines) - int(kept.sum()) - clusters
    counts = StitchCounts(len(outlines), len(rows), overlapped, clusters, int(kept.sum()) - len(rows), len(cut_rows))
    return StitchedCells(outlines, rows, bounds[rows], areas[rows], cut_rows, cut_wkb), counts


def find_pairs(outlines: OutlineStore, config: StitchingConfig) -> Pairs:
    """All pairs of outlines that touch, with as much of their shared areas as the rules need; fills ``outlines.numbers`` on the way."""
    inside: dict[int, Pairs] = {}

    def within(source: int, polygons: NDArray[np.object_], numbers: OutlineTable) -> None:
        left, right = shapely.STRtree(polygons).query(polygons)
        once = left < right
        inside[source] = _touching(polygons, numbers, left[once], right[once], config)

    outlines.survey(within)
    starts = outlines.starts
    found = [replace(p, low=p.low + starts[k], high=p.high + starts[k]) for k, p in sorted(inside.items())]
    found += prefetch_map(
        partial(_candidate_pairs, outlines, config), _neighbours(outlines), threads=THREADS, limit=2 * THREADS
    )
    pairs = Pairs.concatenate(found)
    rank = _rank(outlines.numbers)
    pairs = pairs.take(np.lexsort((rank[pairs.high], rank[pairs.low])))
    return _refine_areas(outlines, pairs, config)


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
        mine = np.arange(starts[filled[k]], starts[filled[k] + 1])
        facing: list[NDArray[np.bool_]] = []
        theirs: list[NDArray[np.intp]] = []
        for other in np.sort(right[(left == k) & (right > k)]):
            facing.append(_meets(bounds[mine], boxes[other]))
            rows = np.arange(starts[filled[other]], starts[filled[other] + 1])
            theirs.append(rows[_meets(bounds[rows], boxes[k])])
        if any(len(rows) for rows in theirs):
            found.append((mine[np.logical_or.reduce(facing)], np.concatenate(theirs)))
    return found


def _meets(bounds: NDArray[np.float64], box: NDArray[np.float64]) -> NDArray[np.bool_]:
    met: NDArray[np.bool_] = np.logical_and.reduce((bounds[:, :2] <= box[2:]) & (bounds[:, 2:] >= box[:2]), axis=1)
    return met


def _candidate_pairs(
    outlines: OutlineStore, config: StitchingConfig, rows: tuple[NDArray[np.intp], NDArray[np.intp]]
) -> Pairs:
    """Pairs of one of the first rows with one of the second."""
    mine, both = len(rows[0]), np.concatenate(rows)
    polygons = outlines.polygons(both)
    right, left = shapely.STRtree(polygons[:mine]).query(polygons[mine:])
    pairs = _touching(polygons, outlines.numbers.take(both), left, right + mine, config)
    return replace(pairs, low=both[pairs.low], high=both[pairs.high])


def _touching(
    polygons: NDArray[np.object_],
    numbers: OutlineTable,
    left: NDArray[np.intp],
    right: NDArray[np.intp],
    config: StitchingConfig,
) -> Pairs:
    """Keep the pairs that touch, of those whose boxes do; the overlap of the boxes bounds the shared area."""
    rank, box, area = _rank(numbers), numbers.bounds, numbers.areas
    worse = rank[left] > rank[right]
    low, high = np.where(worse, left, right), np.where(worse, right, left)
    sides = np.minimum(box[low, 2:], box[high, 2:]) - np.maximum(box[low, :2], box[high, :2])
    shared = np.minimum(np.maximum(sides, 0).prod(1), np.minimum(area[low], area[high]))
    touch = _certainly_suppressed(numbers, low, high, config)
    rest = np.flatnonzero(~touch)
    touch[rest] = shapely.intersects(polygons[low[rest]], polygons[high[rest]])
    return Pairs(low, high, shared).take(touch & (shared > 0))


def _certainly_suppressed(
    numbers: OutlineTable, low: NDArray[np.intp], high: NDArray[np.intp], config: StitchingConfig
) -> NDArray[np.bool_]:
    """Pairs whose worse outline certainly goes if the better stays: |A and B| = |A| + |B| - |A or B|, and the union lies in its box."""
    box, area = numbers.bounds, numbers.areas
    union = (np.maximum(box[low, 2:], box[high, 2:]) - np.minimum(box[low, :2], box[high, :2])).prod(1)
    certain: NDArray[np.bool_] = area[low] + area[high] - union > config.max_overlap * area[low]
    return certain


def _refine_areas(outlines: OutlineStore, pairs: Pairs, config: StitchingConfig) -> Pairs:
    """Compute exact areas where the upper bounds do not decide: too much claimed, one in the other, or a cluster."""
    numbers = outlines.numbers
    area, low, high = numbers.areas, pairs.low, pairs.high
    smaller = np.minimum(area[low], area[high])
    unsure = ~_certainly_suppressed(numbers, low, high, config)
    much = np.bincount(low[unsure], weights=pairs.shared[unsure], minlength=len(area)) > config.max_overlap * area
    needed = unsure & (much[low] | (pairs.shared >= config.nested * smaller))
    held = pairs.shared >= config.contained * smaller
    holder = np.where(area[low] < area[high], high, low)
    needed |= held & (np.bincount(holder[held], minlength=len(area)) >= config.cluster_size)[holder]
    blurred = np.flatnonzero(needed)
    blurred = blurred[np.argsort(low[blurred], kind="stable")]  # by row, so by part
    edges = np.searchsorted(low[blurred], outlines.starts)
    shared = pairs.shared.copy()

    def sharpen(here: NDArray[np.intp]) -> None:
        shared[here] = shapely.area(shapely.intersection(outlines.polygons(low[here]), outlines.polygons(high[here])))

    for _ in prefetch_map(
        sharpen, [blurred[a:b] for a, b in itertools.pairwise(edges) if b > a], threads=THREADS, limit=2 * THREADS
    ):
        pass
    return replace(pairs, shared=shared).take(shared > 0)


def resolve_overlaps(area: NDArray[np.float64], pairs: Pairs, config: StitchingConfig) -> tuple[NDArray[np.bool_], int]:
    """Choose the rows to keep, and count the clusters.

    Parameters
    ----------
    area
        (N,), of all outlines.
    pairs
        Sorted by rank.
    config
        The rules.
    """
    low, high, shared = pairs.low, pairs.high, pairs.shared
    holds = np.bincount(high[(shared >= config.contained * area[low]) & (area[low] < area[high])], minlength=len(area))
    holds += np.bincount(low[(shared >= config.contained * area[high]) & (area[high] < area[low])], minlength=len(area))
    cluster = holds >= config.cluster_size  # how many others each outline holds
    kept = ~cluster
    open_pairs = pairs.take(kept[low])
    nested = open_pairs.shared >= config.nested * np.minimum(area[open_pairs.high], area[open_pairs.low])
    waits = np.zeros(len(area), bool)
    for _ in range(_ROUNDS):
        if not len(open_pairs.low):
            break
        # An outline is decided as soon as all better ones that it meets are; most of them in the first rounds.
        undecided = np.zeros(len(area), bool)
        undecided[open_pairs.low] = True
        waits[:] = False
        waits[open_pairs.low[undecided[open_pairs.high]]] = True
        ready = ~waits[open_pairs.low]
        _decide(kept, area, open_pairs.take(ready), nested[ready], config)
        open_pairs, nested = open_pairs.take(~ready), nested[~ready]
    starts = np.flatnonzero(np.diff(open_pairs.low, prepend=-1))  # one after the other, by rank
    for start, stop in itertools.pairwise([*starts, len(open_pairs.low)]):
        _decide(kept, area, open_pairs.take(slice(start, stop)), nested[start:stop], config)
    return kept, int(cluster.sum())


def _decide(
    kept: NDArray[np.bool_], area: NDArray[np.float64], pairs: Pairs, nested: NDArray[np.bool_], config: StitchingConfig
) -> None:
    """Drop those of ``pairs.low`` that too much is claimed of, or that nest with a better one; all of ``pairs.high`` are decided. In place."""
    rows, where = np.unique(pairs.low, return_inverse=True)
    better = kept[pairs.high]
    claimed = np.bincount(where[better], weights=pairs.shared[better], minlength=len(rows))
    inside = np.bincount(where[better & nested], minlength=len(rows)) > 0
    kept[rows] = (claimed <= config.max_overlap * area[rows]) & ~inside


def _cut(
    outlines: OutlineStore, pairs: Pairs
) -> tuple[NDArray[np.intp], pa.Array, NDArray[np.float64], NDArray[np.float64]]:
    """Cut from each worse outline of ``pairs`` what the better ones hold: rows (sorted), WKB, bounds and areas of what is left."""
    order = np.argsort(pairs.low, kind="stable")  # by row, so by part; within a row by rank
    edges = np.searchsorted(pairs.low[order], outlines.starts)
    spans = [order[a:b] for a, b in itertools.pairwise(edges) if b > a]

    def cut(span: NDArray[np.intp]) -> tuple[NDArray[np.intp], pa.Array, NDArray[np.float64], NDArray[np.float64]]:
        rows, first = np.unique(pairs.low[span], return_index=True)
        counts = np.diff(np.r_[first, len(span)])
        whole = outlines.polygons(rows)
        left = whole.copy()
        for turn in range(counts.max()):  # the best first, then the second best of those that have one, ...
            mine = np.flatnonzero(counts > turn)
            left[mine] = shapely.difference(left[mine], outlines.polygons(pairs.high[span[first[mine] + turn]]))
        odd = (shapely.get_type_id(left) != shapely.GeometryType.POLYGON) | (shapely.get_num_interior_rings(left) > 0)
        left[odd] = [largest_part(g) for g in left[odd]]
        smaller = shapely.area(left) < shapely.area(whole) - _LEAST_CUT  # the others only touch
        rows, left = rows[smaller], left[smaller]
        return (
            rows,
            pa.array(shapely.to_wkb(left), pa.binary()),
            shapely.bounds(left).reshape(-1, 4),
            shapely.area(left),
        )

    done = list(prefetch_map(cut, spans, threads=THREADS, limit=2 * THREADS))
    if not done:
        return np.empty(0, np.intp), pa.array([], pa.binary()), np.empty((0, 4)), np.empty(0)
    rows, wkb, bounds, areas = zip(*done, strict=True)
    return np.concatenate(rows), pa.concat_arrays(wkb), np.concatenate(bounds), np.concatenate(areas)


def _z_order(points_xy: NDArray[np.float64]) -> NDArray[np.intp]:
    """Order along a Z-order (Morton) curve of 16-px cells; ties by y, then x."""
    key = np.zeros(len(points_xy), np.uint64)
    cells = np.clip(points_xy / 16, 0, 2**20).astype(np.uint64)
    for bit in range(21):
        for axis in (0, 1):
            key |= ((cells[:, axis] >> np.uint64(bit)) & np.uint64(1)) << np.uint64(2 * bit + axis)
    return np.lexsort((points_xy[:, 0], points_xy[:, 1], key))
