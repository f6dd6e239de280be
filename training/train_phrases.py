"""Train the decoder of phrases of ``nuclei-compact`` on its frozen features: with groups of phrases, or with each phrase for itself.

    python -m training.train_intent prepare --data DATA --out scenes            # encode images once
    python -m training.train_phrases --scenes scenes --out OUT --objective prompt-group --seed 0

It begins with the features of `training/intent.safetensors`. Phrases are those of the package and of `phrases.json` here; what they mean are the
types of brca_m2c and nucls_mini, and in all collections all nuclei. In each square all that is known is asked for, with ``--phrases`` phrases each; a
type that is not there has an empty map.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.intent_data import Scene, crop_of, pyramid_crop, target_of
from training.train_intent import COLLECTIONS, SIDE, SQUARES
from wsiseg.finetune import losses
from wsiseg.finetune.phrase_networks import with_stray_words
from wsiseg.finetune.prompts import PromptBank, read_prompt_bank
from wsiseg.models.cards import TextCard
from wsiseg.models.nuclei_compact import REFERENCE_CLASSES
from wsiseg.models.phrases import FEATURES, PREFIX, PhraseDecoder, plain_phrase
from wsiseg.models.text_encoder import open_text_encoder

HERE = Path(__file__).parent
LYMPHOCYTE, TUMOUR, STROMAL = REFERENCE_CLASSES
#: Names of the types of each collection, by their numbers; a type without a name is never meant.
NAMES = {"brca_m2c": {1: LYMPHOCYTE, 2: TUMOUR, 3: STROMAL}, "nucls_mini": {1: TUMOUR, 2: STROMAL, 3: LYMPHOCYTE}}
TISSUE = "breast"  #: of both
PHRASES = 3  #: K, by default
AVERAGE_STEPS = 100
OBJECTIVES = ("prompt-group", "supervised")


def bank() -> PromptBank:
    """The package's phrases and those of this folder."""
    return read_prompt_bank(HERE / "phrases.json")


class Sampler:
    """Endless seeded squares, with K phrases for everything that can be meant there."""

    def __init__(self, scenes: list[Scene], phrases: PromptBank, seed: int, count: int = PHRASES) -> None:
        self.count = count
        self.scenes, self.rng = [s for s in scenes if len(s.present)], np.random.default_rng(seed)
        self.phrases = {name: phrases.phrases(name) for name in (None, *REFERENCE_CLASSES)}
        chance = np.zeros(len(self.scenes))
        for name, share in COLLECTIONS.items():
            mine = np.array([s.collection == name for s in self.scenes], float)
            chance += share * mine / max(mine.sum(), 1)
        self.chance = chance / chance.sum()

    def draw(self) -> tuple[dict[str, Tensor], Tensor, list[tuple[Tensor, list[str]]]]:
        """Pyramid of a square, weight, and per intent the target and phrases for it."""
        rng = self.rng
        here = self.scenes[rng.choice(len(self.scenes), p=self.chance)]
        square = crop_of(here, min(SIDE, *here.owner.shape), rng)
        nuclei, groups = here.present, []
        for kind, name in {0: None, **NAMES.get(here.collection, {})}.items():
            meant = nuclei if name is None else nuclei[here.types[nuclei] == kind]
            chosen = rng.choice(len(self.phrases[name]), self.count, replace=False)
            groups.append((target_of(here, meant)[square], [self.phrases[name][k] for k in chosen]))
        return pyramid_crop(here, *square), here.known[square].float(), groups


def train(options: argparse.Namespace) -> None:
    """One run; writes the moving average, with the phrases that it knows, and a curve."""
    torch.manual_seed(options.seed)
    encoder, phrases = open_text_encoder("wordllama"), bank()
    every = tuple(dict.fromkeys(plain_phrase(p) for name in (None, *REFERENCE_CLASSES) for p in phrases.phrases(name)))
    vectors = {phrase: torch.from_numpy(encoder.encode(phrase)) for phrase in every}
    scenes = torch.load(options.scenes / "train.pt", weights_only=False)
    sampler = Sampler(scenes, phrases, options.seed, options.phrases)
    network = PhraseDecoder(encoder.width)
    features = {k: v for k, v in load_file(HERE / "intent.safetensors").items() if k.split(".")[0] in FEATURES}
    network.load_state_dict(network.state_dict() | features)
    average = copy.deepcopy(network)
    optimiser = torch.optim.AdamW(network.parameters(), lr=options.rate, weight_decay=0.01)
    options.out.mkdir(parents=True, exist_ok=True)
    started, seen = time.perf_counter(), []
    for step in range(options.steps):
        for group in optimiser.param_groups:
            group["lr"] = options.rate * min(1, (step + 1) / 30) * (0.5 + 0.5 * np.cos(np.pi * step / options.steps))
        loss = torch.zeros(())
        for _ in range(SQUARES):
            pyramid, known, groups = sampler.draw()
            features = network.features({k: v[None] for k, v in pyramid.items()})
            asked = torch.stack([vectors[plain_phrase(p)] for _, phrases in groups for p in phrases])
            asked = with_stray_words(asked, encoder.vectors, sampler.rng)
            for (target, _), maps in zip(groups, network(features, asked).split(options.phrases), strict=True):
                each = torch.stack(
                    [losses.focal_loss(m, target, known) + losses.dice_loss(m, target, known) for m in maps]
                )
                if options.objective == "prompt-group":
                    one = losses.prompt_group_loss(each) + losses.CONSISTENCY_WEIGHT * losses.consistency_loss(maps)
                else:
                    one = each.mean()
                loss = loss + one / len(groups)
                seen.append((each.mean().item(), (each.max() - each.min()).item()))
        optimiser.zero_grad()
        (loss / SQUARES).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimiser.step()
        with torch.no_grad():
            share = max(1 / AVERAGE_STEPS, 10 / (step + 10))
            for mine, theirs in zip(average.parameters(), network.parameters(), strict=True):
                mine.lerp_(theirs, share)
        if (step + 1) % 50 == 0:
            mean, spread = np.mean(seen, 0)
            seen.clear()
            row = {"step": step + 1, "loss": round(float(mean), 4), "spread": round(float(spread), 4)}
            row |= {"seconds": round(time.perf_counter() - started)}
            print(row, flush=True)
            with (options.out / "curve.jsonl").open("a") as stream:
                stream.write(json.dumps(row) + "\n")
    card = TextCard(
        encoder=encoder.name,
        sha256=encoder.sha256,
        width=encoder.width,
        phrases=every,
        types=REFERENCE_CLASSES,
        tissue=TISSUE,
    )
    tensors = average.state_dict() | {"known": torch.stack([vectors[phrase] for phrase in every])}
    tensors = {PREFIX + name: value.half().contiguous() for name, value in tensors.items()}
    save_file(
        tensors, options.out / "phrases.safetensors", {"wsiseg": json.dumps({"text": asdict(card)}, sort_keys=True)}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--objective", choices=OBJECTIVES, default=OBJECTIVES[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--phrases", type=int, default=PHRASES, help="K: phrases per intent and square")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
