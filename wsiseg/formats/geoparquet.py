"""cells.parquet: every cell of a slide as GeoParquet 1.1, absolute level-0 px. Opens in geopandas, DuckDB, QGIS.

    one row per cell, row groups of 20,000 rows in the given order, zstd
      id           string                     UUID (ids.py), the same as in cells.geojson.gz
      cell_type    dictionary<int32, string>  "unassigned" when no seed claims the cell; never null (in tables of earlier versions: type)
      type_score, type_margin, score   float
      prototype    int32                      number of the most similar click of the type, through all clicks in the order of the seeds; or -1
      area_um2     float                      of the polygon
      perimeter_um, circularity, solidity, eccentricity, major_axis_um, minor_axis_um, orientation_deg   float   (measurements.py)
      nearest_um, density_per_mm2      float  nearest other centroid; centroids around
      "nearest_um: <type>"             float  nearest other centroid of a type, one column per type
      x, y         double                     centroid, px
      prompt_x, prompt_y   double             the point the cell was segmented from, px
      bbox         struct<xmin, ymin, xmax, ymax: double>   the covering of the spec: lets readers skip row groups
      geometry     binary                     WKB polygon, px
      descriptor   fixed_size_list<halffloat>[D]            absent when D = 0
    file metadata
      "geo"      GeoParquet 1.1.0; crs is null, since pixels are not geographic
      "wsiseg"   provenance, frame, mpp, bounds, and the names and colours of the types

Specification: https://geoparquet.org/releases/v1.1.0/
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from wsiseg.errors import FormatError
from wsiseg.formats import CHUNK
from wsiseg.formats.ids import ID_BYTES, CellIds, cell_ids
from wsiseg.formats.parts import UNREADABLE, descriptor_column, descriptors_from, polygons_from_wkb
from wsiseg.measurements import QUPATH_NAMES, is_of_type, measure_types
from wsiseg.records import Cells, CellSource, Provenance, SlideInfo, Typing
from wsiseg.runtime.atomic import atomic_path
from wsiseg.runtime.prefetch import prefetch_map
from wsiseg.runtime.text import first_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["cell_ids", "read_geoparquet", "write_geoparquet"]

ROW_GROUP = 20_000  #: rows; about 20 groups at 400,000 cells: a viewer's window touches one or two of them
FRAME = "absolute level-0 px of the slide: x right, y down, origin at the outer corner of pixel (0, 0)"
CORNERS = ("xmin", "ymin", "xmax", "ymax")
TYPE = "cell_type"  #: not "type", which on a GeoDataFrame is the type of the geometry
AREA = "area_um2"
OLD_TYPE = "type"  #: the same column in tables of earlier versions
TYPE_COLUMNS = (TYPE, "type_score", "type_margin", "prototype")
IN_MEMORY = (
    *TYPE_COLUMNS,
    "score",
    "prompt_x",
    "prompt_y",
    "bbox",
    "descriptor",
)  #: of a table that is typed again: 2 D + 68 B per cell


def write_geoparquet(path: Path, cells: CellSource, typing: Typing, info: SlideInfo, provenance: Provenance) -> None:
    """Write cells.parquet, atomically; same input, same bytes.

    Parameters
    ----------
    path
        The file to write.
    cells
        Level-0 px, already in the order of the file (sorted in space, so that row groups are compact, and cells of equal prompts neighbours);
        N = 0 is valid. Read once, in chunks.
    typing
        Types of the same cells.
    info
        Gives microns per pixel and the bounds.
    provenance
        Goes into the metadata; ``provenance.slide`` is the key of the ids.

    Raises
    ------
    RunError
        The file cannot be written.
    """
    schema = _schema(cells, typing, info, provenance)
    ids = CellIds(provenance.slide)

    def encode(part: tuple[int, Cells]) -> pa.Table:
        start, chunk = part
        return pa.table(_columns(chunk, typing, info, ids(chunk), slice(start, start + len(chunk))), schema=schema)

    with atomic_path(path) as partial, _writer(partial, schema) as writer:

        def write(table: pa.Table) -> None:
            writer.write_table(
                table.combine_chunks(), row_group_size=ROW_GROUP
            )  # whole, so that the pages do not depend on the chunks

        encoded_chunks = prefetch_map(encode, _numbered(cells))  # one thread each: ids and row groups come in order
        for _ in prefetch_map(write, _cut(encoded_chunks, ROW_GROUP)):
            pass


def _writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """Writer with statistics only for the columns by which readers skip row groups."""
    leaves = [name for name in schema.names if name not in ("id", "bbox", "geometry", "descriptor")] + [
        f"bbox.{corner}" for corner in CORNERS
    ]
    place = path.absolute()  # a colon in a relative one makes it an address
    return pq.ParquetWriter(place, schema, compression="zstd", use_dictionary=[TYPE], write_statistics=leaves)


def _numbered(cells: CellSource) -> Iterator[tuple[int, Cells]]:
    """The cells in chunks, with the row that each begins at."""
    start = 0
    for chunk in cells.chunks(CHUNK):
        yield start, chunk
        start += len(chunk)


def read_geoparquet(path: Path) -> tuple[Cells, Typing, dict[str, object]]:
    """Read a file of :func:`write_geoparquet`.

    Parameters
    ----------
    path
        A cells.parquet of wsiseg.

    Returns
    -------
    tuple of (Cells, Typing, dict)
        Exactly as written, and the ``wsiseg`` metadata: tool, version, slide, config_hash, details, frame, mpp, bounds, types.

    Raises
    ------
    FormatError
        The file is missing, damaged, or was not written by wsiseg.
    """
    source = read_table(path)
    return Cells.concatenate(list(source.chunks(ROW_GROUP)), source.descriptor_size), source.typing(), source.note


@dataclass(frozen=True, kw_only=True)
class CellTable:
    """A cells.parquet. Polygons stay in the file and are read from it in every pass, also after :func:`write_retyped` has replaced it.

    Attributes
    ----------
    path, schema, note
        The file; its schema, with the column of types called ``cell_type`` whatever it is in the file; its ``wsiseg`` metadata.
    table
        The columns ``IN_MEMORY``.
    """

    path: Path
    schema: pa.Schema
    note: dict[str, Any]
    table: pa.Table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def descriptor_size(self) -> int:
        """D."""
        return int(self.note["descriptor_size"])

    @property
    def measurement_names(self) -> tuple[str, ...]:
        """Names of the columns that are measurements; none in tables of earlier versions."""
        return tuple(name for name in self.schema.names if name in QUPATH_NAMES or is_of_type(name) if name != AREA)

    @property
    def total_bounds(self) -> tuple[float, float, float, float] | None:
        """xmin, ymin, xmax, ymax of all polygons, level-0 px; ``None`` without cells."""
        if not len(self):
            return None
        (left, top), (right, bottom) = self.bounds[:, :2].min(axis=0), self.bounds[:, 2:].max(axis=0)
        return float(left), float(top), float(right), float(bottom)

    @property
    def descriptors(self) -> NDArray[np.float16]:
        """(N, D)."""
        return descriptors_from(self.table, self.descriptor_size)

    @property
    def points_xy(self) -> NDArray[np.float64]:
        """Prompts (N, 2), level-0 px."""
        return np.stack([self.table["prompt_x"].to_numpy(), self.table["prompt_y"].to_numpy()], axis=1)

    @property
    def bounds(self) -> NDArray[np.float64]:
        """(N, 4): xmin, ymin, xmax, ymax, level-0 px."""
        box = self.table["bbox"].combine_chunks()
        return np.stack([box.field(corner).to_numpy() for corner in CORNERS], axis=1)

    def chunks(self, rows: int) -> Iterator[Cells]:
        """The cells in order, ``rows`` at a time."""
        start = 0
        for part in _cut(_row_groups(self.path, ["geometry", *self.measurement_names]), rows):
            yield self.with_polygons(self.table.slice(start, part.num_rows), part["geometry"], part)
            start += part.num_rows

    @property
    def centroids(self) -> NDArray[np.float64]:
        """Centroids (N, 2), level-0 px; read from the file."""
        with as_format_error(self.path):
            table = pq.read_table(self.path, columns=["x", "y"], partitioning=None)
            return np.stack([table["x"].to_numpy(), table["y"].to_numpy()], axis=1)

    def take(self, rows: NDArray[np.intp]) -> Cells:
        """The cells at ``rows``, in that order."""
        column = _geometry_at(self.path, rows)
        return self.with_polygons(self.table.take(rows), column)

    def check(self) -> None:
        """Read all that is not in memory, once.

        Raises
        ------
        FormatError
            Some of it is damaged.
        """
        start = 0
        for part in _row_groups(self.path, [name for name in self.schema.names if name not in IN_MEMORY]):
            self.with_polygons(self.table.slice(start, part.num_rows), part["geometry"])
            start += part.num_rows

    def with_polygons(self, table: pa.Table, geometry: pa.ChunkedArray, measured: pa.Table | None = None) -> Cells:
        """The rows that are in ``table``, with their polygons, and with the measurements that are columns of ``measured``."""
        with as_format_error(self.path):
            points = np.stack([table["prompt_x"].to_numpy(), table["prompt_y"].to_numpy()], axis=1)
            scores = table["score"].to_numpy().astype(np.float32)
            return Cells(
                polygons=polygons_from_wkb(geometry),
                points_xy=points,
                scores=scores,
                descriptors=descriptors_from(table, self.descriptor_size),
                measurements={name: measured[name].to_numpy().astype(np.float32) for name in self.measurement_names}
                if measured is not None
                else {},
            )

    def typing(self) -> Typing:
        """Types stored in the file."""
        with as_format_error(self.path):
            names = tuple(str(kind["name"]) for kind in self.note["types"])
            colors = tuple((int(r), int(g), int(b)) for r, g, b in (kind["color"] for kind in self.note["types"]))
            scores, margins = (self.table[name].to_numpy().astype(np.float32) for name in ("type_score", "type_margin"))
            return Typing(
                names=names,
                colors=colors,
                codes=type_codes(self.table[TYPE], names),
                scores=scores,
                margins=margins,
                prototypes=self.table["prototype"].to_numpy().astype(np.int32),
            )


def polygons_at(path: Path, rows: NDArray[np.intp]) -> NDArray[np.object_]:
    """Polygons at ``rows`` of a cells.parquet, in that order; only their row groups are read.

    Raises
    ------
    FormatError
        The file is damaged.
    """
    with as_format_error(path):
        return polygons_from_wkb(_geometry_at(path, rows))


def _geometry_at(path: Path, rows: NDArray[np.intp]) -> pa.ChunkedArray:
    wkb = np.empty(len(rows), object)
    with as_format_error(path), pq.ParquetFile(path) as file:
        starts = np.cumsum([0, *(file.metadata.row_group(k).num_rows for k in range(file.num_row_groups))])
        groups = np.searchsorted(starts, rows, side="right") - 1
        for group in np.unique(groups).tolist():
            mine = groups == group
            column = file.read_row_group(group, columns=["geometry"])["geometry"]
            wkb[mine] = column.take(rows[mine] - starts[group]).to_numpy()
    return pa.chunked_array([pa.array(wkb, pa.binary())])


def read_table(path: Path) -> CellTable:
    """A cells.parquet without its polygons.

    Raises
    ------
    FormatError
        The file is missing, damaged, or was not written by wsiseg.
    """
    with as_format_error(path):
        held, schema, note, columns = read_header(path)
        stored = [held.names[schema.get_field_index(name)] for name in columns]
        return CellTable(
            path=path,
            schema=schema,
            note=note,
            table=pq.read_table(path, columns=stored, partitioning=None).rename_columns(columns),
        )


def read_header(path: Path) -> tuple[pa.Schema, pa.Schema, dict[str, Any], list[str]]:
    """What a cells.parquet says of itself; to be called within :func:`as_format_error`.

    Returns
    -------
    tuple of (Schema, Schema, dict, list of str)
        The schema of the file, the same with the names of this version, its ``wsiseg`` metadata, and those of ``IN_MEMORY`` that it has.

    Raises
    ------
    KeyError
        Something that wsiseg writes is not in it.
    """
    held = pq.read_schema(path)
    schema = _with_new_name(held)
    note: dict[str, Any] = json.loads((schema.metadata or {})[b"wsiseg"])
    columns = [name for name in IN_MEMORY if name != "descriptor" or note.get("descriptor_size")]
    missing = [
        *(k for k in ("types", "descriptor_size", "slide") if k not in note),
        *(k for k in (*columns, "geometry") if k not in schema.names),
    ]
    if missing:
        raise KeyError(missing[0])
    return held, schema, note, columns


def type_column(schema: pa.Schema) -> str | None:
    """The column that names the type of each cell in a table of any version; ``None`` if there is none."""
    return next((name for name in (TYPE, OLD_TYPE) if name in schema.names), None)


def _with_new_name(schema: pa.Schema) -> pa.Schema:
    """The schema as this version writes it."""
    if type_column(schema) != OLD_TYPE:
        return schema
    index = schema.get_field_index(OLD_TYPE)
    return schema.set(index, schema.field(index).with_name(TYPE))


def _row_groups(path: Path, columns: list[str]) -> Iterator[pa.Table]:
    """Yield the row groups of some columns of a file; the next is read ahead."""
    with as_format_error(path), pq.ParquetFile(path) as file:
        yield from prefetch_map(lambda group: file.read_row_group(group, columns=columns), range(file.num_row_groups))


def _cut(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """Rechunk tables to ``rows`` rows each, fewer in the last."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        if sum(part.num_rows for part in held) >= rows:
            joined = pa.concat_tables(held)
            whole = joined.num_rows - joined.num_rows % rows
            yield from (joined.slice(start, rows) for start in range(0, whole, rows))
            held = [joined.slice(whole)] if whole < joined.num_rows else []
    if held:
        yield pa.concat_tables(held)


