"""Pseudo-slides: images of different slides side by side, some without one of the types, clicks in one tile or in every tile."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.cop.rules import Clicks, chain, fitted_on_labels, mean_sd, nearest_in_space, ours
from benchmarks.cop.typed import Scene, accuracy, confusion, f1_by_type, macro_f1, spread, unassigned
from wsiseg.config import TypingConfig

if TYPE_CHECKING:
    from wsiseg.records import TypeSpace

COLUMNS = 4
ABSENT = 0.5  #: share of the tiles from which one type is taken away
DISTANCES = {
    "the clicked tile": (-1.0, 1.0),
    "its neighbours": (1.0, 360.0),
    "farther": (360.0, np.inf),
}  #: microns between centres of tiles
MIN_SCORES = (0.9, 0.99, 0.999)  #: more and more cells stay unassigned
CLICKS = {"one tile, 5 per type": 5, "every tile, 1 per type": 1}


@dataclass(frozen=True)
class Mosaic:
    """Cells of all tiles. ``tile``: (N,); ``centres``: (K, 2) microns; ``source``: the tile with the clicks."""

    z: np.ndarray
    xy: np.ndarray
    types: np.ndarray
    tile: np.ndarray
    centres: np.ndarray
    source: int

    def take(self, keep: np.ndarray) -> Mosaic:
        return dataclasses.replace(self, z=self.z[keep], xy=self.xy[keep], types=self.types[keep], tile=self.tile[keep])


def lay_out(scenes: list[Scene], kinds: int, rng: np.random.Generator) -> Mosaic:
    """The images in random order, row by row, each in its own size."""
    order = rng.permutation(len(scenes))
    corner, centres, parts, below = np.zeros(2), [], [], 0.0
    for k, number in enumerate(order):
        s = scenes[number]
        if k and k % COLUMNS == 0:
            corner = np.array([0.0, below])
        parts.append((s.z, s.xy + corner, s.types, np.full(len(s.z), k)))
        centres.append(corner + s.size_um / 2)
        below = max(below, float(corner[1] + s.size_um[1]))
        corner = corner + [s.size_um[0], 0]
    z, xy, types, tile = (np.concatenate(x) for x in zip(*parts, strict=True))
    full = [k for k in range(len(order)) if len(np.unique(types[tile == k])) == kinds]
    return Mosaic(z, xy, types, tile, np.array(centres), int(rng.choice(full)))


def without_types(m: Mosaic, kinds: int, rng: np.random.Generator) -> Mosaic:
    """Take one type away from some tiles, never from the clicked one."""
    keep = np.ones(len(m.z), bool)
    for k in range(len(m.centres)):
        if k != m.source and rng.random() < ABSENT:
            keep &= (m.tile != k) | (m.types != rng.integers(1, kinds + 1))
    return m.take(keep)


def with_prevalence(m: Mosaic, t: int, share: float, rng: np.random.Generator) -> Mosaic:
    """Cells left out at random until type t has this share of all."""
    mine, rest = np.flatnonzero(m.types == t), np.flatnonzero(m.types != t)
    if len(mine) > share / (1 - share) * len(rest):
        mine = rng.permutation(mine)[: round(share / (1 - share) * len(rest))]
    else:
        rest = rng.permutation(rest)[: round((1 - share) / share * len(mine))]
    return m.take(np.sort(np.r_[mine, rest]))


def click(m: Mosaic, kinds: int, where: str, rng: np.random.Generator) -> Clicks:
    tiles = [m.source] if where.startswith("one") else np.unique(m.tile)
    rows = [
        [rng.permutation(np.flatnonzero((m.types == t) & (m.tile == k)))[: CLICKS[where]] for k in tiles]
        for t in range(1, kinds + 1)
    ]
    return [np.concatenate(r) for r in rows]


def abstaining(min_score: float) -> TypingConfig:
    """Typing that leaves every cell unassigned whose type is not at least this probable."""
    return dataclasses.replace(TypingConfig(), min_score=min_score)


def verdicts(m: Mosaic, clicks: Clicks, space: TypeSpace) -> dict[str, np.ndarray]:
    clicked = [m.z[c] for c in clicks]
    near = dataclasses.replace(TypingConfig(), prevalence_temperature=4.0)
    alone, still = (
        dataclasses.replace(TypingConfig(), prevalence_rounds=0),
        dataclasses.replace(TypingConfig(), local_shift=0.0),
    )
    return {
        "ours": ours(m.z, m.xy, clicked, space),
        "ours, no sure cells": ours(m.z, m.xy, clicked, space, dataclasses.replace(TypingConfig(), sure_cells=0.0)),
        "ours, prevalence_temperature 4": ours(m.z, m.xy, clicked, space, near),
        "ours, no drift": ours(m.z, m.xy, clicked, space, still),
        "ours, no local shares": ours(m.z, m.xy, clicked, space, alone),
        "ours, shift from the cells (as a bank)": ours(m.z, m.xy, clicked, space, from_other_slide=True),
        **{f"ours, min_score {at:g}": ours(m.z, m.xy, clicked, space, abstaining(at)) for at in MIN_SCORES},
        "nearest click in the type space": nearest_in_space(m.z, clicks, space),
        "mean + sd, tile by tile": mean_sd(m.z, clicks, m.tile),
        "chain of hops": chain(m.z, m.xy, clicks),
    }


def mosaic_rows(
    scenes: list[Scene], kinds: int, space: TypeSpace, seeds: int
) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Types where there are none, and F1 against the distance from the clicks; then recall and F1 against how frequent a type is."""
    absent: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    frequent: dict[tuple[str, str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for where in CLICKS:
        for seed in range(seeds):
            rng = np.random.default_rng([seed, 1])
            whole = lay_out(scenes, kinds, rng)
            m = without_types(whole, kinds, rng)
            clicks = click(m, kinds, where, rng)
            far = np.hypot(*(m.centres - m.centres[m.source]).T)[m.tile]
            best = {"a linear classifier, all labels of the other tiles": fitted_on_labels(m.z, m.types, m.tile, space)}
            for rule, codes in (verdicts(m, clicks, space) | best).items():
                found = absent[where, rule]
                table = confusion(codes, m.types, kinds, clicks)
                for what, value in (
                    ("macro-F1", macro_f1(table)),
                    ("accuracy of assigned", accuracy(table)),
                    ("unassigned", unassigned(table)),
                ):
                    found[what].append(float(value))
                wrong = [(codes[here] == t).mean() for here, t in lacking(m, kinds)]
                found["given a type its tile lacks"].append(float(np.mean(wrong)))
                for name, (low, high) in DISTANCES.items() if where.startswith("one") else ():
                    here = (far > low) & (far <= high)
                    here[np.concatenate(clicks)] = False
                    found[f"F1, {name}"].append(float(macro_f1(confusion(codes[here], m.types[here], kinds))))
            for share in (0.05, 0.3, 0.7):
                for t in range(1, kinds + 1):
                    rare = with_prevalence(whole, t, share, np.random.default_rng([seed, 2]))
                    clicks = click(rare, kinds, where, np.random.default_rng([seed, 3]))
                    if not all(map(len, clicks)):
                        continue
                    for rule, codes in verdicts(rare, clicks, space).items():
                        table = confusion(codes, rare.types, kinds, clicks)
                        found = frequent[where, f"{share:.0%}", rule]
                        found["recall"].append(float(table[t, t] / table[t].sum()))
                        found["precision"].append(float(table[t, t] / max(table[:, t].sum(), 1)))
                        found["F1"].append(float(f1_by_type(table)[t - 1]))
    distances = [f"F1, {name}" for name in DISTANCES]
    first = [
        {"clicks in": where, "rule": rule}
        | {k: spread(np.array(v)) for k, v in of.items() if k not in distances}
        | {k: spread(np.array(of[k])) if k in of else "" for k in distances}
        for (where, rule), of in absent.items()
    ]
    second = [
        {"clicks in": where, "share of the type": share, "rule": rule} | {k: spread(np.array(v)) for k, v in of.items()}
        for (where, share, rule), of in frequent.items()
    ]
    return first, second


def lacking(m: Mosaic, kinds: int) -> list[tuple[np.ndarray, int]]:
    """Every tile with each type that it does not hold: its cells, the type."""
    tiles = [m.tile == k for k in np.unique(m.tile)]
    return [(here, t) for here in tiles for t in range(1, kinds + 1) if not (m.types[here] == t).any()]
