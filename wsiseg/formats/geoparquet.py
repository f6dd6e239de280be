"""cells.parquet: every cell of a slide as GeoParquet 1.1, absolute level-0 px. Opens in geopandas, DuckDB, QGIS.

    one row per cell, row groups of 20,000 rows in the given order, zstd
      id           string                     UUID (ids.py), the same as in cells.geojson.gz
      type         dictionary<int32, string>  "unassigned" when no seed claims the cell; never null
      type_score, type_margin, score   float
      prototype    int32                      number of the most similar click of the type, through all clicks in the order of the seeds; or -1
      area_um2     float                      of the polygon
      x, y         double                     centroid, px
      prompt_x, prompt_y   double             the point the cell was segmented from, px
      bbox         struct<xmin, ymin, xmax, ymax: double>   the covering of the spec: lets readers skip row groups
      geometry     binary                     WKB polygon, px
      descriptor   fixed_size_list<halffloat>[D]            absent when D = 0
    file metadata
      "geo"      GeoParquet 1.1.0; crs is null, since pixels are not geographic
      "wsiseg"   provenance, frame, mpp, bounds, and the names and colours of the types

Specification: https://geoparquet.org/releases/v1.1.0/
"""  # fmt: skip

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
from wsiseg.formats.atomic import atomic_path
from wsiseg.formats.ids import cell_ids
from wsiseg.formats.parts import UNREADABLE, descriptor_column, descriptors_from, polygons_from_wkb
from wsiseg.records import Cells, Provenance, SlideInfo, Typing

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["cell_ids", "read_geoparquet", "write_geoparquet"]

ROW_GROUP = 20_000  #: rows; about 20 groups at 400,000 cells: a viewer's window touches one or two of them
FRAME = "absolute level-0 px of the slide: x right, y down, origin at the outer corner of pixel (0, 0)"
CORNERS = ("xmin", "ymin", "xmax", "ymax")


def write_geoparquet(path: Path, cells: Cells, typing: Typing, info: SlideInfo, provenance: Provenance) -> None:
    """Write cells.parquet, atomically; same input, same bytes.

    Parameters
    ----------
    path
        The file to write.
    cells
        Level-0 px, already in the order of the file (sorted in space, so that row groups are compact); N = 0 is valid.
    typing
        Of the same cells.
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
    ids = cell_ids(provenance.slide, cells)
    with atomic_path(path) as partial, pq.ParquetWriter(partial, schema, compression="zstd", use_dictionary=["type"]) as writer:
        for start in range(0, len(cells), ROW_GROUP):
            rows = slice(start, start + ROW_GROUP)
            columns = _columns(cells, typing, info, ids, rows)
            writer.write_table(pa.table(columns, schema=schema), row_group_size=ROW_GROUP)


def read_geoparquet(path: Path) -> tuple[Cells, Typing, dict[str, object]]:
    """What :func:`write_geoparquet` wrote.

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
    return source.cells(), source.typing(), source.note


