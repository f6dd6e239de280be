"""What every prompt costs beside the network: logits to polygons and WKB, and mining prompts from a similarity map.

    python -m benchmarks.outlines [--rounds 9]

Masks of nuclei-compact on a real image. CPU seconds of this process on one thread, medians over the rounds; ours and scikit-image's
`find_contours`, one mask at a time in its own crop, alternate (ours goes on to the chosen outline, thinned, made valid, and WKB; the reference stops
at the rings). IoU and area bias are against the logits upsampled four times and cut at zero.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
import torch
import torch.nn.functional as F
from scipy import ndimage
from skimage.measure import find_contours

from benchmarks.common import write_results
from benchmarks.memory import patch
from wsiseg.config import ApgConfig, CopConfig, MaskConfig
from wsiseg.geometry import Box, Lattice
from wsiseg.models import load_model
from wsiseg.segmentation.decoding import decode
from wsiseg.segmentation.polygons import trace
from wsiseg.segmentation.prompts.apg import apg_points
from wsiseg.segmentation.prompts.chain_of_prompts import component_points

if TYPE_CHECKING:
    from collections.abc import Callable


def alternate(rounds: int, *functions: Callable[[], Any]) -> list[float]:
    """Median CPU seconds of several functions, called in turn after one call each to warm up."""
    for function in functions:
        function()
    found: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for seconds, function in zip(found, functions, strict=True):
            started = time.process_time()
            function()
            seconds.append(time.process_time() - started)
    return [statistics.median(seconds) for seconds in found]


def one_by_one(masks: Any) -> list[Any]:
    """scikit-image's rings of each mask, traced in the mask's own crop."""
    rings = []
    for logit in masks.logits.numpy():
        rows, columns = np.flatnonzero((logit > 0).any(1)), np.flatnonzero((logit > 0).any(0))
        if len(rows):
            rings.append(
                find_contours(logit[max(rows[0] - 1, 0) : rows[-1] + 2, max(columns[0] - 1, 0) : columns[-1] + 2], 0.0)
            )
    return rings


def outlines(rounds: int) -> list[dict[str, object]]:
    """Logits of real nuclei to polygons and WKB; truth is the mask of the logits upsampled four times."""
    model = load_model("nuclei-compact", "cpu")
    image = torch.from_numpy(patch().copy()).permute(2, 0, 1)[None]
    embeddings = model.encode(image)
    points = apg_points(embeddings.maps[0].numpy(), 2, model.mpp, ApgConfig())
    outer, lattice = Box(0, 0, 1024, 1024), Lattice(model.mpp, model.mpp)
    rows = []
    for what, config in (
        ("as traced", MaskConfig(convex_above=1.0, simplify_um=0.0)),
        ("thinned by 0.05 um", MaskConfig(convex_above=1.0)),
        ("thinned, and hulls for convex ones (default)", MaskConfig()),
    ):
        masks = list(decode(model, embeddings, 0, points, config))
        done = [trace(m, outer, lattice, config)[0] for m in masks]
        cells = [c for part in done for c in part.polygons]
        ours, reference = alternate(
            rounds,
            lambda masks=masks, config=config: [
                shapely.to_wkb(trace(m, outer, lattice, config)[0].polygons) for m in masks
            ],
            lambda masks=masks: [one_by_one(m) for m in masks],
        )
        iou, bias = _against_upsampled(masks, cells, np.concatenate([part.points_xy for part in done]))
        rows.append(
            {
                "outlines": what,
                "nuclei": len(cells),
                "us per nucleus": 1e6 * ours / len(cells),
                "scikit-image's rings alone, us": 1e6 * reference / len(cells),
                "ratio": ours / reference,
                "IoU": iou,
                "area bias %": 100 * bias,
            }
        )
    return rows


def _against_upsampled(masks: list[Any], polygons: list[shapely.Polygon], points: np.ndarray) -> tuple[float, float]:
    """Mean IoU and mean relative area difference of the outlines against the logits upsampled by 4 (bilinear) and cut at zero."""
    from skimage.draw import polygon2mask

    truth = {}
    for part in masks:
        fine = F.interpolate(part.logits[:, None], scale_factor=4, mode="bilinear", align_corners=False)[:, 0].numpy()
        for logit, origin, point in zip(fine, part.origin_xy.numpy(), part.points_xy.numpy(), strict=True):
            truth[tuple(np.round(point, 3))] = (logit > 0, origin)
    ious, biases = [], []
    for polygon, point in zip(polygons, points, strict=True):
        inside, origin = truth[tuple(np.round(point.astype(np.float32), 3))]
        labels, _ = ndimage.label(inside)
        xy = (np.array(polygon.exterior.coords) - origin) * 2  # px of 0.25 um to quarters of a cell of 2 px
        drawn = polygon2mask(inside.shape, xy[:, ::-1] - 0.5)
        own = np.bincount(labels[drawn], minlength=2)[1:].argmax() + 1
        mask = ndimage.binary_fill_holes(labels == own)
        ious.append((mask & drawn).sum() / (mask | drawn).sum())
        biases.append(polygon.area * 4 / mask.sum() - 1)
    return float(np.mean(ious)), float(np.mean(biases))


def mining(rounds: int) -> list[dict[str, object]]:
    """Components of a 256 x 256 similarity map, as many as nuclei in a tile."""
    rng = np.random.default_rng(0)
    similarity = ndimage.gaussian_filter(rng.standard_normal((256, 256)), 4).astype(np.float32)
    similarity = (similarity - similarity.min()) / np.ptp(similarity)
    floor = float(np.quantile(similarity, 0.8))
    found = component_points(similarity, floor, CopConfig.min_component_um2)
    (seconds,) = alternate(rounds, lambda: component_points(similarity, floor, CopConfig.min_component_um2))
    return [{"map": "256 x 256", "components": len(found), "ms": 1e3 * seconds}]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tables = {"Logits to polygons and WKB": outlines(options.rounds), "Mining prompts": mining(options.rounds)}
    write_results("outlines", tables, __doc__.split("\n\n", 2)[2].strip())


if __name__ == "__main__":
    main()
