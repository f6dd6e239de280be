"""The cells of a slide as the page asks for them: by place, as outlines of a square, as counts on squares, by a click.

Only numbers are in memory (about 250 bytes per cell with descriptors of 75 numbers); outlines are read from the run's files when they are shown.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

from wsiseg.formats.geoparquet import as_format_error, read_table
from wsiseg.records import Cells
from wsiseg.runtime.profiling import trim_memory
from wsiseg.seeds.matching import match_clicks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from wsiseg.records import Typing
    from wsiseg.stitching.stitched_cells import StitchedCells

SQUARE = 2048  #: level-0 px: outlines are sent by squares of this side, some megabyte at 40 px between cells
UNIT = 4  #: outlines are sent in quarters of a px, as QuPath's are written
FEW_SQUARES = 16  #: a box with a larger part of the slide's squares than one of so many is searched cell by cell
ROW_GROUPS = 8  #: kept with their outlines encoded; 20,000 cells and about 9 MB each

Box4 = tuple[float, float, float, float]
Rings = tuple[NDArray[np.float64], NDArray[np.int64]]


@dataclass(frozen=True, kw_only=True)
class CellStore:
    """N cells, level-0 px.

    Attributes
    ----------
    version
        Names this set of cells: another set has another one.
    centres, points_xy
        Centroids and prompts, float64 of shape (N, 2).
    bounds
        float32 of shape (N, 4): xmin, ymin, xmax, ymax, rounded.
    scores, descriptors, typing
        As in the run's table.
    size_px0, mpp
        The slide.
    polygons
        Outlines at rows.
    rings
        Corners of the outlines at n rows, each closed: float64 of shape (all, 2), and their number in each, shape (n,).
    """

    version: str
    centres: NDArray[np.float64]
    points_xy: NDArray[np.float64]
    bounds: NDArray[np.float32]
    scores: NDArray[np.float32]
    descriptors: NDArray[np.float16]
    typing: Typing
    size_px0: tuple[int, int]
    mpp: float
    polygons: Callable[[NDArray[np.intp]], NDArray[np.object_]]
    rings: Callable[[NDArray[np.intp]], Rings]

    def __len__(self) -> int:
        return len(self.centres)

    @property
    def grid(self) -> tuple[int, int]:
        """Columns and rows of squares."""
        width, height = self.size_px0
        return -(-width // SQUARE), -(-height // SQUARE)

    @cached_property
    def _squares(self) -> tuple[NDArray[np.int32], NDArray[np.intp]]:
        """Rows sorted by square, and where each square begins in them."""
        columns, rows = self.grid
        x, y = (np.clip(self.centres[:, k] // SQUARE, 0, (columns, rows)[k] - 1).astype(np.intp) for k in (0, 1))
        square = y * columns + x
        order = np.argsort(square, kind="stable").astype(np.int32)
        return order, np.searchsorted(square[order], np.arange(columns * rows + 1))

    def rows_of_square(self, column: int, row: int) -> NDArray[np.intp]:
        """Rows of the cells whose centroid lies in a square, ascending."""
        order, starts = self._squares
        columns, lines = self.grid
        if not (0 <= column < columns and 0 <= row < lines):
            return np.empty(0, np.intp)
        place = row * columns + column
        rows: NDArray[np.intp] = order[starts[place] : starts[place + 1]].astype(np.intp)
        return rows

    def rows_in(self, box: Box4) -> NDArray[np.intp]:
        """Rows of the cells whose centroid lies in a box (x0, y0, x1, y1), ascending."""
        x0, y0, x1, y1 = box
        columns, rows = self.grid
        first, last = (
            np.clip(np.array(edge) // SQUARE, 0, (columns - 1, rows - 1)).astype(int) for edge in ((x0, y0), (x1, y1))
        )
        if np.prod(last - first + 1) * FEW_SQUARES >= columns * rows:  # to look at every cell is quicker then
            x, y = self.centres.T
            return np.flatnonzero((x >= x0) & (x < x1) & (y >= y0) & (y < y1))
        found = [
            self.rows_of_square(column, row)
            for row in range(first[1], last[1] + 1)
            for column in range(first[0], last[0] + 1)
        ]
        near = np.sort(np.concatenate([np.empty(0, np.intp), *found]))
        x, y = self.centres[near].T
        inside: NDArray[np.intp] = near[(x >= x0) & (x < x1) & (y >= y0) & (y < y1)]
        return inside

    def outlines(self, column: int, row: int) -> bytes:
        """The outlines of a square, little endian.

        uint32 n, total; uint32 rows[n]; int16 xy[2 total], ``1 / UNIT`` px from the square's corner; uint16 corners[n] of each outline.
        """
        rows = self.rows_of_square(column, row)
        xy, lengths = self.rings(rows)
        corners = lengths - 1  # the last repeats the first
        xy = np.delete(xy, np.cumsum(lengths) - 1, axis=0)
        local = np.round((xy - (column * SQUARE, row * SQUARE)) * UNIT)
        head = np.array([len(rows), len(xy)], "<u4")
        body = (rows.astype("<u4"), np.clip(local, -32768, 32767).astype("<i2"), corners.astype("<u2"))
        return head.tobytes() + b"".join(part.tobytes() for part in body)

    def counts(
        self, box: Box4, columns: int, lines: int, codes: NDArray[np.int32], rows: NDArray[np.intp]
    ) -> NDArray[np.uint32]:
        """Cells per type on ``columns`` x ``lines`` squares of a box -> (types, lines, columns).

        Parameters
        ----------
        box
            x0, y0, x1, y1.
        columns, lines
            Numbers of squares.
        codes
            (n,): type of each cell.
        rows
            (n,): the cells, all within the box.
        """
        x0, y0, x1, y1 = box
        kinds = len(self.typing.names) if not len(codes) else max(int(codes.max()) + 1, 1)
        x, y = self.centres[rows].T
        at_x = np.clip((x - x0) / (x1 - x0) * columns, 0, columns - 1).astype(np.intp)
        at_y = np.clip((y - y0) / (y1 - y0) * lines, 0, lines - 1).astype(np.intp)
        place = (codes.astype(np.intp) * lines + at_y) * columns + at_x
        return np.bincount(place, minlength=kinds * lines * columns).reshape(kinds, lines, columns).astype(np.uint32)

    def clicked_row(self, point: tuple[float, float], reach_px0: float) -> int:
        """The cell that a click means (seeds/matching.py); -1 where there is none within reach."""
        found, rows = self._near(point, reach_px0)
        row = int(match_clicks(np.array([point], float), found, reach_px0)[0])
        return -1 if row < 0 else int(rows[row])

    def _near(self, point: tuple[float, float], reach_px0: float) -> tuple[Cells, NDArray[np.intp]]:
        """Every cell whose box is within reach of a point, and a few more; and their rows."""
        far = reach_px0 + 1 + self._largest  # bounds are rounded
        rows = self.rows_in((point[0] - far, point[1] - far, point[0] + far, point[1] + far))
        box = self.bounds[rows]
        here, reach = np.array(point), reach_px0 + 1
        rows = rows[((box[:, :2] <= here + reach) & (box[:, 2:] >= here - reach)).all(1)]
        return self.take(rows), rows

    def take(self, rows: NDArray[np.intp]) -> Cells:
        """The cells at ``rows``, in that order (with ``bounds``, what makes this a :class:`~wsiseg.records.CellIndex`)."""
        return Cells(
            polygons=self.polygons(rows),
            points_xy=self.points_xy[rows],
            scores=self.scores[rows],
            descriptors=self.descriptors[rows],
        )

    @cached_property
    def _largest(self) -> float:
        """The farthest that a cell reaches from its centroid, along an axis."""
        if not len(self):
            return 0.0
        reach = np.maximum(self.centres - self.bounds[:, :2], self.bounds[:, 2:] - self.centres)
        return float(reach.max())


def stored_cells(path: Path, size_px0: tuple[int, int], mpp: float) -> CellStore:
    """The cells of a finished run's table. Its file stays open, so that what is shown stays readable when another process replaces it.

    Raises
    ------
    FormatError
        It is missing, damaged, or not of wsiseg.
    """
    with as_format_error(path):
        version = table_version(path)
        outlines = _StoredOutlines(path)
    table = read_table(path)
    store = CellStore(
        version=version,
        centres=table.centroids,
        points_xy=table.points_xy,
        bounds=table.bounds.astype(np.float32),
        scores=table.table["score"].to_numpy().astype(np.float32),
        descriptors=table.descriptors,
        typing=table.typing(),
        size_px0=size_px0,
        mpp=mpp,
        polygons=outlines.polygons,
        rings=outlines.rings,
    )
    del table
    pa.default_memory_pool().release_unused()  # decoded columns: as much again as the store
    trim_memory()
    return store


def table_version(path: Path) -> str:
    """What changes when the file is replaced; empty when there is none."""
    try:
        facts = os.stat(path)  # noqa: PTH116 - one call
    except OSError:
        return ""
    return f"{facts.st_ino:x}-{facts.st_size:x}-{facts.st_mtime_ns:x}"


class _StoredOutlines:
    """Outlines at rows of a table, from an open file; encoded row groups are kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = pq.ParquetFile(path)
        groups = self._file.metadata.num_row_groups
        self._starts = np.cumsum([0, *(self._file.metadata.row_group(k).num_rows for k in range(groups))])
        self._held: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def polygons(self, rows: NDArray[np.intp]) -> NDArray[np.object_]:
        """Outlines at rows."""
        with as_format_error(self.path):
            return np.asarray(shapely.from_wkb(self._wkb(rows).to_numpy(zero_copy_only=False)), dtype=object)

    def rings(self, rows: NDArray[np.intp]) -> Rings:
        """Corners of the outlines at rows, and their number in each."""
        with as_format_error(self.path):
            return rings_of_wkb(self._wkb(rows))

    def _wkb(self, rows: NDArray[np.intp]) -> pa.BinaryArray:
        """The bytes of outlines, in the order of ``rows``."""
        groups = np.searchsorted(self._starts, rows, side="right") - 1
        order = np.argsort(groups, kind="stable")
        found = [
            self._group(group).take(pa.array(rows[order][groups[order] == group] - self._starts[group]))
            for group in np.unique(groups).tolist()
        ]
        together = pa.concat_arrays([pa.array([], pa.binary()), *found])
        return together if (np.diff(order) == 1).all() else together.take(pa.array(np.argsort(order)))

    def _group(self, group: int) -> Any:  # noqa: ANN401
        with self._lock:
            if group not in self._held:
                column = self._file.read_row_group(group, columns=["geometry"])["geometry"]
                self._held[group] = column.cast(pa.binary()).combine_chunks()
                while len(self._held) > ROW_GROUPS:
                    self._held.popitem(last=False)
            self._held.move_to_end(group)
            return self._held[group]


