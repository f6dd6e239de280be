"""Networks of the SAM family, ours beside their authors' own code, on the same random weights in the same run.

    python -m benchmarks.models [--models B L H] [--rounds 3]          SAM beside segment_anything: results/models.md
    python -m benchmarks.models --hub [--rounds 3]                     SAM 2.1 and SAM 3 beside transformers: results/models_hub.md

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
from wsiseg.errors import counted
from wsiseg.models.sam import encoder as sam_encoder
from wsiseg.models.sam.instance_decoder import InstanceDecoder
from wsiseg.models.sam.model import SamModel
from wsiseg.models.sam.modules import modeling
from wsiseg.models.testing import VIT_B, VIT_H, VIT_L, VIT_TOY, disturb, random_sam
from wsiseg.models.transformers.networks import library
from wsiseg.models.transformers.recipe import Recipe
from wsiseg.models.transformers.sam2 import Sam2
from wsiseg.models.transformers.sam3 import Sam3

if TYPE_CHECKING:
    from collections.abc import Callable

ENCODERS = {"B": VIT_B, "L": VIT_L, "H": VIT_H}
PROMPTS = (1, 16, 64, 256)
HUB = """
A and B alternate. Seconds are CPU seconds of this process on one thread, medians over the rounds; memory is the peak resident set above what the
process held before. Weights are random. SAM 2.1 is its released Hiera-T configuration; SAM 3 its own, with 4 of 32 layers in the trunk, so that
a pass takes seconds on a CPU: what is saved per layer is the same, the necks weigh more than they should. transformers is used as its pages say,
without gradients. Encode: one tile, `get_image_embeddings` of the library (SAM 3 with detector: and `get_vision_features` of `Sam3Model`, a second
pass of the trunk, since two models do not share it); ours includes the two feature maps of Chain-of-Prompts and what the prompts of a tile share.
Prompts: points on an encoded tile, three masks each, in the window around each point (ours) or on the whole tile (the library, which has no
windows); once ours is on the whole tile as well. Tile: both together, as a run does it. The difference is the largest of the logits in the
windows, over the largest logit.
"""


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


def hub_pair(name: str) -> tuple[Any, Any, Any]:
    """(ours, the library's model for points, the library's detector or ``None``), all with the same weights."""
    transformers = library()
    content: dict[str, Any]
    if name.startswith("SAM 2.1"):
        content = transformers.Sam2Config().to_dict()
    else:
        trunk = {"model_type": "sam3_vit_model", "num_hidden_layers": 4, "global_attn_indexes": [3]}
        scales = (
            [4.0, 2.0, 1.0, 0.5] if "detector" in name else [4.0, 2.0, 1.0]
        )  # (its model for points wants three levels)
        vision = {"model_type": "sam3_vision_model", "backbone_config": trunk, "scale_factors": scales}
        content = transformers.Sam3TrackerConfig.from_dict({"vision_config": vision}).to_dict()
        if "detector" in name:
            detector = transformers.Sam3Config.from_dict({"vision_config": vision}).to_dict()
            content = {"model_type": "sam3_video", "detector_config": detector}
            content |= {"tracker_config": {"model_type": "sam3_tracker_video", "vision_config": vision}}
    recipe = Recipe(config=content, pixel_mean=(127.5,) * 3, pixel_sd=(127.5,) * 3)
    network = (Sam2 if name.startswith("SAM 2.1") else Sam3)(recipe, mpp=0.25)
    network.compute_constants()
    torch.manual_seed(0)
    weights = {
        k: torch.randn(v.shape) * 0.02 if v.ndim > 1 else torch.ones(v.shape) for k, v in network.state_dict().items()
    }
    weights |= {k: v * 0.1 for k, v in weights.items() if k.endswith("bias")}
    network.load_state_dict(weights, assign=True)
    if name.startswith("SAM 2.1"):
        points = transformers.Sam2Model(transformers.Sam2Config.from_dict(content)).eval()
        points.load_state_dict({k.removeprefix("sam."): v for k, v in weights.items()}, assign=True)
        return network.ready(torch.device("cpu"), bf16=False), points, None
    inner = content.get("tracker_config", content)
    three = {**inner, "vision_config": {**inner["vision_config"], "scale_factors": [4.0, 2.0, 1.0]}}
    points = transformers.Sam3TrackerModel(transformers.Sam3TrackerConfig.from_dict(three)).eval()
    named = {}
    for key, value in weights.items():
        plain = key.replace("detector_model.vision_encoder.backbone", "backbone").replace("tracker_model.", "")
        named[plain.replace("backbone.", "vision_encoder.backbone.").replace("tracker_neck", "vision_encoder.neck")] = (
            value
        )
    points.load_state_dict({key: named[key] for key in points.state_dict()}, assign=True)
    detector_model = None
    if "detector" in name:
        detector_model = transformers.Sam3Model(transformers.Sam3Config.from_dict(content["detector_config"])).eval()
        own = {k.removeprefix("detector_model."): v for k, v in weights.items() if k.startswith("detector_model.")}
        detector_model.load_state_dict(own, assign=True)
    return network.ready(torch.device("cpu"), bf16=False), points, detector_model


def in_windows(wanted: torch.Tensor, got: Any, stride: float) -> float:
    """Difference of the whole tile's logits (N, 3, h, w) from those of the windows."""
    side = got.logits.shape[-1]
    corners = (got.origin_xy / stride).long().tolist()
    crops = torch.stack(
        [x[v : v + side, u : u + side] for x, (u, v) in zip(wanted.flatten(0, 1), corners, strict=True)]
    )
    return relative(got.logits, crops)


