"""cells.geojson.gz: every cell as a QuPath detection (QuPath >= 0.4). The validator of such files is in qupath/validation.py.

    {"type":"FeatureCollection","features":[
    {"type":"Feature","id":"<uuid>",
     "geometry":{"type":"Polygon","coordinates":[[[10.25,5],[14.5,7.5],...,[10.25,5]]]},
     "properties":{"objectType":"detection","classification":{"name":"tumour","color":[200,0,0]},
                   "measurements":{"Nucleus: Area µm^2":31.2,...,"Detection probability":0.93,"Type score":0.8,"Type margin":0.3}}},
    ...                                                  (one Feature per line; unassigned cells have no classification)
    ],"wsiseg":{"tool":...,"version":...,"slide":...,"config_hash":...,"frame":...,"cells":N}}

Coordinates are level-0 px relative to the OpenSlide bounds, where QuPath has its origin, on a grid of 0.25 px: QuPath 0.6+ keeps float32,
snaps to 0.01 px and aborts the whole import when that makes one polygon invalid; on the coarser grid this never happens. JSON null is
never written: in most places it aborts the import. Above MAX_CELLS the file is a zip of such documents, which QuPath reads one by one.

Specification: https://datatracker.ietf.org/doc/html/rfc7946; QuPath: https://qupath.readthedocs.io/en/stable/docs/advanced/exporting_annotations.html
"""

from __future__ import annotations

import logging
import math
import zipfile
from itertools import compress, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import orjson
import shapely

from wsiseg.errors import FormatError
from wsiseg.formats import CHUNK
from wsiseg.formats.deflate import write_entry, write_gzip
from wsiseg.formats.ids import CellIds
from wsiseg.formats.qupath.coordinates import GRID_PX, outline_texts, snap_polygons
from wsiseg.formats.qupath.validation import validate_geojson
from wsiseg.formats.seed_rules import RESERVED_NAMES
from wsiseg.measurements import qupath_name
from wsiseg.records import UNASSIGNED, Cells, CellSource, Provenance, SlideInfo, Typing
from wsiseg.runtime.atomic import atomic_path

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["snap_polygons", "validate_geojson", "write_geojson"]

logger = logging.getLogger(__name__)

MAX_CELLS = 100_000  #: in one document: QuPath needs 10 to 15 KB of heap per cell, and for a zip of shards as little as for one shard
SHARD_CELLS = 20_000  #: per entry of the zip: 200 MB of heap, whatever the slide
BATCH = 2_500  #: cells turned into text at once: 2 MB; shards are multiples of it
GZIP_LEVEL = 2  #: 7.5 us per cell and 257 B; level 4: 11 us and 237 B; level 6: 35 us and 216 B
ZIP_TIME = (1980, 1, 1, 0, 0, 0)


def write_geojson(path: Path, cells: CellSource, typing: Typing, info: SlideInfo, provenance: Provenance) -> Path:
    """Write the cells for QuPath, atomically; same input, same bytes.

    Parameters
    ----------
    path
        ``cells.geojson.gz``, ``.geojson`` or ``.geojson.zip``.
    cells
        Level-0 px, read once and never all at a time; cells of equal prompts are neighbours. A polygon that vanishes on the 0.25-px grid is
        left out, and logged; one that falls apart is held together by wider necks.
    typing
        Types of the same cells.
    info
        Gives microns per pixel, and the bounds that the coordinates are made relative to.
    provenance
        Goes into the member ``wsiseg``; ``provenance.slide`` is the key of the ids.

    Returns
    -------
    Path
        ``path``, or for more than ``MAX_CELLS`` cells the ``.geojson.zip`` beside it, in shards of at most ``SHARD_CELLS``.

    Raises
    ------
    FormatError
        QuPath would not read a file of that name, or not as one class a type of that name.
    RunError
        The file cannot be written.
    """
    stem = next(
        (path.name[: -len(s)] for s in (".geojson.gz", ".geojson.zip", ".geojson") if path.name.endswith(s)), None
    )
    if stem is None:
        raise FormatError(f"{path}: QuPath does not read this name; allowed are .geojson.gz, .geojson and .geojson.zip")
    text = _FeatureText(cells, typing, info, provenance)
    if path.name.endswith(".zip") or len(cells) > MAX_CELLS:
        path = path.with_name(f"{stem}.geojson.zip")
        with atomic_path(path) as partial:
            written = _write_zip(partial, stem, text)
    else:
        with atomic_path(path) as partial:
            written = _write_document(partial, text, packed=path.name.endswith(".gz"))
    if written < len(cells):
        left_out = len(cells) - written
        logger.warning(
            "%s: %d of %d cells vanish on the grid of %s px and were left out", path, left_out, len(cells), GRID_PX
        )
    return path


