"""Outlines of all tiles, by row number: a few numbers of each in memory (80 bytes), polygons and descriptors in the part files.

A row is an outline's place in the parts, one part after the other. Whoever needs polygons asks for rows; what was read lately stays in a cache
of bounded size, so memory does not grow with a slide's polygons.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import shapely

from wsiseg.errors import RunError
from wsiseg.formats.parts import Part, open_part
from wsiseg.geometry import largest_part
from wsiseg.runtime.prefetch import parallel_map

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from wsiseg.records import Cells

CACHE_BYTES = 16 << 20  #: some 30,000 cells: a block and its neighbours
_OUTLINE, _DESCRIPTOR, _CONCEPT = ("geometry", "prompt_x", "prompt_y", "score"), ("descriptor",), ("concept_scores",)


@dataclass(frozen=True)
class OutlineTable:
    """Numbers kept of N outlines, in the order of the rows; lengths in level-0 px."""

    points_xy: NDArray[np.float64]
    scores: NDArray[np.float32]
    bounds: NDArray[np.float64]
    areas: NDArray[np.float64]

    def take(self, rows: NDArray[np.intp]) -> OutlineTable:
        """Select ``rows``."""
        return OutlineTable(self.points_xy[rows], self.scores[rows], self.bounds[rows], self.areas[rows])

    @staticmethod
    def concatenate(groups: list[OutlineTable]) -> OutlineTable:
        """All groups in order."""
        empty = OutlineTable(np.empty((0, 2)), np.empty(0, np.float32), np.empty((0, 4)), np.empty(0))
        columns = ("points_xy", "scores", "bounds", "areas")
        return OutlineTable(*(np.concatenate([getattr(g, name) for g in (empty, *groups)]) for name in columns))


class OutlineStore:
    """Random access to the outlines of a run.

    Parameters
    ----------
    sources
        Part files, and cells in memory, in the order of the rows.
    size_px0
        Slide size; polygons are cut at its border.
    descriptor_size
        D.
    cache_bytes
        Amount of the parts kept in memory.
    """

    def __init__(
        self,
        sources: Sequence[Path | Cells],
        size_px0: tuple[int, int],
        descriptor_size: int,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.sources = list(sources)
        self.descriptor_size = descriptor_size
        self._size = size_px0
        self._cache: OrderedDict[tuple[int, tuple[str, ...]], Part] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._lock = threading.Lock()
        self._states: dict[int, tuple[int, int, int]] = {}
        self.starts = np.zeros(len(self.sources) + 1, np.intp)
        self.numbers = OutlineTable.concatenate([])
        self.measurement_names: tuple[str, ...] = ()

    def survey(self, visit: Callable[[int, NDArray[np.object_], OutlineTable], None]) -> None:
        """Read everything once: fills ``numbers`` and ``starts``. Calls ``visit(source, polygons, numbers)`` of each, in several threads."""
        names: dict[int, tuple[str, ...]] = {}

        def read(k: int) -> OutlineTable:
            part = self._part(k, _OUTLINE)
            names[k] = part.measurement_names
            polygons = self._cut(part.polygons(None))
            numbers = OutlineTable(
                part.points_xy, part.scores, shapely.bounds(polygons).reshape(-1, 4), shapely.area(polygons)
            )
            visit(k, polygons, numbers)
            return numbers

        groups = list(parallel_map(read, range(len(self.sources))))
        self.numbers = OutlineTable.concatenate(groups)
        self.measurement_names = tuple(dict.fromkeys(name for k in sorted(names) for name in names[k]))
        self.starts = np.concatenate([[0], np.cumsum([len(g.scores) for g in groups])]).astype(np.intp)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def polygons(self, rows: NDArray[np.intp]) -> NDArray[np.object_]:
        """Polygons of ``rows``, cut at the slide's border."""
        out = np.empty(len(rows), object)
        for where, part, inside in self._by_part(rows, _OUTLINE):
            out[where] = self._cut(part.polygons(inside))
        return out

    def descriptors(self, rows: NDArray[np.intp]) -> NDArray[np.float16]:
        """(n, D) of ``rows``."""
        out = np.empty((len(rows), self.descriptor_size), np.float16)
        for where, part, inside in self._by_part(rows, _DESCRIPTOR):
            out[where] = part.descriptors(inside)
        return out

    def concept_scores(self, rows: NDArray[np.intp], types: int) -> NDArray[np.float32]:
        """(n, types) of ``rows``: scores of the types that the run describes; zeros where a source has none."""
        out = np.zeros((len(rows), types), np.float32)
        for where, part, inside in self._by_part(rows, _CONCEPT):
            scores = part.concept_scores(inside)
            if scores is not None:
                out[where] = scores
        return out

    def measurements(self, rows: NDArray[np.intp]) -> dict[str, NDArray[np.float32]]:
        """(n,) of ``rows``, by name; NaN where an outline was not measured."""
        out = {name: np.empty(len(rows), np.float32) for name in self.measurement_names}
        for where, part, inside in self._by_part(rows, self.measurement_names) if out else ():
            for name, column in out.items():
                column[where] = part.measurements(inside, name)
        return out

    def _by_part(
        self, rows: NDArray[np.intp], columns: tuple[str, ...]
    ) -> Iterator[tuple[NDArray[np.intp], Part, NDArray[np.intp]]]:
        """Group ``rows`` by part: positions among ``rows``, the part, and places in it."""
        owner = np.searchsorted(self.starts, rows, side="right") - 1
        order = np.argsort(owner, kind="stable")
        parts, firsts = np.unique(owner[order], return_index=True)
        for k, where in zip(parts.tolist(), np.split(order, firsts)[1:], strict=True):
            yield where, self._part(k, columns), rows[where] - self.starts[k]

    def _part(self, k: int, columns: tuple[str, ...]) -> Part:
        with self._lock:
            if (k, columns) in self._cache:
                self._cache.move_to_end((k, columns))
                return self._cache[k, columns]
        source = self.sources[k]
        part = self._open(k, source, columns) if isinstance(source, os.PathLike) else Part.of(source)
        with self._lock:
            self._cache[k, columns] = part
            while len(self._cache) > 1 and sum(p.nbytes for p in self._cache.values()) > self._cache_bytes:
                self._cache.popitem(last=False)
        return part

    def _open(self, k: int, path: Path, columns: tuple[str, ...]) -> Part:
        """Open a part file, which must not change as long as its rows are in use."""
        part = open_part(path, columns)
        now = path.stat()
        state = now.st_ino, now.st_size, now.st_mtime_ns
        if self._states.setdefault(k, state) != state:
            raise RunError(
                f"{path}: was changed by another run during this one; run the command again, one run per folder"
            )
        return part

    def _cut(self, polygons: NDArray[np.object_]) -> NDArray[np.object_]:
        """Clip polygons to the slide."""
        width, height = self._size
        bounds = shapely.bounds(polygons).reshape(-1, 4)
        out = (bounds[:, 0] < 0) | (bounds[:, 1] < 0) | (bounds[:, 2] > width) | (bounds[:, 3] > height)
        if out.any():
            polygons = polygons.copy()
            polygons[out] = [
                largest_part(g) for g in shapely.intersection(polygons[out], shapely.box(0, 0, width, height))
            ]
        return polygons
