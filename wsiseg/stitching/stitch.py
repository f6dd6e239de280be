"""Outlines of all tiles -> cells: overlaps are resolved once, for the whole slide, in an order that does not depend on the tiling.

Every tile hands over the outlines whose prompt lies in its core; a detector's tiles also those just outside.
Here they are ranked from the best score down (ties: by prompt position, a total order), and overlaps are resolved in that order by the rules of
:mod:`wsiseg.stitching.resolve`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from wsiseg.geometry import z_order
from wsiseg.stitching.outline_store import CACHE_BYTES, OutlineStore
from wsiseg.stitching.overlaps import find_pairs, refine_areas
from wsiseg.stitching.resolve import ClippedOutlines, clip_overlaps, resolve_overlaps
from wsiseg.stitching.stitched_cells import StitchedCells

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from wsiseg.config import StitchingConfig
    from wsiseg.records import Cells


@dataclass(frozen=True, kw_only=True)
class StitchCounts:
    """Counts of the outlines: ``kept + overlapped + clusters + too_small = outlines``.

    Attributes
    ----------
    outlines
        Outlines of all tiles.
    kept
        Those that became cells.
    overlapped
        Dropped in favour of better ones.
    clusters
        Dropped because they hold others.
    too_small
        Smaller than the least area after clipping. A tile leaves out what is too small from the start.
    clipped
        Clipped; counted among ``kept`` or ``too_small``.
    from_clicks
        Of ``outlines``, those decoded from clicks: with Chain-of-Prompts all clicked cells, otherwise those that no tile had found.
    """

    outlines: int
    kept: int
    overlapped: int
    clusters: int
    too_small: int
    clipped: int
    from_clicks: int = 0


def stitch(
    sources: Sequence[Path | Cells],
    size_px0: tuple[int, int],
    min_area_px0: float,
    config: StitchingConfig,
    *,
    descriptor_size: int,
    cache_bytes: int = CACHE_BYTES,
) -> tuple[StitchedCells, StitchCounts]:
    """Resolve the overlaps between the outlines of all tiles.

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
    cells
        No two cells overlap by more than rounding; sorted along a Z-order curve of their prompts, so that equal sets give equal files.
    counts
        Counts for the manifest.
    """
    outlines = OutlineStore(sources, size_px0, descriptor_size, cache_bytes)
    # Find the pairs of outlines that share area, part by part
    pairs = find_pairs(outlines, config)
    numbers = outlines.numbers  # of all outlines, since everything has been read once
    # Measure the shared area where an upper bound of it does not decide
    pairs = refine_areas(outlines, pairs, config)
    # Choose the outlines to keep, on numbers alone, for the whole slide
    kept, clusters = resolve_overlaps(numbers.areas, pairs, config)
    # Clip what the kept ones still share, part by part
    clipped = clip_overlaps(outlines, pairs.take(kept[pairs.low] & kept[pairs.high]))
    # Drop what has become too small
    areas, bounds = numbers.areas.copy(), numbers.bounds.copy()
    areas[clipped.rows], bounds[clipped.rows] = clipped.areas, clipped.bounds
    rows = np.flatnonzero(kept & (areas >= min_area_px0) & (areas > 0))
    # Sort by place; polygons are read in that order, a few thousand at a time
    rows = rows[z_order(numbers.points_xy[rows])]
    counts = StitchCounts(
        outlines=len(outlines),
        kept=len(rows),
        overlapped=len(outlines) - int(kept.sum()) - clusters,
        clusters=clusters,
        too_small=int(kept.sum()) - len(rows),
        clipped=len(clipped.rows),
    )
    return StitchedCells(outlines=outlines, rows=rows, bounds=bounds[rows], areas=areas[rows], clipped=clipped), counts


def keep_all(
    sources: Sequence[Path | Cells], size_px0: tuple[int, int], *, descriptor_size: int, cache_bytes: int = CACHE_BYTES
) -> tuple[StitchedCells, StitchCounts]:
    """Take all outlines as they are, cut only at the slide's border: for outlines that were given, not found.

    Parameters and results are those of :func:`stitch`.
    """
    outlines = OutlineStore(sources, size_px0, descriptor_size, cache_bytes)
    outlines.survey(lambda *_: None)
    numbers = outlines.numbers
    rows = np.flatnonzero(numbers.areas > 0)
    rows = rows[z_order(numbers.points_xy[rows])]
    dropped = len(outlines) - len(rows)
    counts = StitchCounts(
        outlines=len(outlines), kept=len(rows), overlapped=0, clusters=0, too_small=dropped, clipped=0
    )
    cells = StitchedCells(
        outlines=outlines,
        rows=rows,
        bounds=numbers.bounds[rows],
        areas=numbers.areas[rows],
        clipped=ClippedOutlines.concatenate([]),
    )
    return cells, counts