@dataclass(frozen=True)
class CellTable:
    """A cells.parquet as it lies in the file: polygons stay encoded until somebody asks for them."""

    path: Path
    table: pa.Table
    note: dict[str, Any]

    @property
    def descriptors(self) -> NDArray[np.float16]:
        """(N, D)."""
        return descriptors_from(self.table, int(self.note["descriptor_size"]))

    @property
    def points_xy(self) -> NDArray[np.float64]:
        """Prompts (N, 2), level-0 px."""
        return np.stack([self.table["prompt_x"].to_numpy(), self.table["prompt_y"].to_numpy()], axis=1)

    @property
    def bounds(self) -> NDArray[np.float64]:
        """(N, 4): xmin, ymin, xmax, ymax, level-0 px."""
        box = self.table["bbox"].combine_chunks()
        return np.stack([box.field(corner).to_numpy() for corner in CORNERS], axis=1)

    def cells(self, rows: NDArray[np.intp] | None = None) -> Cells:
        """All cells, or those of ``rows``."""
        table = self.table if rows is None else self.table.take(rows)
        with _complaints(self.path):
            points = np.stack([table["prompt_x"].to_numpy(), table["prompt_y"].to_numpy()], axis=1)
            scores = table["score"].to_numpy().astype(np.float32)
            return Cells(polygons_from_wkb(table["geometry"]), points, scores, descriptors_from(table, int(self.note["descriptor_size"])))

    def typing(self) -> Typing:
        """The verdicts in the file."""
        with _complaints(self.path):
            names = tuple(str(kind["name"]) for kind in self.note["types"])
            colors = tuple((int(r), int(g), int(b)) for r, g, b in (kind["color"] for kind in self.note["types"]))
            scores, margins = (self.table[name].to_numpy().astype(np.float32) for name in ("type_score", "type_margin"))
            return Typing(names, colors, _codes(self.table["type"], names), scores, margins, self.table["prototype"].to_numpy().astype(np.int32))


def read_table(path: Path) -> CellTable:
    """A cells.parquet without decoding its polygons.

    Raises
    ------
    FormatError
        The file is missing, damaged, or was not written by wsiseg.
    """
    with _complaints(path):
        table = pq.read_table(path, partitioning=None)
        note: dict[str, Any] = json.loads((table.schema.metadata or {})[b"wsiseg"])
        columns: tuple[str, ...] = ("type", "type_score", "type_margin", "prototype", "score", "prompt_x", "prompt_y", "bbox", "geometry")
        if note.get("descriptor_size"):
            columns += ("descriptor",)
        missing = [*(k for k in ("types", "descriptor_size", "slide") if k not in note), *(k for k in columns if k not in table.schema.names)]
        if missing:
            raise KeyError(missing[0])
    return CellTable(path, table, note)


@contextmanager
def _complaints(path: Path) -> Iterator[None]:
    """Errors in the file, in one line."""
    try:
        yield
    except KeyError as error:
        raise FormatError(f"{path}: no {error} in it, so not a cells.parquet of wsiseg; give the file that `wsiseg run` wrote") from error
    except (*UNREADABLE, shapely.errors.GEOSException) as error:
        reason = str(error).split("\n", 1)[0]
        raise FormatError(f"{path}: not a readable cells.parquet ({reason}); run the command that made it again") from error


def write_retyped(path: Path, source: CellTable, typing: Typing, provenance: Provenance) -> None:
    """The same cells in the same order with other types, atomically.

    Parameters
    ----------
    path
        The file to write; may be the one that ``source`` was read from.
    source
        The cells; their other columns are copied as they are.
    typing
        Of the same cells.
    provenance
        Version, hash and details of the new types.
    """
    codes = pa.DictionaryArray.from_arrays(pa.array(np.asarray(typing.codes, np.int32)), pa.array(typing.names, pa.string()))
    fresh = {
        "type": codes, "type_score": pa.array(typing.scores, pa.float32()), "type_margin": pa.array(typing.margins, pa.float32()),
        "prototype": pa.array(typing.prototypes, pa.int32()),
    }  # fmt: skip
    schema = source.table.schema
    note = source.note | {
        "tool": provenance.tool, "version": provenance.version, "config_hash": provenance.config_hash, "details": provenance.details,
        "types": [{"name": name, "color": list(color)} for name, color in zip(typing.names, typing.colors, strict=True)],
    }  # fmt: skip
    schema = schema.with_metadata({**schema.metadata, b"wsiseg": json.dumps(note, sort_keys=True, default=str).encode()})
    table = pa.table([fresh.get(name, source.table[name]) for name in schema.names], schema=schema)
    with atomic_path(path) as partial:
        pq.write_table(table, partial, compression="zstd", use_dictionary=["type"], row_group_size=ROW_GROUP)


