"""How well do the nuclei say the microns per pixel, and what do labelled nuclei look like?

    python -m benchmarks.scale_from_nuclei --data DATA

Writes results/scale_from_nuclei.md and .json. A sample is four windows of one patient (tnbc), organ (nuinsseg) or image (brca_m2c; monuseg,
evaluation only), averaged down to the stated scale; around each image lie others of its group, since a window at a fine assumed scale is larger
than an image. The constants of wsiseg/segmentation/nuclear_scale.py were chosen on tnbc and brca_m2c (train), those of
wsiseg/runs/plausibility.py on tnbc and nuinsseg. The scale of nuinsseg is nominal, and its estimates are relative to that.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.common import write_results
from wsiseg.models import load_model
from wsiseg.segmentation.nuclear_scale import CONTRADICTION, LADDER, WINDOW_PX, WINDOWS, choose_scale, measure_rungs

MIDDLE, QUARTERS = ((0.5, 0.5),), ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75))
#: set -> microns per px of its files (nuinsseg's is nominal: its nuclei look like that), and the places of the windows in an image
SETS = {
    "instances/tnbc/train": (0.25, MIDDLE),
    "points/brca_m2c/train": (0.5, QUARTERS),
    "instances/tnbc/dev": (0.25, MIDDLE),
    "instances/monuseg/dev_nc": (0.25, QUARTERS),
    "instances/nuinsseg/train": (0.2, MIDDLE),
}
SCALES = (0.25, 0.5, 1.0)


def group_of(name: str, stem: str) -> str:
    return stem.rsplit("_", 1)[0] if name in ("tnbc", "nuinsseg") else stem


def images_of(folder: Path) -> dict[str, list[Image.Image]]:
    """Images by patient, organ or slide, at most as many of each as there are windows."""
    found: dict[str, list[Image.Image]] = {}
    for path in sorted((folder / "image").iterdir()):
        group = found.setdefault(group_of(folder.parent.name, path.stem), [])
        if len(group) < WINDOWS:
            group.append(Image.open(path).convert("RGB"))
    return found


def windows_of(
    group: list[Image.Image], mpp: float, places: tuple[tuple[float, float], ...], coarse: float
) -> list[np.ndarray]:
    """Windows of level-0 px of a slide of ``coarse`` microns per px, as ``estimate_scale`` reads them."""
    side = int(min(min(image.size) for image in group) * mpp / coarse)
    small = [
        np.asarray(image.resize((side, side), Image.Resampling.BOX if coarse > mpp else Image.Resampling.BICUBIC))
        for image in group
    ]
    reach = math.ceil(WINDOW_PX * 0.25 / LADDER[0] / 2)
    around = math.ceil(reach / side)
    windows = []
    for number in range(len(group)):
        rows = [
            np.concatenate(
                [
                    small[(number + row * (2 * around + 1) + column) % len(small)]
                    for column in range(-around, around + 1)
                ],
                1,
            )
            for row in range(-around, around + 1)
        ]
        mosaic = np.concatenate(rows)
        for x, y in places:
            left, top = (round((around + at) * side) - reach for at in (x, y))
            windows.append(np.ascontiguousarray(mosaic[max(top, 0) : top + 2 * reach, max(left, 0) : left + 2 * reach]))
    return windows[:WINDOWS]


def fields(folder: Path, mpp: float) -> dict[str, object]:
    """What the drawn nuclei of each image look like."""
    medians, densities, every = [], [], []
    for path in sorted((folder / "label").glob("*.png")):
        label = np.asarray(Image.open(path))
        areas = np.bincount(label.ravel())[1:]
        areas = areas[areas > 0] * mpp**2
        if len(areas):
            medians.append(float(np.median(areas)))
            densities.append(len(areas) / (label.size * mpp**2 / 1e6))
            every.append(areas)
    low, middle, high = np.percentile(medians, (1, 50, 99))
    diameter = float(np.sqrt(4 / np.pi * np.median(np.concatenate(every))))
    return {
        "set": "/".join(folder.parts[-2:]),
        "images": len(medians),
        "median nucleus, diameter um": diameter,
        "median area um2: 1 %": float(low),
        "half": float(middle),
        "99 %": float(high),
        "nuclei per mm2: fewest": float(min(densities)),
        "most": float(max(densities)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--every", type=int, default=4, help="take one group in so many of sets with more than fifteen")
    options = parser.parse_args()
    model = load_model("nuclei-compact", "cpu")
    rows = []
    for name in options.sets:
        mpp, places = SETS[name]
        groups = images_of(options.data / name)
        if len(groups) > 15:
            groups = dict(list(groups.items())[:: options.every])
        for scale in (scale for scale in SCALES if scale >= mpp):
            found = [
                choose_scale(measure_rungs(windows_of(group, mpp, places, scale), model)) for group in groups.values()
            ]
            ratios = np.array([estimate.mpp / scale for estimate in found if estimate is not None])
            low, middle, high = np.percentile(ratios, (5, 50, 95)) if len(ratios) else (math.nan,) * 3
            rows.append(
                {
                    "set": name.partition("/")[2],
                    "um per px": scale,
                    "samples": len(found),
                    "no estimate": len(found) - len(ratios),
                    "estimate / truth: 5 %": float(low),
                    "half": float(middle),
                    "95 %": float(high),
                    "within 1.25x": float((np.abs(np.log(ratios)) < math.log(1.25)).mean())
                    if len(ratios)
                    else math.nan,
                    f"beyond {CONTRADICTION}x": int((np.abs(np.log(ratios)) > math.log(CONTRADICTION)).sum()),
                }
            )
            print(rows[-1], flush=True)
    drawn = [name for name in options.sets if (options.data / name / "label").is_dir()]
    tables = {
        "estimated from nuclei": rows,
        "labelled nuclei": [fields(options.data / name, SETS[name][0]) for name in drawn],
    }
    write_results(
        "scale_from_nuclei",
        tables,
        "`benchmarks/scale_from_nuclei.py`: a sample is four windows of one patient, organ or image.",
    )


if __name__ == "__main__":
    main()
