"""Collections with dots of known type: our typing and other rules from the same clicks, clicks in another image, and ours without its parts."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from benchmarks.common import MPP, encode, point_images
from benchmarks.cop.rules import (
    Clicks,
    chain,
    first_click_wins,
    mean_sd,
    nearest_by_measurements,
    nearest_click,
    nearest_in_space,
    ours,
)
from wsiseg.celltypes.assignment import assign_types
from wsiseg.config import TypingConfig
from wsiseg.records import Bank, Cells

if TYPE_CHECKING:
    from pathlib import Path

    from wsiseg.models.contract import PromptableModel
    from wsiseg.records import TypeSpace

SETS = {"brca_m2c/dev": (0.5, 3), "nucls_mini/dev": (MPP, 4)}  #: microns per px, types
COUNTS = (1, 2, 3, 5)  #: clicks per type and image
RESAMPLES = 2000


@dataclass(frozen=True)
class Scene:
    """The dots of one image. ``types`` count from 1; ``size_um`` is (width, height)."""

    name: str
    image: np.ndarray
    mpp: float
    z: np.ndarray
    xy: np.ndarray
    types: np.ndarray

    @property
    def size_um(self) -> np.ndarray:
        return np.array(self.image.shape[1::-1]) * self.mpp


def describe(model: PromptableModel, data: Path, name: str) -> list[Scene]:
    """Descriptors of what the model outlines at every dot."""
    mpp, scenes = SETS[name][0], []
    scale = mpp / MPP
    for title, image, dots in point_images(data, name):
        size = round(image.shape[1] * scale), round(image.shape[0] * scale)
        embeddings = encode(model, np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)))
        points = torch.from_numpy((dots[:, :2] * scale).astype(np.float32)).to(model.device)
        with torch.inference_mode():
            z = model.decode(
                embeddings, torch.zeros(len(points), dtype=torch.long, device=model.device), points
            ).descriptors
        scenes.append(Scene(title, image, mpp, z.half().cpu().numpy(), dots[:, :2] * mpp, dots[:, 2].astype(int)))
    return scenes


def draw_clicks(types: np.ndarray, kinds: int, count: int, *seed: int) -> tuple[Clicks, np.ndarray]:
    """Rows of up to ``count`` random dots of each type, and an order of the types. Of one seed, fewer clicks are among more clicks."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(kinds)
    return [rng.permutation(np.flatnonzero(types == t))[:count] for t in range(1, kinds + 1)], order


def confusion(given: np.ndarray, types: np.ndarray, kinds: int, without: Clicks | None = None) -> np.ndarray:
    """(T + 1, T + 1): rows truth, columns verdict, 0 unassigned; the clicked dots are left out."""
    keep = np.ones(len(types), bool)
    if without is not None:
        keep[np.concatenate(without)] = False
    table = np.zeros((kinds + 1, kinds + 1))
    np.add.at(table, (types[keep], given[keep]), 1)
    return table


def f1_by_type(table: np.ndarray) -> np.ndarray:
    """(..., T + 1, T + 1) -> (..., T); NaN for types that the truth does not hold."""
    hits = np.diagonal(table, axis1=-2, axis2=-1)[..., 1:]
    truth, given = table.sum(-1)[..., 1:], table.sum(-2)[..., 1:]
    return np.where(truth > 0, 2 * hits / np.maximum(truth + given, 1e-9), np.nan)


def macro_f1(table: np.ndarray) -> np.ndarray:
    return np.nanmean(f1_by_type(table), -1)


def accuracy(table: np.ndarray) -> np.ndarray:
    """Of the dots that were given a type, the share with the right one."""
    inner = table[..., 1:, 1:]
    return np.trace(inner, axis1=-2, axis2=-1) / np.maximum(inner.sum((-2, -1)), 1)


def unassigned(table: np.ndarray) -> np.ndarray:
    return table[..., 1:, 0].sum(-1) / np.maximum(table[..., 1:, :].sum((-2, -1)), 1)


def spread(values: np.ndarray) -> str:
    return f"{np.mean(values):.3f} +- {np.std(values):.3f}"


def figures(table: np.ndarray) -> dict[str, object]:
    """Mean +- sd over the click seeds of (seeds, T + 1, T + 1)."""
    return {
        "macro-F1": spread(macro_f1(table)),
        "accuracy of assigned": spread(accuracy(table)),
        "unassigned": spread(unassigned(table)),
    }


