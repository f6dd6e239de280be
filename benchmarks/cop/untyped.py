"""One click per image on collections without types: what of the segmentation is kept when the prompts come from that click."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.accuracy import centre_points, every_click_a_cell
from benchmarks.apg_sweep import development_images
from benchmarks.common import MPP, instance_images
from benchmarks.cop.picture import Picture, Remembering
from wsiseg.config import RunConfig
from wsiseg.errors import SeedsError
from wsiseg.evaluation.metrics import score
from wsiseg.evaluation.rasterize import rasterise
from wsiseg.records import Bank, Seeds, SeedType
from wsiseg.segmentation.prompts.chain_of_prompts import farthest_point_recursion

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

DEFAULT, EVERY, MERGED, APG = (
    "cop (default)",
    "one point per nucleus",
    "one point per nucleus, settled as in a run",
    "apg, no click",
)
WAYS: dict[str, dict[str, object]] = {
    DEFAULT: {},
    "cop, floor not limited": {"highest_floor": 1.0},
    "cop, highest_floor 0.6": {"highest_floor": 0.6},
    "cop, highest_floor 0.4": {"highest_floor": 0.4},
    "cop, product gate": {"gate": "product"},
    "cop, components": {"localise": "components"},
    "cop, components, product gate": {"localise": "components", "gate": "product"},
}
PAPER = {
    "the paper's chain over the image, product gate": "product",
    "the paper's chain over the image, candidate gate": "candidate",
}
SLOW_SEEDS, SLOW_IMAGES = (
    2,
    {"monuseg/dev_nc": 4, "dsb2018_histology/dev": 3},
)  #: all but the first two ways: click seeds, and one image in so many


def collections(data: Path) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Images and labels; those of dsb2018 at 26 px per nucleus, their scale is unknown."""
    out: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"tnbc/dev": [], "dsb2018_histology/dev": []}
    names = {"tnbc": "tnbc/dev", "dsb2018": "dsb2018_histology/dev"}
    for name, image, label in development_images(data):
        if name in names:
            out[names[name]].append((image, label))
    return out | {"monuseg/dev_nc": [(image, label) for _, image, label in instance_images(data, "monuseg/dev_nc")]}


def draw_bank(picture: Picture, centres: np.ndarray, config: RunConfig, *seed: int) -> tuple[Bank, np.ndarray, int]:
    """The bank of one random nucleus, where it was clicked, and how many clicks before it hit no cell."""
    for missed, k in enumerate(np.random.default_rng(seed).permutation(len(centres))):
        click = tuple(float(v) for v in centres[k])
        try:
            return (
                picture.bank(Seeds((SeedType("nucleus", (200, 0, 0), (click,)),), "click"), config),
                centres[k],
                missed,
            )
        except SeedsError:
            continue
    raise RuntimeError("no true nucleus of the image is found by a click on it")


def measure(
    picture: Picture, label: np.ndarray, points: np.ndarray, bank: Bank | None, config: RunConfig
) -> dict[str, float]:
    """AJI of the cells; precision of the points; which of the automatic points in and outside true nuclei are among them."""
    cells, _ = picture.cells(points, bank, config)
    inside, automatic = _inside(points, label), _inside(picture.automatic, label)
    chosen = {tuple(p) for p in points.tolist()}
    kept = np.array([tuple(p) in chosen for p in picture.automatic.tolist()], bool)
    return {
        "AJI": score(label, rasterise(cells.polygons, label.shape))["aji"],
        "points": len(points),
        "precision": _mean(inside),
        "true kept": _mean(kept[automatic]),
        "false kept": _mean(kept[~automatic]),
    }


def _mean(x: np.ndarray) -> float:
    return float(x.mean()) if len(x) else np.nan


