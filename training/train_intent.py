"""Train the intent decoder of ``nuclei-compact`` on its frozen features: supervised, then with SAMPO's preferences or without.

    python -m training.train_intent prepare --data DATA --out scenes            # encode images once; 10 minutes on a core
    python -m training.train_intent train --scenes scenes --out OUT --objective sampo-a --seed 0 [--init supervised.pt] --steps 600

Every step draws squares of images, an intent for each (all nuclei; or one type), ``PROMPTS`` prompt sets of varied quality for it, and supervises
the maps; `wsiseg/finetune/losses.py` has the losses. Types that do not occur in a square give empty targets.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.intent import Clicked, IntentDecoder
from training.intent_data import CLICKS, Scene, crop_of, draw_clicks, fields_of, pyramid_crop, scene, stack, target_of
from wsiseg.finetune.losses import hypothesis_iou, preference_loss, preference_pairs, supervised_pair_loss
from wsiseg.models import load_model

SIDE = 80  #: cells of a square: 80 um, some 60 nuclei
SQUARES = 6  #: per step
PROMPTS = 3  #: K
ELSEWHERE = (
    0.35  #: typed squares whose clicks are in another image, as those of a bank or of a distant part of the slide
)
TYPED_SHARE = 0.75  #: squares whose intent is a type
QUALITY = (0.45, 0.45, 0.10)  #: chances of a click at the centre, near the border and just outside (algorithms 3.3)
COLLECTIONS = {"brca_m2c": 0.7, "nucls_mini": 0.1, "tnbc": 0.08, "nuinsseg": 0.08, "dsb2018_histology": 0.04}
OBJECTIVES = ("supervised", "sampo-a", "sampo-b")
TYPED = ("brca_m2c", "nucls_mini")
AVERAGE_STEPS = 150


def prepare(data: Path, out: Path, variants: int, weights: str) -> None:
    """Encode the training images ``variants`` times, each time turned and stained differently, and the development images as they are."""
    model = load_model(weights, "cpu")
    rng = np.random.default_rng(0)
    out.mkdir(parents=True, exist_ok=True)
    fields = fields_of(model, data, "train")
    few = {"nuinsseg": 4, "dsb2018_histology": 3}  # every so many
    fields = [f for i, f in enumerate(fields) if i % few.get(f.collection, 1) == 0]
    scenes = [
        scene(model, f, rng, augment=v > 0) for v in range(variants) for f in fields if v == 0 or f.collection in TYPED
    ]
    torch.save(scenes, out / "train.pt")
    torch.save([scene(model, f, rng, augment=False) for f in fields_of(model, data, "dev")], out / "dev.pt")
    print(f"{len(scenes)} training scenes")


class Sampler:
    """Endless seeded squares with K prompt sets each."""

    def __init__(self, scenes: list[Scene], seed: int) -> None:
        self.scenes = [s for s in scenes if len(s.present)]
        self.by_collection = {c: [s for s in self.scenes if s.collection == c] for c in COLLECTIONS}
        self.rng = np.random.default_rng(seed)
        chance = np.zeros(len(self.scenes))
        for name, share in COLLECTIONS.items():
            mine = np.array([s.collection == name for s in self.scenes], float)
            if mine.sum():
                chance += share * mine / mine.sum()
        self.chance = chance / chance.sum()

    def draw(self) -> tuple[dict[str, Tensor], Tensor, Tensor, Clicked, bool]:
        """Pyramid of a square, target, weight, clicks of K queries, and whether all nuclei are meant."""
        rng = self.rng
        here = self.scenes[rng.choice(len(self.scenes), p=self.chance)]
        rows, columns = crop_of(here, min(SIDE, *here.owner.shape), rng)
        typed = here.collection in TYPED and rng.random() < TYPED_SHARE / sum(COLLECTIONS[c] for c in TYPED)
        nuclei = here.present
        source, meant, other = here, nuclei, nuclei[:0]
        if typed:
            if rng.random() < ELSEWHERE:
                alike = self.by_collection[here.collection]
                source = alike[int(rng.integers(len(alike)))]
            there = source.types[source.present]
            kind = int(rng.choice(np.unique(there[there > 0])))
            meant, other = source.present[there == kind], source.present[(there != kind) & (there > 0)]
            nuclei = nuclei[here.types[nuclei] == kind]
        with_negatives = rng.random() < 0.7
        drawn = [
            draw_clicks(
                source,
                meant,
                other,
                rng,
                quality=QUALITY,
                positives=int(rng.integers(1, CLICKS + 1)),
                negatives=int(rng.integers(1, CLICKS + 1)) if with_negatives else 0,
            )
            for _ in range(PROMPTS)
        ]
        return (
            pyramid_crop(here, rows, columns),
            target_of(here, nuclei)[rows, columns],
            here.known[rows, columns].float(),
            stack(drawn),
            not typed,
        )


def train(options: argparse.Namespace) -> None:
    """One run; writes the moving average and a curve."""
    torch.manual_seed(options.seed)
    scenes = torch.load(options.scenes / "train.pt", weights_only=False)
    sampler = Sampler(scenes, options.seed)
    network = IntentDecoder()
    if options.init:
        network.load_state_dict(torch.load(options.init))
    else:
        known = torch.cat([s.descriptions[::7].float() for s in scenes])
        network.centre.copy_(known.mean(0))
        network.spread.copy_(known.std(0).clamp_min(1e-3))
    reference = copy.deepcopy(network).requires_grad_(requires_grad=False)
    average = copy.deepcopy(network)
    optimiser = torch.optim.AdamW(network.parameters(), lr=options.rate, weight_decay=0.01)
    started, seen = time.perf_counter(), []
    options.out.mkdir(parents=True, exist_ok=True)
    for step in range(options.steps):
        rate = options.rate * min(1, (step + 1) / 30) * (0.5 + 0.5 * np.cos(np.pi * step / options.steps)) + 1e-6
        for group in optimiser.param_groups:
            group["lr"] = rate
        drawn = [sampler.draw() for _ in range(SQUARES)]
        side = min(d[1].shape[0] for d in drawn), min(d[1].shape[1] for d in drawn)
        pyramid = {
            k: torch.stack(
                [d[0][k][:, : side[0] // (2 if k == "p8" else 1), : side[1] // (2 if k == "p8" else 1)] for d in drawn]
            )
            for k in drawn[0][0]
        }
        clicked = Clicked(*(torch.cat([getattr(d[3], k) for d in drawn]) for k in Clicked._fields))
        tile = torch.arange(SQUARES).repeat_interleave(PROMPTS)
        everything = torch.tensor([d[4] for d in drawn]).repeat_interleave(PROMPTS)
        logits, quality = network(network.features(pyramid), tile, clicked, all_nuclei=everything)
        with torch.no_grad():
            before, _ = reference(reference.features(pyramid), tile, clicked, all_nuclei=everything)
        loss, parts = torch.zeros(()), np.zeros(4)
        for i, (_, of_square, known, _, _) in enumerate(drawn):
            target, weight = of_square[: side[0], : side[1]], known[: side[0], : side[1]]
            one = logits[i * PROMPTS : (i + 1) * PROMPTS]
            iou = hypothesis_iou(one, target, weight)
            pairs = preference_pairs(iou)
            supervised = supervised_pair_loss(one, target, weight=weight, pairs=pairs)
            ranking = F.mse_loss(quality[i * PROMPTS : (i + 1) * PROMPTS], iou)
            preferred = torch.zeros(())
            if options.objective != "supervised":
                preferred = preference_loss(
                    one,
                    before[i * PROMPTS : (i + 1) * PROMPTS],
                    target,
                    beta=options.beta,
                    reading=options.objective[-1].upper(),
                    weight=weight,
                    pairs=pairs,
                )
            loss = loss + supervised + ranking + options.preference * preferred
            parts += [x.item() for x in (supervised, preferred, ranking, iou.max())]
        optimiser.zero_grad()
        (loss / SQUARES).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimiser.step()
        keep = min(1 - 1 / AVERAGE_STEPS, step / (step + 10))
        with torch.no_grad():
            for mine, theirs in zip(average.state_dict().values(), network.state_dict().values(), strict=True):
                mine.lerp_(theirs, 1 - keep)
        seen.append(parts / SQUARES)
        if (step + 1) % 50 == 0:
            row = dict(
                zip(
                    ("supervised", "preference", "ranking", "best_iou"),
                    np.mean(seen[-50:], 0).round(4).tolist(),
                    strict=True,
                )
            )
            row |= {"step": step + 1, "seconds": round(time.perf_counter() - started)}
            print(row, flush=True)
            with (options.out / "curve.jsonl").open("a") as stream:
                stream.write(json.dumps(row) + "\n")
    torch.save(average.state_dict(), options.out / "intent.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("prepare")
    one.add_argument("--data", type=Path, required=True)
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--variants", type=int, default=3)
    one.add_argument("--weights", default="nuclei-compact")
    two = commands.add_parser("train")
    two.add_argument("--scenes", type=Path, required=True)
    two.add_argument("--out", type=Path, required=True)
    two.add_argument("--objective", choices=OBJECTIVES, default="sampo-a")
    two.add_argument("--seed", type=int, default=0)
    two.add_argument("--steps", type=int, default=600)
    two.add_argument("--rate", type=float, default=1e-3)
    two.add_argument("--beta", type=float, default=10.0)
    two.add_argument("--preference", type=float, default=1.0, help="weight of the preference loss")
    two.add_argument("--init", type=Path)
    options = parser.parse_args()
    if options.command == "prepare":
        prepare(options.data, options.out, options.variants, options.weights)
    else:
        train(options)


if __name__ == "__main__":
    main()
