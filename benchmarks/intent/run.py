"""Maps of an intent from a few clicks: SAMPO's preferences against supervision alone, prompt quality, types that are absent.

    python -m benchmarks.intent.run --scenes SCENES --data DATA --runs NAME=FOLDER:FOLDER:FOLDER ...

Columns: "before" is training/intent.safetensors, the others are trained from it, several seeds each (mean +- sd).

`SCENES` is what `python -m training.train_intent prepare` wrote; every `FOLDER` holds the `intent.pt` of one training seed. Clicks are random true
nuclei; each image is asked from several draws of them. Writes results/intent.md and .json.

Dice is of the union of the masks that are meant, at 4 px (1 um), images with the type only; a dot is right when the map at its nucleus is on the
side of 0.5 that its type asks for, and F1 is over the dots of the meant type, pooled over images and types.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks.common import write_results
from benchmarks.cop.typed import describe
from benchmarks.intent.slides import slide_rows
from training.intent import DESCRIPTION_SIZE, IntentDecoder
from training.intent_data import BORDER, CENTRE, OUTSIDE, Scene, draw_clicks, stack, target_of
from wsiseg.models import load_model

DRAWS = 4
DECODER, SLIDES = Path(__file__).parents[2] / "training" / "intent.safetensors", "brca_m2c/dev"
FLOOR = 0.2  #: probability below which a nucleus is of no type
SETTINGS = {"1 + 0": (1, 0), "3 + 3": (3, 3)}
KINDS = {"centre": CENTRE, "near the border": BORDER, "just outside": OUTSIDE}
TYPED = ("brca_m2c",)


@torch.inference_mode()
def best_map(network: IntentDecoder, features: torch.Tensor, drawn: list, *, all_nuclei: bool) -> torch.Tensor:
    """Probabilities (Q, h, w) of the hypothesis that the network takes for its best."""
    q = len(drawn)
    logits, quality = network(
        features, torch.zeros(q, dtype=torch.long), stack(drawn), all_nuclei=torch.full((q,), all_nuclei)
    )
    return logits[torch.arange(q), quality.argmax(1)].sigmoid()


def dice(chance: torch.Tensor, target: torch.Tensor, known: torch.Tensor) -> np.ndarray:
    """Dice of each of Q maps with one target."""
    found, true = (chance > 0.5) & known, (target >= 0.5) & known
    return (2 * (found & true).sum((1, 2)) / ((found.sum((1, 2)) + true.sum()).clamp_min(1))).numpy()


def at_nuclei(chance: torch.Tensor, here: Scene) -> np.ndarray:
    """Mean of each of Q maps inside every nucleus -> (Q, nuclei + 1)."""
    owner = here.owner.flatten().long()
    size = len(here.types)
    count = torch.bincount(owner, minlength=size).clamp_min(1)
    return torch.stack(
        [torch.bincount(owner, weights=c.flatten().double(), minlength=size) / count for c in chance]
    ).numpy()


def measure(network: IntentDecoder, scenes: list[Scene], seed: int) -> dict[str, float]:
    """Every figure of one network."""
    found: dict[str, list[float]] = defaultdict(list)
    hits: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(3))
    for number, here in enumerate(scenes):
        rng = np.random.default_rng((seed, number))
        with torch.inference_mode():
            features = network.features({k: v[None].float() for k, v in here.pyramid.items()})
        nuclei = np.unique(here.nuclei[here.nuclei > 0])
        if here.collection in TYPED:
            kinds = np.unique(here.types[nuclei])
            for kind in kinds[kinds > 0]:
                meant = nuclei[here.types[nuclei] == kind]
                other = nuclei[(here.types[nuclei] != kind) & (here.types[nuclei] > 0)]
                if len(meant) < 4 or len(other) < 4:
                    continue
                target = target_of(here, meant)
                for name, (positives, negatives) in SETTINGS.items():
                    for quality, of in KINDS.items():
                        drawn = [
                            draw_clicks(here, meant, other, rng, quality=of, positives=positives, negatives=negatives)
                            for _ in range(DRAWS)
                        ]
                        chance = best_map(network, features, drawn, all_nuclei=False)
                        found[f"T2 Dice, {name}, {quality}"] += dice(chance, target, here.known).tolist()
                        inside = at_nuclei(chance, here) > 0.5
                        hits[f"T2 F1 at nuclei, {name}, {quality}"] += [
                            inside[:, meant].sum(),
                            inside[:, other].sum(),
                            (~inside[:, meant]).sum(),
                        ]
        else:
            drawn = [
                draw_clicks(here, nuclei, nuclei[:0], rng, quality=CENTRE, positives=3, negatives=0)
                for _ in range(DRAWS)
            ]
            chance = best_map(network, features, drawn, all_nuclei=True)
            found[f"T1 Dice, 3 + 0, {here.collection}"] += dice(chance, target_of(here, nuclei), here.known).tolist()
    out = {k: float(np.mean(v)) for k, v in found.items()}
    for k, (right, wrong, missed) in hits.items():
        out[k] = 2 * right / max(2 * right + wrong + missed, 1)
    for name in SETTINGS:
        of_kinds = [out[f"T2 Dice, {name}, {q}"] for q in KINDS]
        out[f"T2 spread over quality, {name}"] = max(of_kinds) - min(of_kinds)
        out[f"T2 Dice, {name}"] = float(np.mean(of_kinds[:2]))
    return out


def typed(network: IntentDecoder, scenes: list[Scene], clicks: int, seed: int) -> dict[str, float]:
    """Nuclei typed by the likeliest of one map per type: each type's clicks for it, the other types' against.

    Returns macro-F1 over the types and, the mean over types, how many of the nuclei of other types a type gets.
    """
    table, wrong = np.zeros((4, 4)), []
    for number, here in enumerate(scenes):
        rng = np.random.default_rng((seed, number))
        of = here.types[here.present]
        chosen = {t: rng.permutation(here.present[of == t])[:clicks] for t in (1, 2, 3)}
        drawn = []
        for kind in chosen:
            rows = [
                (int(here.clicks(np.array([n]), CENTRE)[0]), 1 if t == kind else -1)
                for t, c in chosen.items()
                for n in c
            ]
            descriptions, signs = torch.zeros((3 * clicks, DESCRIPTION_SIZE)), torch.zeros(3 * clicks)
            descriptions[: len(rows)] = here.descriptions[[row for row, _ in rows]].float()
            signs[: len(rows)] = torch.tensor([float(sign) for _, sign in rows])
            drawn.append((descriptions, signs))
        with torch.inference_mode():
            features = network.features({k: v[None].float() for k, v in here.pyramid.items()})
        inside = at_nuclei(best_map(network, features, drawn, all_nuclei=False), here)
        rest = np.setdiff1d(here.present, np.concatenate(list(chosen.values())))
        truth, given = here.types[rest], inside[:, rest].argmax(0) + 1
        np.add.at(table, (truth, np.where(inside[:, rest].max(0) > FLOOR, given, 0)), 1)
        for kind in chosen:
            other = truth != kind
            if other.any():
                wrong.append(float(((given == kind) & (inside[kind - 1, rest] > 0.5))[other].mean()))
    f1 = [2 * table[k, k] / max(table[k].sum() + table[:, k].sum(), 1) for k in (1, 2, 3)]
    return {"macro-F1": float(np.mean(f1)), "of other types": float(np.mean(wrong))}


def spread(values: list[float]) -> str:
    """Mean and standard deviation over training seeds; of one, the number."""
    deviation = f" +- {np.std(values):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{deviation}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", nargs="+", required=True, metavar="NAME=FOLDER:FOLDER")
    options = parser.parse_args()
    scenes = torch.load(options.scenes / "dev.pt", weights_only=False)
    columns = {}
    for run in options.runs:
        name, _, folders = run.partition("=")
        figures = []
        for seed, folder in enumerate(folders.split(":")):
            network = IntentDecoder()
            network.load_state_dict(torch.load(Path(folder) / "intent.pt"))
            found = measure(network.eval(), scenes, seed)
            dots = [s for s in scenes if s.collection in TYPED]
            for clicks in (1, 5):
                each = [typed(network, dots, clicks, draw) for draw in range(3)]
                for what in each[0]:
                    found[f"typed by the likeliest map, {clicks} per type: {what}"] = float(
                        np.mean([e[what] for e in each])
                    )
            figures.append(found)
        columns[name] = {k: [f[k] for f in figures] for k in figures[0]}
    rows = [
        {"figure": k, **{n: spread(c[k]) for n, c in columns.items()}} for k in sorted(next(iter(columns.values())))
    ]
    model, network = load_model("nuclei-compact", "cpu"), IntentDecoder()
    network.load_state_dict(load_file(DECODER))
    typed_dots = describe(model, options.data, SLIDES)
    tables = {
        "maps and nuclei": rows,
        f"pseudo-slides of {SLIDES}, training/intent.safetensors": slide_rows(
            model, network.eval(), typed_dots, SLIDES, 5
        ),
    }
    write_results("intent", tables, __doc__.split("\n\n", 2)[2].strip())


if __name__ == "__main__":
    main()
