"""Move the border of the finished network's masks, then teach it how good they are: only the quality head is trained.

    python -m training.calibrate_quality --data DATA --weights OUT/nuclei-compact.safetensors --out OUT/calibrated.safetensors --minutes 8

During training the head judges the masks of weights that still move; here it judges those of the moving average, single ones and the three
answers to one prompt, on hand-drawn outlines with strong augmentation, so that it sees many bad masks. Its inputs are those of
`NucleiCompact.decode`. Before, the logits of all masks are raised by ``--border``, a bias of the last layer. Loss: cross-entropy of predicted
with true IoU, and for pairs of masks of a batch the logistic loss of their order.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from training.data import Crops, load_instances
from training.pseudo_labels import mark_doubtful
from training.train_nuclei_compact import batches, rate_at, save_weights
from wsiseg.finetune.compact import compare_masks, is_known
from wsiseg.finetune.crops import INSTANCES
from wsiseg.models.morphology import windows
from wsiseg.models.nuclei_compact import MASK_STRIDE_PX, MASKS, WINDOW_SIZE, NucleiCompact

SHARES = {"nuinsseg": 0.4, "tnbc": 0.35, "dsb2018_histology": 0.25}  # hand-drawn outlines only
BORDER = 0.5  #: added to the logits of all masks; chosen on the development sets (training/README.md)
PROMPTS = 40  #: per batch that are answered with three masks


def order_loss(predicted: Tensor, true: Tensor) -> Tensor:
    """Logistic loss of the order of pairs, weighted by how far apart their true IoU are."""
    other = torch.randperm(len(true), device=true.device)
    gap = true - true[other]
    return (F.softplus(-(predicted - predicted[other]) * gap.sign()) * gap.abs()).sum() / gap.abs().sum().clamp_min(
        1e-6
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--border", type=float, default=BORDER, help="added to the logits of all masks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = torch.device(
        "cuda" if options.device == "auto" and torch.cuda.is_available() else options.device.replace("auto", "cpu")
    )
    torch.manual_seed(options.seed)
    model = NucleiCompact()
    model.load_state_dict(load_file(options.weights))
    with torch.no_grad():
        model.controller[2].bias[-1] += (
            options.border
        )  # the last of the generated parameters: the bias of the mask's logits
    model = model.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(requires_grad=False)
    model.quality.requires_grad_(requires_grad=True)
    average = copy.deepcopy(model)
    optimiser = torch.optim.AdamW(model.quality.parameters(), lr=1e-3, weight_decay=0.05)
    fields = [f for name in SHARES for f in load_instances(options.data, name)]
    mark_doubtful(model, fields, device)
    stream = batches(Crops(fields, SHARES, options.seed), *((6, 1) if device.type == "cpu" else (64, 14)))
    started, step, running = time.time(), 0, 0.0
    while (progress := (time.time() - started) / (60 * options.minutes)) < 1:
        batch = {k: v.to(device) for k, v in next(stream).items()}
        tile = torch.arange(len(batch["image"]), device=device).repeat_interleave(INSTANCES)
        points, owners = batch["points"].flatten(0, 1), batch["owners"].flatten()
        sure = (owners > 0) | is_known(batch["weight"], tile, points)
        with torch.no_grad():
            e = model.encode(batch["image"])
        several = (owners > 0).nonzero()[:, 0]
        several = several[torch.randperm(len(several), device=device)[:PROMPTS]]
        loss = torch.zeros((), device=device)
        for rows, count in ((sure.nonzero()[:, 0], 1), (several, MASKS)):
            if not len(rows):
                continue
            masks = model.decode(e, tile[rows], points[rows], multimask=count > 1)
            mine = owners[rows].repeat_interleave(count)
            origin = masks.origin_xy // MASK_STRIDE_PX
            which = tile[rows].repeat_interleave(count)
            window = windows(batch["label"].float()[:, None] + 1, which, masks.origin_xy, WINDOW_SIZE * MASK_STRIDE_PX)
            known = windows(batch["weight"][:, None], which, origin, WINDOW_SIZE)[:, 0] * (
                F.max_pool2d(window, MASK_STRIDE_PX)[:, 0] > 0
            )
            target = F.avg_pool2d((window == (mine + 1)[:, None, None, None]).float(), MASK_STRIDE_PX)[:, 0]
            _, true = compare_masks(masks.logits, target, known)
            true = true * (mine > 0)
            predicted = torch.logit(masks.predicted_iou, eps=1e-5)
            loss = (
                loss
                + F.binary_cross_entropy_with_logits(predicted, true)
                + 0.5 * order_loss(predicted[mine > 0], true[mine > 0])
            )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        for group in optimiser.param_groups:
            group["lr"] = 1e-3 * rate_at(progress)
        optimiser.step()
        step += 1
        with torch.no_grad():
            for a, b in zip(average.quality.parameters(), model.quality.parameters(), strict=True):
                a.lerp_(b, 1 - min(0.99, step / (step + 9)))
        running = 0.98 * running + 0.02 * loss.item() if step > 1 else loss.item()
        if step % 50 == 0:
            print(step, round(time.time() - started), round(running, 4), flush=True)
    save_weights(average, options.out)


if __name__ == "__main__":
    main()