def _write_document(partial: Path, text: _FeatureText, *, packed: bool) -> int:
    """One document; returns the number of Features."""
    document = _Document(text.batches(), len(text.cells), text.note)
    with partial.open("wb") as file:
        if packed:
            write_gzip(file, document.text(), GZIP_LEVEL)
        else:
            file.writelines(document.text())
    return document.written


def _write_zip(partial: Path, stem: str, text: _FeatureText) -> int:
    total, batches = len(text.cells), text.batches()
    shards = max(1, math.ceil(total / SHARD_CELLS))
    written = 0
    with partial.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        for shard in range(shards):
            document = _Document(
                batches,
                min(SHARD_CELLS, total - shard * SHARD_CELLS),
                text.note | {"shard": shard + 1, "shards": shards},
            )
            entry = zipfile.ZipInfo(f"{stem}-{shard + 1:04d}-of-{shards:04d}.geojson", ZIP_TIME)
            entry.create_system, entry.external_attr = 3, 0o644 << 16  # the same bytes on every system
            write_entry(archive, file, entry, document.text(), GZIP_LEVEL)
            written += document.written
    return written


class _Batch(NamedTuple):
    """Rows as lines of text, fewer where a cell vanished; ``text`` begins with the comma after the line before."""

    rows: int
    lines: int
    text: bytes


class _Document:
    """One FeatureCollection of the next ``rows`` cells."""

    def __init__(self, batches: Iterator[_Batch], rows: int, note: dict[str, object]) -> None:
        self.batches, self.rows, self.note = batches, rows, note
        self.written = 0  #: Features so far

    def text(self) -> Iterator[bytes]:
        """The document, in portions."""
        yield b'{"type":"FeatureCollection","features":[\n'
        rows = 0
        while rows < self.rows and (batch := next(self.batches, None)):
            yield batch.text if self.written else batch.text[2:]
            rows += batch.rows
            self.written += batch.lines
        yield b'\n],"wsiseg":' + orjson.dumps(self.note | {"cells": self.written}) + b"}\n"


