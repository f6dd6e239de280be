"""APG + table typing against Chain-of-Prompts: typed detection on brca_m2c/dev from one or five clicks per type and image.

    python benchmarks/methods.py --data DATA [--click-seeds 5]

Clicks are random annotated dots. A cell and a dot match one to one within 6 um (3 um is the convention for centroids of outlines; the dots here
are loose: also given). F1 of a type counts missed, spurious and wrongly typed cells; macro-F1 is the mean over the types of all images pooled.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import shapely
from common import point_images, write_results
from scipy.spatial import cKDTree

from wsiseg.config import RunConfig
from wsiseg.errors import SeedsError
from wsiseg.image import segment_image
from wsiseg.models import load_model
from wsiseg.records import Seeds, SeedType

SLIDE_MPP = 0.5
NAMES = ("lymphocyte", "tumor_or_epithelial", "stromal")


def matches(cells: np.ndarray, dots: np.ndarray, reach: float) -> list[tuple[int, int]]:
    """Greedy one-to-one matching, nearest pairs first."""
    if not len(cells) or not len(dots):
        return []
    pairs = cKDTree(cells).sparse_distance_matrix(cKDTree(dots), reach, output_type="coo_matrix")
    taken_c, taken_d, out = set(), set(), []
    for k in np.argsort(pairs.data, kind="stable"):
        c, d = int(pairs.row[k]), int(pairs.col[k])
        if c not in taken_c and d not in taken_d:
            taken_c.add(c)
            taken_d.add(d)
            out.append((c, d))
    return out


def clicks_of(dots: np.ndarray, count: int, rng: np.random.Generator) -> Seeds:
    types = []
    for t, name in enumerate(NAMES, 1):
        mine = dots[dots[:, 2] == t, :2]
        if len(mine):
            picked = mine[rng.permutation(len(mine))[:count]]
            types.append(SeedType(name, (0, 0, 0), tuple(map(tuple, picked))))
    return Seeds(tuple(types), "clicks")


def segment(image: np.ndarray, dots: np.ndarray, count: int, config: RunConfig, model, rng: np.random.Generator):
    """Draw clicks until each hits a cell, as a person would who sees the error."""
    for _ in range(20):
        seeds = clicks_of(dots, count, rng)
        try:
            return segment_image(image, mpp=SLIDE_MPP, seeds=seeds, config=config, model=model)
        except SeedsError:
            continue
    raise RuntimeError("20 draws of clicks without one that hits cells")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--click-seeds", type=int, default=5)
    parser.add_argument("--clicks", type=int, nargs="+", default=[1, 5])
    options = parser.parse_args()
    model = load_model("nuclei-compact")
    images = point_images(options.data, "brca_m2c/dev")
    rows: list[dict[str, object]] = []
    for method in ("apg", "cop"):
        config = dataclasses.replace(RunConfig(), method=method)
        for count in options.clicks:
            results = []
            for click_seed in range(options.click_seeds):
                rng = np.random.default_rng(click_seed)
                found = {r: np.zeros((4, 4)) for r in (3, 6)}  # rows: truth (0 none), columns: verdict (0 none or unassigned)
                typed, correct, matched, unassigned, cells_in_all = 0, 0, 0, 0, 0
                for _, image, dots in images:
                    cells, typing = segment(image, dots, count, config, model, rng)
                    codes = np.array([0, *(NAMES.index(n) + 1 for n in typing.names[1:])])[typing.codes]
                    xy = shapely.get_coordinates(shapely.centroid(cells.polygons))
                    unassigned, cells_in_all = unassigned + (codes == 0).sum(), cells_in_all + len(codes)
                    for reach, table in found.items():
                        pairs = matches(xy, dots[:, :2], reach / SLIDE_MPP)
                        for c, d in pairs:
                            table[int(dots[d, 2]), codes[c]] += 1
                        lone_c = np.setdiff1d(np.arange(len(codes)), [c for c, _ in pairs])
                        lone_d = np.setdiff1d(np.arange(len(dots)), [d for _, d in pairs])
                        np.add.at(table, (0, codes[lone_c]), 1)
                        np.add.at(table, (dots[lone_d, 2].astype(int), 0), 1)
                        if reach == 6:
                            matched += len(pairs)
                            typed += sum(codes[c] > 0 for c, _ in pairs)
                            correct += sum(codes[c] == dots[d, 2] for c, d in pairs)
                f1 = {r: np.mean([2 * t[k, k] / (t[k].sum() + t[:, k].sum()) for k in (1, 2, 3)]) for r, t in found.items()}
                dots_in_all = sum(len(d) for *_, d in images)
                results.append((f1[6], f1[3], correct / max(typed, 1), matched / dots_in_all, unassigned / max(cells_in_all, 1)))
            mean, sd = np.mean(results, 0), np.std(results, 0)
            names = ("macro-F1 (6 um)", "macro-F1 (3 um)", "type accuracy", "dots found", "unassigned")
            rows.append({"method": method, "clicks": count} | {n: f"{m:.3f} +- {s:.3f}" for n, m, s in zip(names, mean, sd, strict=True)})
            print(rows[-1], flush=True)
    write_results("methods", rows, f"`benchmarks/methods.py`: brca_m2c/dev, 12 images, {options.click_seeds} draws of random clicks, mean +- sd.")


if __name__ == "__main__":
    main()
