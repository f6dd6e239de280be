"""Phrases on ``nuclei-compact``: groups of phrases against each phrase for itself, by level of detail, with phrases and names never trained on.

    python -m benchmarks.intent.phrases --scenes SCENES --data DATA --runs NAME=FOLDER:FOLDER:FOLDER ...

Columns: with K = 3 phrases per intent and step, "prompt groups" and "each phrase for itself" (their mean loss); "one phrase at a time" has K = 1.

`SCENES` is what `python -m training.train_intent prepare` wrote; every `FOLDER` holds the `phrases.safetensors` of one training seed
(`training/train_phrases.py`). Writes results/phrases.md and .json.

Dice is of the union of the nuclei that are meant, at 4 px (1 um): T1 all nuclei, T2 those of a type, mean over images that have the type, and over
all phrases of a level of detail; "spread" is the largest difference between two levels. "Other phrases" are three that were never trained with,
"other names" are these with names of types that were not either: inflammatory, cancer, fibroblast. F1 is macro-F1 over true dots, each typed by
the phrase whose map covers its nucleus most, if the map does by at least 0.3; "of a type that is not there" is how many dots of a tile get a type
that its tile lacks, on the pseudo-slides of the table c1 of cop (benchmarks/cop/mosaic.py). "The package's" is the decoder that
`run --text` uses; a run besides leaves cells unassigned that two types claim alike (`typing.min_margin`), which is not done here.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks.common import write_results
from benchmarks.cop.mosaic import Mosaic, lacking, lay_out, without_types
from benchmarks.cop.typed import SETS, describe, known_type_rows
from benchmarks.intent.run import dice, spread
from benchmarks.intent.slides import Seen, look
from training.intent_data import Scene, target_of
from training.train_phrases import NAMES, bank
from wsiseg.config import DetectionConfig
from wsiseg.finetune.prompts import LEVELS
from wsiseg.models import load_model
from wsiseg.models.nuclei_compact import REFERENCE_CLASSES
from wsiseg.models.phrases import PREFIX, MixedPyramid, PhraseDecoder, plain_phrase
from wsiseg.models.registry import WEIGHTS_FOLDER
from wsiseg.models.text_encoder import open_text_encoder

if TYPE_CHECKING:
    from collections.abc import Mapping

    from benchmarks.cop.typed import Scene as Dots

SET, DOTS = "brca_m2c/dev", "brca_m2c"
OTHER_ALL = {
    "low": "outline nuclei",
    "medium": "segment each nucleus that can be seen",
    "high": "draw the border of every nucleus, small or large, of whatever cell, and nothing outside of it",
}
OTHER_TYPE = {
    "low": "show {} nuclei",
    "medium": "find all {} cells in this picture",
    "high": "draw the border of every nucleus that belongs to a {} cell and ignore cells of all other kinds",
}
OTHER_NAMES = dict(zip(REFERENCE_CLASSES, ("inflammatory", "cancer", "fibroblast"), strict=True))
SLIDES = 5  #: random pseudo-slides


def asked(name: str | None, level: str, kind: str) -> tuple[str, ...]:
    """Phrases of a level: those of training, others, or others with another name."""
    if kind == "trained":
        return bank().phrases(name, level)
    if name is None:
        return (OTHER_ALL[level],)
    return (OTHER_TYPE[level].format(OTHER_NAMES[name] if kind == "other names" else name),)


def read(path: Path) -> PhraseDecoder:
    """A trained decoder."""
    tensors = {name.removeprefix(PREFIX): value.float() for name, value in load_file(path).items()}
    network = PhraseDecoder(*reversed(tensors["known"].shape))
    network.load_state_dict(tensors)
    return network.eval()


class Words:
    """Vectors of phrases, each encoded once."""

    def __init__(self) -> None:
        self.encoder, self.known = open_text_encoder("wordllama"), {}

    def __call__(self, phrases: tuple[str, ...]) -> torch.Tensor:
        for phrase in phrases:
            self.known.setdefault(phrase, torch.from_numpy(self.encoder.encode(plain_phrase(phrase))))
        return torch.stack([self.known[phrase] for phrase in phrases])


def measure(network: PhraseDecoder, scenes: list[Scene], words: Words) -> dict[str, float]:
    """Dice of maps by level of detail."""
    found: dict[str, list[float]] = defaultdict(list)
    for here in scenes:
        with torch.inference_mode():
            features = network.features({k: v[None].float() for k, v in here.pyramid.items()})
        typed = here.collection == DOTS
        meant = {None: here.present}
        if typed:
            meant = {name: here.present[here.types[here.present] == k] for k, name in NAMES[DOTS].items()}
        for name, nuclei in meant.items():
            if len(nuclei) < 4:
                continue
            target = target_of(here, nuclei)
            for kind in ("trained", "other phrases", *(("other names",) if typed else ())):
                for level in LEVELS:
                    with torch.inference_mode():
                        chance = network(features, words(asked(name, level, kind))).sigmoid()
                    what = f"T2 Dice, {kind}" if typed else f"T1 Dice, {here.collection}, {kind}"
                    found[f"{what}, {level}"].append(float(dice(chance, target, here.known).mean()))
    out = {k: float(np.mean(v)) for k, v in found.items()}
    for what in sorted({k.rsplit(", ", 1)[0] for k in out}):
        levels = [out[f"{what}, {level}"] for level in LEVELS]
        out |= {f"{what}: mean": float(np.mean(levels)), f"{what}: spread": max(levels) - min(levels)}
    return out


class AsIs(MixedPyramid):
    """Leaves the pyramid as it is, so that an image is encoded once for all networks."""

    def features(self, pyramid: Mapping[str, torch.Tensor]) -> Any:
        return pyramid


def type_dots(network: PhraseDecoder, seen: list[Seen], words: Words, kind: str, level: str) -> np.ndarray:
    """Type of every dot of all images, 0: none."""
    phrases = words(tuple(asked(name, level, kind)[0] for name in REFERENCE_CLASSES))
    codes = []
    for image in seen:
        with torch.inference_mode():
            chance = network(network.features(image.features), phrases).sigmoid().flatten(1)
        scores = torch.stack([chance[:, inside].mean(1) for inside in image.inside])
        best, code = scores.max(1)
        codes.append(torch.where(best >= DetectionConfig().min_score, code + 1, 0).numpy())
    return np.concatenate(codes)


def dot_figures(codes: np.ndarray, dots: list[Dots]) -> dict[str, float]:
    """Macro-F1 over all dots, and dots of a type that their tile lacks."""
    kinds, truth = SETS[SET][1], np.concatenate([image.types for image in dots])
    f1 = [
        2 * ((codes == k) & (truth == k)).sum() / max((codes == k).sum() + (truth == k).sum(), 1)
        for k in range(1, kinds + 1)
    ]
    first, wrong = np.cumsum([0, *(len(image.z) for image in dots)]), []
    for seed in range(SLIDES):
        rng = np.random.default_rng([seed, 1])
        order = np.random.default_rng([seed, 1]).permutation(len(dots))  # as lay_out draws it
        whole = lay_out(dots, kinds, rng)
        number = np.concatenate([np.arange(first[k], first[k + 1]) for k in order])
        numbered = Mosaic(number, *(getattr(whole, f) for f in ("xy", "types", "tile", "centres", "source")))
        slide = without_types(numbered, kinds, rng)
        wrong.append(np.mean([(codes[slide.z][here] == t).mean() for here, t in lacking(slide, kinds)]))
    return {"F1": float(np.mean(f1)), "of a type that is not there": float(np.mean(wrong))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", nargs="*", default=[], metavar="NAME=FOLDER:FOLDER")
    options = parser.parse_args()
    scenes = torch.load(options.scenes / "dev.pt", weights_only=False)
    model, words = load_model("nuclei-compact", "cpu"), Words()
    dots = describe(model, options.data, SET)
    seen = [look(model, AsIs(), image) for image in dots]
    files = {"the package's": [WEIGHTS_FOLDER / "nuclei-compact-phrases.safetensors"]}
    for run in options.runs:
        name, _, folders = run.partition("=")
        files[name] = [Path(folder) / "phrases.safetensors" for folder in folders.split(":")]
    columns = {}
    for name, paths in files.items():
        figures = []
        for path in paths:
            network = read(path)
            of = measure(network, scenes, words)
            for kind in ("trained", "other phrases", "other names"):
                for level in LEVELS:
                    found = dot_figures(type_dots(network, seen, words, kind, level), dots)
                    of |= {f"dots, {kind}, {level}: {k}": v for k, v in found.items()}
            figures.append(of)
        columns[name] = {k: [f[k] for f in figures] for k in figures[0]}
        print(
            name,
            {k: round(float(np.mean(v)), 3) for k, v in columns[name].items() if "mean" in k or "spread" in k},
            flush=True,
        )
    rows = [{"figure": k, **{n: spread(c[k]) for n, c in columns.items()}} for k in sorted(columns["the package's"])]
    names = list(REFERENCE_CLASSES)
    tables = {"phrases": rows, "without phrases: --known-types": known_type_rows(dots, SET, names, model.types)}
    write_results("phrases", tables, __doc__.split("\n\n", 2)[2].strip())


if __name__ == "__main__":
    main()
