"""Do the features tell types apart on images that were not trained on? Nearest neighbours across images, and silhouettes.

    python -m benchmarks.features --data DATA

Every annotated dot is a click; its descriptor votes for the type of the dots in *other* images (20 nearest by cosine). `silhouette` is the mean
over dots of (b - a) / max(a, b), with a the mean cosine distance to the same type and b to the nearest other type, over all images together.
"measurements" are hand-made: log area, axis ratio, optical density inside (mean, sd) and around.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.common import MPP, encode, point_images, write_results
from wsiseg.models import load_model
from wsiseg.models.nuclei_compact import LEARNED, sample_bilinear

SETS = {"brca_m2c/dev": 0.5, "nucls_mini/dev": MPP}
NEIGHBOURS = 20


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-9)


def nearest_neighbours(features: np.ndarray, types: np.ndarray, image: np.ndarray) -> tuple[float, float]:
    """Macro-F1 and accuracy of the vote of the nearest dots of other images."""
    near = features @ features.T
    near[image[:, None] == image[None]] = -np.inf
    votes = types[np.argpartition(-near, NEIGHBOURS, 1)[:, :NEIGHBOURS]]
    kinds = np.unique(types)
    given = kinds[np.stack([(votes == k).sum(1) for k in kinds], 1).argmax(1)]
    f1 = [2 * ((given == k) & (types == k)).sum() / ((given == k).sum() + (types == k).sum()) for k in kinds]
    return float(np.mean(f1)), float((given == types).mean())


def silhouette(features: np.ndarray, types: np.ndarray) -> float:
    kinds = np.unique(types)
    sums = features @ np.stack([features[types == k].sum(0) for k in kinds], 1)  # similarity to every type, summed
    counts = np.array([(types == k).sum() for k in kinds])
    mine = np.searchsorted(kinds, types)
    rows = np.arange(len(types))
    a = 1 - (sums[rows, mine] - 1) / (counts[mine] - 1)
    others = 1 - sums / counts
    others[rows, mine] = np.inf
    b = others.min(1)
    return float(np.mean((b - a) / np.maximum(a, b)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="nuclei-compact")
    parser.add_argument("--name", default="features")
    options = parser.parse_args()
    model = load_model(options.model, "cpu")
    rows: list[dict[str, object]] = []
    for name, mpp in SETS.items():
        parts: dict[str, list[np.ndarray]] = {
            "descriptor": [],
            "learned half": [],
            "measurements": [],
            "F_l at the click": [],
        }
        types, of_image = [], []
        for number, (_, image, dots) in enumerate(point_images(options.data, name)):
            scale = mpp / MPP
            size = round(image.shape[1] * scale), round(image.shape[0] * scale)
            e = encode(model, np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)))
            points = torch.from_numpy((dots[:, :2] * scale).astype(np.float32))
            tile = torch.zeros(len(points), dtype=torch.long)
            with torch.inference_mode():
                descriptors = model.decode(e, tile, points).descriptors.numpy()
                parts["F_l at the click"].append(sample_bilinear(e.low, tile, points, 8).numpy())
            parts["descriptor"].append(descriptors)
            parts["learned half"].append(descriptors[:, :LEARNED])
            parts["measurements"].append(descriptors[:, LEARNED:])
            types.append(dots[:, 2].astype(int))
            of_image.append(np.full(len(dots), number))
        kinds, images = np.concatenate(types), np.concatenate(of_image)
        for what, found in parts.items():
            features = unit(np.concatenate(found))
            f1, accuracy = nearest_neighbours(features, kinds, images)
            rows.append(
                {
                    "set": name,
                    "dots": len(kinds),
                    "types": len(np.unique(kinds)),
                    "features": what,
                    "macro-F1": f1,
                    "accuracy": accuracy,
                    "silhouette": silhouette(features, kinds),
                }
            )
    write_results(
        options.name,
        rows,
        f"`benchmarks/features.py`, model {options.model}: {NEIGHBOURS} nearest neighbours in other images.",
    )


if __name__ == "__main__":
    main()
