"""cells.geojson.gz: every cell as a QuPath detection (QuPath >= 0.4). The validator of such files is in qupath_rules.py.

    {"type":"FeatureCollection","features":[
    {"type":"Feature","id":"<uuid>",
     "geometry":{"type":"Polygon","coordinates":[[[10.25,5],[14.5,7.5],...,[10.25,5]]]},
     "properties":{"objectType":"detection","classification":{"name":"tumour","color":[200,0,0]},
                   "measurements":{"Area µm^2":31.2,"Detection probability":0.93,"Type score":0.8,"Type margin":0.3}}},
    ...                                                  (one Feature per line; unassigned cells have no classification)
    ],"wsiseg":{"tool":...,"version":...,"slide":...,"config_hash":...,"frame":...,"cells":N}}

Coordinates are level-0 px relative to the OpenSlide bounds, where QuPath has its origin, on a grid of 0.25 px: QuPath 0.6+ keeps float32,
snaps to 0.01 px and aborts the whole import when that makes one polygon invalid; on the coarser grid this never happens. JSON null is
never written: in most places it aborts the import. Above MAX_CELLS the file is a zip of such documents, which QuPath reads one by one.

Specification: https://datatracker.ietf.org/doc/html/rfc7946; QuPath: https://qupath.readthedocs.io/en/stable/docs/advanced/exporting_annotations.html
"""  # fmt: skip

from __future__ import annotations

import gzip
import logging
import math
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import shapely

from wsiseg.errors import FormatError
from wsiseg.formats.atomic import atomic_path
from wsiseg.formats.ids import cell_ids
from wsiseg.formats.qupath_rules import validate_geojson
from wsiseg.records import UNASSIGNED, Cells, Provenance, SlideInfo, Typing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from concurrent.futures import Future
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["snap_polygons", "validate_geojson", "write_geojson"]

logger = logging.getLogger(__name__)

MAX_CELLS = 500_000  #: in one document: QuPath needs about 10 KB of heap per cell and takes half of the RAM, so this fits a 16-GB laptop
SHARD_CELLS = 20_000  #: per entry of the zip: 200 MB of heap, whatever the slide
GRID_PX = 0.25  #: 0 of 10,000 shapes abort QuPath 0.6+ on it, at any offset (plain rounding to 0.01 px: 8)
BATCH = 2_000  #: cells turned into text at once: a few MB
GZIP_LEVEL = 2  #: 7.5 us per cell and 257 B; level 4: 11 us and 237 B; level 6: 35 us and 216 B
ZIP_TIME = (1980, 1, 1, 0, 0, 0)


