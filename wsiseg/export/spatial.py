"""SpatialData: the outlines as shapes, and the AnnData table that annotates them, in one Zarr folder.

Specification: https://spatialdata.scverse.org, Marconato et al., Nature Methods 22, 58 (2025).
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import geopandas
import numpy as np
import pandas as pd

from wsiseg.export.tables import as_anndata, import_extra, storable_text
from wsiseg.runtime.atomic import atomic_folder

if TYPE_CHECKING:
    from pathlib import Path

    from wsiseg.export.source import ExportSettings, RunCells

SHAPES, TABLE = "cells", "table"
SLIDE, MICRONS = "global", "microns"  #: coordinate systems: level-0 px, as an image of the slide has them, and um
_KEY, _REGION = "cell_id", "region"


def write_spatialdata(path: Path, run: RunCells, settings: ExportSettings) -> None:  # noqa: ARG001
    """Write a SpatialData folder: shapes ``cells``, annotated by ``table``, in coordinate systems of px (``global``) and ``microns``."""
    with warnings.catch_warnings(action="ignore"):  # of spatialdata's own imports
        spatialdata = import_extra("spatialdata", "spatialdata", "spatialdata")
        models, transformations = spatialdata.models, spatialdata.transformations
    with storable_text(), atomic_folder(path) as partial:
        table = as_anndata(run, "spatialdata")
        table.obs[_KEY] = table.obs.index.to_numpy(object)
        table.obs[_REGION] = pd.Categorical([SHAPES] * table.n_obs)
        polygons = np.concatenate([chunk.polygons() for chunk in run.chunks(["geometry"])])
        places = {
            SLIDE: transformations.Identity(),
            MICRONS: transformations.Scale([run.mpp, run.mpp], axes=("x", "y")),
        }
        shapes: Any = geopandas.GeoDataFrame(geometry=polygons, index=table.obs.index)
        made = spatialdata.SpatialData(
            shapes={SHAPES: models.ShapesModel.parse(shapes, transformations=places)},
            tables={TABLE: models.TableModel.parse(table, region=SHAPES, region_key=_REGION, instance_key=_KEY)},
        )
        made.write(partial)
