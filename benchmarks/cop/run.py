"""Chain-of-Prompts and the typing from clicks, measured: every number that the documentation gives of them.

    python -m benchmarks.cop.run --data DATA [--click-seeds 5] [--only a,b,c,d,bank,ablation] [--weights PATH]

a         one click per image on untyped collections: how much of the segmentation is kept
b         types from 1 and 5 clicks per type and image: ours beside other rules, on true dots; then end to end, with own detections
c         pseudo-slides: types where there are none, distance from the clicks, rare and frequent types
d         1, 2, 3, 5 clicks
bank      clicks in one image, cells in the others
ablation  ours without each of its parts

Clicks are random true nuclei; always the mean +- sd over click seeds. Writes results/cop.md, .json and .png.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import wsiseg
from benchmarks.common import write_results
from benchmarks.cop.end_to_end import end_to_end_rows
from benchmarks.cop.figure import draw
from benchmarks.cop.mosaic import mosaic_rows
from benchmarks.cop.typed import (
    SETS,
    ablation_rows,
    bank_rows,
    by_type_rows,
    compare,
    comparison_rows,
    describe,
    more_clicks_rows,
)
from benchmarks.cop.untyped import retention_rows
from wsiseg.models import find_weights, load_model
from wsiseg.models.cards import file_hash

PARTS = ("a", "b", "c", "d", "bank", "ablation")
TYPED, STARTED = "brca_m2c/dev", time.perf_counter()


def say(text: str) -> None:
    print(f"[{time.perf_counter() - STARTED:5.0f} s] {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--click-seeds", type=int, default=5)
    parser.add_argument(
        "--only", type=lambda text: text.split(","), default=list(PARTS), help="parts, separated by commas"
    )
    parser.add_argument("--weights", default="nuclei-compact", help="name of a model or path of a safetensors file")
    options = parser.parse_args()
    if unknown := set(options.only) - set(PARTS):
        parser.error(f"--only {','.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    model, seeds = load_model(options.weights, "cpu"), options.click_seeds
    space, tables = model.types, {}

    if "a" in options.only:
        tables["a. One click per image, untyped collections"] = retention_rows(model, options.data, seeds, say)
    if set(options.only) - {"a"}:
        scenes = {name: describe(model, options.data, name) for name in SETS}
        names = {
            n: list(json.loads((options.data / "points" / n.split("/")[0] / "classes.json").read_text()).values())
            for n in SETS
        }
        say("descriptors of all dots")
        found = {name: compare(scenes[name], name, space, seeds) for name in SETS}
        say("rules compared")
    if "b" in options.only:
        tables["b1. Types of true dots, clicks in every image"] = [
            r for n in SETS for r in comparison_rows(found[n], n)
        ]
        for number, n in enumerate(SETS, 2):
            tables[f"b{number}. Ours by type, {n}"] = by_type_rows(found[n], n, names[n])
        tables["b4. End to end"] = end_to_end_rows(model, scenes, seeds, say)
    if "d" in options.only:
        tables["d. More clicks: macro-F1 on true dots"] = [r for n in SETS for r in more_clicks_rows(found[n], n)]
    if "bank" in options.only:
        tables[f"Bank: clicks in one image, cells in the others, {TYPED}"] = bank_rows(
            scenes[TYPED], TYPED, space, seeds, found[TYPED]
        )
        say("bank")
    if "c" in options.only:
        absent, frequent = mosaic_rows(scenes[TYPED], SETS[TYPED][1], space, seeds)
        tables["c1. Pseudo-slides: tiles without a type, and distance from the clicked tile"] = absent
        tables["c2. Pseudo-slides: rare and frequent types"] = frequent
        say("pseudo-slides")
    if "ablation" in options.only:
        tables["Ablation: true dots, clicks in every image"] = [
            r for n in SETS for r in ablation_rows(scenes[n], n, space, seeds)
        ]
        say("ablation")

    command = f"python -m benchmarks.cop.run --data DATA --click-seeds {seeds}"
    command += f" --only {','.join(options.only)}" if set(options.only) != set(PARTS) else ""
    weights = file_hash(find_weights(options.weights)[1])[:16]
    versions = f"wsiseg {wsiseg.__version__}, weights sha256 {weights}, {time.perf_counter() - STARTED:.0f} s"
    note = f"""`{command}`

{versions}. {seeds} click seeds unless said otherwise; mean +- sd over them.

- a: AJI is the mean over images; "of ..." is the ratio of two such means. Prompts by `find_points` from the bank of one random click; of "the
  paper's chain over the image" the points are what the click itself grows to, without a bank and without instance maps. "Kept" is said of apg's
  points, those inside and outside true nuclei. dsb2018 is rescaled to 26 px per nucleus; rows of fewer images
  are every third or fourth image, and their ratios are of the same images.
- b, c, d, bank, ablation: the descriptor of every true dot is typed and the clicked dots are left out; counts of all images are pooled, unassigned
  dots are misses. Intervals: 2000 resamples of the images, clicks the same for both rules. End to end: detections within 6 um of a dot, one to one.
- c: 12 images of different slides side by side, half of the tiles with one type taken away."""
    write_results("cop", tables, note)
    draw(tables)
    say("done")


if __name__ == "__main__":
    main()
