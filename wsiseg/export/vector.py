"""GeoPackage and Shapefile, through GDAL: outlines with the columns of cells.parquet, level-0 px, without a coordinate reference system."""

from __future__ import annotations

import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import geopandas

from wsiseg.export.tables import with_microns
from wsiseg.runtime.atomic import atomic_path

if TYPE_CHECKING:
    from collections.abc import Mapping

    from wsiseg.export.source import Chunk, ExportSettings, RunCells

LAYER = "cells"
_SHAPE = {"geometry_type": "Polygon"}  # also of a layer without features
NAME_LENGTH = 10  #: characters of a column's name in a Shapefile


def write_geopackage(path: Path, run: RunCells, settings: ExportSettings) -> None:  # noqa: ARG001
    """Write a GeoPackage with the layer ``cells``."""
    with atomic_path(path) as partial, tempfile.TemporaryDirectory(dir=partial.parent) as folder:
        made = Path(folder) / path.name
        _write_layer(made, run, "GPKG", {})
        made.rename(partial)


def write_shapefile(path: Path, run: RunCells, settings: ExportSettings) -> None:  # noqa: ARG001
    """Write a zipped Shapefile; longer names of columns are cut to ten characters, all different."""
    names = short_names([*run.listed, "x_um", "y_um"])
    with atomic_path(path) as partial, tempfile.TemporaryDirectory(dir=partial.parent) as folder:
        _write_layer(Path(folder) / f"{LAYER}.shp", run, "ESRI Shapefile", names)
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
            for part in sorted(Path(folder).iterdir()):
                archive.write(part, part.name)


def short_names(columns: list[str]) -> dict[str, str]:
    """A name of at most ten characters for each column; those that would be equal end in a number.

    Examples
    --------
    >>> short_names(["id", "measurement_a", "measurement_b"])
    {'id': 'id', 'measurement_a': 'measuremen', 'measurement_b': 'measurem_1'}
    """
    short: dict[str, str] = {}
    for name in columns:
        candidate, number = name[:NAME_LENGTH], 0
        while candidate in short.values():
            number += 1
            end = f"_{number}"
            candidate = name[: NAME_LENGTH - len(end)] + end
        short[name] = candidate
    return short


def _write_layer(path: Path, run: RunCells, driver: str, names: Mapping[str, str]) -> None:
    """Write the cells row group by row group; a run without any makes a layer without features."""
    columns = [*run.listed, "geometry"]
    chunks = run.chunks(columns) if run.has_cells else iter([run.no_cells(columns)])
    for number, chunk in enumerate(chunks):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="'crs' was not provided")  # px have none
            frame = _frame(run, chunk).rename(columns=dict(names))
            frame.to_file(path, driver=driver, layer=LAYER, mode="a" if number else "w", engine="pyogrio", **_SHAPE)


def _frame(run: RunCells, chunk: Chunk) -> geopandas.GeoDataFrame:
    table = with_microns(chunk.chosen.drop_columns(["geometry"]), run.mpp)
    return geopandas.GeoDataFrame(table.to_pandas(), geometry=chunk.polygons())
