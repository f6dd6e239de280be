"""Part files: the outlines of one block of tiles before stitching. Private to a run; ``cells.parquet`` is the public file.

    Parquet, zstd, one row per cell, page checksums
      geometry    binary      WKB polygon, level-0 px
      prompt_x, prompt_y  double   level-0 px
      score       float
      descriptor  fixed_size_list<halffloat>[D]
      concept_scores  fixed_size_list<float>[T]   only of runs that describe T types (--method text, exemplar)
      and a float column per measurement of colour
    file metadata, key "wsiseg_part": {"format": 2, "config_hash": ..., "counts": {...}, "failures": [...], "failed_px0": [...],
      "cells": N, "descriptor_size": D, "concepts": T, "measurements": [...]}

The footer is at the end of the file and the file arrives by rename, so a footer that can be read means a part that is complete.
Format: https://parquet.apache.org/docs/file-format/
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from wsiseg.errors import FormatError
from wsiseg.records import Cells
from wsiseg.runtime.atomic import atomic_path
from wsiseg.runtime.text import first_line

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

KEY = b"wsiseg_part"
FORMAT = 2
UNREADABLE = (OSError, pa.ArrowException, ValueError, KeyError, TypeError, AttributeError)


@dataclass(frozen=True)
class Part:
    """One part in memory, its polygons still encoded.

    Attributes
    ----------
    name
        Name of the part in errors.
    table, note
        As in the file.
    """

    name: str
    table: pa.Table
    note: dict[str, Any]

    @staticmethod
    def of(cells: Cells, name: str = "cells") -> Part:
        """Cells that are in memory."""
        return Part(name, _table(cells), _sizes(cells))

    @property
    def nbytes(self) -> int:
        """Size of the columns."""
        return int(self.table.nbytes)

    @property
    def counts(self) -> dict[str, int]:
        """Counts of the block."""
        return {str(name): int(count) for name, count in self.note["counts"].items()}

    @property
    def failures(self) -> list[str]:
        """A message per tile of the block that could not be read."""
        return [str(failure) for failure in self.note.get("failures", [])]

    @property
    def failed_px0(self) -> list[tuple[float, float]]:
        """Corner of each of them, level-0 px; none in parts of earlier versions."""
        return [(float(x), float(y)) for x, y in self.note.get("failed_px0", [])]

    @property
    def points_xy(self) -> NDArray[np.float64]:
        """Prompts (N, 2), level-0 px."""
        return np.stack([self.table["prompt_x"].to_numpy(), self.table["prompt_y"].to_numpy()], axis=1)

    @property
    def scores(self) -> NDArray[np.float32]:
        """Scores (N,)."""
        scores: NDArray[np.float32] = self.table["score"].to_numpy().astype(np.float32)
        return scores

    def polygons(self, rows: NDArray[np.intp] | None = None) -> NDArray[np.object_]:
        """All polygons, or those of ``rows``.

        Raises
        ------
        FormatError
            One of them is damaged.
        """
        column = self.table["geometry"]
        try:
            return polygons_from_wkb(column if rows is None else column.take(pa.array(rows)))
        except (*UNREADABLE, shapely.errors.GEOSException) as error:
            raise _unreadable(self.name, error) from error

    def descriptors(self, rows: NDArray[np.intp]) -> NDArray[np.float16]:
        """(n, D) of ``rows``."""
        return descriptors_from(self.table, int(self.note["descriptor_size"]))[rows]

    def concept_scores(self, rows: NDArray[np.intp] | slice = slice(None)) -> NDArray[np.float32] | None:
        """(n, T) of ``rows``; ``None`` in a part without."""
        size = int(self.note.get("concepts", 0))
        if not size:
            return None
        return _rows_of(self.table, "concept_scores", size, np.float32)[rows]

    @property
    def measurement_names(self) -> tuple[str, ...]:
        """Names of the measurements; none where there are no cells."""
        return tuple(str(name) for name in self.note.get("measurements", ()))

    def measurements(self, rows: NDArray[np.intp], name: str) -> NDArray[np.float32]:
        """(n,) of ``rows``; NaN where the part does not have the measurement."""
        if name not in self.measurement_names:
            return np.full(len(rows), np.nan, np.float32)
        column: NDArray[np.float32] = self.table[name].to_numpy()[rows].astype(np.float32)
        return column

    def cells(self) -> Cells:
        """All cells of the part."""
        return Cells(
            polygons=self.polygons(),
            points_xy=self.points_xy,
            scores=self.scores,
            descriptors=descriptors_from(self.table, int(self.note["descriptor_size"])),
            concept_scores=self.concept_scores(),
            measurements={name: self.table[name].to_numpy().astype(np.float32) for name in self.measurement_names},
        )


def write_part(
    path: Path,
    cells: Cells,
    parts_hash: str,
    counts: dict[str, int],
    failures: Sequence[str] = (),
    failed_px0: Sequence[tuple[float, float]] = (),
) -> None:
    """Write one part, atomically; same input, same bytes.

    Parameters
    ----------
    path
        ``parts/<block name>.parquet``.
    cells
        Cells of one block, level-0 px; N = 0 is valid.
    parts_hash
        Hash of everything that decides the parts; :func:`part_is_current` compares it.
    counts
        Tiles, tiles that could not be read, prompts, masks larger than the window, outlines: summed into the manifest.
    failures
        A message per tile that could not be read.
    failed_px0
        The corners of their cores, level-0 px.
    """
    note = {
        "format": FORMAT,
        "config_hash": parts_hash,
        "counts": {name: int(count) for name, count in counts.items()},
        "failures": list(failures),
        "failed_px0": [list(corner) for corner in failed_px0],
        "cells": len(cells),
        **_sizes(cells),
    }
    table = _table(cells).replace_schema_metadata({KEY: json.dumps(note, sort_keys=True)})
    with atomic_path(path) as partial:
        place = partial.absolute()  # a colon in a relative one makes it an address
        pq.write_table(table, place, compression="zstd", use_dictionary=False, write_page_checksum=True)


def _sizes(cells: Cells) -> dict[str, Any]:
    """Lengths of the lists, and the names of the measurements."""
    scores = cells.concept_scores
    concepts = {} if scores is None else {"concepts": scores.shape[1]}
    return {"descriptor_size": cells.descriptor_size, "measurements": cells.measurement_names, **concepts}


def _table(cells: Cells) -> pa.Table:
    return pa.table(
        {
            "geometry": pa.array(shapely.to_wkb(cells.polygons), pa.binary()),
            "prompt_x": np.ascontiguousarray(cells.points_xy[:, 0], np.float64),
            "prompt_y": np.ascontiguousarray(cells.points_xy[:, 1], np.float64),
            "score": np.asarray(cells.scores, np.float32),
            **descriptor_column(cells.descriptors),
            **(
                {}
                if cells.concept_scores is None
                else {"concept_scores": _list_column(cells.concept_scores, np.float32)}
            ),
            **cells.measurements,
        }
    )


def open_part(path: Path, columns: tuple[str, ...] | None = None) -> Part:
    """Open a part without decoding its polygons.

    Parameters
    ----------
    path
        Written by :func:`write_part`.
    columns
        Only these; all when absent.

    Raises
    ------
    FormatError
        The file is missing, damaged, or no part.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            note = json.loads(file.schema_arrow.metadata[KEY])
            known = {
                "geometry",
                "prompt_x",
                "prompt_y",
                "score",
                *(["descriptor"] if int(note["descriptor_size"]) else []),
                *(["concept_scores"] if int(note.get("concepts", 0)) else []),
                *note.get("measurements", ()),  # none in the clicks of a run that an earlier version began
            }
            missing = known - set(file.schema_arrow.names)
            if missing:
                raise KeyError(min(missing))
            part = Part(str(path), file.read([name for name in columns if name in known] if columns else None), note)
            part.counts  # noqa: B018 - raises when it is damaged
    except UNREADABLE as error:
        raise _unreadable(str(path), error) from error
    return part


