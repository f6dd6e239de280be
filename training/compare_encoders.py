"""Which encoder? Each is trained for the same processor time on the same crops, on hand-drawn outlines alone, then scored on development images.

    python -m training.compare_encoders --data DATA [--minutes 8]

Losses, crops and learning rate are those of `train_nuclei_compact.py` (without pseudo masks, and with a shorter moving average). On a CPU the
time to make the crops counts too, alike for all. A short budget shows which one learns fastest from little, which is what
the recipe on a CPU needs; on a GPU give it more minutes.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.accuracy import centre_points, every_click_a_cell
from benchmarks.apg_sweep import development_images
from benchmarks.common import automatic_points, cells_of, encode, write_results
from training.data import Crops, load_instances
from training.encoders import ENCODERS
from training.train_nuclei_compact import MASK_SHARES, TypeHeads, batches, losses, rate_at
from wsiseg.config import RunConfig
from wsiseg.evaluation.metrics import score
from wsiseg.evaluation.rasterize import rasterise
from wsiseg.models.nuclei_compact import LEARNED, NucleiCompact

RATE = 2e-3


def train(model: NucleiCompact, crops: Crops, budget: float, device: torch.device) -> tuple[NucleiCompact, int]:
    """Train for ``budget`` seconds of this process -> the moving average, and the steps that it took."""
    heads = TypeHeads(LEARNED, 64).to(device)
    average = copy.deepcopy(model).eval()
    optimiser = torch.optim.AdamW([*model.parameters(), *heads.parameters()], lr=RATE, weight_decay=0.02)
    stream = batches(crops, *((6, 0) if device.type == "cpu" else (64, 14)))
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start, step = clock(), 0
    while (progress := (clock() - start) / budget) < 1:
        batch = {k: v.to(device) for k, v in next(stream).items()}
        parts = losses(model.train(), heads, batch, amp=True)
        optimiser.zero_grad(set_to_none=True)
        (parts["maps"] + parts["mask"] + 0.5 * parts["quality"] + 0.5 * parts["high"] + 0.4 * parts["types"]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        for group in optimiser.param_groups:
            group["lr"] = RATE * rate_at(progress)
        optimiser.step()
        step += 1
        decay = min(0.995, step / (step + 19))  # short runs: a short memory
        with torch.no_grad():
            for a, b in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
                a.lerp_(b, 1 - decay) if a.dtype.is_floating_point else a.copy_(b)
    return average, step


def cost(model: NucleiCompact) -> tuple[float, float]:
    """GMAC and CPU milliseconds (one thread) of the encoder for a megapixel."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    images = torch.zeros(1, 3, 1024, 1024, dtype=torch.uint8)
    with torch.inference_mode():
        with FlopCounterMode(display=False) as counter:
            model.encode(images)
        start = time.process_time()
        model.encode(images)
        seconds = time.process_time() - start
    torch.set_num_threads(before)
    return counter.get_total_flops() / 2 / 1.048576e9, seconds / 1.048576 * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0, help="processor time for each encoder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", choices=list(ENCODERS), nargs="+", default=list(ENCODERS))
    options = parser.parse_args()
    device = torch.device(
        "cuda" if options.device == "auto" and torch.cuda.is_available() else options.device.replace("auto", "cpu")
    )
    outlines = [f for name in MASK_SHARES for f in load_instances(options.data, name)]
    images = development_images(options.data)
    config = RunConfig()
    by_point = every_click_a_cell(config)
    rows: list[dict[str, object]] = []
    for name in options.only:
        torch.manual_seed(0)
        model = NucleiCompact()
        model.pyramid = ENCODERS[name]()
        parameters = sum(p.numel() for p in model.pyramid.parameters()) / 1e6
        average, steps = train(
            model.to(device).to(memory_format=torch.channels_last),
            Crops(outlines, MASK_SHARES, 0),
            60 * options.minutes,
            device,
        )
        average = average.cpu().ready(torch.device("cpu"), bf16=False)
        gmac, milliseconds = cost(average)
        row: dict[str, object] = {
            "encoder": name,
            "parameters (M)": parameters,
            "GMAC/Mpx": gmac,
            "CPU ms/Mpx": milliseconds,
            "steps": steps,
        }
        for collection in ("tnbc", "dsb2018"):
            found: dict[str, list[float]] = {"APG": [], "point": []}
            for of, image, label in images:
                if of != collection:
                    continue
                e = encode(average, image)
                for key, points, settings in (
                    ("APG", automatic_points(e, config), config),
                    ("point", centre_points(label), by_point),
                ):
                    found[key].append(
                        score(
                            label, rasterise(cells_of(average, e, points, label.shape, settings).polygons, label.shape)
                        )["aji"]
                    )
            row |= {f"{collection} {k} AJI": float(np.mean(v)) for k, v in found.items()}
        print(row, flush=True)
        rows.append(row)
    write_results(
        "encoders",
        rows,
        f"`training/compare_encoders.py --minutes {options.minutes:g}`: {device.type} time for each, outlines only.",
    )


if __name__ == "__main__":
    main()