def _inside(points: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Which points lie in a true nucleus."""
    column, row = np.clip(np.floor(points).astype(int), 0, np.array(label.shape[::-1]) - 1).T
    return label[row, column] > 0


def records_of(
    model: Remembering, image: np.ndarray, label: np.ndarray, seeds: int, number: int, *, slow: bool
) -> Iterator[dict[str, object]]:
    """One record per way and click seed; ``slow``: of the ways that take long too."""
    base = dataclasses.replace(RunConfig(), method="cop", precision="fp32")
    picture, centres = Picture(model, image, MPP, base), centre_points(label)
    yield {"way": EVERY, "seed": 0, **measure(picture, label, centres, None, every_click_a_cell(base))}
    yield {"way": MERGED, "seed": 0, **measure(picture, label, centres, None, base)}
    yield {"way": APG, "seed": 0, **measure(picture, label, picture.automatic, None, base)}
    for seed in range(seeds):
        for k, (way, values) in enumerate(WAYS.items()):
            if k > 1 and not (slow and seed < SLOW_SEEDS):
                break
            config = dataclasses.replace(base, cop=dataclasses.replace(base.cop, **values))
            bank, click, missed = draw_bank(picture, centres, config, seed, number)
            said = {"seed": seed, "floor": float(bank.similarity_thresholds[0]), "missed": missed}
            yield {"way": way, **said, **measure(picture, label, picture.points(bank, config), bank, config)}
        if slow and seed < SLOW_SEEDS:
            for way, gate in PAPER.items():
                points = _paper(picture, click, dataclasses.replace(base.cop, gate=gate))
                yield {"way": way, "seed": seed, **measure(picture, label, points, bank, base)}


def _paper(picture: Picture, click: np.ndarray, config: object) -> np.ndarray:
    """What the click grows to in the whole image, without the bank that a slide needs."""
    high, low = (x[0].float().cpu().numpy() for x in (picture.embeddings.high, picture.embeddings.low))
    stride_px = picture.box.width / high.shape[2]
    chain = farthest_point_recursion(tuple(click / stride_px), high, low, stride_px * MPP, config)
    return picture.inside((chain * stride_px).astype(np.float32))


def retention_rows(model: object, data: Path, seeds: int, say: Callable[[str], None]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    remembering = Remembering(model)
    for name, images in collections(data).items():
        records: list[dict[str, object]] = []
        for number, (image, label) in enumerate(images):
            slow = number % SLOW_IMAGES.get(name, 1) == 0
            records += [{"image": number, **r} for r in records_of(remembering, image, label, seeds, number, slow=slow)]
        for way in dict.fromkeys(r["way"] for r in records):
            mine = [r for r in records if r["way"] == way]
            of = {r["image"] for r in mine}
            aji = _by_seed(mine)
            every, apg = (
                _by_seed([r for r in records if r["way"] == w and r["image"] in of]).mean() for w in (EVERY, APG)
            )
            similarity_thresholds = [r["floor"] for r in mine if "floor" in r]
            clicked = way not in (EVERY, MERGED, APG)
            rows.append(
                {
                    "set": name,
                    "prompts": way,
                    "images": len(of),
                    "click seeds": len(aji) if clicked else "",
                    "AJI": _spread(aji),
                    "of one point per nucleus": _spread(aji / every),
                    "of apg": _spread(aji / apg),
                    "points": round(float(np.mean([r["points"] for r in mine]))),
                    "point precision": float(np.nanmean([r["precision"] for r in mine])),
                    "true apg points kept": _kept(mine, "true kept"),
                    "false apg points kept": _kept(mine, "false kept"),
                    "floor": f"{np.mean(similarity_thresholds):.2f} ({min(similarity_thresholds):.2f} to {max(similarity_thresholds):.2f})"
                    if similarity_thresholds
                    else "",
                    "clicks that hit no cell": _mean(np.array([r["missed"] > 0 for r in mine]))
                    if similarity_thresholds
                    else "",
                }
            )
        say(f"{name}: " + ", ".join(f"{r['prompts']} {r['AJI']}" for r in rows if r["set"] == name))
    return rows


def _by_seed(records: list[dict[str, object]]) -> np.ndarray:
    """AJI: the mean over images, per click seed."""
    return np.array(
        [np.mean([r["AJI"] for r in records if r["seed"] == s]) for s in sorted({r["seed"] for r in records})]
    )


def _kept(records: list[dict[str, object]], what: str) -> float | str:
    """Empty for points that are not automatic ones."""
    values = np.array([r[what] for r in records])
    return float(np.nanmean(values)) if np.nansum(values) else ""


def _spread(values: np.ndarray) -> str:
    return f"{values.mean():.3f}" + (f" +- {values.std():.3f}" if len(values) > 1 else "")
