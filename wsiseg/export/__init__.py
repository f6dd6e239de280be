"""Files for other programs, made from a finished run.

``EXPORTS`` maps the name given to ``wsiseg export --format`` to what it makes. Nothing heavy is imported until a format is used.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

from wsiseg.errors import ConfigError
from wsiseg.runtime.text import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from wsiseg.export.source import ExportSettings, RunCells


@dataclass(frozen=True, kw_only=True)
class Export:
    """A format.

    Attributes
    ----------
    file
        Name of the file that is made; of SpatialData, of the folder.
    writer
        ``module:function`` of the function that makes it.
    what
        Description for the help.
    """

    file: str
    writer: str
    what: str


EXPORTS = {
    "labels": Export(
        file="labels.ome.tif", writer="wsiseg.export.images:write_labels", what="label image, the number of each cell"
    ),
    "types": Export(
        file="types.ome.tif", writer="wsiseg.export.images:write_types", what="label image, the type of each cell"
    ),
    "density": Export(
        file="density.ome.tif", writer="wsiseg.export.images:write_density", what="cells per mm2, a channel per type"
    ),
    "csv": Export(file="cells.csv", writer="wsiseg.export.tables:write_csv", what="a row per cell, without outlines"),
    "tsv": Export(file="cells.tsv", writer="wsiseg.export.tables:write_tsv", what="the same, separated by tabs"),
    "h5ad": Export(file="cells.h5ad", writer="wsiseg.export.tables:write_anndata", what="AnnData, for scanpy"),
    "spatialdata": Export(
        file="cells.zarr", writer="wsiseg.export.spatial:write_spatialdata", what="SpatialData, outlines and table"
    ),
    "coco": Export(file="coco.json", writer="wsiseg.export.coco:write_coco", what="COCO instances"),
    "review": Export(
        file="review.geojson", writer="wsiseg.export.review:write_review", what="the least certain cells, for QuPath"
    ),
    "gpkg": Export(file="cells.gpkg", writer="wsiseg.export.vector:write_geopackage", what="GeoPackage, for QGIS"),
    "shp": Export(file="cells.shp.zip", writer="wsiseg.export.vector:write_shapefile", what="zipped Shapefile"),
}


class Exporter(Protocol):
    """Makes one file of a run's cells."""

    def __call__(self, path: Path, run: RunCells, settings: ExportSettings) -> None:
        """Write the file, whole or not at all."""


def load_exporter(name: str) -> Exporter:
    """Import the writer of a format, a key of ``EXPORTS``."""
    module, function = EXPORTS[name].writer.split(":")
    return cast("Exporter", getattr(importlib.import_module(module), function))


def check_formats(names: Sequence[str] | None) -> tuple[str, ...]:
    """Names of formats, each once.

    Raises
    ------
    ConfigError
        There is none, or one that is not known.
    """
    known = f"allowed are {', '.join(EXPORTS)}, comma-separated"
    if not names:
        raise ConfigError(f"--format: no format given; {known}")
    for name in names:
        if name not in EXPORTS:
            raise ConfigError(f"--format: unknown format {name!r}; {did_you_mean(name, EXPORTS)}{known}")
    return tuple(dict.fromkeys(names))
