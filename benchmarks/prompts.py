"""How well the model answers what it is told: points, jittered points, boxes, corrections, several masks, and whether its scores rank.

    python -m benchmarks.prompts --data DATA [--sets monuseg/dev_nc tnbc/dev]

One prompt of each kind per nucleus; every prompt keeps its mask, what two of them share goes to the one that scores more. `ranking` is the
Spearman correlation of predicted IoU with true IoU over single decoded masks, before anything is dropped; its prompts are clicks anywhere in a
nucleus. `touching`: of the pairs of annotated nuclei that touch, the share that two points turn into two masks, each with IoU > 0.5 with its own
nucleus.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from scipy.stats import spearmanr

from benchmarks.accuracy import centre_points, every_click_a_cell
from benchmarks.common import MPP, encode, instance_images, write_results
from wsiseg.config import RunConfig
from wsiseg.evaluation.metrics import overlaps, score
from wsiseg.evaluation.rasterize import rasterise
from wsiseg.geometry import Box, Lattice
from wsiseg.models import load_model
from wsiseg.models.nuclei_compact import MASKS
from wsiseg.records import Cells, PromptExtras, WindowMasks
from wsiseg.segmentation.polygons import trace
from wsiseg.stitching.stitch import stitch

JITTER_UM = 2.0
CONFIG = every_click_a_cell(RunConfig())


def moved_points(label: np.ndarray, points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each point moved by up to 2 um, to a place inside its nucleus."""
    out = points.copy()
    for k, (x, y) in enumerate(points):
        owner = label[int(y), int(x)]
        for _ in range(50):
            angle, far = rng.uniform(0, 2 * np.pi), rng.uniform(0, JITTER_UM / MPP)
            place = np.array([x + far * np.cos(angle), y + far * np.sin(angle)])
            row, column = int(place[1]), int(place[0])
            if 0 <= row < label.shape[0] and 0 <= column < label.shape[1] and label[row, column] == owner:
                out[k] = place
                break
    return out


