"""What can be compared: label images, outlines and points, read from the files that people have.

    .png .tif .tiff .npy               label image: integer ids, 0 = background
    .geojson .json .gz .zip            outlines: QuPath objects, their classification is the type
    .parquet                           outlines: cells.parquet of wsiseg, or any GeoParquet; a column `type` is the type
    .csv                               points: columns x, y and, if there are types, type
    a folder of a run                  its cells.parquet, else its cells.geojson.gz

Frame: px, x right, y down, origin at the outer corner of the first pixel. QuPath has its origin at the slide's OpenSlide bounds; `Outlines.frame`
keeps the two apart.
"""  # fmt: skip

from __future__ import annotations

import csv
import json
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely

from wsiseg.errors import FormatError, counted
from wsiseg.evaluation.contingency import polygonal
from wsiseg.formats.documents import iter_features, parse_json, read_texts
from wsiseg.records import UNASSIGNED

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
UNREADABLE = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError, SyntaxError, EOFError, zlib.error)


@dataclass(frozen=True)
class Labels:
    """A label image. ``ids``: integers of shape (H, W); ``types``: names by ascending id, empty for none, or ``None``."""

    ids: NDArray[np.integer]
    types: NDArray[np.object_] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
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
        Sentences about what was passed over or repaired.
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
    if suffix is None or not path.is_file():
        raise FormatError(f"{path}: {path.suffix or 'a name without suffix'} is no kind of file that can be compared; {KINDS}")
    if suffix in IMAGES:
        return Labels(read_label(path))
    if suffix == ".csv":
        return _read_points(path, names)
    return _read_parquet(path, names) if suffix == ".parquet" else _read_geojson(path, names)


def suffix_of(path: Path) -> str | None:
    """The suffix that decides how a file is read; ``None``: it is of no kind that can be compared."""
    return next((s for s in SUFFIXES if path.name.lower().endswith(s)), None)


