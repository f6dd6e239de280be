"""From clicks to a bank of prototypes: every click's window is encoded, its cell decoded, and Chain-of-Prompts run to convergence there."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from wsiseg.errors import SeedsError
from wsiseg.geometry import Box, round_up
from wsiseg.masks import decode
from wsiseg.prompts.apg import apg_points
from wsiseg.prompts.chain_of_prompts import farthest_point_recursion, resize_unit
from wsiseg.records import Bank, Embeddings
from wsiseg.slide import read_region

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsiseg.config import RunConfig
    from wsiseg.geometry import Lattice
    from wsiseg.models.contract import PromptableModel
    from wsiseg.records import Seeds, WindowMasks
    from wsiseg.slide import SlideReader


@dataclass(frozen=True)
class _Window:
    """An encoded seed window. ``click`` is the prompt that stands for the clicked cell, model px of the window."""

    box: Box
    embeddings: Embeddings
    high: NDArray[np.float32]
    low: NDArray[np.float32]
    click: NDArray[np.float32]
    descriptor: NDArray[np.float32]


def build_bank(reader: SlideReader, model: PromptableModel, seeds: Seeds, lattice: Lattice, config: RunConfig) -> Bank:
    """Turn the clicks of a slide into prototypes.

    Parameters
    ----------
    reader, model
        The slide and the network.
    seeds
        Checked against the slide, level-0 px.
    lattice
        Between model px and level-0 px.
    config
        ``cop``, ``masks`` and ``typing``.

    Raises
    ------
    SeedsError
        A click hits no cell; the sentence names the nearest one.
    """
    windows = [
        [_open_window(reader, model, seeds, f"types[{t}].points[{i}]", point, lattice, config) for i, point in enumerate(kind.points)]
        for t, kind in enumerate(seeds.types)
    ]
    negative = [
        _open_window(reader, model, seeds, f"types[{t}].negative[{i}]", point, lattice, config).descriptor
        for t, kind in enumerate(seeds.types)
        for i, point in enumerate(kind.negative)
    ]
    clicked = tuple(np.stack([w.descriptor for w in kind]) for kind in windows)
    high, low, floors = [], [], []
    for t, kind in enumerate(windows):
        others = [d for k, d in enumerate(clicked) if k != t]
        found = [_reliable(w, model, np.concatenate(others) if others else None, config) for w in kind]
        h, f = (np.concatenate([f[k] for f in found]) for k in (0, 1))
        rows = _spread(f, config.cop.prototypes, keep=len(kind), first=np.cumsum([0, *(len(x[0]) for x in found[:-1])]))
        floors.append(_floor(h, f, config.cop.floor_percentile))
        high.append(h[rows])
        low.append(f[rows])
    return Bank(
        names=tuple(t.name for t in seeds.types),
        colors=tuple(t.color for t in seeds.types),
        clicks=tuple(np.array(t.points, float).reshape(-1, 2) for t in seeds.types),
        clicked=clicked,
        negative=np.stack(negative) if negative else np.empty((0, model.descriptor_size), np.float32),
        high=tuple(high),
        low=tuple(low),
        floors=np.array(floors, np.float32),
    )


def _open_window(
    reader: SlideReader, model: PromptableModel, seeds: Seeds, place: str, point: tuple[float, float], lattice: Lattice, config: RunConfig
) -> _Window:
    """Encode the surroundings of a click and find the cell it means."""
    centre = lattice.to_model(np.array(point))
    side = round_up(config.cop.window_um / model.mpp, model.stride_px)
    x0, y0 = (int(np.floor((c - side / 2) / model.stride_px)) * model.stride_px for c in centre)
    box = Box(x0, y0, x0 + side, y0 + side)
    pixels = torch.from_numpy(read_region(reader, box, lattice)).permute(2, 0, 1)[None].to(model.device)
    with torch.inference_mode():
        embeddings = model.encode(pixels)
    click = (centre - (box.x0, box.y0)).astype(np.float32)
    maps = embeddings.maps
    candidates = np.empty((0, 2), np.float32)
    if maps is not None:
        candidates = apg_points(maps[0].float().cpu().numpy(), side // maps.shape[-1], model.mpp, config.apg)
    order = np.argsort(np.hypot(*(candidates - click).T), kind="stable")
    reach = config.typing.click_reach_um / model.mpp
    lenient = dataclasses.replace(config.masks, min_score=config.typing.click_min_score)
    # The click itself first: on a large or hollow nucleus it may be far from the automatic prompt and still be right.
    for prompt in np.vstack([click, candidates[order]]):
        for masks in decode(model, embeddings, 0, prompt[None], lenient):
            gap = _gap(masks, click)
            if gap <= reach:
                high, low = (x[0].float().cpu().numpy() for x in (embeddings.high, embeddings.low))
                return _Window(box, embeddings, high, low, prompt, masks.descriptors[0].float().numpy())
            if np.isfinite(gap):
                hit = lattice.to_level0(prompt + (box.x0, box.y0))
                raise SeedsError(
                    f"{seeds.source}: {place} = [{point[0]:g}, {point[1]:g}]: no cell there; the nearest is at [{hit[0]:.0f}, {hit[1]:.0f}], "
                    f"{gap * model.mpp:.0f} um away; move the click onto a nucleus"
                )
    raise SeedsError(
        f"{seeds.source}: {place} = [{point[0]:g}, {point[1]:g}]: no cell there, nor within {config.cop.window_um / 2:g} um "
        "(glass or empty tissue?); click on a nucleus"
    )


def _gap(masks: WindowMasks, click: NDArray[np.float32]) -> float:
    """Distance from the click to the first mask, model px; infinite when there is none."""
    if not len(masks.logits) or not (masks.logits[0] > 0).any():
        return float("inf")
    y, x = torch.nonzero(masks.logits[0] > 0, as_tuple=True)
    dx = (x + 0.5) * masks.cell_px + masks.origin_xy[0, 0] - float(click[0])
    dy = (y + 0.5) * masks.cell_px + masks.origin_xy[0, 1] - float(click[1])
    return float(torch.hypot(dx, dy).min())


def _reliable(
    window: _Window, model: PromptableModel, others: NDArray[np.float32] | None, config: RunConfig
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """F_h and F_l (K, C) at the click and at what Chain-of-Prompts reaches from it, without what looks more like another type's click."""
    cell_px = window.box.width / window.high.shape[2]
    chain = farthest_point_recursion(tuple(window.click / cell_px), window.high, window.low, cell_px * model.mpp, config.cop)
    points, descriptors = [window.click[None]], [window.descriptor[None]]
    for masks in decode(model, window.embeddings, 0, (chain.points * cell_px).astype(np.float32), config.masks):
        points.append(masks.points_xy.numpy())
        descriptors.append(masks.descriptors.float().numpy())
    xy, z = np.concatenate(points), np.concatenate(descriptors)
    if others is not None:
        own = z @ window.descriptor >= (z @ others.T).max(1)
        own[0] = True
        xy = xy[own]
    low = resize_unit(window.low, window.high.shape[1:])
    column, row = (np.clip((xy[:, k] / cell_px).astype(int), 0, low.shape[2 - k] - 1) for k in (0, 1))
    return window.high[:, row, column].T, low[:, row, column].T


def _spread(rows: NDArray[np.float32], count: int, keep: int, first: NDArray[np.intp]) -> NDArray[np.intp]:
    """Farthest-first subset of unit rows (K, C): the ``keep`` rows at ``first`` and up to ``count`` in all."""
    chosen = list(first[:keep])
    nearest = (rows @ rows[chosen].T).max(1)
    while len(chosen) < min(count, len(rows)):
        chosen.append(int(nearest.argmin()))
        nearest = np.maximum(nearest, rows @ rows[chosen[-1]])
    return np.array(chosen)


def _floor(high: NDArray[np.float32], low: NDArray[np.float32], percentile: float) -> float:
    """Similarity that ``percentile`` % of the reliable places stay below, each scored by the others."""
    if len(high) < 3:
        return 0.5  # a lone click: half of a perfect match
    h, f = high @ high.T, low @ low.T
    np.fill_diagonal(h, 0)
    np.fill_diagonal(f, 0)
    return float(np.percentile(np.clip(h.max(1), 0, 1) * np.clip(f.max(1), 0, 1), percentile))
