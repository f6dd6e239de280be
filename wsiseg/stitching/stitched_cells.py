"""Lazy reader of the stitched cells: what the writers of files and the typing take instead of all polygons in memory."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from wsiseg.records import Cells
from wsiseg.runtime.prefetch import prefetch_map

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from wsiseg.stitching.outline_store import OutlineStore
    from wsiseg.stitching.resolve import ClippedOutlines


@dataclass(frozen=True, kw_only=True)
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
    clipped
        Remainders of the outlines that lost an overlap.
    """

    outlines: OutlineStore
    rows: NDArray[np.intp]
    bounds: NDArray[np.float64]
    areas: NDArray[np.float64]
    clipped: ClippedOutlines

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def descriptor_size(self) -> int:
        """Size of a descriptor."""
        return self.outlines.descriptor_size

    @property
    def measurement_names(self) -> tuple[str, ...]:
        """Those that the outlines have."""
        return self.outlines.measurement_names

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
        for here in self._by_part():
            out[here] = self.outlines.descriptors(self.rows[here])
        return out

    def concept_scores(self, types: int) -> NDArray[np.float32]:
        """(N, types), all in memory: scores of the types that the run describes."""
        out = np.empty((len(self), types), np.float32)
        for here in self._by_part():
            out[here] = self.outlines.concept_scores(self.rows[here], types)
        return out

    def _by_part(self) -> Iterator[NDArray[np.intp]]:
        """Places of the cells, those of one part after the other."""
        here = np.argsort(self.rows, kind="stable")
        for a, b in itertools.pairwise(np.searchsorted(self.rows[here], self.outlines.starts)):
            yield here[a:b]

    def take(self, places: NDArray[np.intp] | slice) -> Cells:
        """The cells at ``places`` of the files' order."""
        rows = self.rows[places]
        polygons = self.outlines.polygons(rows)
        self.clipped.replace(rows, polygons)
        numbers = self.outlines.numbers
        return Cells(
            polygons=polygons,
            points_xy=numbers.points_xy[rows],
            scores=numbers.scores[rows],
            descriptors=self.outlines.descriptors(rows),
            measurements=self.outlines.measurements(rows),
        )

    def chunks(self, rows: int) -> Iterator[Cells]:
        """All cells in order, ``rows`` at a time; the next ones are read meanwhile."""
        return prefetch_map(
            self.take, (slice(start, start + rows) for start in range(0, len(self), rows)), threads=1, limit=2
        )