@contextmanager
def as_format_error(path: Path) -> Iterator[None]:
    """Turn errors in the file into one-line errors."""
    try:
        yield
    except KeyError as error:
        raise FormatError(
            f"{path}: no {error} in it, so not a cells.parquet of wsiseg; give the file that `wsiseg run` wrote"
        ) from error
    except (*UNREADABLE, shapely.errors.GEOSException) as error:
        reason = first_line(error)
        raise FormatError(
            f"{path}: not a readable cells.parquet ({reason}); run the command that made it again"
        ) from error


def write_retyped(path: Path, source: CellTable, typing: Typing, provenance: Provenance) -> None:
    """Write the same cells in the same order with other types, atomically.

    Parameters
    ----------
    path
        The file to write; may be the one that ``source`` was read from.
    source
        The cells; their other columns are copied as they are, one row group after the other.
    typing
        Types of the same cells.
    provenance
        Version, hash and details of the new types.
    """
    note = source.note | {
        "tool": provenance.tool,
        "version": provenance.version,
        "config_hash": provenance.config_hash,
        "details": provenance.details,
        "types": [
            {"name": name, "color": list(color)} for name, color in zip(typing.names, typing.colors, strict=True)
        ],
    }
    schema = source.schema
    distances: dict[str, NDArray[np.float32]] = {}
    if source.measurement_names:
        distances = measure_types(source.centroids * float(source.note["mpp"]), typing)
        fields = [field for field in schema if not is_of_type(field.name)]
        place = 1 + max(k for k, field in enumerate(fields) if field.name in QUPATH_NAMES)
        fields[place:place] = [pa.field(name, pa.float32(), nullable=False) for name in distances]
        schema = pa.schema(fields, metadata=schema.metadata)
    schema = schema.with_metadata(
        {**source.schema.metadata, b"wsiseg": json.dumps(note, sort_keys=True, default=str).encode()}
    )
    kept = [name for name in schema.names if name not in TYPE_COLUMNS and name not in distances]
    start = 0
    with atomic_path(path) as partial, _writer(partial, schema) as writer:
        for part in _cut(_row_groups(source.path, kept), ROW_GROUP):
            rows = slice(start, start + part.num_rows)
            fresh = _type_columns(typing, rows) | {name: pa.array(of[rows]) for name, of in distances.items()}
            columns = [fresh[name] if name in fresh else part[name] for name in schema.names]
            writer.write_table(pa.table(columns, schema=schema), row_group_size=ROW_GROUP)
            start += part.num_rows


