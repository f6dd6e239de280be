"""Outlined cells of any program: label images, outlines and points, and the files they are read from.

    .png .tif .tiff .npy               label image: integer ids, 0 = background
    .geojson .json .gz .zip            outlines: QuPath objects, their classification is the type
    .parquet                           outlines: cells.parquet of wsiseg, or any GeoParquet; a column `cell_type` or `type` is the type
    .csv                               points: columns x, y and, if there are types, type
    a folder of a run                  its cells.parquet, else its cells.geojson.gz

Frame: px, x right, y down, origin at the outer corner of the first pixel. QuPath has its origin at the slide's OpenSlide bounds; `Outlines.frame`
keeps the two apart.
"""

from __future__ import annotations

import json
import logging
import struct
import tokenize
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import shapely
from scipy import ndimage

from wsiseg.config import FORCED_MPP
from wsiseg.errors import FormatError, counted
from wsiseg.formats.geojson_geometry import FARTHEST_PX, read_polygons, repaired
from wsiseg.formats.json_documents import class_name, iter_features, read_texts
from wsiseg.formats.text_tables import read_table
from wsiseg.records import UNASSIGNED
from wsiseg.runtime.paths import kind_of, names_in, normal, require_regular, require_text
from wsiseg.runtime.text import first_line, parse_json, read_text, show

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

IMAGES = (".png", ".tif", ".tiff", ".npy")
DOCUMENTS = (".geojson.gz", ".geojson.zip", ".json.gz", ".geojson", ".json", ".gz", ".zip")
SUFFIXES = (*DOCUMENTS, *IMAGES, ".parquet", ".csv")
RUN_FILES = ("cells.parquet", "cells.geojson.gz", "cells.geojson.zip")
NOT_CELLS = ("classes.json", "manifest.json")  #: other documents that lie in such folders
KINDS = "allowed are .png, .tif, .npy (labels), .geojson, .json, .gz, .zip, .parquet (outlines) and .csv (points)"
# What decoders of other libraries raise on damaged files.
UNREADABLE = (
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    SyntaxError,
    EOFError,
    AssertionError,
    MemoryError,
    struct.error,
    tokenize.TokenError,
    zlib.error,
)
COLUMNS = ("x", "y", "type")  #: of points


@dataclass(frozen=True)
class Labels:
    """A label image. ``ids``: integers of shape (H, W); ``types``: names by ascending id, empty for none, or ``None``."""

    ids: NDArray[np.integer]
    types: NDArray[np.object_] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Outlines:
    """Outlined cells.

    Attributes
    ----------
    polygons
        Valid shapely Polygons or MultiPolygons of shape (N,), px.
    types
        Names of shape (N,), empty for none; ``None`` when no cell has one.
    mpp
        Microns per px, when the file says.
    frame
        ``slide``: absolute level-0 px; ``qupath``: relative to the bounds of the slide, if it has them.
    origin
        (x, y) of those bounds in absolute level-0 px, when the file says.
    notes
        Warnings about what was skipped or repaired.
    """

    polygons: NDArray[np.object_]
    types: NDArray[np.object_] | None = None
    mpp: float | None = None
    frame: str = "slide"
    origin: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Points:
    """Cells as points. ``xy``: float64 of shape (N, 2), px; ``types`` as in `Outlines`."""

    xy: NDArray[np.float64]
    types: NDArray[np.object_] | None = None
    notes: tuple[str, ...] = ()


Side = Labels | Outlines | Points


def read_side(path: Path, names: Mapping[str, str]) -> Side:
    """Read one side of a comparison.

    Parameters
    ----------
    path
        An existing file of one of the kinds above.
    names
        Names for types that a file gives as numbers, ``{"1": "tumour"}``; others stay as they are.

    Returns
    -------
    Labels, Outlines or Points

    Raises
    ------
    FormatError
        The file is of no such kind, damaged, or holds something else.
    """
    suffix = suffix_of(path)
    if suffix is None or kind_of(path, FormatError) != "file":
        raise FormatError(
            f"{path}: {path.suffix or 'a name without suffix'} is not a kind of file that is read here; {KINDS}"
        )
    if suffix in IMAGES:
        notes: list[str] = []
        return Labels(read_label(path, notes), notes=tuple(notes))
    if suffix == ".csv":
        return _read_points(path, names)
    return _read_parquet(path, names) if suffix == ".parquet" else _read_geojson(path, names)


def suffix_of(path: Path) -> str | None:
    """Suffix that decides how a file is read; ``None``: not a supported kind of file."""
    return next((s for s in SUFFIXES if path.name.lower().endswith(s)), None)


