"""The least certain cells of a run as points for QuPath: give those that you look at a class, export them, and they are clicks."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import shapely

from wsiseg.errors import ConfigError
from wsiseg.formats.geoparquet import TYPE
from wsiseg.runtime.atomic import atomic_path

if TYPE_CHECKING:
    from pathlib import Path

    from wsiseg.export.source import ExportSettings, RunCells

CELLS = 50  #: what a person looks through in some minutes


def write_review(path: Path, run: RunCells, settings: ExportSettings) -> None:  # noqa: ARG001
    """Write the cells of lowest margin as point annotations without a class, the least certain first; each is named by its type and margin.

    Coordinates are relative to the slide's bounds, as QuPath counts.
    """
    if len(run.names) < 2:
        raise ConfigError(
            f"{run.file}: its cells have no types; --format review needs a run with types: wsiseg type RUN --seeds FILE"
        )
    margins, spots, kinds, ids = np.empty(0), np.empty((0, 2)), np.empty(0, int), np.empty(0, object)
    for chunk in run.chunks(["id", "type_margin", TYPE, "geometry"]):
        here = chunk.chosen["type_margin"].to_numpy()
        lowest = np.argsort(here, kind="stable")[:CELLS]
        inside = shapely.get_coordinates(shapely.point_on_surface(chunk.polygons()[lowest]))
        margins, spots = np.append(margins, here[lowest]), np.concatenate([spots, inside])
        kinds = np.append(kinds, run.codes(chunk)[lowest])
        ids = np.append(ids, np.array(chunk.chosen["id"].to_pylist(), object)[lowest])
        kept = np.argsort(margins, kind="stable")[:CELLS]
        margins, spots, kinds, ids = margins[kept], spots[kept], kinds[kept], ids[kept]
    features = [
        {
            "type": "Feature",
            "id": str(cell_id),
            "geometry": {"type": "Point", "coordinates": [round(float(v), 2) for v in spot - run.corner]},
            "properties": {"objectType": "annotation", "name": f"{run.names[kind]}, margin {margin:.2f}"},
        }
        for cell_id, spot, kind, margin in zip(ids.tolist(), spots, kinds.tolist(), margins.tolist(), strict=True)
    ]
    text = ",\n".join(json.dumps(feature, ensure_ascii=False, separators=(",", ":")) for feature in features)
    with atomic_path(path) as partial:
        partial.write_text(f'{{"type":"FeatureCollection","features":[\n{text}\n]}}\n', encoding="utf-8")
