"""Train ``nuclei-compact``: the recipe of the weights that ship in the package.

    python -m training.train_nuclei_compact --data DATA --out OUT --minutes 45 [--device auto]

The encoder starts from ImageNet weights (`imagenet.py`). First the network learns outlines from drawn masks (nuinsseg, tnbc,
dsb2018_histology; silver masks of nucls_mini). Then its moving average draws one mask per annotated dot of brca_m2c/train (pseudo masks: real,
permissively licensed H&E with cell types) and marks what nuinsseg's annotators may have left out (`pseudo_labels.py`), and training continues
with both; later the better teacher does so again. Types come from the dots. Only the data folder's `train` splits are trained on.

A run that was stopped continues from its last save when the same command is given again; one that was paused does not lose time. With `--steps`
instead of `--minutes` an uninterrupted run on the same CPU, threads and workers gives the same bytes. `OUT` then holds the weights (a moving
average), their card, the losses as rows and as a plot, and pictures.

Losses: those of `wsiseg.finetune.compact`, which adapting the network uses too, and
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

from training.data import TYPES, Crops, load_instances
from training.imagenet import find_checkpoint, load_imagenet
from training.pseudo_labels import mark_doubtful, pseudo_masks
from training.record import draw_curve, draw_pictures, list_images, write_card
from wsiseg.finetune.compact import SHARES, answer
from wsiseg.finetune.crops import CROP, INSTANCES
from wsiseg.models.nuclei_compact import LEARNED, NucleiCompact

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Chance of each collection in a crop. nuinsseg alone has other organs than breast (31); tnbc has the most careful outlines, and pathological
#: nuclei; dsb2018_histology is varied in stain but most of its images lack eosin; nucls_mini is small and its outlines are machine-drawn.
MASK_SHARES = {"nuinsseg": 0.45, "tnbc": 0.28, "dsb2018_histology": 0.20, "nucls_mini": 0.07}
DOTS_SHARE = 0.3  #: of brca_m2c, once it has pseudo masks: the only dots for types in number, but breast again
ALL_SHARES = {**{name: share * (1 - DOTS_SHARE) for name, share in MASK_SHARES.items()}, "brca_m2c": DOTS_SHARE}
ROUNDS = (0.25, 0.55)  #: share of the run after which the pseudo labels are made (again)
ENCODER_RATE = (
    0.4  #: learning rate of the encoder, which starts from ImageNet, relative to the rest, which starts from nothing
)
WEIGHT_DECAY = 0.03
LONGEST_STEP = 30.0  #: seconds; a longer step was a pause of the process and does not count
CALM = 0.8  #: from this share of the run on, crops are damaged and restained less often: the end is spent on images as they are
CALM_STRENGTH = 0.35
WARM_UP = 0.05  #: share of the run in which the learning rate rises; then it falls as a cosine


class TypeHeads(nn.Module):
    """Cosine classifiers, one per collection with types; used only here. Class 0 of the F_l head is background."""

    def __init__(self, descriptor: int, low: int) -> None:
        super().__init__()
        self.descriptor = nn.ParameterList([nn.Parameter(torch.randn(n, descriptor)) for n in TYPES.values()])
        self.low = nn.ParameterList([nn.Parameter(torch.randn(n + 1, low)) for n in TYPES.values()])


def losses(model: NucleiCompact, heads: TypeHeads, batch: dict[str, Tensor], amp: bool) -> dict[str, Tensor]:
    """Every loss of one batch."""
    found = answer(model, batch, amp=amp)
    out, points, tile = dict(found.losses), found.points, found.tile
    types, collection = batch["types"].flatten(), batch["collection"].repeat_interleave(INSTANCES)
    low_at = found.embeddings.low[
        tile, :, (points[:, 1] / 8).long().clamp(max=CROP // 8 - 1), (points[:, 0] / 8).long().clamp(max=CROP // 8 - 1)
    ]
    out["types"] = torch.zeros((), device=points.device)
    for k in range(len(TYPES)):
        mine = (collection == k) & (types > 0) & (found.iou > 0.3)
        if mine.sum() > 3:
            learned = F.normalize(found.masks.descriptors[mine, :LEARNED], dim=1)
            logits = 12 * learned @ F.normalize(heads.descriptor[k], dim=1).T
            out["types"] = out["types"] + _balanced(logits, types[mine] - 1)
        mine = (collection == k) & ((types > 0) | (found.owners == 0))
        if mine.sum() > 3:
            logits = 12 * low_at[mine] @ F.normalize(heads.low[k], dim=1).T
            out["types"] = out["types"] + 0.5 * _balanced(logits, types[mine])
    return out


def _balanced(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy with weights that flatten the class frequencies half-way (square root)."""
    count = torch.bincount(target, minlength=logits.shape[1]).float()
    weight = torch.where(count > 0, count.clamp_min(1).rsqrt(), torch.zeros_like(count))
    return F.cross_entropy(logits, target, weight=weight / weight.max(), label_smoothing=0.05)


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