def files_in(folder: Path) -> dict[str, Path]:
    """Everything in a folder that can be compared, by its stem: files, and folders of runs.

    Raises
    ------
    FormatError
        There is nothing of the kind, or two files of one stem.
    """
    found: dict[str, Path] = {}
    for name in names_in(folder, FormatError):
        path = folder / name
        suffix = suffix_of(path)
        run = run_file(path)
        if (
            name.startswith(".")
            or name in NOT_CELLS
            or (run is None and (suffix is None or kind_of(path, FormatError) != "file"))
        ):
            continue
        require_text(path, FormatError)
        stem = normal(name if run or suffix is None else name[: -len(suffix)])
        if stem in found:
            raise FormatError(
                f"{folder}: {found[stem].name} and {path.name} are both named {stem!r}; one per image is needed, remove the other"
            )
        found[stem] = run or path
    if not found:
        raise FormatError(f"{folder}: nothing to compare in the folder; {KINDS}")
    return found


def run_file(folder: Path) -> Path | None:
    """Cells of a run folder; ``None`` if the folder is not one."""
    if kind_of(folder, FormatError) != "folder":
        return None
    return next((folder / name for name in RUN_FILES if kind_of(folder / name, FormatError) == "file"), None)


def read_label(path: Path, notes: list[str]) -> NDArray[np.integer]:
    """A label image, or an image of type ids: integers of shape (H, W).

    Parameters
    ----------
    path
        PNG, TIFF or NumPy's ``.npy``.
    notes
        Receives a warning where the decoder read the file with doubts.

    Raises
    ------
    FormatError
        It cannot be read, has colours, or its values are not integers.
    """
    if suffix_of(path) not in IMAGES:
        raise FormatError(f"{path}: not a label image; allowed are .png, .tif, .tiff and .npy")
    try:
        require_regular(path)
        with _DecoderLog() as decoder_log:
            pixels = _load(path)
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise FormatError(f"{path}: not a readable label image ({reason}); copy or export it again") from error
    if decoder_log.messages:
        notes.append(
            f"{path}: may be damaged, the decoder says: {' '.join(decoder_log.messages[0].split())[:200]}; compare it with the original"
        )
    if pixels.ndim > 2:
        pixels = np.squeeze(pixels)
    if pixels.ndim == 3:
        raise FormatError(
            f"{path}: a colour image or a stack, shape {pixels.shape}; one channel of integer ids is needed, export it so"
        )
    if pixels.ndim != 2 or pixels.dtype.kind not in "uib":
        raise FormatError(
            f"{path}: {pixels.dtype} of shape {pixels.shape}; integers of shape (height, width) are needed"
        )
    if pixels.size and int(pixels.min()) < 0:
        raise FormatError(
            f"{path}: the id {int(pixels.min())}; ids are 0 for the background and positive for instances"
        )
    return pixels.astype(np.uint8) if pixels.dtype == bool else pixels


def trace_labels(ids: NDArray[np.integer]) -> NDArray[np.object_]:
    """Outline the instances of a label image.

    Parameters
    ----------
    ids
        Integers of shape (H, W); 0 is background.

    Returns
    -------
    ndarray
        Polygons or MultiPolygons of shape (N,) in ascending order of the ids, px, corner frame: the borders of the instances' px, with holes.
    """
    values = np.union1d([0], ids)  # of any size: find_objects wants small ones
    polygons = []
    for value, box in zip(values[1:], ndimage.find_objects(np.searchsorted(values, ids)), strict=True):
        inside = np.pad(ids[box] == value, 1)
        rows, columns = np.nonzero(np.diff(inside.astype(np.int8), axis=1))
        begins, ends = columns[::2], columns[1::2]  # runs of px: row by row, each begins and ends
        runs = shapely.box(begins, rows[::2] - 1, ends, rows[::2])
        corner = (box[1].start, box[0].start)
        polygons.append(shapely.transform(shapely.union_all(runs), lambda xy, corner=corner: xy + corner))
    out = np.empty(len(polygons), object)
    out[:] = polygons
    return out


def type_names(names: Mapping[str, str], values: list[Any]) -> NDArray[np.object_] | None:
    """Types as a file has them -> names, empty for none; ``None`` when no cell has a type."""
    words = ["" if value is None else str(value).strip() for value in values]
    out = np.empty(len(words), object)
    out[:] = ["" if word == UNASSIGNED else names.get(word, word) for word in words]
    return out if any(out) else None