def _schema(cells: CellSource, typing: Typing, info: SlideInfo, provenance: Provenance) -> pa.Schema:
    size = cells.descriptor_size
    fields: list[tuple[str, pa.DataType]] = [
        ("id", pa.string()),
        (TYPE, pa.dictionary(pa.int32(), pa.string())),
        ("type_score", pa.float32()),
        ("type_margin", pa.float32()),
        ("prototype", pa.int32()),
        ("score", pa.float32()),
        (AREA, pa.float32()),
        *((name, pa.float32()) for name in cells.measurement_names),
        ("x", pa.float64()),
        ("y", pa.float64()),
        ("prompt_x", pa.float64()),
        ("prompt_y", pa.float64()),
        ("bbox", pa.struct([pa.field(corner, pa.float64(), nullable=False) for corner in CORNERS])),
        ("geometry", pa.binary()),
    ]
    if size:
        fields.append(("descriptor", pa.list_(pa.field("element", pa.float16(), nullable=False), size)))
    note = {
        "tool": provenance.tool,
        "version": provenance.version,
        "slide": provenance.slide,
        "config_hash": provenance.config_hash,
        "details": provenance.details,
        "frame": FRAME,
        "mpp": info.mpp,
        "mpp_source": info.mpp_source,
        "bounds": None if info.bounds is None else list(info.bounds),
        "size_px0": list(info.size_px0),
        "cells": len(cells),
        "descriptor_size": size,
        "types": [
            {"name": name, "color": list(color)} for name, color in zip(typing.names, typing.colors, strict=True)
        ],
    }
    metadata = {"geo": json.dumps(_geo(cells), sort_keys=True), "wsiseg": json.dumps(note, sort_keys=True, default=str)}
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields], metadata=metadata)


