"""Accuracy on labelled images that were not trained on: without points (APG) and with one point per nucleus.

    python -m benchmarks.accuracy --data DATA [--sets monuseg/dev_nc tnbc/dev] [--model nuclei-compact]

The mean over images of AJI, PQ, mSA and Dice with a 95 % bootstrap interval of AJI. Images are taken at 0.25 um/px as they are. A nucleus's
point is the place inside it that is nearest to its centroid; every such click keeps its mask, and only what two masks share is cut from the one
that scores less (nothing is dropped for overlapping, as it is without points, where two prompts may lie in one nucleus).
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

import numpy as np

from benchmarks.common import automatic_points, cells_of, encode, instance_images, write_results
from wsiseg.config import RunConfig
from wsiseg.evaluation.metrics import score
from wsiseg.evaluation.rasterize import rasterise
from wsiseg.models import load_model


def centre_points(label: np.ndarray) -> np.ndarray:
    out = []
    for i in np.unique(label[label > 0]):
        y, x = np.nonzero(label == i)
        k = np.hypot(y - y.mean(), x - x.mean()).argmin()
        out.append((x[k] + 0.5, y[k] + 0.5))
    return np.array(out, np.float32).reshape(-1, 2)


def every_click_a_cell(config: RunConfig) -> RunConfig:
    """No mask is dropped, for its score, its size, or what it shares with others."""
    masks = dataclasses.replace(config.masks, min_score=0.0, min_area_um2=1e-6)
    stitching = dataclasses.replace(config.stitching, max_overlap=np.inf, nested=np.inf, cluster_size=10**9)
    return dataclasses.replace(config, masks=masks, stitching=stitching)


def interval(values: np.ndarray) -> str:
    rng = np.random.default_rng(0)
    means = values[rng.integers(0, len(values), (2000, len(values)))].mean(1)
    return "{:.3f} to {:.3f}".format(*np.percentile(means, [2.5, 97.5]))


def accuracy_rows(model, data: Path, sets: list[str]) -> list[dict[str, object]]:
    """A row per set and way of prompting."""
    config = RunConfig()
    every_point = every_click_a_cell(config)
    rows: list[dict[str, object]] = []
    for name in sets:
        images = instance_images(data, name)
        for prompts in ("none (APG)", "one per nucleus"):
            scores, seconds = [], 0.0
            for _, image, label in images:
                centres = centre_points(label)
                start = time.process_time()
                embeddings = encode(model, image)
                if prompts == "none (APG)":
                    cells = cells_of(model, embeddings, automatic_points(embeddings, config), label.shape, config)
                else:
                    cells = cells_of(model, embeddings, centres, label.shape, every_point)
                seconds += time.process_time() - start
                scores.append(score(label, rasterise(cells.polygons, label.shape)))
            means = {k: float(np.mean([s[k] for s in scores])) for k in scores[0]}
            mpx = sum(label.size for *_, label in images) / 1e6
            aji = np.array([s["aji"] for s in scores])
            rows.append(
                {
                    "set": name,
                    "images": len(images),
                    "prompts": prompts,
                    **means,
                    "AJI 95 %": interval(aji),
                    "CPU s/Mpx": seconds / mpx,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=["monuseg/dev_nc", "tnbc/dev"])
    parser.add_argument("--model", default="nuclei-compact")
    parser.add_argument("--name", default="accuracy")
    options = parser.parse_args()
    rows = accuracy_rows(load_model(options.model, "cpu"), options.data, options.sets)
    write_results(options.name, rows, f"`benchmarks/accuracy.py`, model {options.model}. Means over images.")


if __name__ == "__main__":
    main()