def read_part(path: Path) -> tuple[Cells, dict[str, int]]:
    """Read the cells of a part and its counts, exactly as written.

    Raises
    ------
    FormatError
        The file is missing, damaged, or no part.
    """
    part = open_part(path)
    return part.cells(), part.counts


def _unreadable(name: str, error: Exception) -> FormatError:
    return FormatError(f"{name}: not a readable part file ({first_line(error)}); delete it and run the command again")


def part_is_current(path: Path, parts_hash: str) -> bool:
    """Tell whether the part exists, is complete, and was made with this configuration.

    Parameters
    ----------
    path
        May be missing, truncated or anything at all: the answer is then False, never an exception.
    parts_hash
        The hash given to :func:`write_part`.
    """
    try:
        footer = pq.read_metadata(path)
        note = json.loads(footer.metadata[KEY])
        return bool(note["format"] == FORMAT and note["config_hash"] == parts_hash and note["cells"] == footer.num_rows)
    except UNREADABLE:
        return False


def descriptor_column(descriptors: NDArray[np.float16]) -> dict[str, pa.Array]:
    """``{"descriptor": array}``, or nothing at all for descriptors of size 0, which Parquet cannot hold."""
    return {"descriptor": _list_column(descriptors, np.float16)} if descriptors.shape[1] else {}


def _list_column(rows: NDArray[Any], kind: type[np.generic]) -> pa.Array:
    """Rows (N, n), of n > 0 numbers, as a column of lists."""
    values = pa.array(np.ascontiguousarray(rows, kind).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(values, rows.shape[1])


def descriptors_from(table: pa.Table, size: int) -> NDArray[np.float16]:
    """The descriptor column as float16 of shape (N, size)."""
    if size == 0:
        return np.empty((table.num_rows, 0), np.float16)
    return _rows_of(table, "descriptor", size, np.float16)


def _rows_of(table: pa.Table, column: str, size: int, kind: type[np.generic]) -> NDArray[Any]:
    """A column of lists of ``size`` numbers as an array (N, size)."""
    chunks = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in table[column].chunks]
    flat = np.concatenate([np.empty(0, kind), *chunks])
    return flat.astype(kind, copy=False).reshape(table.num_rows, size)


def polygons_from_wkb(column: pa.ChunkedArray) -> NDArray[np.object_]:
    """Geometries of shape (N,) from a WKB column."""
    wkb = column.to_numpy()
    polygons: Any = shapely.from_wkb(wkb) if len(wkb) else np.empty(0, object)
    return np.asarray(polygons, dtype=object)