class _DecoderLog(logging.Handler):
    """Context that collects what the decoders log, so that one warning replaces it."""

    loggers = tuple(logging.getLogger(name) for name in ("tifffile", "imagecodecs"))

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def __enter__(self) -> Self:
        self.before = [(logger.level, logger.propagate) for logger in self.loggers]
        for logger in self.loggers:
            logger.addHandler(self)
            logger.setLevel(logging.WARNING)
            logger.propagate = False
        return self

    def __exit__(self, *reason: object) -> None:
        for logger, (level, propagate) in zip(self.loggers, self.before, strict=True):
            logger.removeHandler(self)
            logger.setLevel(level)
            logger.propagate = propagate


def _load(path: Path) -> NDArray[Any]:
    suffix = path.suffix.lower()
    if suffix == ".npy":
        with path.open("rb") as stream:
            return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))
    if suffix in (".tif", ".tiff"):
        import tifffile

        return np.asarray(tifffile.imread(path))
    content = path.read_bytes()
    if content.startswith(b"\x89PNG") and content[25:26] == b"\x03":  # a palette: the indices are the ids
        from PIL import Image

        with Image.open(path) as image:
            return np.asarray(image)
    import imagecodecs

    return np.asarray(imagecodecs.png_decode(content))  # knows 16 bits, and no limit of size


def _read_points(path: Path, names: Mapping[str, str]) -> Points:
    table = read_table(read_text(path, FormatError), str(path), FormatError, known=COLUMNS, numbers=("x", "y"))
    if not {"x", "y"} <= set(table.columns):
        found = ", ".join(filter(None, table.columns))
        found = show(found) if len(found) > 200 or not found.isprintable() else found or "none"
        raise FormatError(f"{path}: the columns are {found}; x and y are needed, and type if there are types")
    xy: list[tuple[float, float]] = []
    types: list[str] = []
    for line, row in table.rows:
        x, y = (table.number(row.get(axis, "")) for axis in ("x", "y"))
        if x is None or y is None or not (abs(x) <= FARTHEST_PX and abs(y) <= FARTHEST_PX):  # (NaN is not below it)
            found = f"{show(row.get('x', ''))} and {show(row.get('y', ''))}"
            raise FormatError(f"{path}: line {line}: x and y are {found}; finite numbers of px are needed")
        xy.append((x, y))
        types.append(row.get("type", ""))
    return Points(np.array(xy, np.float64).reshape(-1, 2), type_names(names, types))


def _read_parquet(path: Path, names: Mapping[str, str]) -> Outlines:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from wsiseg.formats.geoparquet import type_column

    try:
        schema = pq.read_schema(path)
        metadata = schema.metadata or {}
        column = json.loads(metadata.get(b"geo", b"{}")).get("primary_column", "geometry")
        named = type_column(schema)
        wanted = [name for name in (column, named) if name in schema.names]
        table = pq.read_table(path, columns=wanted, partitioning=None)
        if column not in wanted:
            geometries = None
        elif pa.types.is_binary(table[column].type) or pa.types.is_large_binary(table[column].type):
            geometries = np.asarray(shapely.from_wkb(table[column].to_numpy()), object)
        else:  # coordinates as nested lists
            import geopandas

            geometries = np.asarray(geopandas.read_parquet(path, columns=[column]).geometry.array, object)
        types = table[named].to_pylist() if named is not None else []
        note: dict[str, Any] = json.loads(metadata.get(b"wsiseg", b"{}"))
        mpp, origin = _scale_and_origin(note)
    except (*UNREADABLE, pa.ArrowException, shapely.errors.GEOSException) as error:
        reason = first_line(error)
        raise FormatError(
            f"{path}: not a readable GeoParquet ({reason}); run the command that made it again"
        ) from error
    if geometries is None:
        raise FormatError(f"{path}: no column {column!r}; a GeoParquet of polygons is needed")
    polygons, kept, notes = _cleaned(geometries, path)
    return Outlines(
        polygons=polygons,
        types=type_names(names, _picked(types, kept)),
        mpp=mpp,
        frame="slide",
        origin=origin,
        notes=notes,
    )


