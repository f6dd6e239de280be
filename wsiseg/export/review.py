"""The least certain cells of a run as points for QuPath: give those that you look at a class, export them, and they are clicks."""

from __future__ import annotations

import json
import operator
import uuid
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
    found: list[tuple[float, str, str, shapely.Point]] = []  # margin, id, type, a point inside
    for chunk in run.chunks(["id", "type_margin", TYPE, "geometry"]):
        margins = chunk.chosen["type_margin"].to_numpy()
        lowest = np.argsort(margins, kind="stable")[:CELLS]
        ids = chunk.chosen["id"].take(lowest).to_pylist()
        kinds = [run.names[code] for code in run.codes(chunk)[lowest]]
        spots = shapely.point_on_surface(chunk.polygons()[lowest])
        found += zip(margins[lowest].tolist(), ids, kinds, spots, strict=True)
    features = [
        {
            "type": "Feature",
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"wsiseg:review:{cell_id}")),  # not that of the detection
            "geometry": {
                "type": "Point",
                "coordinates": [round(spot.x - run.corner[0], 2), round(spot.y - run.corner[1], 2)],
            },
            "properties": {"objectType": "annotation", "name": f"{kind}, margin {margin:.2f}"},
        }
        for margin, cell_id, kind, spot in sorted(found, key=operator.itemgetter(0))[:CELLS]
    ]
    text = ",\n".join(json.dumps(feature, ensure_ascii=False, separators=(",", ":")) for feature in features)
    with atomic_path(path) as partial:
        partial.write_text(f'{{"type":"FeatureCollection","features":[\n{text}\n]}}\n', encoding="utf-8")
