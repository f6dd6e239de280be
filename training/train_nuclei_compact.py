"""Train ``nuclei-compact``: the recipe of the weights that ship in the package.

    python -m training.train_nuclei_compact --data DATA --out OUT --minutes 45 [--device auto]

First the network learns outlines from hand-drawn masks (tnbc, dsb2018_histology; silver masks of nucls_mini). Then its moving average draws
one mask per annotated dot of brca_m2c/train (pseudo masks: real, permissively licensed H&E with cell types), and training goes on with both;
later the better teacher draws them again. Types come from the dots. What may be trained on is the data folder's `train` splits only.

A run that was killed goes on at its last save when the same command is given again. With `--steps` instead of `--minutes` an uninterrupted run
on the same CPU, threads and workers gives the same bytes. `OUT` then holds the weights (a moving average), their card, the losses as rows and as
a plot, and pictures.

Losses, each a mean over what it covers:
    maps        cross-entropy + Dice of the foreground, L1 of the two distance maps (twice the weight inside nuclei)
    mask        cross-entropy + Dice of every prompt's window; of the best of three for some of them
    quality     cross-entropy of the predicted IoU with the true IoU (0 for clicks on background)
    high        pairs of places on F_h: nucleus-nucleus alike, nucleus-background not
    types       cosine classifier on the descriptors, and on F_l at the prompts (heads are thrown away)
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.data import CROP, INSTANCES, TYPES, Crops, Field, distances_of, load_instances, load_points
from training.record import draw_curve, draw_pictures, list_images, write_card
from wsiseg.models.morphology import windows
from wsiseg.models.nuclei_compact import LEARNED, MASK_STRIDE_PX, MASKS, WINDOW_SIZE, NucleiCompact
from wsiseg.records import Embeddings, PromptExtras

if TYPE_CHECKING:
    from collections.abc import Iterator

MASK_SHARES = {"tnbc": 0.42, "dsb2018_histology": 0.46, "nucls_mini": 0.12}
ALL_SHARES = {"tnbc": 0.28, "dsb2018_histology": 0.28, "nucls_mini": 0.09, "brca_m2c": 0.35}
ROUNDS = (0.3, 0.56)  #: share of the run after which the pseudo masks are drawn (again)
CALM = 0.8  #: from this share of the run on, crops are damaged and restained less often: the end is spent on images as they are
CALM_STRENGTH = 0.35
AMBIGUOUS = 12  #: prompts per batch that also train the alternative masks
WARM_UP = 0.05  #: share of the run in which the learning rate rises; then it falls as a cosine


class TypeHeads(nn.Module):
    """Cosine classifiers, one per collection with types; used only here. Class 0 of the F_l head is background."""

    def __init__(self, descriptor: int, low: int) -> None:
        super().__init__()
        self.descriptor = nn.ParameterList([nn.Parameter(torch.randn(n, descriptor)) for n in TYPES.values()])
        self.low = nn.ParameterList([nn.Parameter(torch.randn(n + 1, low)) for n in TYPES.values()])


def dice(probability: Tensor, target: Tensor, weight: Tensor, dims: tuple[int, ...]) -> Tensor:
    inter = (probability * target * weight).sum(dims)
    return 1 - (2 * inter + 1) / (((probability + target) * weight).sum(dims) + 1)


def losses(model: NucleiCompact, heads: TypeHeads, batch: dict[str, Tensor], amp: bool) -> dict[str, Tensor]:
    """Every loss of one batch."""
    images = batch["image"].contiguous(memory_format=torch.channels_last)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        e = model.encode(images)
    e = Embeddings(
        high=e.high.float(), low=e.low.float(), maps=e.maps.float(), extra={k: v.float() for k, v in e.extra.items()}
    )
    out: dict[str, Tensor] = {}

    weight, foreground = batch["weight"], batch["foreground"]
    fg = e.maps[:, 0]
    bce = F.binary_cross_entropy_with_logits(fg, foreground, reduction="none")
    out["maps"] = (bce * weight).sum() / weight.sum() + dice(fg.sigmoid(), foreground, weight, (1, 2)).mean()
    emphasis = weight * (1 + foreground)
    error = (e.maps[:, 1:].sigmoid() - batch["distances"]).abs().sum(1)
    out["maps"] = out["maps"] + 2.0 * (error * emphasis).sum() / emphasis.sum()

    b = len(images)
    tile = torch.arange(b, device=images.device).repeat_interleave(INSTANCES)
    points, owners = batch["points"].flatten(0, 1), batch["owners"].flatten()
    extras = PromptExtras(
        batch["hint_xy"].flatten(0, 1), batch["hint_labels"].flatten(0, 1), batch["boxes"].flatten(0, 1)
    )
    masks = model.decode(e, tile, points, extras=extras)
    origin = masks.origin_xy // MASK_STRIDE_PX
    label = batch["label"].float()[:, None] + 1  # 0 is "outside the crop" after windowing
    window = windows(label, tile, origin * MASK_STRIDE_PX, WINDOW_SIZE * MASK_STRIDE_PX)
    inside = F.max_pool2d(window, MASK_STRIDE_PX)[:, 0] > 0
    known = windows(weight[:, None], tile, origin, WINDOW_SIZE)[:, 0] * inside
    target = F.avg_pool2d((window == (owners + 1)[:, None, None, None]).float(), MASK_STRIDE_PX)[:, 0]
    click = owners > 0
    per, iou = compare_masks(masks.logits, target, known)
    out["mask"] = (per * click).sum() / click.sum().clamp_min(1)
    out["quality"] = F.binary_cross_entropy(masks.predicted_iou, iou * click)
    few = click.nonzero()[:, 0]
    few = few[torch.randperm(len(few), device=few.device)[:AMBIGUOUS]]
    if len(few):
        several = model.decode(
            e,
            tile[few],
            points[few],
            extras=PromptExtras(extras.points_xy[few], extras.labels[few], extras.boxes[few]),
            multimask=True,
        )
        loss, true = compare_masks(
            several.logits, target[few].repeat_interleave(MASKS, 0), known[few].repeat_interleave(MASKS, 0)
        )
        out["mask"] = out["mask"] + 0.25 * loss.view(-1, MASKS).min(1).values.mean()
        out["quality"] = out["quality"] + 0.25 * F.binary_cross_entropy(several.predicted_iou, true)

    # F_h: sample places at stride 4; pairs of background with background say nothing.
    coarse = F.avg_pool2d(foreground[:, None], 2)[:, 0].flatten(1)
    sure = (F.avg_pool2d(weight[:, None], 2)[:, 0].flatten(1) == 1) & ((coarse > 0.9) | (coarse < 0.05))
    pick = (torch.rand_like(coarse) * (0.2 + (coarse > 0.9)) * sure).topk(192, 1).indices
    v = torch.gather(e.high.flatten(2), 2, pick[:, None].expand(-1, e.high.shape[1], -1))
    is_nucleus = torch.gather(coarse, 1, pick) > 0.5
    cosine = torch.einsum("bci,bcj->bij", v, v)
    same = is_nucleus[:, :, None] & is_nucleus[:, None, :]
    pair = (is_nucleus[:, :, None] | is_nucleus[:, None, :]) & torch.gather(sure, 1, pick)[:, None, :]
    pairs = F.binary_cross_entropy_with_logits(8 * (cosine - 0.4), same.float(), reduction="none")
    out["high"] = (pairs * pair).sum() / pair.sum().clamp_min(1)

    types, collection = batch["types"].flatten(), batch["collection"].repeat_interleave(INSTANCES)
    low_at = e.low[
        tile, :, (points[:, 1] / 8).long().clamp(max=CROP // 8 - 1), (points[:, 0] / 8).long().clamp(max=CROP // 8 - 1)
    ]
    out["types"] = torch.zeros((), device=images.device)
    for k in range(len(TYPES)):
        mine = (collection == k) & (types > 0) & (iou > 0.3)
        if mine.sum() > 3:
            logits = (
                12 * F.normalize(masks.descriptors[mine, :LEARNED], dim=1) @ F.normalize(heads.descriptor[k], dim=1).T
            )
            out["types"] = out["types"] + _balanced(logits, types[mine] - 1)
        mine = (collection == k) & ((types > 0) | ~click)
        if mine.sum() > 3:
            logits = 12 * low_at[mine] @ F.normalize(heads.low[k], dim=1).T
            out["types"] = out["types"] + 0.5 * _balanced(logits, types[mine])
    return out


def compare_masks(logits: Tensor, target: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and true IoU of every mask (N, h, w), where ``known`` is not 0."""
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    per = (bce * known).sum((1, 2)) / known.sum((1, 2)).clamp_min(1) * 8 + dice(logits.sigmoid(), target, known, (1, 2))
    with torch.no_grad():
        hard, truth = (logits > 0) & (known > 0), (target >= 0.5) & (known > 0)
        iou = (hard & truth).sum((1, 2)) / (hard | truth).sum((1, 2)).clamp_min(1)
    return per, iou