class _FeatureText:
    """Turns the cells into Features; holds what is the same for all of them."""

    def __init__(self, cells: CellSource, typing: Typing, info: SlideInfo, provenance: Provenance) -> None:
        self.cells, self.typing = cells, typing
        self.slide = provenance.slide
        self.um2_per_px = info.mpp**2
        self.origin = (0.0, 0.0) if info.bounds is None else (float(info.bounds[0]), float(info.bounds[1]))
        self.classes = [_classification(name, color) for name, color in zip(typing.names, typing.colors, strict=True)]
        self.typed = np.array([bool(text) for text in self.classes])
        self.note = _provenance_note(info, provenance, len(cells))

    def batches(self) -> Iterator[_Batch]:
        """The Features of all cells, in order. In the caller's thread: most of the work holds the interpreter's lock."""
        ids, start, step = CellIds(self.slide), 0, min(BATCH, SHARD_CELLS)
        for chunk in self.cells.chunks(CHUNK):
            names = ids(chunk).tolist()
            edges = sorted(
                {0, *range(-start % step, len(chunk), step), len(chunk)}
            )  # of the whole: a batch lies in one shard
            for first, end in pairwise(edges):
                yield self._batch(slice(start + first, start + end), chunk.take(slice(first, end)), names[first:end])
            start += len(chunk)

    def _batch(self, rows: slice, cells: Cells, ids: list[bytes]) -> _Batch:
        codes = self.typing.codes[rows]
        typed = self.typed[codes]
        areas = np.nan_to_num(
            np.round(shapely.area(cells.polygons) * self.um2_per_px, 3)
        )  # a number in any case: the comma follows it
        columns: list[bytes | list[bytes]] = [
            b',\n{"type":"Feature","id":"',
            ids,
            b'","geometry":{"type":"Polygon","coordinates":[[',
            outlines := outline_texts(cells.polygons, self.origin),
            b']]},"properties":{"objectType":"detection"',
            [self.classes[code] for code in codes.tolist()],
            b',"measurements":{',
            [text[1:] for text in _measurements(qupath_name("area_um2"), areas)],
            *(_measurements(qupath_name(name), _round(column)) for name, column in cells.measurements.items()),
            _measurements("Detection probability", _round(cells.scores)),
            _measurements("Type score", np.where(typed, _round(self.typing.scores[rows]), np.nan)),
            _measurements("Type margin", np.where(typed, _round(self.typing.margins[rows]), np.nan)),
            b"}}}",
        ]
        if not all(outlines):
            columns = [column if isinstance(column, bytes) else list(compress(column, outlines)) for column in columns]
        lines = sum(map(bool, outlines))
        return _Batch(len(cells), lines, _interleaved(columns, lines))


def _interleaved(columns: list[bytes | list[bytes]], lines: int) -> bytes:
    """Interleave columns line by line; a column is a list, or one text for every line."""
    pieces = [b""] * (lines * len(columns))
    for k, column in enumerate(columns):
        pieces[k :: len(columns)] = [column] * lines if isinstance(column, bytes) else column
    return b"".join(pieces)


def _measurements(name: str, values: NDArray[np.float64]) -> list[bytes]:
    """``,"name":value`` of each row; nothing where the value is not finite."""
    key = b"\n," + orjson.dumps(name) + b":"
    numbers = orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]
    return (key + numbers.replace(b",", key)).replace(key + b"null", b"\n").split(b"\n")[1:]


def _round(values: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.asarray(np.round(values.astype(np.float64), 4))


def _classification(name: str, color: tuple[int, int, int]) -> bytes:
    if name == UNASSIGNED:
        return b""
    if (
        not name.strip()
        or name != name.strip()
        or ":" in name
        or not name.isprintable()
        or name.casefold() in RESERVED_NAMES
    ):
        raise FormatError(
            f"type {name!r}: QuPath cannot read this class name; use printable text without ':' or blanks at its ends in the seeds, "
            "and not 'Unclassified', and run again"
        )
    return b',"classification":' + orjson.dumps({"name": name, "color": [int(value) for value in color]})


def _provenance_note(info: SlideInfo, provenance: Provenance, cells: int) -> dict[str, object]:
    note: dict[str, object] = {
        "tool": provenance.tool,
        "version": provenance.version,
        "slide": provenance.slide,
        "config_hash": provenance.config_hash,
        "details": provenance.details,
        "mpp": info.mpp,
        "cells_of_slide": cells,
    }
    if info.bounds is None:
        note["frame"] = "level-0 px of the slide: x right, y down, origin at the outer corner of pixel (0, 0)"
    else:
        x, y = info.bounds[:2]
        note["bounds"] = list(info.bounds)
        note["frame"] = (
            "level-0 px of the slide as QuPath crops it: x right, y down, origin at the corner of its OpenSlide bounds; "
            f"add ({x}, {y}) for absolute level-0 px"
        )
    return dict(_without_nulls(orjson.loads(orjson.dumps(note, option=orjson.OPT_SERIALIZE_NUMPY, default=str))))


def _without_nulls(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in sorted(value.items()) if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value if item is not None]
    return value
