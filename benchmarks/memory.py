"""Peak memory of `wsiseg run` on synthetic slides of two sizes: it must not grow with the slide.

    python -m benchmarks.memory [nuclei-compact:10000 nuclei-compact:20000 toy:5000 toy:10000]

The slide is a JPEG-compressed TIFF pyramid at 0.25 um that repeats a piece of real tissue. `toy` is SAM with a ViT of width 48 and an instance
decoder of width 32: random weights, scaled so that its maps give prompts; its masks are noise and are refused, so it has prompts, logits and
descriptors to forget, and no cells. Each run is a process of its own; peaks are what the kernel says of it (ru_maxrss).
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

import numpy as np
import tifffile
import torch
from PIL import Image
from skimage.data import immunohistochemistry

from benchmarks.common import write_results
from wsiseg.models.sam.instance_decoder import InstanceDecoder
from wsiseg.models.sam.model import SamModel
from wsiseg.models.testing import VIT_TOY, disturb, random_sam

if TYPE_CHECKING:
    from collections.abc import Iterator

PATCH = 1024  #: the slide repeats this patch


def patch() -> np.ndarray:
    """Real tissue at 0.25 um (scikit-image's immunohistochemistry, enlarged twice) -> uint8 (PATCH, PATCH, 3)."""
    return np.asarray(Image.fromarray(immunohistochemistry()).resize((PATCH, PATCH), Image.Resampling.BICUBIC))


def write_slide(path: Path, side: int) -> None:
    """A pyramid of three levels."""
    source = patch()
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for k, step in enumerate((1, 4, 16)):
            level = source[::step, ::step]
            size, tile = -(-side // step), min(256, len(level))
            count = -(-size // tile)

            def tiles(level: np.ndarray = level, tile: int = tile, count: int = count) -> Iterator[np.ndarray]:
                per = len(level) // tile
                for row in range(count):
                    for column in range(count):
                        yield level[row % per * tile :, column % per * tile :][:tile, :tile]

            file.write(
                tiles(),
                shape=(size, size, 3),
                dtype=np.uint8,
                tile=(tile, tile),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": 95},
                subfiletype=bool(k),
                resolution=(40_000 / step, 40_000 / step),
                resolutionunit="CENTIMETER",
            )


@torch.inference_mode()
def write_toy(path: Path) -> None:
    """The toy's checkpoint, in micro-sam's exported form."""
    torch.manual_seed(0)
    sam, decoder = random_sam(VIT_TOY), InstanceDecoder(32).eval()
    disturb(decoder)
    before = {k: v.clone() for k, v in decoder.state_dict().items()}
    model = SamModel(sam, decoder, mpp=0.25).ready(torch.device("cpu"), bf16=False)
    maps = model.encode(torch.from_numpy(patch()).permute(2, 0, 1)[None]).maps[0].flatten(1)
    for mlp in sam["mask_decoder"].output_hypernetworks_mlps:
        mlp.layers[-1].bias -= 0.5  # few positive logits
    scale, wanted = 2 / maps.std(1), torch.tensor([1.0, 1.2, 1.2])
    before["out_conv.weight"] *= scale[:, None, None, None]
    before["out_conv.bias"] = (before["out_conv.bias"] - maps.mean(1)) * scale + wanted
    torch.save({"model_state": sam.state_dict(), "decoder_state": before}, path)


def run(slide: Path, model: str, out: Path) -> dict[str, object]:
    """One `wsiseg run`."""
    command = [
        sys.executable,
        "-m",
        "wsiseg",
        "run",
        str(slide),
        "--model",
        model,
        "--out",
        str(out),
        "--mpp",
        "0.25",
        "--no-progress",
        "-q",
    ]
    started = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    manifest = json.loads(next(out.glob("*/manifest.json")).read_text())
    counts = manifest["counts"]
    return {
        "model": model,
        "tiles": counts["tiles"],
        "prompts": counts["prompts"],
        "cells": counts["cells"],
        "peak MB": usage.ru_maxrss / 1024,
        "minutes": (time.perf_counter() - started) / 60,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs",
        nargs="*",
        default=["nuclei-compact:10000", "nuclei-compact:20000", "toy:5000", "toy:10000"],
        metavar="MODEL:SIDE",
    )
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.environ["WSISEG_MODELS"] = str(folder / "models")
        write_toy(folder / "toy.pt")
        subprocess.run(
            [sys.executable, "-m", "wsiseg", "models", "import", str(folder / "toy.pt"), "--name", "toy"], check=True
        )
        for model, side in (text.split(":") for text in options.runs):
            slide = folder / f"{side}.tiff"
            if not slide.exists():
                write_slide(slide, int(side))
            rows.append({"side px": int(side)} | run(slide, model, folder / f"out-{side}-{model}"))
            print(rows[-1], flush=True)
    write_results("memory", rows, __doc__.split("\n\n", 2)[2].strip())


if __name__ == "__main__":
    main()
