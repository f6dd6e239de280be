"""Own detections instead of true dots: cells are found, typed and matched to the dots; missed, spurious and wrongly typed cells count.

Clicked dots, and the cells on them, are left out: they keep the type they were clicked as.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import shapely
from scipy.spatial import cKDTree

from benchmarks.cop.picture import Picture, Remembering
from benchmarks.cop.typed import SETS, accuracy, macro_f1, spread, unassigned
from wsiseg.config import RunConfig
from wsiseg.errors import SeedsError
from wsiseg.records import Bank, Seeds, SeedType

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.cop.typed import Scene

REACH_UM = 6.0
METHODS = ("apg", "cop")
SEEDS = {1: 3, 5: 2}  #: clicks per type: click seeds at most; the surroundings of every click are encoded


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


def click_cells(
    picture: Picture, scene: Scene, kinds: int, count: int, config: RunConfig, rng: np.random.Generator
) -> tuple[Seeds, Bank, np.ndarray]:
    """Draw clicks until each hits a cell, as a person would who sees the error; also the rows of the clicked dots."""
    for _ in range(20):
        rows = {t: rng.permutation(np.flatnonzero(scene.types == t))[:count] for t in range(1, kinds + 1)}
        points = {t: tuple(map(tuple, (scene.xy[r] / scene.mpp).tolist())) for t, r in rows.items() if len(r)}
        seeds = Seeds(tuple(SeedType(str(t), (0, 0, 0), p) for t, p in points.items()), "clicks")
        try:
            return seeds, picture.bank(seeds, config), np.concatenate(list(rows.values()))
        except SeedsError:
            continue
    raise RuntimeError("20 draws of clicks without one that hits cells")


def end_to_end_rows(
    model: object, scenes: dict[str, list[Scene]], seeds: int, say: Callable[[str], None]
) -> list[dict[str, object]]:
    rows, remembering = [], Remembering(model)
    apg = dataclasses.replace(RunConfig(), method="apg", precision="fp32")
    configs = {name: dataclasses.replace(apg, method=name) for name in METHODS}
    for name, of in scenes.items():
        kinds = SETS[name][1]
        found = {
            (method, count): np.zeros((min(seeds, most), kinds + 1, kinds + 1))
            for count, most in SEEDS.items()
            for method in METHODS
        }
        pairs_in_all = dict.fromkeys(found, 0)
        for number, scene in enumerate(of):
            picture = Picture(remembering, scene.image, scene.mpp, apg)
            for count, most in SEEDS.items():
                for seed in range(min(seeds, most)):
                    drawn, bank, clicked = click_cells(
                        picture, scene, kinds, count, apg, np.random.default_rng([seed, number])
                    )
                    for method, config in configs.items():
                        chosen = bank if config.method == "apg" else picture.bank(drawn, config)
                        cells, typing = picture.cells(picture.points(chosen, config), chosen, config)
                        codes = np.array([0, *map(int, typing.names[1:])])[typing.codes]
                        xy = shapely.get_coordinates(shapely.centroid(cells.polygons)) * scene.mpp
                        pairs = np.array(matches(xy, scene.xy, REACH_UM), int).reshape(-1, 2)
                        table = found[method, count][seed]
                        np.add.at(table, (0, codes[np.setdiff1d(np.arange(len(codes)), pairs[:, 0])]), 1)
                        lost = np.setdiff1d(np.arange(len(scene.types)), np.r_[pairs[:, 1], clicked])
                        np.add.at(table, (scene.types[lost], 0), 1)
                        pairs = pairs[~np.isin(pairs[:, 1], clicked)]
                        np.add.at(table, (scene.types[pairs[:, 1]], codes[pairs[:, 0]]), 1)
                        pairs_in_all[method, count] += len(pairs)
            say(f"end to end, {name}: image {number + 1} of {len(of)}")
        for (method, count), table in found.items():
            rows.append(
                {
                    "set": name,
                    "clicks": count,
                    "method": method,
                    "click seeds": len(table),
                    "macro-F1 (6 um)": spread(macro_f1(table)),
                    "accuracy of assigned": spread(accuracy(table)),
                    "dots found": pairs_in_all[method, count] / float(table[:, 1:].sum()),
                    "missed or unassigned": spread(unassigned(table)),
                }
            )
    return rows