def hub_models(name: str, rounds: int) -> list[dict[str, object]]:
    network, points_model, detector = hub_pair(name)
    side, stride = network.input_px, network.mask_stride_px
    tile = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    pixels = (tile.float() - 127.5) / 127.5
    rows: list[dict[str, object]] = []

    def row(
        what: str, unit: str, count: int, found: tuple[list[Any], list[float], list[float]], difference: float
    ) -> None:
        _, seconds, peaks = found
        rows.append(
            {
                "model": name,
                "work": what,
                f"transformers {unit}": count / seconds[0],
                f"ours {unit}": count / seconds[1],
                "time ratio": seconds[1] / seconds[0],
                "transformers MB": peaks[0],
                "ours MB": peaks[1],
                "memory ratio": peaks[1] / peaks[0],
                "difference": difference,
            }
        )
        print(rows[-1], flush=True)

    def encode_theirs() -> Any:
        seen = None if detector is None else detector.get_vision_features(pixels)
        return points_model.get_image_embeddings(pixels), seen

    found = alternate(rounds, encode_theirs, lambda: network.encode(tile))
    (embeddings, seen), ours = found[0]
    level = embeddings[2].flatten(2).transpose(1, 2) + points_model.prompt_encoder.no_mask_embed.weight
    difference = relative(ours.extra["keys"], level)
    if seen is not None:
        difference = max(difference, relative(ours.extra["fpn0"], seen.fpn_hidden_states[0]))
    row("encode", "per s", 1, found, difference)
    del seen
    for count in PROMPTS[:-1]:  # of the last the library takes 10 GB
        points = torch.rand(count, 2, generator=torch.Generator().manual_seed(2)) * side
        which, given = torch.zeros(count, dtype=torch.long), points[None, :, None] - 0.5
        found = alternate(
            rounds,
            lambda given=given: points_model(image_embeddings=embeddings, input_points=given).pred_masks[0],
            lambda which=which, points=points: network.decode(ours, which, points, multimask=True),
        )
        row(counted(count, "prompt"), "per s", count, found, in_windows(*found[0], stride))
        if count == 16:
            found = alternate(
                rounds,
                lambda given=given: points_model(image_embeddings=embeddings, input_points=given).pred_masks[0],
                lambda which=which, points=points: network.decode(ours, which, points, multimask=True, full_tile=True),
            )
            wanted, got = found[0]
            row(
                f"{count} prompts, on the whole tile", "per s", count, found, relative(got.logits, wanted.flatten(0, 1))
            )
    points = torch.rand(64, 2, generator=torch.Generator().manual_seed(3)) * side
    which, given = torch.zeros(64, dtype=torch.long), points[None, :, None] - 0.5

    def tile_theirs() -> Any:
        if detector is not None:
            detector.get_vision_features(pixels)
        return points_model(pixel_values=pixels, input_points=given).pred_masks[0]

    found = alternate(rounds, tile_theirs, lambda: network.decode(network.encode(tile), which, points, multimask=True))
    row("tile with 64 prompts", "per s", 1, found, in_windows(*found[0], stride))
    return rows


HUB_MODELS = ("SAM 2.1 Hiera-T", "SAM 3 tracker", "SAM 3 detector and tracker")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=ENCODERS, default=list(ENCODERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hub", action="store_true", help="SAM 2.1 and SAM 3 instead of SAM")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.hub:
        write_results("models_hub", {name: hub_models(name, options.rounds) for name in HUB_MODELS}, HUB.strip())
        return
    tables = {
        "Mask decoder": decoders(options.rounds),
        "Instance decoder": instance_decoder(),
        "Image encoder": encoders(options.models, options.rounds),
    }
    write_results("models", tables, __doc__.split("\n\n", 2)[2].strip())


if __name__ == "__main__":
    main()