def _schema(cells: Cells, typing: Typing, info: SlideInfo, provenance: Provenance) -> pa.Schema:
    size = cells.descriptors.shape[1]
    fields: list[tuple[str, pa.DataType]] = [
        ("id", pa.string()),
        ("type", pa.dictionary(pa.int32(), pa.string())),
        ("type_score", pa.float32()),
        ("type_margin", pa.float32()),
        ("prototype", pa.int32()),
        ("score", pa.float32()),
        ("area_um2", pa.float32()),
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
        "tool": provenance.tool, "version": provenance.version, "slide": provenance.slide, "config_hash": provenance.config_hash,
        "details": provenance.details, "frame": FRAME, "mpp": info.mpp, "mpp_source": info.mpp_source,
        "bounds": None if info.bounds is None else list(info.bounds), "size_px0": list(info.size_px0), "cells": len(cells),
        "descriptor_size": size,
        "types": [{"name": name, "color": list(color)} for name, color in zip(typing.names, typing.colors, strict=True)],
    }  # fmt: skip
    metadata = {"geo": json.dumps(_geo(cells), sort_keys=True), "wsiseg": json.dumps(note, sort_keys=True, default=str)}
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields], metadata=metadata)


def _geo(cells: Cells) -> dict[str, object]:
    column: dict[str, object] = {
        "encoding": "WKB", "geometry_types": ["Polygon"], "crs": None, "edges": "planar",
        "covering": {"bbox": {corner: ["bbox", corner] for corner in CORNERS}},
    }  # fmt: skip
    if len(cells):
        column["bbox"] = [float(value) for value in shapely.total_bounds(cells.polygons)]
    return {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}


def _columns(cells: Cells, typing: Typing, info: SlideInfo, ids: list[str], rows: slice) -> Mapping[str, object]:
    polygons = cells.polygons[rows]
    bounds = shapely.bounds(polygons)
    centroids = shapely.get_coordinates(shapely.centroid(polygons))
    points = cells.points_xy[rows]
    corners = [np.ascontiguousarray(bounds[:, k]) for k in range(4)]
    box_fields = [pa.field(corner, pa.float64(), nullable=False) for corner in CORNERS]
    codes = pa.array(np.asarray(typing.codes[rows], np.int32))
    return {
        "id": pa.array(ids[rows], pa.string()),
        "type": pa.DictionaryArray.from_arrays(codes, pa.array(typing.names, pa.string())),
        "type_score": np.asarray(typing.scores[rows], np.float32),
        "type_margin": np.asarray(typing.margins[rows], np.float32),
        "prototype": np.asarray(typing.prototypes[rows], np.int32),
        "score": np.asarray(cells.scores[rows], np.float32),
        "area_um2": (shapely.area(polygons) * info.mpp**2).astype(np.float32),
        "x": np.ascontiguousarray(centroids[:, 0]),
        "y": np.ascontiguousarray(centroids[:, 1]),
        "prompt_x": np.ascontiguousarray(points[:, 0], np.float64),
        "prompt_y": np.ascontiguousarray(points[:, 1], np.float64),
        "bbox": pa.StructArray.from_arrays([pa.array(corner) for corner in corners], fields=box_fields),
        "geometry": pa.array(shapely.to_wkb(polygons), pa.binary()),
        **descriptor_column(cells.descriptors[rows]),
    }


def _codes(column: pa.ChunkedArray, names: tuple[str, ...]) -> np.ndarray[Any, np.dtype[np.int32]]:
    index = {name: code for code, name in enumerate(names)}
    codes = [np.empty(0, np.int32)]
    for chunk in column.chunks:
        encoded = chunk if isinstance(chunk, pa.DictionaryArray) else chunk.dictionary_encode()
        lookup = np.array([index[name] for name in encoded.dictionary.to_pylist()], np.int32)
        codes.append(lookup[encoded.indices.to_numpy(zero_copy_only=False)])
    return np.concatenate(codes)