def any_points(label: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One place anywhere in each nucleus, in order of id."""
    out = []
    for i, rows in enumerate(ndimage.find_objects(label), 1):
        if rows is not None and (here := np.argwhere(label[rows] == i)).size:
            y, x = here[rng.integers(len(here))]
            out.append((x + rows[1].start + 0.5, y + rows[0].start + 0.5))
    return np.array(out, np.float32)


def no_extras(n: int, slots: int = 1) -> PromptExtras:
    return PromptExtras(torch.zeros(n, slots, 2), -torch.ones(n, slots), torch.full((n, 4), torch.nan))


def box_extras(label: np.ndarray, noise: float, rng: np.random.Generator) -> PromptExtras:
    boxes = [(s[1].start, s[0].start, s[1].stop, s[0].stop) for s in ndimage.find_objects(label) if s is not None]
    boxes = np.array(boxes, np.float32)
    side = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    boxes += rng.normal(0, 1, boxes.shape).astype(np.float32) * noise * side
    return dataclasses.replace(no_extras(len(boxes)), boxes=torch.from_numpy(boxes))


def middle_of(extras: PromptExtras) -> np.ndarray:
    return ((extras.boxes[:, :2] + extras.boxes[:, 2:]) / 2).numpy()


def neighbour_extras(points: np.ndarray) -> PromptExtras:
    """A negative point at the centre of the nearest other nucleus, where there is one within the window."""
    far = np.hypot(*(points[:, None] - points[None]).transpose(2, 0, 1)) + np.eye(len(points)) * 1e9
    nearest = far.argmin(1)
    labels = np.where(far.min(1) < 60, 0, -1).astype(np.float32)
    return dataclasses.replace(
        no_extras(len(points)),
        points_xy=torch.from_numpy(points[nearest][:, None]),
        labels=torch.from_numpy(labels[:, None]),
    )


def decode(
    model, embeddings, points: np.ndarray, extras: PromptExtras | None = None, *, several: bool = False
) -> list[WindowMasks]:
    out = []
    for start in range(0, len(points), 128):
        rows = slice(start, start + 128)
        xy = torch.from_numpy(points[rows].astype(np.float32))
        part = None if extras is None else PromptExtras(extras.points_xy[rows], extras.labels[rows], extras.boxes[rows])
        with torch.inference_mode():
            masks = model.decode(embeddings, torch.zeros(len(xy), dtype=torch.long), xy, extras=part, multimask=several)
        out.append(dataclasses.replace(masks, descriptors=masks.descriptors.half()))
    return out


def best_of_three(masks: WindowMasks) -> WindowMasks:
    """The mask of each prompt whose predicted IoU is highest."""
    best = masks.predicted_iou.view(-1, MASKS).argmax(1) + torch.arange(len(masks.predicted_iou) // MASKS) * MASKS
    values = {f.name: getattr(masks, f.name) for f in dataclasses.fields(masks)}
    return dataclasses.replace(masks, **{k: v[best] for k, v in values.items() if isinstance(v, torch.Tensor)})


def settled(model, masks: list[WindowMasks], shape: tuple[int, int]) -> np.ndarray:
    height, width = shape
    box, lattice = Box(0, 0, width, height), Lattice(MPP, MPP)
    cells = Cells.concatenate([trace(m, box, lattice, CONFIG.masks)[0] for m in masks], model.descriptor_size)
    settled, _ = stitch(
        [cells],
        (width, height),
        CONFIG.masks.min_area_um2 / MPP**2,
        CONFIG.stitching,
        descriptor_size=cells.descriptor_size,
    )
    cells = settled.take(slice(None))
    return rasterise(cells.polygons, shape)


def true_iou(masks: list[WindowMasks], points: np.ndarray, label: np.ndarray) -> np.ndarray:
    """IoU of every mask on its window with the nucleus under its point, at the mask's own sampling."""
    out = []
    padded = np.pad(label, 160)
    k = 0
    for batch in masks:
        for logits, (ox, oy) in zip(batch.logits.numpy(), batch.origin_xy.tolist(), strict=True):
            x, y = points[k].astype(int)
            window = (padded[oy + 160 : oy + 288, ox + 160 : ox + 288] == label[y, x]).reshape(64, 2, 64, 2).mean(
                (1, 3)
            ) >= 0.5
            mask = logits > 0
            out.append((mask & window).sum() / max((mask | window).sum(), 1))
            k += 1
    return np.array(out)


def touching(label: np.ndarray, found: np.ndarray) -> tuple[int, int]:
    """Pairs of nuclei that touch, and how many of them both have a mask of their own."""
    pairs = set()
    for dy, dx in ((0, 2), (2, 0)):
        a, b = label[: label.shape[0] - dy, : label.shape[1] - dx], label[dy:, dx:]
        edge = (a != b) & (a > 0) & (b > 0)
        pairs |= set(map(tuple, np.unique(np.sort(np.stack([a[edge], b[edge]], 1), 1), axis=0).tolist()))
    o = overlaps(label, found)
    ids = np.unique(label[label > 0])
    matched = set(ids[o.truth[o.iou > 0.5]].tolist())
    return len(pairs), sum(a in matched and b in matched for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=["monuseg/dev_nc", "tnbc/dev"])
    parser.add_argument("--model", default="nuclei-compact")
    parser.add_argument("--name", default="prompts")
    options = parser.parse_args()
    model = load_model(options.model, "cpu")
    rows: list[dict[str, object]] = []
    for name in options.sets:
        scores: dict[str, list[dict[str, float]]] = {}
        predicted, true, pairs, parted = [], [], 0, 0
        for number, (_, image, label) in enumerate(instance_images(options.data, name)):
            rng = np.random.default_rng(number)
            e = encode(model, image)
            centre = centre_points(label)
            boxes, noisy = box_extras(label, 0.0, rng), box_extras(label, 0.05, rng)
            anywhere = any_points(label, rng)
            two = dataclasses.replace(
                no_extras(len(centre)),
                points_xy=torch.from_numpy(any_points(label, rng)[:, None]),
                labels=torch.ones(len(centre), 1),
            )
            kinds = {
                "point at the centre": (centre, None),
                "point moved by up to 2 um": (moved_points(label, centre, rng), None),
                "point anywhere inside": (anywhere, None),
                "two points": (centre, two),
                "point, and a negative one in the nearest neighbour": (centre, neighbour_extras(centre)),
                "box": (middle_of(boxes), boxes),
                "box with 5 % noise": (middle_of(noisy), noisy),
                "box and point": (centre, boxes),
            }
            for kind, (points, extras) in kinds.items():
                masks = decode(model, e, points, extras)
                found = settled(model, masks, label.shape)
                scores.setdefault(kind, []).append(score(label, found))
                if kind == "point at the centre":
                    n, both = touching(label, found)
                    pairs, parted = pairs + n, parted + both
                if kind == "point anywhere inside":
                    predicted += torch.cat([m.predicted_iou for m in masks]).tolist()
                    true += true_iou(masks, points, label).tolist()
            best = [best_of_three(m) for m in decode(model, e, centre, several=True)]
            scores.setdefault("point, best of three masks by predicted IoU", []).append(
                score(label, settled(model, best, label.shape))
            )
        for kind, of in scores.items():
            means = {k: float(np.mean([s[k] for s in of])) for k in of[0]}
            row: dict[str, object] = {"set": name, "prompt": kind, **means, "ranking": "", "touching": ""}
            if kind == "point anywhere inside":
                row["ranking"] = f"{spearmanr(predicted, true).statistic:.3f} (n = {len(true)})"
            if kind == "point at the centre":
                row["touching"] = f"{parted} of {pairs}"
            rows.append(row)
    write_results(
        options.name,
        rows,
        f"`benchmarks/prompts.py`, model {options.model}. Means over images, one prompt per nucleus.",
    )


if __name__ == "__main__":
    main()
