"""How much is lost on bad slides? Each damage at growing severity, without points: AJI, and its share of the AJI of the clean images.

    python -m benchmarks.robustness --data DATA [--sets tnbc/dev monuseg/dev_nc]

Writes results/robustness.md, .json and .png. Damage is done at 0.25 um per px. The stain is moved in optical density, one channel at a time (mean
over the three); coarse sources are averaged down and enlarged again as a run does it; out of focus is a disc; pen marks are strokes
across the image, 60 px wide, two thirds ink and one third tissue (they cover more of the small images of tnbc).
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from benchmarks.common import RESULTS, automatic_points, cells_of, encode, instance_images, write_results
from wsiseg.config import RunConfig
from wsiseg.evaluation.metrics import score
from wsiseg.evaluation.rasterize import rasterise
from wsiseg.models import load_model


def blurred(image: np.ndarray, sigma: float) -> list[np.ndarray]:
    return [ndimage.gaussian_filter(image, (sigma, sigma, 0))]


def compressed(image: np.ndarray, quality: float) -> list[np.ndarray]:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=int(quality))
    return [np.asarray(Image.open(buffer))]


def restained(image: np.ndarray, factor: float) -> list[np.ndarray]:
    density = -np.log((image.astype(np.float32) + 1) / 256)
    return [
        np.clip(256 * np.exp(-density * np.where(np.arange(3) == k, factor, 1)) - 1, 0, 255).astype(np.uint8)
        for k in range(3)
    ]


def coarse(image: np.ndarray, mpp: float) -> list[np.ndarray]:
    size = image.shape[1], image.shape[0]
    small = Image.fromarray(image).resize(tuple(round(n * 0.25 / mpp) for n in size), Image.Resampling.BOX)
    return [np.asarray(small.resize(size, Image.Resampling.BICUBIC))]


def defocused(image: np.ndarray, radius: float) -> list[np.ndarray]:
    reach = int(np.ceil(radius)) + 1
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disc = np.clip(radius + 0.5 - np.hypot(x, y), 0, 1)
    disc /= disc.sum()
    return [np.stack([ndimage.convolve(image[..., c].astype(np.float32), disc) for c in range(3)], 2).astype(np.uint8)]


def inked(image: np.ndarray, strokes: float) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    out = image.astype(np.float32)
    for _ in range(int(strokes)):
        layer = Image.new("L", (image.shape[1], image.shape[0]))
        ends = rng.uniform(0, 1, (4, 2)) * [image.shape[1], image.shape[0]]
        ImageDraw.Draw(layer).line([tuple(p) for p in ends], fill=255, width=60, joint="curve")
        ink = np.array([(30, 60, 160), (20, 120, 60), (25, 25, 30)][rng.integers(3)], np.float32)
        alpha = (np.asarray(layer) / 255 * 0.67)[..., None]
        out = out * (1 - alpha) + ink * alpha
    return [out.astype(np.uint8)]


DAMAGE = {
    "blur, sigma in px": (blurred, (0.5, 1.0, 1.5, 2.0, 3.0)),
    "JPEG quality": (compressed, (80, 50, 30, 15)),
    "stain, x optical density of a channel": (restained, (0.7, 0.85, 1.2, 1.4)),
    "um per px of the source": (coarse, (0.35, 0.5, 0.7, 1.0)),
    "out of focus, radius in px": (defocused, (1.0, 2.0, 3.0, 4.0)),
    "pen strokes across the image": (inked, (1, 2, 4)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=["tnbc/dev", "monuseg/dev_nc"])
    parser.add_argument("--every", type=int, default=3, help="take one image in so many of sets with more than five")
    options = parser.parse_args()
    model, config = load_model("nuclei-compact", "cpu"), RunConfig()
    images = {name: instance_images(options.data, name) for name in options.sets}
    images = {name: of[:: options.every] if len(of) > 5 else of for name, of in images.items()}

    def found(image: np.ndarray, label: np.ndarray) -> float:
        e = encode(model, image)
        return score(
            label, rasterise(cells_of(model, e, automatic_points(e, config), label.shape, config).polygons, label.shape)
        )["aji"]

    clean = {name: float(np.mean([found(image, label) for _, image, label in of])) for name, of in images.items()}
    first: dict[str, object] = {
        "damage": "none",
        "severity": "",
        **{f"{n} AJI": v for n, v in clean.items()},
        **{f"{n} kept": 1.0 for n in clean},
    }
    rows = [first]
    for damage, (make, severities) in DAMAGE.items():
        for severity in severities:
            aji = {
                n: float(np.mean([found(bad, label) for _, image, label in of for bad in make(image, severity)]))
                for n, of in images.items()
            }
            kept = {f"{n} kept": v / clean[n] for n, v in aji.items()}
            rows.append({"damage": damage, "severity": severity, **{f"{n} AJI": v for n, v in aji.items()}, **kept})
            print(rows[-1], flush=True)
    write_results(
        "robustness",
        rows,
        "`benchmarks/robustness.py`: without points, means over images; `kept` is the share of the clean AJI.",
    )
    draw(rows, clean)


def draw(rows: list[dict[str, object]], clean: dict[str, float]) -> None:
    """One small plot per damage."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(11, 6), sharey=True, layout="constrained")
    for axis, damage in zip(axes.flat, DAMAGE, strict=True):
        mine = [r for r in rows if r["damage"] == damage]
        for name, best in clean.items():
            line = axis.plot([r["severity"] for r in mine], [r[f"{name} AJI"] for r in mine], "o-", label=name)
            axis.axhline(best, color=line[0].get_color(), linewidth=0.8, linestyle=":")
        if damage.startswith("JPEG"):
            axis.invert_xaxis()  # worse to the right, as in the others
        axis.set_xlabel(damage)
    axes[0, 0].set_ylim(0)
    axes[0, 0].legend()
    figure.supylabel("AJI without points (dotted: clean images)")
    figure.savefig(RESULTS / "robustness.png", dpi=110)


if __name__ == "__main__":
    main()
