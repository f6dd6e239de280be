"""Which thresholds? APG's seeds, the score that a mask needs and the overlap that the merge allows, on the development sets only.

    python -m benchmarks.apg_sweep --data DATA

One value is moved at a time from the defaults. dsb2018_histology/dev is rescaled to 26 px per nucleus (its scale is unknown); of nuinsseg/dev
every third image is taken.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.common import automatic_points, cells_of, encode, instance_images, write_results
from wsiseg.config import RunConfig, from_mapping
from wsiseg.evaluation.metrics import score
from wsiseg.evaluation.rasterize import rasterise
from wsiseg.models import load_model

MOVES: list[dict[str, dict[str, float]]] = [
    {},
    *({"masks": {"min_score": v}} for v in (0.1, 0.15, 0.25, 0.3, 0.4, 0.5)),
    *({"stitching": {"max_overlap": v}} for v in (0.15, 0.2, 0.4, 0.5)),
    *({"apg": {"foreground": v}} for v in (0.3, 0.4, 0.6)),
    *({"apg": {"centre": v}} for v in (0.4, 0.6)),
    *({"apg": {"boundary": v}} for v in (0.4, 0.6, 0.7)),
    *({"masks": {"min_area_um2": v}} for v in (3, 8, 12)),
    *({"masks": {"convex_above": v}} for v in (0.6, 0.8, 1.0)),
]


COLLECTIONS = ("tnbc", "dsb2018", "nuinsseg")


def development_images(data: Path) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(collection, image, label), by collection in the order of ``COLLECTIONS``."""
    out = [("tnbc", image, label) for _, image, label in instance_images(data, "tnbc/dev")]
    groups = json.loads((data / "instances/dsb2018_histology/groups.json").read_text())
    for name, image, label in instance_images(data, "dsb2018_histology/dev"):
        scale = 26 / groups[f"dev/{name}"]["median_diameter_px"]
        size = round(image.shape[1] * scale), round(image.shape[0] * scale)
        small = np.asarray(Image.fromarray(label.astype(np.int32)).resize(size, Image.Resampling.NEAREST))
        out.append(
            (
                "dsb2018",
                np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR, reducing_gap=3)),
                small.astype(np.int64),
            )
        )
    out += [("nuinsseg", image, label) for _, image, label in instance_images(data, "nuinsseg/dev")[::3]]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    options = parser.parse_args()
    model = load_model("nuclei-compact", "cpu")
    images = [(name, image, label, encode(model, image)) for name, image, label in development_images(options.data)]
    rows = []
    for move in MOVES:
        config = from_mapping(move, "sweep", RunConfig())
        row: dict[str, object] = {
            "moved": ", ".join(f"{s}.{k} = {v}" for s, d in move.items() for k, v in d.items()) or "defaults"
        }
        for collection in COLLECTIONS:
            scores = [
                score(
                    label,
                    rasterise(
                        cells_of(model, e, automatic_points(e, config), label.shape, config).polygons, label.shape
                    ),
                )
                for name, _, label, e in images
                if name == collection
            ]
            row |= {f"{collection} {k}": float(np.mean([s[k] for s in scores])) for k in ("aji", "pq", "msa")}
        rows.append(row)
    write_results(
        "apg_sweep",
        rows,
        "`benchmarks/apg_sweep.py`: one value moved at a time; "
        + ", ".join(f"{name}: {sum(of == name for of, *_ in images)} images" for name in COLLECTIONS),
    )


if __name__ == "__main__":
    main()