class TrainingClock:
    """Seconds spent on training, also over resumed runs; the time of a process that was paused is left out."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self._last = time.monotonic()

    def tick(self, longest: float = LONGEST_STEP) -> None:
        """Count the time since the last call, at most ``longest``."""
        now = time.monotonic()
        self.seconds += min(now - self._last, longest)
        self._last = now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--minutes", type=float, default=45.0, help="how long to train; the learning rate follows the clock"
    )
    length.add_argument("--steps", type=int, help="how many steps to train instead")
    parser.add_argument("--batch", type=int, help="crops per step (8; 64 on a GPU)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, help="processes that make crops (1; 14 with a GPU)")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--init", type=Path, help="start from these weights (safetensors)")
    start.add_argument("--imagenet", type=Path, help="checkpoint of the encoder (that of the dependency group `train`)")
    parser.add_argument("--rate", type=float, default=2e-3, help="largest learning rate")
    options = parser.parse_args()
    device = torch.device(
        "cuda" if options.device == "auto" and torch.cuda.is_available() else options.device.replace("auto", "cpu")
    )
    size = options.batch or (8 if device.type == "cpu" else 64)
    workers = options.workers or (1 if device.type == "cpu" else 14)
    random.seed(options.seed)
    np.random.seed(options.seed)
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    state_path = options.out / "state.pt"

    model = NucleiCompact()
    if options.init:
        missing, unexpected = model.load_state_dict(load_file(options.init), strict=False)
        print(f"initialised from {options.init}; not in it: {missing}; not used: {unexpected}", flush=True)
    else:
        try:
            load_imagenet(model.pyramid.encoder, options.imagenet or find_checkpoint())
        except FileNotFoundError as error:
            parser.error(str(error))
    model = model.to(device).to(memory_format=torch.channels_last)
    heads = TypeHeads(LEARNED, 64).to(device)
    average = copy.deepcopy(model).eval()
    encoder = list(model.pyramid.encoder.parameters())
    others = [p for name, p in model.named_parameters() if not name.startswith("pyramid.encoder.")]
    others += heads.parameters()
    optimiser = torch.optim.AdamW(
        [{"params": others, "share": 1.0}, {"params": encoder, "share": ENCODER_RATE}],
        lr=options.rate,
        weight_decay=WEIGHT_DECAY,
    )
    kept = {"model": model, "heads": heads, "average": average, "optimiser": optimiser}
    step, drawn, clock = 0, 0, TrainingClock()
    if state_path.exists():
        state = torch.load(state_path, map_location=device, weights_only=True)
        for name, thing in kept.items():
            thing.load_state_dict(state[name])
        step, drawn, clock = state["step"], state["drawn"], TrainingClock(state["seconds"])
        print(f"resuming at step {step}", flush=True)

    list_images(options.data, options.out)
    outlines = [f for name in MASK_SHARES for f in load_instances(options.data, name)]
    rounds = (0.0, *ROUNDS) if options.init else ROUNDS  # weights that are trained already can draw at once
    stream, running, calm = None, {}, False
    curve = options.out / "curve.jsonl"
    rows = (
        [line for line in curve.read_text().splitlines() if json.loads(line)["step"] <= step] if curve.exists() else []
    )
    curve.write_text("".join(f"{line}\n" for line in rows))
    log = curve.open("a")
    clock.tick(0.0)  # loading does not count
    weights = options.out / "nuclei-compact.safetensors"
    while True:
        progress = step / options.steps if options.steps else clock.seconds / (60 * options.minutes)
        finished = progress >= 1
        if step and (finished or step % 250 == 0):
            save_weights(average, weights)
            part = state_path.with_suffix(".part")
            torch.save(
                {
                    **{k: v.state_dict() for k, v in kept.items()},
                    "step": step,
                    "seconds": clock.seconds,
                    "drawn": drawn,
                },
                part,
            )
            part.replace(state_path)
        if step and (finished or step % 1000 == 0):
            draw_curve(options.out)
            draw_pictures(weights, options.data, options.out)
        if finished:
            write_card(weights, options.data, options.out, options, step, clock.seconds)
            break
        due = sum(progress >= r for r in rounds)
        if stream is None or due > drawn:
            fields, shares = outlines, MASK_SHARES
            if due:
                doubtful = mark_doubtful(average, outlines, device)
                fields, shares = outlines + pseudo_masks(average, options.data, device), ALL_SHARES
                print(f"pseudo labels; {doubtful:.1%} of the incomplete collections is doubtful", flush=True)
                clock.tick(math.inf)
            drawn, stream = due, None
        if stream is None or (progress >= CALM and not calm):
            calm = progress >= CALM
            stream = batches(Crops(fields, shares, options.seed + step, CALM_STRENGTH if calm else 1.0), size, workers)
        batch = {k: v.to(device, non_blocking=True) for k, v in next(stream).items()}
        parts = losses(model.train(), heads, batch, amp=True)
        total = sum(share * parts[name] for name, share in SHARES.items()) + 0.4 * parts["types"]
        optimiser.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_([*others, *encoder], 5.0)
        for group in optimiser.param_groups:
            group["lr"] = options.rate * group["share"] * rate_at(progress)
        optimiser.step()
        step += 1
        decay = min(0.999, step / (step + 19))
        with torch.no_grad():
            for a, b in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
                a.lerp_(b, 1 - decay) if a.dtype.is_floating_point else a.copy_(b)
        clock.tick()
        for k, v in parts.items():
            running[k] = 0.98 * running.get(k, v.item()) + 0.02 * v.item()
        if step % 50 == 0:
            row = {"step": step, "seconds": round(clock.seconds, 1), **{k: round(v, 4) for k, v in running.items()}}
            log.write(json.dumps(row) + "\n")
            log.flush()
            print(row, flush=True)


if __name__ == "__main__":
    main()
