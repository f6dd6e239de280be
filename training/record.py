"""What a training run leaves behind beside the weights: the curve, pictures, and the model card."""

from __future__ import annotations

import csv
import hashlib
import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from skimage.segmentation import find_boundaries
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.accuracy import accuracy_rows
from benchmarks.apg_sweep import COLLECTIONS, development_images
from benchmarks.common import automatic_points, cells_of, encode, table
from training.data import EXCLUDED, image_files
from wsiseg.config import RunConfig
from wsiseg.evaluation.rasterize import rasterise
from wsiseg.models import load_model

if TYPE_CHECKING:
    import argparse

SAM_VIT_B_GMAC = (
    486 * 4
)  # one 1024-px input, and micro-sam's usual 512-px tile enlarged to it: four inputs for a megapixel

SOURCES = {
    "nuinsseg": ("Mahbod et al. 2024, NuInsSeg, doi.org/10.1038/s41597-024-03117-2", "CC BY 4.0"),
    "tnbc": ("Naylor et al. 2019, zenodo.org/records/2579118", "CC BY 4.0"),
    "dsb2018_histology": ("Caicedo et al. 2019, BBBC038", "CC0 1.0"),
    "nucls_mini": ("Amgad et al. 2022, NuCLS", "CC0 1.0"),
    "brca_m2c": ("Abousamra et al. 2021, BRCA-M2C", "BSD-3-Clause"),
}


def list_images(data: Path, out: Path) -> None:
    """`images.csv`: every image that the recipe trains on, with its sha256, source and licence."""
    with (out / "images.csv").open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["set", "image", "sha256", "source", "licence"])
        for name, (source, licence) in SOURCES.items():
            folder = data / ("points" if name == "brca_m2c" else "instances") / name / "train" / "image"
            for path in image_files(folder):
                if not path.name.startswith(EXCLUDED):
                    writer.writerow(
                        [f"{name}/train", path.name, hashlib.sha256(path.read_bytes()).hexdigest(), source, licence]
                    )


def draw_curve(out: Path) -> None:
    """`curve.png` from `curve.jsonl`."""
    rows = [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]
    if not rows:
        return
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name in [k for k in rows[0] if k not in ("step", "seconds")]:
        axis.plot([r["step"] for r in rows], [r[name] for r in rows], label=name)
    axis.set(xlabel="step", ylabel="loss (running mean)", yscale="log")
    axis.legend()
    figure.savefig(out / "curve.png", dpi=100)
    plt.close(figure)


def draw_pictures(weights: Path, data: Path, out: Path) -> None:
    """`pictures.png`: development images with the annotated borders (yellow) and those found without points (green)."""
    if (
        not (data / "instances/dsb2018_histology/dev").exists()
        or not (data / "instances/dsb2018_histology/groups.json").exists()
    ):
        return
    with torch.random.fork_rng():  # building a network draws numbers
        model, config = load_model(str(weights), "cpu"), RunConfig()
    views = []
    images = development_images(data)
    for _, image, label in [row for name in COLLECTIONS for row in [r for r in images if r[0] == name][:2]]:
        found = rasterise(
            cells_of(model, e := encode(model, image), automatic_points(e, config), label.shape, config).polygons,
            label.shape,
        )
        view = image.copy()
        view[find_boundaries(label, mode="inner")] = (255, 255, 0)
        view[find_boundaries(found, mode="inner")] = (0, 255, 0)
        side = np.zeros((400, 400, 3), np.uint8)
        part = view[:400, :400]
        side[: part.shape[0], : part.shape[1]] = part
        views.append(side)
    views += [np.zeros((400, 400, 3), np.uint8)] * (6 - len(views))
    Image.fromarray(np.concatenate([np.concatenate(views[k : k + 3], 1) for k in (0, 3)])).save(out / "pictures.png")


def write_card(weights: Path, data: Path, out: Path, options: argparse.Namespace, step: int, seconds: float) -> None:
    """`nuclei-compact.md`: what the network is, what it saw, what it scores. Ships beside the weights."""
    model = load_model(str(weights), "cpu")
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.encode(torch.zeros(1, 3, 1024, 1024, dtype=torch.uint8))
    gmac = counter.get_total_flops() / 2 / 1.048576e9
    sets = [name for name in ("monuseg/dev_nc", "tnbc/dev", "nuinsseg/dev") if (data / "instances" / name).exists()]
    size = sum(p.numel() for p in model.parameters())  # type: ignore[attr-defined]
    unsaid = {"data", "out", "imagenet"} | ({"minutes"} if options.steps else set())
    command = " ".join(f"--{k} {v}" for k, v in sorted(vars(options).items()) if k not in unsaid and v is not None)
    text = (
        (Path(__file__).parent / "card.md")
        .read_text()
        .format(
            parameters=size / 1e6,
            megabytes=weights.stat().st_size / 1e6,
            gmac=gmac,
            sam=SAM_VIT_B_GMAC,
            ratio=SAM_VIT_B_GMAC / gmac,
            command=command.replace(str(options.init), "THE WEIGHTS BEFORE") if options.init else command,
            steps=step,
            minutes=seconds / 60,
            versions=f"python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}",
            accuracy=table(accuracy_rows(model, data, sets)) if sets else "not measured: no such images",
        )
    )
    (out / "nuclei-compact.md").write_text(text)
