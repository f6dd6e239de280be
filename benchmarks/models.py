"""SAM's networks, ours beside `segment_anything`'s own, on the same random weights in the same run.

    python -m benchmarks.models [--models B L H] [--rounds 3]

A and B alternate. Seconds are CPU seconds of this process on one thread, medians over the rounds; memory is the peak resident set above what the
process held before. Per model: the image encoder on one 1024 x 1024 tile. Once, for all have the same: the mask decoder at 1, 16, 64 and
256 prompts, against SamPredictor.predict_torch (its upsampling to 1024 x 1024 included, as that is what it returns; ours stops at the logits,
from which outlines are traced: benchmarks/outlines.py).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import sys
import time
import types
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.common import write_results
from wsiseg.models.sam import encoder as sam_encoder
from wsiseg.models.sam.instance_decoder import InstanceDecoder
from wsiseg.models.sam.model import SamModel
from wsiseg.models.sam.modules import modeling
from wsiseg.testing import VIT_B, VIT_H, VIT_L, VIT_TOY, disturb, random_sam

if TYPE_CHECKING:
    from collections.abc import Callable

ENCODERS = {"B": VIT_B, "L": VIT_L, "H": VIT_H}
PROMPTS = (1, 16, 64, 256)


def _resident(what: str) -> float:
    """MB of VmRSS or VmHWM."""
    return int(Path("/proc/self/status").read_text().split(f"{what}:")[1].split()[0]) / 1024


def measure(function: Callable[[], Any]) -> tuple[Any, float, float]:
    """Result, CPU seconds and peak MB of one call."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the call before has freed is not at hand for this one
    Path("/proc/self/clear_refs").write_text("5")
    before, started = _resident("VmRSS"), time.process_time()
    result = function()
    return result, time.process_time() - started, _resident("VmHWM") - before


def alternate(rounds: int, *functions: Callable[[], Any]) -> tuple[list[Any], list[float], list[float]]:
    """Results, median seconds and highest peaks of several functions, called in turn."""
    found = [[measure(f) for f in functions] for _ in range(rounds)]
    return (
        [x[0] for x in found[-1]],
        [statistics.median(r[k][1] for r in found) for k in range(len(functions))],
        [max(r[k][2] for r in found) for k in range(len(functions))],
    )


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def predictor_class() -> Any:
    """SamPredictor; it imports names of torchvision that this benchmark never calls."""
    if "torchvision" not in sys.modules:
        for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
            sys.modules[name] = types.ModuleType(name)
        sys.modules["torchvision.transforms.functional"].resize = None
        sys.modules["torchvision.transforms.functional"].to_pil_image = None
    modeling()
    stand_in = types.ModuleType("segment_anything")
    stand_in.__path__ = [str(Path(modeling().__file__).parents[1])]
    sys.modules["segment_anything"] = stand_in
    from segment_anything.predictor import SamPredictor

    return SamPredictor


def encoders(names: list[str], rounds: int) -> list[dict[str, object]]:
    rows = []
    image = torch.randn(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(0))
    for name in names:
        encoder = random_sam(ENCODERS[name])["image_encoder"]
        (wanted, got), seconds, peaks = alternate(
            rounds, lambda e=encoder: e(image), lambda e=encoder: sam_encoder.encode(e, image)
        )
        rows.append(
            {
                "encoder": f"ViT-{name}",
                "reference s": seconds[0],
                "ours s": seconds[1],
                "ratio": seconds[1] / seconds[0],
                "reference MB": peaks[0],
                "ours MB": peaks[1],
                "memory ratio": peaks[1] / peaks[0],
                "difference": relative(got, wanted),
            }
        )
        print(rows[-1], flush=True)
        half, x = encoder.bfloat16(), image.bfloat16()
        _, seconds, peaks = alternate(1, lambda e=half, x=x: sam_encoder.encode(e, x))
        rows[-1] |= {"ours bf16 s": seconds[0]}
    return rows


def decoders(rounds: int) -> list[dict[str, object]]:
    networks = random_sam(VIT_TOY)
    model = SamModel(networks, None, mpp=0.25).ready(torch.device("cpu"), bf16=False)
    sam = modeling().Sam(networks["image_encoder"], networks["prompt_encoder"], networks["mask_decoder"]).eval()
    predictor = predictor_class()(sam)
    tile = torch.randint(0, 256, (1, 3, 1024, 1024), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    embeddings = model.encode(tile)
    predictor.set_torch_image(tile, (1024, 1024))
    rows = []
    for count in PROMPTS:
        points = torch.rand(count, 2, generator=torch.Generator().manual_seed(2)) * 1024
        which, labels = torch.zeros(count, dtype=torch.long), torch.ones(count, 1)

        def ours(points=points, which=which):
            shared = model.share(predictor.features)  # what the prompts of a tile share is counted
            return model.decode(replace(embeddings, extra=embeddings.extra | vars(shared)), which, points)

        def theirs(points=points, labels=labels):
            return predictor.predict_torch(points[:, None] - 0.5, labels, multimask_output=False)

        (wanted, got), seconds, peaks = alternate(rounds if count < 256 else 1, theirs, ours)
        logits = wanted[2][:, 0]
        crops = torch.stack(
            [x[v : v + 64, u : u + 64] for x, (u, v) in zip(logits, (got.origin_xy // 4).tolist(), strict=True)]
        )
        rows.append(
            {
                "prompts": count,
                "predict_torch ms": 1e3 * seconds[0] / count,
                "ours ms": 1e3 * seconds[1] / count,
                "ratio": seconds[1] / seconds[0],
                "predict_torch MB": peaks[0] / count,
                "ours MB": peaks[1] / count,
                "memory ratio": peaks[1] / max(peaks[0], 1e-9),
                "difference of logits": float((crops - got.logits).abs().max()),
            }
        )
        print(rows[-1], flush=True)
    return rows


def instance_decoder() -> list[dict[str, object]]:
    torch.manual_seed(0)
    network = InstanceDecoder().eval()
    disturb(network)
    embedding = torch.randn(1, 256, 64, 64)
    (maps, _), seconds, peaks = measure(lambda: network.folded()(embedding))
    return [
        {
            "network": "instance decoder (UNETR), 1024 px",
            "s": seconds,
            "MB": peaks,
            "finite": bool(maps.isfinite().all()),
        }
    ]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=ENCODERS, default=list(ENCODERS))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tables = {
        "Mask decoder": decoders(options.rounds),
        "Instance decoder": instance_decoder(),
        "Image encoder": encoders(options.models, options.rounds),
    }
    write_results("models", tables, __doc__.split("\n\n", 2)[2].strip())


if __name__ == "__main__":
    main()
