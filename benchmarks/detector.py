"""SAM 3's detector beside transformers' plain use of it, and what more types cost.

    python -m benchmarks.detector [--rounds 3]

Seconds are CPU seconds of this process on one thread, medians over the rounds, in which all take turns; memory is the peak resident set above what
the process held before. The networks have SAM 3's own sizes and random weights; the trunk has 2 of its 32 layers: it runs once whatever is asked.
A pass: one phrase of five tokens on a tile that is encoded already; transformers is given the same features and tokens. Its masks are always those
of all 200 queries; ours are those of the queries that are kept, none on a tile without the type. The difference is the largest of the logits, boxes
and masks that both have, relative to the largest. Types: a tile of 1008 px from pixels to masks on windows, each type a phrase, without the search
of crowded tiles in quarters; random masks are larger than cells, so that this last step costs more than it should.
"""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from benchmarks.common import write_results
from benchmarks.models import alternate, relative
from wsiseg.config import DetectionConfig
from wsiseg.geometry import Box
from wsiseg.models.transformers.detector import Sam3Detector
from wsiseg.records import Concept, DescribedType, Embeddings
from wsiseg.segmentation.detection import Detector

SIDE = 1008
SCORE = 0.3


def network() -> Any:
    config = transformers.Sam3Config()
    trunk = config.vision_config.backbone_config
    trunk.num_hidden_layers, trunk.global_attn_indexes = 2, [1]
    config.text_config.num_hidden_layers = 1  # phrases are given as tokens
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.Sam3Model(config).eval().requires_grad_(requires_grad=False)


class Tiles:
    """What a run needs of a model besides its detector."""

    mpp, stride_px, input_px, mask_stride_px, device = 0.25, 14, SIDE, 3.5, torch.device("cpu")

    def __init__(self, model: Any) -> None:
        self.model, self.detector, self.trunk = model, Sam3Detector(model), 0

    def encode(self, images: torch.Tensor) -> Embeddings:
        self.trunk += 1
        levels = self.detector.levels(self.model.get_vision_features(images.float() / 127.5 - 1).fpn_hidden_states)
        extra = {f"fpn{k}": level for k, level in enumerate(levels)}
        return Embeddings(high=levels[0], low=levels[2], maps=None, extra=extra)

    def describe(self, *given: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(given[-1]), 1)


def passes(model: Any, rounds: int) -> list[dict[str, object]]:
    detector = Sam3Detector(model)
    seen = model.get_vision_features(torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)))
    levels = detector.levels(seen.fpn_hidden_states)
    tokens = torch.randn(5, 256, generator=torch.Generator().manual_seed(2))
    text = SimpleNamespace(pooler_output=tokens[None])
    rows: list[dict[str, object]] = []
    for kept in (0, 100, 200):

        def theirs() -> Any:
            return model(vision_embeds=seen, text_embeds=text, attention_mask=torch.ones(1, 5))

        def ours(kept: int = kept) -> Any:
            answer = detector.answer(levels, tokens)
            return answer, detector.masks(levels, answer, torch.arange(kept)) if kept else None

        (expected, (answer, masks)), seconds, peaks = alternate(rounds, theirs, ours)
        pairs = [(answer.logits, expected.pred_logits[0]), (answer.boxes, expected.pred_boxes[0])]
        pairs += [(masks, expected.pred_masks[0, :kept])] if kept else []
        rows.append(
            {
                "instances kept": kept,
                "transformers passes per s": 1 / seconds[0],
                "ours passes per s": 1 / seconds[1],
                "time ratio": seconds[1] / seconds[0],
                "transformers MB": peaks[0],
                "ours MB": peaks[1],
                "memory ratio": peaks[1] / peaks[0],
                "difference": max(relative(a, b) for a, b in pairs),
            }
        )
        print(rows[-1], flush=True)
    return rows


def types(model: Any, rounds: int) -> list[dict[str, object]]:
    tiles = Tiles(model)
    image = torch.randint(0, 256, (1, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    pixels = image[0].permute(1, 2, 0).contiguous().numpy()
    tokens = torch.randn(12, 5, 256, generator=torch.Generator().manual_seed(4)).numpy()
    described = [
        DescribedType(name=str(k), color=(0, 0, 0), phrases=(str(k),), tokens=(t,)) for k, t in enumerate(tokens)
    ]
    config, core = DetectionConfig(min_score=SCORE, crowded=1.0), Box(112, 112, 896, 896)
    embeddings = tiles.encode(image)

    def tile(count: int) -> Any:
        return Detector(tiles, described[:count], config).find(pixels, core, tiles.encode(image), 0)

    def eleven() -> Any:
        return [tiles.detector.detect(embeddings, 0, Concept(text=t), SCORE) for t in tokens[1:]]

    def counted(function: Any) -> int:
        before = tiles.trunk
        function()
        return tiles.trunk - before

    trunks = [counted(f) for f in (lambda: tile(1), eleven, lambda: tile(12))]
    _, seconds, peaks = alternate(rounds, lambda: tile(1), eleven, lambda: tile(12))
    ratio = seconds[2] / (seconds[0] + seconds[1])
    work = ("one type", "eleven passes", "twelve types")
    share = ("", "", ratio)
    return [
        {"work": w, "seconds": s, "MB": p, "passes of the trunk": n, "share of the two above": r}
        for w, s, p, n, r in zip(work, seconds, peaks, trunks, share, strict=True)
    ]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = network()
    tables = {"A pass": passes(model, options.rounds), "More types": types(model, max(options.rounds // 2, 1))}
    write_results("detector", tables, __doc__.split("\n\n", 2)[2].strip())


if __name__ == "__main__":
    main()