def _read_geojson(path: Path, names: Mapping[str, str]) -> Outlines:
    geometries: list[shapely.Geometry] = []
    types: list[str] = []
    kinds: list[object] = []
    count, opened, note = 0, 0, {}
    for place, text in read_texts(path, FormatError):
        document = parse_json(text, place, FormatError)
        if isinstance(document, dict) and isinstance(document.get("wsiseg"), dict):
            note = document["wsiseg"]
        for inside, feature in iter_features(document, place, FormatError):
            count += 1
            properties = feature.get("properties") or {}
            # of a QuPath cell that has both, the nucleus: what nucleus metrics are about
            nucleus = feature.get("nucleusGeometry")
            outline = feature.get("geometry") if nucleus is None else nucleus
            shapes, unclosed = read_polygons(outline, f"{place}: {inside}", FormatError)
            opened += unclosed > 0
            if shapes:
                geometries.append(shapes[0] if len(shapes) == 1 else shapely.MultiPolygon(shapes))
                types.append(class_name(properties.get("classification"), f"{place}: {inside}", FormatError))
                kinds.append(properties.get("objectType") or properties.get("object_type") or "")
    if count and not geometries:
        nothing = f"{path}: {counted(count, 'object')}, no polygon"
        raise FormatError(f"{nothing}; export the outlined cells from QuPath with File > Export objects as GeoJSON")
    notes: tuple[str, ...] = (
        (f"{path}: {opened} of {count} outlines were not closed; they were closed",) if opened else ()
    )
    if (
        "detection" in kinds or "cell" in kinds
    ) and "annotation" in kinds:  # then the annotations are regions around the cells
        cells = [k for k, kind in enumerate(kinds) if kind != "annotation"]
        notes += (
            f"{path}: {len(kinds) - len(cells)} annotations beside detections were taken for regions and left out",
        )
        geometries, types = [geometries[k] for k in cells], [types[k] for k in cells]
    found = np.empty(len(geometries), object)
    found[:] = geometries
    polygons, kept, more = _cleaned(found, path)
    try:
        mpp, origin = _scale_and_origin(note)
    except UNREADABLE as error:
        raise FormatError(
            f"{path}: 'wsiseg' in it has the wrong mpp or bounds ({show(note)}); take that member out"
        ) from error
    return Outlines(
        polygons=polygons,
        types=type_names(names, _picked(types, kept)),
        mpp=mpp,
        frame="qupath",
        origin=origin,
        notes=notes + more,
    )


def _cleaned(
    geometries: NDArray[np.object_], path: Path
) -> tuple[NDArray[np.object_], NDArray[np.bool_], tuple[str, ...]]:
    """Valid polygons, their indices among the geometries, and notes on repairs."""
    area_like = np.isin(
        shapely.get_type_id(geometries), (shapely.GeometryType.POLYGON, shapely.GeometryType.MULTIPOLYGON)
    )
    if len(geometries) and not area_like.any():
        raise FormatError(f"{path}: {len(geometries)} geometries, no polygon; outlines of cells are needed")
    xy, owner = shapely.get_coordinates(geometries, return_index=True)
    if not np.isfinite(xy).all():
        first = int(owner[~np.isfinite(xy).all(axis=1)][0])
        raise FormatError(
            f"{path}: outline {first} has a non-finite number among its coordinates; export the file again"
        )
    if len(xy) and np.abs(xy).max() > FARTHEST_PX:
        raise FormatError(
            f"{path}: the coordinate {np.abs(xy).max():g} is larger than any slide; px are needed; export the file again"
        )
    broken = np.flatnonzero(area_like & ~shapely.is_valid(geometries))
    out = geometries.copy()
    for row in broken:
        out[row] = repaired(geometries[row])
    kept = area_like & (shapely.area(out) > 0)
    notes = []
    if len(broken):
        notes.append(
            f"{path}: {len(broken)} of {len(out)} outlines touch, cross or overlap themselves and were repaired"
        )
    if not kept.all():
        notes.append(f"{path}: {int((~kept).sum())} of {len(out)} objects have no area and were left out")
    return out[kept], kept, tuple(notes)


def _picked(values: list[Any], kept: NDArray[np.bool_]) -> list[Any]:
    return [value for value, keep in zip(values, kept.tolist(), strict=False) if keep]


def _scale_and_origin(note: dict[str, Any]) -> tuple[float | None, tuple[float, float] | None]:
    """Microns per px and the origin of QuPath's frame from what wsiseg wrote into a file."""
    mpp, bounds = note.get("mpp"), note.get("bounds")
    if mpp is not None and not FORCED_MPP[0] <= mpp <= FORCED_MPP[1]:
        raise ValueError(f"mpp {mpp}")
    origin = None if bounds is None else (float(bounds[0]), float(bounds[1]))
    if origin is not None and not max(map(abs, origin)) <= FARTHEST_PX:
        raise ValueError(f"bounds {bounds}")
    return None if mpp is None else float(mpp), origin
