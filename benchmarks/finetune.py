"""Adapting the packaged network to a few images of a laboratory: does it help there, and what does it cost elsewhere?

    python -m benchmarks.finetune --data DATA [--images train|dev] [--minutes 15] [--seeds 0 1 2] [--ways both keep also none]

`--images train`: 20 images of dsb2018_histology/train, drawn by seed, of which a fifth validates; AJI on dsb2018_histology/dev. The packaged network
was trained on all images of that split already. `--images dev`: images that it has never seen, those of dsb2018_histology/dev in two halves by seed:
adapted to six without validation, measured on the other six, and the other way round. Their weights are thrown away.

`keep` holds the network near its parent's answers on the new images, `also` mixes tnbc/train in, `both` does both. Images have the scale that gives
their nuclei a median diameter of 26 px, as theirs is unknown. AJI without points, mean over images; tnbc/dev is what must not be forgotten.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.apg_sweep import development_images
from benchmarks.common import MPP, automatic_points, cells_of, encode, instance_images, write_results
from wsiseg.config import RunConfig
from wsiseg.evaluation.metrics import score
from wsiseg.evaluation.rasterize import rasterise
from wsiseg.finetune.config import FinetuneConfig
from wsiseg.finetune.run import Finetuned, finetune
from wsiseg.models import load_model

IMAGES = 20
DIAMETER_PX = 26  #: as in benchmarks/apg_sweep.py
WAYS = {"none": (0.0, False), "keep": (0.5, False), "also": (0.0, True), "both": (0.5, True)}

Labelled = tuple[str, np.ndarray, np.ndarray]


def write_folder(data: Path, split: str, names: list[str], folder: Path) -> None:
    """Images of dsb2018_histology with their labels and scales, as `wsiseg finetune` reads them."""
    source = data / "instances/dsb2018_histology"
    groups = json.loads((source / "groups.json").read_text())
    for kind in ("image", "label"):
        (folder / kind).mkdir(parents=True)
        for name in names:
            shutil.copy(source / split / kind / f"{name}.png", folder / kind)
    with (folder / "images.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "mpp"])
        for name in names:
            writer.writerow([name, round(MPP * DIAMETER_PX / groups[f"{split}/{name}"]["median_diameter_px"], 4)])


def accuracy(model_name: str, images: list[Labelled]) -> np.ndarray:
    """AJI of each image."""
    model, config = load_model(model_name, "cpu"), RunConfig()
    out = []
    for _, image, label in images:
        e = encode(model, image)
        cells = cells_of(model, e, automatic_points(e, config), label.shape, config)
        out.append(score(label, rasterise(cells.polygons, label.shape))["aji"])
    return np.array(out)


def adapt(
    data: Path, split: str, names: list[str], out: Path, options: argparse.Namespace, seed: int, way: str
) -> Finetuned:
    """The packaged network, adapted to these images."""
    keep, also = WAYS[way]
    with tempfile.TemporaryDirectory() as place:
        write_folder(data, split, names, Path(place) / "data")
        return finetune(
            Path(place) / "data",
            out,
            config=FinetuneConfig(minutes=options.minutes, seed=seed, keep=keep, rate=options.rate, device="cpu"),
            also=[data / "instances/tnbc/train"] if also else [],
            mpp=MPP,  # of tnbc; the others have their own
            no_valid=split == "dev",
            overwrite=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", choices=["train", "dev"], default="train")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["both"])
    parser.add_argument("--rate", type=float)
    parser.add_argument(
        "--halves", type=int, choices=[1, 2], default=2, help="of --images dev: the last one only, or both"
    )
    parser.add_argument("--name", default="finetune")
    options = parser.parse_args()
    every = development_images(options.data)
    new, old = [i for i in every if i[0] == "dsb2018"], [i for i in every if i[0] == "tnbc"]
    new_names = [name for name, *_ in instance_images(options.data, "dsb2018_histology/dev")]
    train_names = sorted(p.stem for p in (options.data / "instances/dsb2018_histology/train/image").glob("*.png"))
    before, old_before = accuracy("nuclei-compact", new), accuracy("nuclei-compact", old)
    print("before", before.mean(), old_before.mean(), flush=True)
    rows: list[dict[str, object]] = []
    for way in options.ways:
        for seed in options.seeds:
            order = np.random.default_rng(seed).permutation(len(new))
            sides = (
                [(order, order)]
                if options.images == "train"
                else [(order[::2], order[1::2]), (order[1::2], order[::2])]
            )
            for learned, held in sides[-options.halves :]:
                drawn = np.random.default_rng(seed).choice(train_names, IMAGES, replace=False).tolist()
                names = drawn if options.images == "train" else [new_names[k] for k in learned]
                with tempfile.TemporaryDirectory() as place:
                    out = Path(place) / "new.safetensors"
                    cpu, clock = time.process_time(), time.monotonic()
                    done = adapt(options.data, options.images, names, out, options, seed, way)
                    cpu, clock = time.process_time() - cpu, time.monotonic() - clock
                    after, old_after = accuracy(str(out), [new[k] for k in held]), accuracy(str(out), old)
                rows.append(
                    {
                        "guard": way,
                        "seed": seed,
                        "images": len(names),
                        "steps": done.steps,
                        "CPU min": round(cpu / 60, 1),
                        "min": round(clock / 60, 1),
                        "dsb2018 before": float(before[held].mean()),
                        "after": float(after.mean()),
                        "change": float(after.mean() - before[held].mean()),
                        "tnbc before": float(old_before.mean()),
                        "tnbc after": float(old_after.mean()),
                        "tnbc change": float(old_after.mean() - old_before.mean()),
                    }
                )
                print(rows[-1], flush=True)
                write_results(
                    options.name,
                    rows,
                    f"`benchmarks/finetune.py --images {options.images}`: {(__doc__ or '').split(chr(10), 1)[0]}",
                )


if __name__ == "__main__":
    main()