def write_geojson(path: Path, cells: Cells, typing: Typing, info: SlideInfo, provenance: Provenance) -> Path:
    """Write the cells for QuPath, atomically; same input, same bytes.

    Parameters
    ----------
    path
        ``cells.geojson.gz``, ``.geojson`` or ``.geojson.zip``.
    cells
        Level-0 px. A polygon that vanishes on the 0.25-px grid is left out, and logged; of one that falls apart the largest part stays.
    typing
        Of the same cells.
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
    stem = next((path.name[: -len(s)] for s in (".geojson.gz", ".geojson.zip", ".geojson") if path.name.endswith(s)), None)
    if stem is None:
        raise FormatError(f"{path}: QuPath does not read this name; allowed are .geojson.gz, .geojson and .geojson.zip")
    text = _FeatureText(cells, typing, info, provenance)
    if path.name.endswith(".zip") or len(cells) > MAX_CELLS:
        path = path.with_name(f"{stem}.geojson.zip")
        with atomic_path(path) as partial:
            written = _write_zip(partial, stem, text)
    else:
        with atomic_path(path) as partial, _open_text(partial, path) as write:
            written = _write_document(write, text, range(len(cells)), {})
    if written < len(cells):
        left_out = len(cells) - written
        logger.warning("%s: %d of %d cells vanish on the grid of %s px and were left out", path, left_out, len(cells), GRID_PX)
    return path


@contextmanager
def _open_text(partial: Path, path: Path) -> Iterator[Callable[[bytes], int]]:
    with partial.open("wb") as file:
        if path.name.endswith(".gz"):
            with gzip.GzipFile(filename="", mode="wb", fileobj=file, compresslevel=GZIP_LEVEL, mtime=0) as packed:
                yield packed.write
        else:
            yield file.write


def _write_zip(partial: Path, stem: str, text: _FeatureText) -> int:
    total = len(text.cells)
    shards = max(1, math.ceil(total / SHARD_CELLS))
    written = 0
    with zipfile.ZipFile(partial, "w") as archive:
        for shard in range(shards):
            rows = range(shard * SHARD_CELLS, min((shard + 1) * SHARD_CELLS, total))
            chunks: list[bytes] = []
            written += _write_document(chunks.append, text, rows, {"shard": shard + 1, "shards": shards})
            entry = zipfile.ZipInfo(f"{stem}-{shard + 1:04d}-of-{shards:04d}.geojson", ZIP_TIME)
            entry.create_system, entry.external_attr = 3, 0o644 << 16  # the same bytes on every system
            archive.writestr(entry, b"".join(chunks), zipfile.ZIP_DEFLATED, GZIP_LEVEL)
    return written


def _write_document(write: Callable[[bytes], object], text: _FeatureText, rows: range, extra: dict[str, object]) -> int:
    """One FeatureCollection; the next batches are snapped and the last one compressed beside. Returns the number of Features."""
    batches = [slice(start, min(start + BATCH, rows.stop)) for start in range(rows.start, rows.stop, BATCH)]
    written = 0
    with ThreadPoolExecutor(1) as snapper, ThreadPoolExecutor(1) as writer:  # both let go of the interpreter's lock
        before = writer.submit(write, b'{"type":"FeatureCollection","features":[\n')
        for batch, polygons in _ahead(snapper, text.snapped, batches):
            features = text.features(batch, polygons)
            if features:
                lines = (b",\n" if written else b"") + b",\n".join(features)
                before.result()
                before = writer.submit(write, lines)
                written += len(features)
        before.result()
    note = orjson.dumps({**text.note, **extra, "cells": written})
    write(b'\n],"wsiseg":' + note + b"}\n")
    return written


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[slice], NDArray[np.object_]], batches: Iterable[slice]
) -> Iterator[tuple[slice, NDArray[np.object_]]]:
    """Each batch with its result, in order; at most two are worked on ahead."""
    pending: deque[tuple[slice, Future[NDArray[np.object_]]]] = deque()
    for batch in batches:
        pending.append((batch, pool.submit(function, batch)))
        if len(pending) > 2:
            done, future = pending.popleft()
            yield done, future.result()
    for done, future in pending:
        yield done, future.result()


class _FeatureText:
    """Turns rows of the table into Features; holds what is the same for all of them."""

    def __init__(self, cells: Cells, typing: Typing, info: SlideInfo, provenance: Provenance) -> None:
        self.cells, self.typing = cells, typing
        self.ids = cell_ids(provenance.slide, cells)
        self.um2_per_px = info.mpp**2
        self.origin = (0.0, 0.0) if info.bounds is None else (float(info.bounds[0]), float(info.bounds[1]))
        self.classes = [_classification(name, color) for name, color in zip(typing.names, typing.colors, strict=True)]
        self.note = _provenance_note(info, provenance, len(cells))

    def snapped(self, rows: slice) -> NDArray[np.object_]:
        """The polygons of ``rows`` on the grid."""
        return snap_polygons(self.cells.polygons[rows])

    def features(self, rows: slice, polygons: NDArray[np.object_]) -> list[bytes]:
        """The Features of ``rows``, given their snapped polygons; fewer than rows where one vanished."""
        kept = ~shapely.is_missing(polygons)
        codes = np.asarray(self.typing.codes[rows])[kept]
        typed = np.array([bool(text) for text in self.classes])[codes]
        areas = shapely.area(self.cells.polygons[rows])[kept] * self.um2_per_px
        measurements = _measurements({
            "Area µm^2": np.round(areas, 3),
            "Detection probability": _round(self.cells.scores[rows][kept]),
            "Type score": np.where(typed, _round(self.typing.scores[rows][kept]), np.nan),
            "Type margin": np.where(typed, _round(self.typing.margins[rows][kept]), np.nan),
        })  # fmt: skip
        ids = [self.ids[row] for row in np.arange(rows.start, rows.stop)[kept].tolist()]
        rings = _ring_texts(polygons[kept], self.origin)
        return [
            b'{"type":"Feature","id":"%b","geometry":{"type":"Polygon","coordinates":%b},"properties":{"objectType":"detection"%b%b}}'
            % (cell_id.encode(), ring, self.classes[code], values)
            for cell_id, ring, code, values in zip(ids, rings, codes.tolist(), measurements, strict=True)
        ]


def snap_polygons(polygons: NDArray[np.object_]) -> NDArray[np.object_]:
    """Polygons on the 0.25-px grid that QuPath imports unchanged.

    Parameters
    ----------
    polygons
        shapely geometries of shape (N,), px; may be invalid. Not modified.

    Returns
    -------
    NDArray
        Valid Polygons of shape (N,), without holes smaller than the grid; ``None`` where nothing is left.
    """
    # Rounding each vertex (6 us per cell) is all that set_precision does (38 us) unless it makes the ring touch itself.
    with np.errstate(invalid="ignore"):  # NaN among the coordinates: _repair drops the polygon
        snapped = np.asarray(shapely.set_precision(polygons, GRID_PX, mode="pointwise"), dtype=object)
        fine = shapely.is_valid(snapped) & (shapely.get_type_id(snapped) == shapely.GeometryType.POLYGON) & ~shapely.is_empty(snapped)
    for index in np.flatnonzero(~fine):
        snapped[index] = _repair(polygons[index])
    return snapped


def _repair(polygon: shapely.Geometry | None) -> shapely.Polygon | None:
    """make_valid, polygonal parts, set_precision, the largest part; ``None`` when nothing is left."""
    if polygon is None or not np.isfinite(shapely.get_coordinates(polygon)).all():
        return None
    parts = shapely.get_parts(shapely.get_parts(shapely.make_valid(polygon)))
    parts = parts[shapely.get_type_id(parts) == shapely.GeometryType.POLYGON]
    parts = shapely.get_parts(shapely.set_precision(shapely.multipolygons(parts), GRID_PX)) if len(parts) else parts
    parts = parts[shapely.is_valid(parts) & (shapely.area(parts) > 0)]
    return parts[int(np.argmax(shapely.area(parts)))] if len(parts) else None


def _ring_texts(polygons: NDArray[np.object_], origin: tuple[float, float]) -> list[bytes]:
    """The ``coordinates`` of each polygon as JSON, without repeated vertices and without ``.0``."""
    if not len(polygons):
        return []
    _, xy, (ring_starts, polygon_starts) = shapely.to_ragged_array(polygons, include_z=False)
    keep = np.ones(len(xy), bool)
    keep[1:] = (xy[1:] != xy[:-1]).any(axis=1)
    keep[ring_starts[:-1]] = True
    starts = np.concatenate([[0], np.cumsum(keep)])[ring_starts].tolist()
    xy = np.ascontiguousarray(xy[keep] - origin)
    rings = [xy[a:b] for a, b in pairwise(starts)]
    firsts = polygon_starts.tolist()
    text = orjson.dumps([rings[a:b] for a, b in pairwise(firsts)], option=orjson.OPT_SERIALIZE_NUMPY)
    text = text.replace(b".0", b"")  # on the grid a fraction is .0, .25, .5 or .75
    return [b"[[[" + inner + b"]]]" for inner in text[4:-4].split(b"]]],[[[")]


def _measurements(columns: dict[str, NDArray[np.float64]]) -> list[bytes]:
    """``,"measurements":{...}`` of each row; what is not finite is left out."""
    cells = []
    for name, values in columns.items():
        key = orjson.dumps(name) + b":"
        numbers = orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].split(b",")
        cells.append([b"" if number == b"null" else key + number for number in numbers])
    return [b',"measurements":{' + b",".join(filter(None, row)) + b"}" if any(row) else b"" for row in zip(*cells, strict=True)]


def _round(values: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.asarray(np.round(values.astype(np.float64), 4))


def _classification(name: str, color: tuple[int, int, int]) -> bytes:
    if name == UNASSIGNED:
        return b""
    if not name.strip() or ":" in name or not name.isprintable():
        raise FormatError(f"type {name!r}: QuPath cannot read this class name; use printable text without ':' in the seeds and run again")
    return b',"classification":' + orjson.dumps({"name": name, "color": [int(value) for value in color]})


def _provenance_note(info: SlideInfo, provenance: Provenance, cells: int) -> dict[str, object]:
    note: dict[str, object] = {
        "tool": provenance.tool, "version": provenance.version, "slide": provenance.slide, "config_hash": provenance.config_hash,
        "details": provenance.details, "mpp": info.mpp, "cells_of_slide": cells,
    }  # fmt: skip
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