def _geo(cells: CellSource) -> dict[str, object]:
    column: dict[str, object] = {
        "encoding": "WKB",
        "geometry_types": ["Polygon"],
        "crs": None,
        "edges": "planar",
        "covering": {"bbox": {corner: ["bbox", corner] for corner in CORNERS}},
    }
    if (bounds := cells.total_bounds) is not None:
        column["bbox"] = list(bounds)
    return {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}


def _columns(
    cells: Cells, typing: Typing, info: SlideInfo, ids: NDArray[np.bytes_], rows: slice
) -> Mapping[str, object]:
    """The columns of ``cells``, which are ``rows`` of the file."""
    polygons = cells.polygons
    bounds = shapely.bounds(polygons)
    centroids = shapely.get_coordinates(shapely.centroid(polygons))
    points = cells.points_xy
    corners = [np.ascontiguousarray(bounds[:, k]) for k in range(4)]
    box_fields = [pa.field(corner, pa.float64(), nullable=False) for corner in CORNERS]
    return {
        "id": _id_column(ids),
        **_type_columns(typing, rows),
        "score": np.asarray(cells.scores, np.float32),
        AREA: (shapely.area(polygons) * info.mpp**2).astype(np.float32),
        **cells.measurements,
        "x": np.ascontiguousarray(centroids[:, 0]),
        "y": np.ascontiguousarray(centroids[:, 1]),
        "prompt_x": np.ascontiguousarray(points[:, 0], np.float64),
        "prompt_y": np.ascontiguousarray(points[:, 1], np.float64),
        "bbox": pa.StructArray.from_arrays([pa.array(corner) for corner in corners], fields=box_fields),
        "geometry": pa.array(shapely.to_wkb(polygons, byte_order=1), pa.binary()),
        **descriptor_column(cells.descriptors),
    }


