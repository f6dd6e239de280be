"""Train ``nuclei-compact``: the recipe of the weights that ship in the package.

    python training/train_nuclei_compact.py --data DATA --out OUT [--steps 4200] [--device auto]

One run, two parts. First the network learns outlines from hand-drawn masks (tnbc, dsb2018_histology; silver masks of nucls_mini). Then its moving
average draws one mask per annotated dot of brca_m2c/train (pseudo masks: real, permissively licensed H&E with cell types), and training
goes on with both; types come from the dots. What may be trained on is the data folder's `train` splits only.

Losses, each a mean over what it covers:
    maps        cross-entropy + Dice of the foreground, L1 of the two distance maps (twice the weight inside nuclei)
    mask        cross-entropy + Dice of every prompt's window
    quality     cross-entropy of the predicted IoU with the true IoU (0 for clicks on background)
    high        pairs of places on F_h: nucleus-nucleus alike, nucleus-background not
    types       cosine classifier on the descriptors, and on F_l at the prompts (heads are thrown away)
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from data import CROP, INSTANCES, TYPES, Crops, Field, distances_of, load_instances, load_points
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wsiseg.models.nuclei_compact import CELL_PX, LEARNED, WINDOW_CELLS, NucleiCompact, _windows
from wsiseg.records import Embeddings

MASK_SHARES = {"tnbc": 0.42, "dsb2018_histology": 0.46, "nucls_mini": 0.12}
ALL_SHARES = {"tnbc": 0.26, "dsb2018_histology": 0.26, "nucls_mini": 0.10, "brca_m2c": 0.38}


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
    e = Embeddings(e.high.float(), e.low.float(), e.maps.float(), {k: v.float() for k, v in e.extra.items()})
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
    masks = model.decode(e, tile, points)
    origin = masks.origin_xy // CELL_PX
    label = batch["label"].float()[:, None] + 1  # 0 is "outside the crop" after windowing
    window = _windows(label, tile, origin * CELL_PX, WINDOW_CELLS * CELL_PX)
    inside = F.max_pool2d(window, CELL_PX)[:, 0] > 0
    known = _windows(weight[:, None], tile, origin, WINDOW_CELLS)[:, 0] * inside
    target = F.avg_pool2d((window == (owners + 1)[:, None, None, None]).float(), CELL_PX)[:, 0]
    click = owners > 0
    bce = F.binary_cross_entropy_with_logits(masks.logits, target, reduction="none")
    per = (bce * known).sum((1, 2)) / known.sum((1, 2)).clamp_min(1) * 8 + dice(masks.logits.sigmoid(), target, known, (1, 2))
    out["mask"] = per[click].mean()
    with torch.no_grad():
        hard, truth = (masks.logits > 0) & (known > 0), (target >= 0.5) & (known > 0)
        iou = (hard & truth).sum((1, 2)) / (hard | truth).sum((1, 2)).clamp_min(1) * click
    out["quality"] = F.binary_cross_entropy(masks.quality, iou)

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
    low_at = e.low[tile, :, (points[:, 1] / 8).long().clamp(max=CROP // 8 - 1), (points[:, 0] / 8).long().clamp(max=CROP // 8 - 1)]
    out["types"] = torch.zeros((), device=images.device)
    for k in range(len(TYPES)):
        mine = (collection == k) & (types > 0) & (iou > 0.3)
        if mine.sum() > 3:
            logits = 12 * F.normalize(masks.descriptors[mine, :LEARNED], dim=1) @ F.normalize(heads.descriptor[k], dim=1).T
            out["types"] = out["types"] + _balanced(logits, types[mine] - 1)
        mine = (collection == k) & ((types > 0) | ~click)
        if mine.sum() > 3:
            logits = 12 * low_at[mine] @ F.normalize(heads.low[k], dim=1).T
            out["types"] = out["types"] + 0.5 * _balanced(logits, types[mine])
    return out


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
        score = (masks.quality * masks.stability).cpu().numpy()
        logits = F.interpolate(masks.logits[:, None], scale_factor=CELL_PX, mode="bilinear", align_corners=False)[:, 0].cpu().numpy()
        foreground = F.interpolate(e.maps[:, :1], scale_factor=CELL_PX, mode="bilinear", align_corners=False)[0, 0]
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


def _stream(fields: list[Field], shares: dict[str, float], batch: int, seed: int):  # noqa: ANN202
    return iter(torch.utils.data.DataLoader(Crops(fields, shares, seed), batch_size=batch, num_workers=1, prefetch_factor=4))


def _save(model: nn.Module, path: Path) -> None:
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4200)
    parser.add_argument("--outline-steps", type=int, default=1300, help="steps before the pseudo masks are drawn")
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--init", type=Path, help="continue from these weights (safetensors)")
    parser.add_argument("--rate", type=float, default=2e-3, help="largest learning rate")
    options = parser.parse_args()
    device = torch.device("cuda" if options.device == "auto" and torch.cuda.is_available() else options.device.replace("auto", "cpu"))
    random.seed(options.seed)
    np.random.seed(options.seed)
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)

    model = NucleiCompact().to(device).to(memory_format=torch.channels_last)
    if options.init:
        model.load_state_dict(load_file(options.init))
    heads = TypeHeads(LEARNED, 64).to(device)
    average = copy.deepcopy(model).eval()
    parameters = [*model.parameters(), *heads.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=options.rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, options.rate, total_steps=options.steps, pct_start=0.06)
    outlines = [f for name in MASK_SHARES for f in load_instances(options.data, name)]
    stream = _stream(outlines, MASK_SHARES, options.batch, options.seed)
    log = (options.out / "curve.jsonl").open("w")
    started, running = time.time(), {}
    for step in range(options.steps):
        if step == options.outline_steps:
            _save(average, options.out / "outlines.safetensors")
            dots = pseudo_masks(average, options.data, device)
            stream = _stream(outlines + dots, ALL_SHARES, options.batch, options.seed + 1)
        batch = {k: v.to(device, non_blocking=True) for k, v in next(stream).items()}
        parts = losses(model.train(), heads, batch, amp=True)
        total = parts["maps"] + parts["mask"] + 0.5 * parts["quality"] + 0.5 * parts["high"] + 0.4 * parts["types"]
        optimiser.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimiser.step()
        schedule.step()
        decay = min(0.999, (step + 1) / (step + 20))
        with torch.no_grad():
            for a, b in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
                a.lerp_(b, 1 - decay) if a.dtype.is_floating_point else a.copy_(b)
        for k, v in parts.items():
            running[k] = 0.98 * running.get(k, v.item()) + 0.02 * v.item()
        if step % 50 == 49:
            row = {"step": step + 1, "seconds": round(time.time() - started, 1), **{k: round(v, 4) for k, v in running.items()}}
            log.write(json.dumps(row) + "\n")
            log.flush()
            print(row, flush=True)
        if step % 500 == 499 or step + 1 == options.steps:
            _save(average, options.out / "nuclei-compact.safetensors")


if __name__ == "__main__":
    main()
