"""COCO instances: one image, one annotation per cell.

Specification: https://cocodataset.org/#format-data
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson
import shapely

from wsiseg.runtime.atomic import atomic_path

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from wsiseg.export.source import Chunk, ExportSettings, RunCells


def write_coco(path: Path, run: RunCells, settings: ExportSettings) -> None:  # noqa: ARG001
    """Write COCO instances; px of the part of the slide that the image is, whose corner is its ``offset``.

    An annotation's ``id`` is the number of the cell's row in cells.parquet, counted from 1, as in the label image.
    """
    left, top, right, bottom = run.box
    image = {"id": 1, "file_name": run.slide, "width": right - left, "height": bottom - top, "offset": [left, top]}
    kinds = [{"id": k + 1, "name": name, "supercategory": "cell"} for k, name in enumerate(run.names)]
    with atomic_path(path) as partial, partial.open("wb") as stream:
        stream.write(b'{"images":' + orjson.dumps([image]) + b',"categories":' + orjson.dumps(kinds))
        stream.write(b',"annotations":[')
        separator = b"\n"
        for chunk in run.chunks(["id", "cell_type", "score", "geometry"]):
            for annotation in _annotations(chunk, run):
                stream.write(separator + orjson.dumps(annotation, option=orjson.OPT_SERIALIZE_NUMPY))
                separator = b",\n"
        stream.write(b"]}\n")


def _annotations(chunk: Chunk, run: RunCells) -> Iterator[dict[str, object]]:
    polygons = shapely.transform(chunk.polygons(), lambda xy: xy - run.box[:2])
    boxes, areas = shapely.bounds(polygons), shapely.area(polygons)
    table = chunk.chosen
    facts = zip(
        chunk.rows.tolist(),
        polygons,
        boxes,
        areas,
        run.codes(chunk),
        table["id"].to_pylist(),
        table["score"].to_pylist(),
        strict=True,
    )
    for row, polygon, (x0, y0, x1, y1), area, code, cell_id, score in facts:
        yield {
            "id": row + 1,
            "image_id": 1,
            "category_id": int(code) + 1,
            "segmentation": [shapely.get_coordinates(polygon)[:-1].round(3).ravel()],
            "bbox": [round(float(v), 3) for v in (x0, y0, x1 - x0, y1 - y0)],
            "area": round(float(area), 3),
            "iscrowd": 0,
            "score": score,
            "cell_id": cell_id,
        }