def _balanced(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy with weights that flatten the class frequencies half-way (square root)."""
    count = torch.bincount(target, minlength=logits.shape[1]).float()
    weight = torch.where(count > 0, count.clamp_min(1).rsqrt(), torch.zeros_like(count))
    return F.cross_entropy(logits, target, weight=weight / weight.max(), label_smoothing=0.05)


@torch.no_grad()
def pseudo_masks(model: NucleiCompact, root: Path, device: torch.device) -> list[Field]:
    """One mask per dot of brca_m2c/train from the network itself; doubtful places get weight 0."""
    fields = []
    for name, image, points in load_points(root, "brca_m2c"):
        height, width = image.shape[:2]
        pad = [(0, -n % 16) for n in (height, width)]
        padded = np.pad(image, [*pad, (0, 0)], mode="reflect")
        e = model.encode(torch.from_numpy(padded).permute(2, 0, 1)[None].to(device))
        xy = torch.from_numpy(points[:, :2]).to(device)
        masks = model.decode(e, torch.zeros(len(xy), dtype=torch.long, device=device), xy)
        score = (masks.predicted_iou * masks.stability).cpu().numpy()
        logits = (
            F.interpolate(masks.logits[:, None], scale_factor=MASK_STRIDE_PX, mode="bilinear", align_corners=False)[
                :, 0
            ]
            .cpu()
            .numpy()
        )
        foreground = F.interpolate(e.maps[:, :1], scale_factor=MASK_STRIDE_PX, mode="bilinear", align_corners=False)[
            0, 0
        ]
        foreground = foreground.sigmoid().cpu().numpy()[:height, :width]
        best = np.zeros((height, width), np.float32)
        label = np.zeros((height, width), np.int32)
        for i, (ox, oy) in enumerate(masks.origin_xy.tolist()):
            y0, y1, x0, x1 = max(oy, 0), min(oy + 128, height), max(ox, 0), min(ox + 128, width)
            if score[i] < 0.45 or y1 <= y0 or x1 <= x0:
                continue
            here = (logits[i, y0 - oy : y1 - oy, x0 - ox : x1 - ox] > 0) & (best[y0:y1, x0:x1] < score[i])
            label[y0:y1, x0:x1][here] = i + 1
            best[y0:y1, x0:x1][here] = score[i]
        area = np.bincount(label.ravel(), minlength=len(points) + 1)
        keep = (area > 120) & (area < 8000)
        keep[0] = False
        weight = np.where((label == 0) & (foreground > 0.25), 0.0, 1.0).astype(np.float32)
        weight[(label > 0) & ~keep[label]] = 0
        renumber = np.cumsum(keep) * keep
        types = np.concatenate([[0], points[keep[1:], 2].astype(np.int64)])
        label = renumber[label].astype(np.int32)
        fields.append(Field(name, "brca_m2c", image, label, distances_of(label), weight, types, diameter=26.0))
    return fields


def batches(crops: Crops, batch: int, workers: int) -> Iterator[dict[str, Tensor]]:
    """Endless batches of crops, made by `workers` processes."""
    return iter(
        torch.utils.data.DataLoader(
            crops, batch_size=batch, num_workers=workers, prefetch_factor=4 if workers else None
        )
    )


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the weights whole or not at all: a temporary file is renamed."""
    part = path.with_suffix(".part")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, part)
    part.replace(path)