def files_in(folder: Path) -> dict[str, Path]:
    """Everything in a folder that can be compared, by its stem: files, and folders of runs.

    Raises
    ------
    FormatError
        There is nothing of the kind, or two files of one stem.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        suffix = suffix_of(path)
        run = run_file(path)
        if path.name.startswith(".") or path.name in NOT_CELLS or (run is None and (suffix is None or not path.is_file())):
            continue
        stem = path.name if run or suffix is None else path.name[: -len(suffix)]
        if stem in found:
            raise FormatError(f"{folder}: {found[stem].name} and {path.name} are both named {stem!r}; one per image is needed, remove the other")
        found[stem] = run or path
    if not found:
        raise FormatError(f"{folder}: nothing to compare in the folder; {KINDS}")
    return found


def run_file(folder: Path) -> Path | None:
    """The cells of a folder that `wsiseg run` wrote; ``None`` if it is no such folder."""
    return next((folder / name for name in RUN_FILES if (folder / name).is_file()), None) if folder.is_dir() else None


def read_label(path: Path) -> NDArray[np.integer]:
    """A label image, or an image of type ids: integers of shape (H, W).

    Raises
    ------
    FormatError
        It cannot be read, has colours, or its values are no integers.
    """
    if suffix_of(path) not in IMAGES:
        raise FormatError(f"{path}: not a label image; allowed are .png, .tif, .tiff and .npy")
    try:
        pixels = _load(path)
    except UNREADABLE as error:
        reason = (str(error) or type(error).__name__).split("\n", 1)[0]
        raise FormatError(f"{path}: not a readable label image ({reason}); copy or export it again") from error
    if pixels.ndim > 2:
        pixels = np.squeeze(pixels)
    if pixels.ndim == 3:
        raise FormatError(f"{path}: a colour image or a stack, shape {pixels.shape}; one channel of integer ids is needed, export it so")
    if pixels.ndim != 2 or pixels.dtype.kind not in "uib":
        raise FormatError(f"{path}: {pixels.dtype} of shape {pixels.shape}; integers of shape (height, width) are needed")
    if pixels.size and int(pixels.min()) < 0:
        raise FormatError(f"{path}: the id {int(pixels.min())}; ids are 0 for the background and positive for instances")
    return pixels.astype(np.uint8) if pixels.dtype == bool else pixels


def type_names(names: Mapping[str, str], values: list[Any]) -> NDArray[np.object_] | None:
    """Types as a file has them -> names, empty for none; ``None`` when no cell has a type."""
    words = ["" if value is None else str(value).strip() for value in values]
    out = np.empty(len(words), object)
    out[:] = ["" if word == UNASSIGNED else names.get(word, word) for word in words]
    return out if any(out) else None


def _load(path: Path) -> NDArray[Any]:
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return np.asarray(np.load(path, allow_pickle=False))
    if suffix in (".tif", ".tiff"):
        import tifffile

        return np.asarray(tifffile.imread(path))
    content = path.read_bytes()
    if content[25:26] == b"\x03":  # a palette: the indices are the ids
        from PIL import Image

        with Image.open(path) as image:
            return np.asarray(image)
    import imagecodecs

    return np.asarray(imagecodecs.png_decode(content))  # knows 16 bits, and no limit of size


def _read_points(path: Path, names: Mapping[str, str]) -> Points:
    xy: list[tuple[float, float]] = []
    types: list[str] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            rows = csv.DictReader(stream)
            columns = rows.fieldnames or []
            if not {"x", "y"} <= set(columns):
                raise FormatError(f"{path}: the columns are {', '.join(columns) or 'none'}; x and y are needed, and type if there are types")
            for row in rows:
                try:
                    x, y = float(row["x"]), float(row["y"])
                except (TypeError, ValueError):
                    x = y = np.nan
                if not np.isfinite([x, y]).all():
                    raise FormatError(f"{path}: line {rows.line_num}: x and y are {row['x']!r} and {row['y']!r}; finite numbers are needed")
                xy.append((x, y))
                types.append(row.get("type") or "")
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise FormatError(f"{path}: not a readable table ({error}); save it as comma-separated UTF-8") from error
    return Points(np.array(xy, np.float64).reshape(-1, 2), type_names(names, types))


def _read_parquet(path: Path, names: Mapping[str, str]) -> Outlines:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
        metadata = schema.metadata or {}
        column = json.loads(metadata.get(b"geo", b"{}")).get("primary_column", "geometry")
        wanted = [name for name in (column, "type") if name in schema.names]
        table = pq.read_table(path, columns=wanted, partitioning=None)
        if column not in wanted:
            geometries = None
        elif pa.types.is_binary(table[column].type) or pa.types.is_large_binary(table[column].type):
            geometries = np.asarray(shapely.from_wkb(table[column].to_numpy()), object)
        else:  # coordinates as nested lists
            import geopandas

            geometries = np.asarray(geopandas.read_parquet(path, columns=[column]).geometry.array, object)
        types = table["type"].to_pylist() if "type" in table.column_names else []
        note: dict[str, Any] = json.loads(metadata.get(b"wsiseg", b"{}"))
        mpp, origin = _scale_and_origin(note)
    except (*UNREADABLE, pa.ArrowException, shapely.errors.GEOSException) as error:
        reason = str(error).split("\n", 1)[0]
        raise FormatError(f"{path}: not a readable GeoParquet ({reason}); run the command that made it again") from error
    if geometries is None:
        raise FormatError(f"{path}: no column {column!r}; a GeoParquet of polygons is needed")
    polygons, kept, notes = _cleaned(geometries, path)
    return Outlines(polygons, type_names(names, _picked(types, kept)), mpp, "slide", origin, notes)


def _read_geojson(path: Path, names: Mapping[str, str]) -> Outlines:
    geometries: list[shapely.Geometry] = []
    types: list[str] = []
    kinds: list[str] = []
    count, note = 0, {}
    for place, text in read_texts(path, FormatError):
        document = parse_json(text, place, FormatError)
        if isinstance(document, dict) and isinstance(document.get("wsiseg"), dict):
            note = document["wsiseg"]
        for inside, feature in iter_features(document, place, FormatError):
            count += 1
            properties = feature.get("properties")
            properties = properties if isinstance(properties, dict) else {}
            # of a QuPath cell that has both, the nucleus: what nucleus metrics are about
            shape = _shape(feature.get("nucleusGeometry") or feature.get("geometry"), f"{place}: {inside}")
            if shape is not None:
                geometries.append(shape)
                types.append(_class_name(properties.get("classification")))
                kinds.append(str(properties.get("objectType") or properties.get("object_type") or ""))
    if count and not geometries:
        nothing = f"{path}: {counted(count, 'object')}, no polygon"
        raise FormatError(f"{nothing}; export the outlined cells from QuPath with File > Export objects as GeoJSON")
    notes: tuple[str, ...] = ()
    if {"detection", "cell"} & set(kinds) and "annotation" in kinds:  # then the annotations are regions around the cells
        cells = [k for k, kind in enumerate(kinds) if kind != "annotation"]
        notes = (f"{path}: {len(kinds) - len(cells)} annotations beside detections were taken for regions and left out",)
        geometries, types = [geometries[k] for k in cells], [types[k] for k in cells]
    found = np.empty(len(geometries), object)
    found[:] = geometries
    polygons, kept, more = _cleaned(found, path)
    mpp, origin = _scale_and_origin(note)
    return Outlines(polygons, type_names(names, _picked(types, kept)), mpp, "qupath", origin, notes + more)


def _shape(geometry: Any, place: str) -> shapely.Geometry | None:  # noqa: ANN401
    """Polygon or MultiPolygon of a GeoJSON geometry, holes kept; ``None`` for anything else."""
    if not isinstance(geometry, dict):
        return None
    kind, parts = geometry.get("type"), geometry.get("coordinates")
    if kind == "GeometryCollection":  # QuPath 0.4 and 0.5 write them
        members = [shape for shape in (_shape(member, place) for member in geometry.get("geometries") or []) if shape is not None]
        return shapely.union_all(members) if members else None
    if kind not in ("Polygon", "MultiPolygon"):
        return None
    try:
        rings = [[np.array(ring, np.float64)[:, :2] for ring in part or []] for part in ([parts] if kind == "Polygon" else parts or [])]
        if not all(np.isfinite(ring).all() for part in rings for ring in part):
            raise FormatError(f"{place}.geometry: null, text or a non-finite number among the coordinates; export the file again")
        polygons = [shapely.Polygon(part[0], part[1:]) for part in rings if part]
    except (TypeError, IndexError, ValueError, shapely.errors.GEOSException) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{place}.geometry: coordinates are no rings of [x, y] positions; export the file again") from error
    return polygons[0] if len(polygons) == 1 else shapely.MultiPolygon(polygons)


def _cleaned(geometries: NDArray[np.object_], path: Path) -> tuple[NDArray[np.object_], NDArray[np.bool_], tuple[str, ...]]:
    """Valid polygons, which of the geometries they are, and what was done."""
    area_like = np.isin(shapely.get_type_id(geometries), (shapely.GeometryType.POLYGON, shapely.GeometryType.MULTIPOLYGON))
    if len(geometries) and not area_like.any():
        raise FormatError(f"{path}: {len(geometries)} geometries, no polygon; outlines of cells are needed")
    xy, owner = shapely.get_coordinates(geometries, return_index=True)
    if not np.isfinite(xy).all():
        first = int(owner[~np.isfinite(xy).all(axis=1)][0])
        raise FormatError(f"{path}: outline {first} has a non-finite number among its coordinates; export the file again")
    broken = np.flatnonzero(area_like & ~shapely.is_valid(geometries))
    out = geometries.copy()
    for row in broken:
        out[row] = polygonal(shapely.make_valid(geometries[row]))
    kept = area_like & (shapely.area(out) > 0)
    notes = []
    if len(broken):
        notes.append(f"{path}: {len(broken)} of {len(out)} outlines cross themselves and were repaired")
    if not kept.all():
        notes.append(f"{path}: {int((~kept).sum())} of {len(out)} objects have no area and were left out")
    return out[kept], kept, tuple(notes)


def _picked(values: list[Any], kept: NDArray[np.bool_]) -> list[Any]:
    return [value for value, keep in zip(values, kept.tolist(), strict=False) if keep]


def _class_name(value: object) -> str:
    """Name of a QuPath classification in any of its forms; empty: unclassified."""
    if isinstance(value, dict):
        names = value.get("names")
        return ": ".join(map(str, names)) if isinstance(names, list) else str(value.get("name") or "")
    return value if isinstance(value, str) else ""


def _scale_and_origin(note: dict[str, Any]) -> tuple[float | None, tuple[float, float] | None]:
    """Microns per px and the origin of QuPath's frame from what wsiseg wrote into a file."""
    mpp, bounds = note.get("mpp"), note.get("bounds")
    return None if mpp is None else float(mpp), None if bounds is None else (float(bounds[0]), float(bounds[1]))
