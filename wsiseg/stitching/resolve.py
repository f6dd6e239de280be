"""Resolve overlaps: which outlines are kept, and what is clipped from those that are.

Rules, in the order of scores (``config.StitchingConfig`` has the thresholds and their reasons)

Cluster   an outline that holds ``cluster_size`` others to ``contained`` of their areas is dropped before the rest is decided
Suppress  an outline is dropped when better ones that stay share more than ``max_overlap`` of its area (non-maximum suppression, of which this
          is the form with summed shares)
Nested    an outline is dropped when a better one that stays shares ``nested`` of the smaller of the two
Clip      a kept outline loses what it still shares with better ones; its largest part is left

Source: the score-ordered merge of the second version of automatic prompt generation (micro-sam's ``dev`` branch), on polygons instead of a
label image: no pixels, no order of tiles, and no special case at tile borders. Departures: "Cluster" and "Nested" are ours; upstream paints
free pixels where "Clip" cuts polygons.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import shapely

from wsiseg.geometry import largest_part
from wsiseg.runtime.prefetch import parallel_map

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsiseg.config import StitchingConfig
    from wsiseg.stitching.outline_store import OutlineStore
    from wsiseg.stitching.overlaps import OverlapPairs

MIN_OVERLAP_PX0 = 1e-6  #: px squared; outlines that share less only touch
MAX_ROUNDS = 50  #: of deciding many outlines at once; what depends on a longer chain of others is decided one by one


@dataclass(frozen=True, kw_only=True)
class ClippedOutlines:
    """Remainders of the N outlines that lost an overlap.

    Attributes
    ----------
    rows
        (N,): rows of the outlines, ascending.
    wkb
        (N,): the polygons as well-known binary.
    bounds, areas
        (N, 4) and (N,): of the polygons, level-0 px.
    """

    rows: NDArray[np.intp]
    wkb: pa.Array
    bounds: NDArray[np.float64]
    areas: NDArray[np.float64]

    @staticmethod
    def concatenate(groups: list[ClippedOutlines]) -> ClippedOutlines:
        """All groups in order."""
        return ClippedOutlines(
            rows=np.concatenate([np.empty(0, np.intp), *(g.rows for g in groups)]),
            wkb=pa.concat_arrays([pa.array([], pa.binary()), *(g.wkb for g in groups)]),
            bounds=np.concatenate([np.empty((0, 4)), *(g.bounds for g in groups)]),
            areas=np.concatenate([np.empty(0), *(g.areas for g in groups)]),
        )

    def replace(self, rows: NDArray[np.intp], polygons: NDArray[np.object_]) -> None:
        """Put the clipped ones of ``rows`` into ``polygons``, in place."""
        at = np.searchsorted(self.rows, rows)
        here = np.flatnonzero(at < len(self.rows))
        here = here[self.rows[at[here]] == rows[here]]
        if len(here):
            polygons[here] = shapely.from_wkb(self.wkb.take(pa.array(at[here])).to_numpy(zero_copy_only=False))


def resolve_overlaps(
    area: NDArray[np.float64], pairs: OverlapPairs, config: StitchingConfig
) -> tuple[NDArray[np.bool_], int]:
    """Choose the rows to keep, and count the clusters: the first three rules.

    Parameters
    ----------
    area
        (N,), of all outlines.
    pairs
        Sorted by rank.
    config
        The rules.

    Returns
    -------
    kept
        bool of shape (N,).
    clusters
        Number of outlines that were dropped as clusters.

    Examples
    --------
    The best of three in a row is kept; the second shares half of its area with it; the third shares only with the second.

    >>> from wsiseg.config import StitchingConfig
    >>> from wsiseg.stitching.overlaps import OverlapPairs
    >>> pairs = OverlapPairs(np.array([1, 2]), np.array([0, 1]), np.array([50.0, 40.0]))
    >>> resolve_overlaps(np.array([100.0, 100.0, 100.0]), pairs, StitchingConfig())
    (array([ True, False,  True]), 0)
    """
    low, high, shared = pairs.low, pairs.high, pairs.shared
    holds = np.bincount(high[(shared >= config.contained * area[low]) & (area[low] < area[high])], minlength=len(area))
    holds += np.bincount(low[(shared >= config.contained * area[high]) & (area[high] < area[low])], minlength=len(area))
    cluster = holds >= config.cluster_size  # how many others each outline holds
    kept = ~cluster
    open_pairs = pairs.take(kept[low])
    nested = open_pairs.shared >= config.nested * np.minimum(area[open_pairs.high], area[open_pairs.low])
    waits = np.zeros(len(area), bool)
    for _ in range(MAX_ROUNDS):
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
    kept: NDArray[np.bool_],
    area: NDArray[np.float64],
    pairs: OverlapPairs,
    nested: NDArray[np.bool_],
    config: StitchingConfig,
) -> None:
    """Drop those of ``pairs.low`` that better ones cover too much, or that nest with a better one; all of ``pairs.high`` are decided. In place."""
    rows, where = np.unique(pairs.low, return_inverse=True)
    better = kept[pairs.high]
    claimed = np.bincount(where[better], weights=pairs.shared[better], minlength=len(rows))
    inside = np.bincount(where[better & nested], minlength=len(rows)) > 0
    kept[rows] = (claimed <= config.max_overlap * area[rows]) & ~inside


def clip_overlaps(outlines: OutlineStore, pairs: OverlapPairs) -> ClippedOutlines:
    """Clip from each worse outline of ``pairs``, of which both are kept, what the better ones hold; the best is clipped first."""
    pairs = pairs.take(pairs.shared > MIN_OVERLAP_PX0)
    order = np.argsort(pairs.low, kind="stable")  # by row, so by part; within a row by rank
    edges = np.searchsorted(pairs.low[order], outlines.starts)
    spans = [order[a:b] for a, b in itertools.pairwise(edges) if b > a]

    def clip(span: NDArray[np.intp]) -> ClippedOutlines:
        rows, first = np.unique(pairs.low[span], return_index=True)
        counts = np.diff(np.r_[first, len(span)])
        whole = outlines.polygons(rows)
        left = whole.copy()
        for turn in range(counts.max()):  # the best first, then the second best of those that have one, ...
            here = np.flatnonzero(counts > turn)
            left[here] = shapely.difference(left[here], outlines.polygons(pairs.high[span[first[here] + turn]]))
        odd = (shapely.get_type_id(left) != shapely.GeometryType.POLYGON) | (shapely.get_num_interior_rings(left) > 0)
        left[odd] = [largest_part(g) for g in left[odd]]
        smaller = shapely.area(left) < shapely.area(whole) - MIN_OVERLAP_PX0  # the others only touch
        rows, left = rows[smaller], left[smaller]
        return ClippedOutlines(
            rows=rows,
            wkb=pa.array(shapely.to_wkb(left), pa.binary()),
            bounds=shapely.bounds(left).reshape(-1, 4),
            areas=shapely.area(left),
        )

    return ClippedOutlines.concatenate(list(parallel_map(clip, spans)))