def rings_of_wkb(wkb: pa.BinaryArray) -> Rings:
    """Corners of polygons, and their number in each.

    Polygons of one ring, little endian, as wsiseg writes them, are read here: of each, 13 bytes of head before its corners. That is some
    twenty times as fast as to make polygons of them.

    Examples
    --------
    >>> import pyarrow as pa, shapely
    >>> rings_of_wkb(pa.array([shapely.to_wkb(shapely.box(0, 0, 2, 1))]))
    (array([[2., 0.],
           [2., 1.],
           [0., 1.],
           [0., 0.],
           [2., 0.]]), array([5]))
    """
    if not len(wkb):
        return np.empty((0, 2)), np.empty(0, np.int64)
    offsets = np.frombuffer(wkb.buffers()[1], np.int32)[wkb.offset : wkb.offset + len(wkb) + 1].astype(np.int64)
    content = np.frombuffer(wkb.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]
    offsets -= offsets[0]
    heads = offsets[:-1, None] + np.arange(13)
    if wkb.null_count == 0 and (np.diff(offsets) >= 13).all():
        kinds, lengths = content[heads[:, :9]], content[heads[:, 9:]].view("<u4")[:, 0].astype(np.int64)
        if (kinds == (1, 3, 0, 0, 0, 1, 0, 0, 0)).all() and (np.diff(offsets) == 13 + 16 * lengths).all():
            kept = np.ones(len(content), bool)
            kept[heads.ravel()] = False
            return content[kept].view("<f8").reshape(-1, 2), lengths
    return rings_of(np.asarray(shapely.from_wkb(wkb.to_numpy(zero_copy_only=False)), dtype=object))


def rings_of(polygons: NDArray[np.object_]) -> Rings:
    """Corners of the outer rings of polygons, and their number in each."""
    rings = shapely.get_exterior_ring(polygons)
    return shapely.get_coordinates(rings), shapely.get_num_coordinates(rings).astype(np.int64)


def stitched_store(
    cells: StitchedCells, typing: Typing, version: str, size_px0: tuple[int, int], mpp: float
) -> CellStore:
    """The cells of the blocks of a run that is not finished, all in memory: as many as somebody has looked at."""
    held = cells.take(slice(None))
    centres = shapely.get_coordinates(shapely.centroid(held.polygons)).reshape(-1, 2)
    return CellStore(
        version=version,
        centres=centres,
        points_xy=held.points_xy,
        bounds=held.bounds.astype(np.float32),
        scores=held.scores,
        descriptors=held.descriptors,
        typing=typing,
        size_px0=size_px0,
        mpp=mpp,
        polygons=lambda rows: held.polygons[rows],
        rings=lambda rows: rings_of(held.polygons[rows]),
    )