def _type_columns(typing: Typing, rows: slice) -> dict[str, pa.Array]:
    """``TYPE_COLUMNS``."""
    codes = pa.array(np.asarray(typing.codes[rows], np.int32))
    return {
        TYPE: pa.DictionaryArray.from_arrays(codes, pa.array(typing.names, pa.string())),
        "type_score": pa.array(typing.scores[rows], pa.float32()),
        "type_margin": pa.array(typing.margins[rows], pa.float32()),
        "prototype": pa.array(typing.prototypes[rows], pa.int32()),
    }


def _id_column(ids: NDArray[np.bytes_]) -> pa.StringArray:
    ends = np.arange(len(ids) + 1, dtype=np.int32) * ID_BYTES
    return pa.StringArray.from_buffers(len(ids), pa.py_buffer(ends), pa.py_buffer(ids))


def type_codes(column: pa.ChunkedArray, names: tuple[str, ...]) -> NDArray[np.int32]:
    """Index of each row's type among ``names``, from the column of types."""
    index = {name: code for code, name in enumerate(names)}
    codes = [np.empty(0, np.int32)]
    for chunk in column.chunks:
        encoded = chunk if isinstance(chunk, pa.DictionaryArray) else chunk.dictionary_encode()
        lookup = np.array([index[name] for name in encoded.dictionary.to_pylist()], np.int32)
        codes.append(lookup[encoded.indices.to_numpy(zero_copy_only=False)])
    return np.concatenate(codes)
