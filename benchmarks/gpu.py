"""Throughput of SAM's encoders and of the mask decoder on one device, and what a standard slide would take.

    python -m benchmarks.gpu [--device auto] [--models B L H] [--seconds 5]

Random weights, bf16 on an accelerator and fp32 on a CPU. Images: uint8 tiles of 1024 x 1024 px in host memory to the image embedding, in the batch
size that is fastest. Prompts: single points on 8 tiles together, to logits on their windows and descriptors. The standard slide is 15 x 15 mm of
tissue at 0.25 um: 4489 tiles of 1024 px with 128 px shared, 653 000 prompts; its time here is that of the device alone, reading and outlining
being done beside it. Runs: `wsiseg run` on a synthetic slide, mm2 per second of wall time while tiles are worked on, the share of it in which the
device is busy by its own events, and wall seconds per stage, which overlap and on a GPU include waiting for it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.common import write_results
from benchmarks.memory import write_slide, write_toy
from wsiseg.models import pick_device
from wsiseg.models.sam.model import SamModel
from wsiseg.models.testing import VIT_B, VIT_H, VIT_L, VIT_TOY, random_sam

if TYPE_CHECKING:
    from collections.abc import Callable

ENCODERS = {"B": VIT_B, "L": VIT_L, "H": VIT_H, "toy": VIT_TOY}
TILES, PROMPTS = 4489, 653_000
STAGES = ("read", "wait_for_read", "encode", "prompt", "decode", "vectorise", "measure", "write", "stitch")


def rate(work: Callable[[], object], per_call: int, device: torch.device, seconds: float) -> float:
    """Items per second over at least ``seconds``, after one call to warm up."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    wait()
    started, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - started < seconds:
        work()
        wait()
        calls += 1
    return calls * per_call / (time.perf_counter() - started)


def peak_gb(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else float("nan")


@torch.inference_mode()
def device_rows(names: list[str], device: torch.device, seconds: float) -> list[dict[str, object]]:
    rows = []
    fast = device.type == "cuda"
    for name in names:
        model = SamModel(random_sam(ENCODERS[name]), None, mpp=0.25).ready(device, bf16=fast)
        if fast:
            torch.cuda.reset_peak_memory_stats(device)
        best, size = 0.0, 1
        for batch in (1, 2, 4, 8, 16) if fast else (1,):
            tiles = torch.randint(0, 256, (batch, 3, 1024, 1024), dtype=torch.uint8)
            tiles = tiles.pin_memory() if fast else tiles
            found = rate(lambda t=tiles, m=model: m.embed(t.to(device, non_blocking=True)), batch, device, seconds)
            best, size = max((best, size), (found, batch))
        per_tile, count = (128, 8) if fast else (4, 2)
        tiles = torch.randint(0, 256, (count, 3, 1024, 1024), dtype=torch.uint8, device=device)
        embeddings = model.encode(tiles)
        points = torch.rand(per_tile * count, 2, device=device) * 1024
        which = torch.arange(count, device=device).repeat_interleave(per_tile)
        prompts = rate(lambda m=model, e=embeddings, w=which, p=points: m.decode(e, w, p), len(points), device, seconds)
        rows.append(
            {
                "encoder": f"ViT-{name}",
                "images/s": best,
                "batch": size,
                "us per prompt": 1e6 / prompts,
                "peak GB": peak_gb(device),
                "standard slide, s": TILES / best + PROMPTS / prompts,
            }
        )
        print(rows[-1], flush=True)
    return rows


def busy_rows(device: torch.device, side: int) -> list[dict[str, object]]:
    """Busy share of whole runs, with the models that the memory benchmark uses."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.environ["WSISEG_MODELS"] = str(folder / "models")
        write_toy(folder / "toy.pt")
        subprocess.run(
            [sys.executable, "-m", "wsiseg", "models", "import", str(folder / "toy.pt"), "--name", "toy"], check=True
        )
        write_slide(folder / "slide.tiff", side)
        for name in ("nuclei-compact", "toy"):
            out = folder / name
            command = [
                "run",
                str(folder / "slide.tiff"),
                "--model",
                name,
                "--device",
                str(device),
                "--out",
                str(out),
                "--no-progress",
                "-q",
            ]
            subprocess.run([sys.executable, "-m", "wsiseg", *command], check=True)
            manifest = json.loads((out / "slide" / "manifest.json").read_text())
            mm2, seconds = manifest["seconds"]["total"] / manifest["seconds_per_mm2"], manifest["seconds"]
            rows.append(
                {
                    "model": name,
                    "tiles": manifest["counts"]["tiles"],
                    "mm2": mm2,
                    "prompts": manifest["counts"]["prompts"],
                    "mm2 per s": mm2 / seconds["tiles"],
                    "busy share": manifest["model_share"],
                }
                | {f"{stage}, s per mm2": seconds.get(stage, 0) / mm2 for stage in STAGES}
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--models", nargs="+", choices=ENCODERS, default=["B", "L", "H"])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--side", type=int, default=4096, help="of the synthetic slide, px")
    options = parser.parse_args()
    device = pick_device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    tables = {
        f"{name}: encoders and prompts": device_rows(options.models, device, options.seconds),
        f"{name}: runs": busy_rows(device, options.side),
    }
    write_results(f"gpu-{name.lower().replace(' ', '-')}", tables, __doc__.split("\n\n", 2)[2].strip())


if __name__ == "__main__":
    main()