def compare(scenes: list[Scene], name: str, space: TypeSpace, seeds: int) -> dict[tuple[str, int], np.ndarray]:
    """All rules from the same clicks: {(rule, clicks): counts of shape (seeds, images, T + 1, T + 1)}."""
    kinds = SETS[name][1]
    found = defaultdict(lambda: np.zeros((seeds, len(scenes), kinds + 1, kinds + 1)))
    for seed in range(seeds):
        for number, s in enumerate(scenes):
            for count in COUNTS:
                clicks, order = draw_clicks(s.types, kinds, count, seed, number)
                given = {
                    "ours": ours(s.z, s.xy, [s.z[c] for c in clicks], space),
                    "nearest click (cosine)": nearest_click(s.z, clicks),
                    "nearest click, measurements only": nearest_by_measurements(s.z, clicks),
                    "nearest click in the type space": nearest_in_space(s.z, clicks, space),
                    "mean + sd": mean_sd(s.z, clicks),
                    "first click wins": first_click_wins(s.z, clicks, order),
                    "chain of hops": chain(s.z, s.xy, clicks),
                }
                for rule, codes in given.items():
                    found[rule, count][seed, number] = confusion(codes, s.types, kinds, clicks)
    return dict(found)


def paired(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """Macro-F1 of ``a`` less that of ``b``, and its 95 % interval over resampled sets of images; mean over the seeds each time."""
    images = a.shape[1]
    chosen = np.random.default_rng(0).integers(0, images, (RESAMPLES, images))
    weight = np.stack([np.bincount(c, minlength=images) for c in chosen]).astype(float)  # (resamples, images)
    f1 = [macro_f1(np.einsum("ri,sijk->srjk", weight, x)).mean(0) for x in (a, b)]
    low, high = np.percentile(f1[0] - f1[1], [2.5, 97.5])
    return float((macro_f1(a.sum(1)) - macro_f1(b.sum(1))).mean()), float(low), float(high)


def comparison_rows(
    found: dict[tuple[str, int], np.ndarray], name: str, counts: tuple[int, ...] = (1, 5)
) -> list[dict[str, object]]:
    rows = []
    for count in counts:
        for (rule, clicks), table in found.items():
            if clicks == count:
                gap = (
                    ""
                    if rule == "ours"
                    else "{:+.3f} ({:+.3f} to {:+.3f})".format(*paired(found["ours", count], table))
                )
                rows.append(
                    {"set": name, "clicks": count, "rule": rule, **figures(table.sum(1)), "ours less this (95 %)": gap}
                )
    return rows


def more_clicks_rows(found: dict[tuple[str, int], np.ndarray], name: str) -> list[dict[str, object]]:
    shown = ("ours", "nearest click (cosine)", "nearest click in the type space", "mean + sd", "chain of hops")
    return [
        {"set": name, "rule": rule}
        | {f"{n} click{'s' * (n > 1)}": spread(macro_f1(found[rule, n].sum(1))) for n in COUNTS}
        for rule in shown
    ]


def known_type_rows(scenes: list[Scene], name: str, names: list[str], space: TypeSpace) -> list[dict[str, object]]:
    """`--known-types`: no click at all; every image by itself. The classes of the model are those of the collection, in its order."""
    kinds, nothing = SETS[name][1], Bank((), Cells.empty(len(scenes[0].z[0])))
    table = np.zeros((kinds + 1, kinds + 1))
    for s in scenes:
        typing, _ = assign_types(s.z, s.xy, nothing, space, TypingConfig(known_types=True))
        table += confusion(typing.codes, s.types, kinds)
    f1 = f1_by_type(table)
    row = {"set": name, "clicks": 0, "macro-F1": round(float(macro_f1(table)), 3)}
    row |= {"accuracy of assigned": round(float(accuracy(table)), 3), "unassigned": round(float(unassigned(table)), 3)}
    return [row | {f"F1 of {n}": round(float(f1[t]), 3) for t, n in enumerate(names)}]


def by_type_rows(found: dict[tuple[str, int], np.ndarray], name: str, names: list[str]) -> list[dict[str, object]]:
    rows = []
    for count in (1, 5):
        f1 = f1_by_type(found["ours", count].sum(1))
        rows.append({"set": name, "clicks": count} | {f"F1 of {n}": spread(f1[:, t]) for t, n in enumerate(names)})
    return rows


# -------------------------------------------------------------------------------------------------------------- clicks in another image


def bank_rows(
    scenes: list[Scene], name: str, space: TypeSpace, seeds: int, here: dict[tuple[str, int], np.ndarray]
) -> list[dict[str, object]]:
    """Clicks in one image, cells in all others; every image that has all types takes its turn."""
    kinds = SETS[name][1]
    sources = [k for k, s in enumerate(scenes) if len(np.unique(s.types)) == kinds]
    rows = []
    for count in (1, 5):
        found: dict[str, list[float]] = defaultdict(list)
        for source in sources:
            for seed in range(seeds):
                clicks, _ = draw_clicks(scenes[source].types, kinds, count, seed, source)
                clicked = [scenes[source].z[c] for c in clicks]
                tables: dict[str, list[np.ndarray]] = defaultdict(list)
                for k, s in enumerate(scenes):
                    if k == source:
                        continue
                    z, rows_of = (
                        np.vstack([*clicked, s.z]),
                        np.split(np.arange(sum(map(len, clicked))), np.cumsum([len(c) for c in clicked])[:-1]),
                    )
                    given = {
                        "ours, each image's shift estimated (bank)": ours(
                            s.z, s.xy, clicked, space, from_other_slide=True
                        ),
                        "ours, clicks taken as this image's own": ours(s.z, s.xy, clicked, space),
                        "nearest click in the type space": nearest_in_space(z, rows_of, space)[-len(s.z) :],
                        "nearest click (cosine)": nearest_click(z, rows_of)[-len(s.z) :],
                    }
                    for rule, codes in given.items():
                        tables[rule].append(confusion(codes, s.types, kinds))
                for rule, parts in tables.items():
                    found[rule].append(float(macro_f1(np.sum(parts, 0))))
        rows.append(
            {
                "clicks": count,
                "clicks in": "every image",
                "rule": "ours",
                "macro-F1": spread(macro_f1(here["ours", count].sum(1))),
            }
        )
        rows += [
            {"clicks": count, "clicks in": "one other image", "rule": rule, "macro-F1": spread(np.array(f1))}
            for rule, f1 in found.items()
        ]
    return rows


# ---------------------------------------------------------------------------------------------------------------- ours without its parts


def variants(space: TypeSpace) -> dict[str, tuple[TypeSpace, TypingConfig]]:
    """One thing changed at a time."""
    base = TypingConfig()

    def moved(**values: float) -> tuple[TypeSpace, TypingConfig]:
        return space, dataclasses.replace(base, **values)

    out = {
        "defaults": (space, base),
        "no local shares": moved(prevalence_rounds=0),
        "prevalence_temperature 2": moved(prevalence_temperature=2.0),
        "prevalence_temperature 4": moved(prevalence_temperature=4.0),
        "no sure cells": moved(sure_cells=0.0),
        "sure_cells 2": moved(sure_cells=2.0),
        "sure_cells 10": moved(sure_cells=10.0),
        "no drift": moved(local_shift=0.0),
        "drift 0.25": moved(local_shift=0.25),
        "drift 1": moved(local_shift=1.0),
        "no rivals": moved(unclicked_weight=1e-9, background_weight=1e-9),
        "no known kinds": (
            dataclasses.replace(space, reference_classes=space.reference_classes[:0], class_names=()),
            base,
        ),
        "no shift": (dataclasses.replace(space, slide_variance=np.full_like(space.slide_variance, 1e-9)), base),
    }
    out |= {f"unknown_class {v:g}": moved(unknown_class=v) for v in (0.1, 0.3, 0.6, 0.9) if v != base.unknown_class}
    out |= {
        f"neighbourhood_um {v:g}": moved(neighbourhood_um=v)
        for v in (128.0, 256.0, 512.0)
        if v != base.neighbourhood_um
    }
    out |= {
        f"neighbourhood_cells {v:g}": moved(neighbourhood_cells=v) for v in (0.0, 20.0) if v != base.neighbourhood_cells
    }
    for score, margin in ((0.0, 0.0), (0.5, 0.0), (0.5, 0.05), (0.5, 0.15), (0.8, 0.5)):
        if (score, margin) != (base.min_score, base.min_margin):
            out[f"min_score {score:g}, min_margin {margin:g}"] = moved(min_score=score, min_margin=margin)
    return out


def ablation_rows(scenes: list[Scene], name: str, space: TypeSpace, seeds: int) -> list[dict[str, object]]:
    kinds = SETS[name][1]
    rows = []
    for count in (1, 5):
        found = {what: np.zeros((seeds, kinds + 1, kinds + 1)) for what in variants(space)}
        for seed in range(seeds):
            for number, s in enumerate(scenes):
                clicks, _ = draw_clicks(s.types, kinds, count, seed, number)
                for what, (changed, config) in variants(space).items():
                    found[what][seed] += confusion(
                        ours(s.z, s.xy, [s.z[c] for c in clicks], changed, config), s.types, kinds, clicks
                    )
        rows += [{"set": name, "clicks": count, "changed": what, **figures(table)} for what, table in found.items()]
    return rows