def rate_at(progress: float) -> float:
    """Share of the largest learning rate at ``progress`` in [0, 1] of the run."""
    if progress < WARM_UP:
        return 0.04 + 0.96 * progress / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * min((progress - WARM_UP) / (1 - WARM_UP), 1.0)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--minutes", type=float, default=45.0, help="how long to train; the learning rate follows the clock"
    )
    length.add_argument("--steps", type=int, help="how many steps to train instead")
    parser.add_argument("--batch", type=int, help="crops per step (6; 64 on a GPU)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, help="processes that make crops (1; 14 with a GPU)")
    parser.add_argument("--init", type=Path, help="begin with these weights (safetensors)")
    parser.add_argument("--rate", type=float, default=2e-3, help="largest learning rate")
    options = parser.parse_args()
    device = torch.device(
        "cuda" if options.device == "auto" and torch.cuda.is_available() else options.device.replace("auto", "cpu")
    )
    size = options.batch or (6 if device.type == "cpu" else 64)
    workers = options.workers or (1 if device.type == "cpu" else 14)
    random.seed(options.seed)
    np.random.seed(options.seed)
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    state_path = options.out / "state.pt"

    model = NucleiCompact().to(device).to(memory_format=torch.channels_last)
    if options.init:
        missing, unexpected = model.load_state_dict(load_file(options.init), strict=False)
        print(f"initialised from {options.init}; not in it: {missing}; not used: {unexpected}", flush=True)
    heads = TypeHeads(LEARNED, 64).to(device)
    average = copy.deepcopy(model).eval()
    parameters = [*model.parameters(), *heads.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=options.rate, weight_decay=0.02)
    kept = {"model": model, "heads": heads, "average": average, "optimiser": optimiser}
    step, before, drawn = 0, 0.0, 0
    if state_path.exists():
        state = torch.load(state_path, map_location=device, weights_only=True)
        for name, thing in kept.items():
            thing.load_state_dict(state[name])
        step, before, drawn = state["step"], state["seconds"], state["drawn"]
        print(f"resuming at step {step}", flush=True)

    list_images(options.data, options.out)
    outlines = [f for name in MASK_SHARES for f in load_instances(options.data, name)]
    rounds = (0.0, *ROUNDS) if options.init else ROUNDS
    stream, running, calm = None, {}, False
    curve = options.out / "curve.jsonl"
    rows = (
        [line for line in curve.read_text().splitlines() if json.loads(line)["step"] <= step] if curve.exists() else []
    )
    curve.write_text("".join(f"{line}\n" for line in rows))
    log = curve.open("a")
    started = time.time()
    weights = options.out / "nuclei-compact.safetensors"
    while True:
        seconds = before + time.time() - started
        progress = step / options.steps if options.steps else seconds / (60 * options.minutes)
        finished = progress >= 1
        if step and (finished or step % 250 == 0):
            save_weights(average, weights)
            part = state_path.with_suffix(".part")
            torch.save(
                {**{k: v.state_dict() for k, v in kept.items()}, "step": step, "seconds": seconds, "drawn": drawn}, part
            )
            part.replace(state_path)
        if step and (finished or step % 1000 == 0):
            draw_curve(options.out)
            draw_pictures(weights, options.data, options.out)
        if finished:
            write_card(weights, options.data, options.out, options, step, seconds)
            break
        due = sum(progress >= r for r in rounds)
        if stream is None or due > drawn:
            fields, shares = outlines, MASK_SHARES
            if due:
                fields, shares = outlines + pseudo_masks(average, options.data, device), ALL_SHARES
            drawn, stream = due, None
        if stream is None or (progress >= CALM and not calm):
            calm = progress >= CALM
            stream = batches(Crops(fields, shares, options.seed + step, CALM_STRENGTH if calm else 1.0), size, workers)
        batch = {k: v.to(device, non_blocking=True) for k, v in next(stream).items()}
        parts = losses(model.train(), heads, batch, amp=True)
        total = parts["maps"] + parts["mask"] + 0.5 * parts["quality"] + 0.5 * parts["high"] + 0.4 * parts["types"]
        optimiser.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        for group in optimiser.param_groups:
            group["lr"] = options.rate * rate_at(progress)
        optimiser.step()
        step += 1
        decay = min(0.999, step / (step + 19))
        with torch.no_grad():
            for a, b in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
                a.lerp_(b, 1 - decay) if a.dtype.is_floating_point else a.copy_(b)
        for k, v in parts.items():
            running[k] = 0.98 * running.get(k, v.item()) + 0.02 * v.item()
        if step % 50 == 0:
            row = {"step": step, "seconds": round(seconds, 1), **{k: round(v, 4) for k, v in running.items()}}
            log.write(json.dumps(row) + "\n")
            log.flush()
            print(row, flush=True)


if __name__ == "__main__":
    main()
