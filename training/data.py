"""Training crops for ``nuclei-compact``: labelled images -> the augmented crops of `wsiseg.finetune.crops`.

Folders are read as `instances/<set>/<split>/{image,label,type}/<id>.png` and `points/<set>/<split>/{image/<id>.png,points/<id>.csv}`; an
image may also be WebP (`<id>.webp`).
"""

from __future__ import annotations

import csv
import json
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from wsiseg.finetune import crops
from wsiseg.finetune.crops import Field, make_field

if TYPE_CHECKING:
    from pathlib import Path

TYPES = {"brca_m2c": 3, "nucls_mini": 4}
SIZES_PX = {"dsb2018_histology": (19.0, 36.0)}  # its scale is unknown: diameters to draw nuclei at
SCALES = {"nuinsseg": 0.8}  # its nuclei look like 0.2 um per px: what brings them to 0.25
# Blurred nuclei were left out by the annotators: what looks like a nucleus there and has no outline may be one.
INCOMPLETE = ("nuinsseg",)
# One patient of brca_m2c/train is also in an evaluation-only collection.
EXCLUDED = ("TCGA-A7-A13E",)


def image_files(folder: Path) -> list[Path]:
    """PNG and WebP images of a folder, in order of name."""
    return sorted(path for path in folder.glob("*") if path.suffix in (".png", ".webp"))


def read_instances(path: Path, collection: str) -> tuple[np.ndarray, np.ndarray]:
    """The image at ``path`` and its instance labels (int32), both at 0.25 um per px where the collection's scale is known."""
    image, label = Image.open(path).convert("RGB"), Image.open(path.parents[1] / "label" / f"{path.stem}.png")
    if (scale := SCALES.get(collection, 1.0)) != 1.0:
        size = round(image.width * scale), round(image.height * scale)
        image = image.resize(size, Image.Resampling.LANCZOS)
        label = label.convert("I").resize(size, Image.Resampling.NEAREST)
    return np.asarray(image), np.asarray(label).astype(np.int32)


def load_instances(root: Path, collection: str, split: str = "train") -> list[Field]:
    """Every image of an instance-labelled collection that has an instance."""
    fields = []
    groups = {}
    if (root / "instances" / collection / "groups.json").exists():
        groups = json.loads((root / "instances" / collection / "groups.json").read_text())
    for path in image_files(root / "instances" / collection / split / "image"):
        image, label = read_instances(path, collection)
        if not label.any():
            continue
        types = np.zeros(label.max() + 1, np.int64)
        typed = path.parents[1] / "type" / f"{path.stem}.png"
        if typed.exists():
            kind = np.asarray(Image.open(typed)).astype(np.int64)
            for i in range(1, len(types)):
                here = kind[label == i]
                types[i] = np.bincount(here[here > 0]).argmax() if (here > 0).any() else 0
        field = make_field(path.stem, collection, image, label, types)
        group = groups.get(f"{split}/{path.stem}", {}).get("stain_group", "")
        field.share = 6.0 if group == "eosin_rich" else 1.0
        field.sizes_px = SIZES_PX.get(collection)
        field.pale = collection == "dsb2018_histology" and field.share == 1.0
        fields.append(field)
    return fields


def load_points(
    root: Path, collection: str, split: str = "train", scale: int = 2
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Every image of a dot-labelled collection, enlarged ``scale`` times: (name, image, rows of x, y, type)."""
    out = []
    for path in image_files(root / "points" / collection / split / "image"):
        if path.name.startswith(EXCLUDED):
            continue
        image = Image.open(path).convert("RGB")
        image = np.asarray(image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC))
        with (path.parents[1] / "points" / f"{path.stem}.csv").open() as stream:
            rows = [(float(r["x"]), float(r["y"]), int(r["type"])) for r in csv.DictReader(stream)]
        points = np.array(rows, np.float32).reshape(-1, 3)
        points[:, :2] = (points[:, :2] + 0.5) * scale
        out.append((path.stem, image, points))
    return out


def crop(field: Field, rng: np.random.Generator, strength: float = 1.0) -> dict[str, Tensor]:
    """A crop of the package's, and the number of its collection among those with types; -1 for the others."""
    number = list(TYPES).index(field.collection) if field.collection in TYPES else -1
    return crops.crop(field, rng, strength) | {"collection": torch.tensor(number)}


class Crops(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    """An endless, seeded stream of crops; ``shares`` gives the chance of each collection."""

    def __init__(self, fields: list[Field], shares: dict[str, float], seed: int, strength: float = 1.0) -> None:
        self.fields, self.seed, self.strength = fields, seed, strength
        chance = np.zeros(len(fields))
        for collection, share in shares.items():
            mine = np.array([f.share if f.collection == collection else 0.0 for f in fields])
            chance += share * mine / mine.sum()
        self.chance = chance / chance.sum()

    def __iter__(self):  # noqa: ANN204
        torch.set_num_threads(1)
        worker = torch.utils.data.get_worker_info()  # each worker its own crops
        rng = np.random.default_rng((self.seed, worker.id if worker else 0))
        while True:
            yield crop(self.fields[rng.choice(len(self.fields), p=self.chance)], rng, self.strength)
