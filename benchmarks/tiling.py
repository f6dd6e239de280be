"""Does the tiling show? One region of a real slide as one tile, in small tiles, with other halos and with the grid moved.

python -m benchmarks.tiling --slide CMU-1-Small-Region.svs
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import shapely

from benchmarks.common import write_results
from wsiseg.config import RunConfig, TilingConfig
from wsiseg.geometry import Box
from wsiseg.models import load_model
from wsiseg.runs.image import segment_image
from wsiseg.slide import open_slide


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slide", type=Path, required=True)
    options = parser.parse_args()
    with open_slide(options.slide) as reader:
        image, mpp = reader.read(0, Box(700, 700, 1500, 1500)), reader.info.mpp
    model = load_model("nuclei-compact")

    def cells(tiling: TilingConfig) -> np.ndarray:
        return segment_image(image, mpp=mpp, config=dataclasses.replace(RunConfig(), tiling=tiling), model=model)[
            0
        ].polygons

    whole = cells(TilingConfig(tile_um=512))
    rows: list[dict[str, object]] = []
    for tile, halo, origin in [
        (256, 40, 0),
        (256, 40, 37),
        (256, 40, 100),
        (64, 17, 0),
        (64, 24, 0),
        (64, 32, 0),
        (64, 40, 0),
        (64, 64, 0),
    ]:
        found = cells(TilingConfig(tile, halo, 4, origin))
        i, j = shapely.STRtree(found).query(whole, predicate="intersects")
        iou = shapely.area(shapely.intersection(whole[i], found[j])) / shapely.area(shapely.union(whole[i], found[j]))
        row: dict[str, object] = {"tile um": tile, "halo um": halo, "grid moved um": origin, "cells": len(found)}
        for limit in (0.9, 0.99):
            same = len(np.unique(i[iou > limit])) + len(np.unique(j[iou > limit]))
            row[f"identical (IoU > {limit})"] = same / (len(whole) + len(found))
        rows.append(row)
    write_results(
        "tiling",
        rows,
        f"`benchmarks/tiling.py`: {len(whole)} cells of a 400 x 400 um region as one tile, against the same in tiles.",
    )


if __name__ == "__main__":
    main()
