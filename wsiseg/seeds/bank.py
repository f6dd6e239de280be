"""From clicks to a bank of prototypes: each click's surroundings are encoded and its cell decoded; for Chain-of-Prompts, the chain is run there.

A click always counts. Where the network finds no nucleus, what it decodes from the click itself is used, with a warning; only glass is refused.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import shapely
import torch

from wsiseg.errors import SeedsError
from wsiseg.geometry import Box, round_up
from wsiseg.records import Bank, Cells, ChainPrototypes, TypePrototypes
from wsiseg.seeds.glass import GlassFinder
from wsiseg.seeds.matching import describe_nearest, match_clicks, match_groups
from wsiseg.segmentation.decoding import decode
from wsiseg.segmentation.polygons import trace
from wsiseg.segmentation.prompts.apg import apg_points
from wsiseg.segmentation.prompts.chain_of_prompts import farthest_point_recursion, resize_unit
from wsiseg.slide import read_region

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from wsiseg.config import RunConfig
    from wsiseg.geometry import Lattice
    from wsiseg.models.contract import PromptableModel
    from wsiseg.records import CellIndex, Embeddings, Seeds
    from wsiseg.slide import SlideReader

logger = logging.getLogger(__name__)

_SAME_UM = 1e-3  #: prompts this close are one
_CANDIDATES = 12  #: automatic prompts around a click that are tried for the cell it may mean


@dataclass(frozen=True, kw_only=True)
class _ClickContext:
    """Resources for finding the cell of a click."""

    reader: SlideReader
    model: PromptableModel
    lattice: Lattice
    config: RunConfig

    @cached_property
    def glass(self) -> GlassFinder:
        """Made for the first click without a nucleus; most runs have none."""
        return GlassFinder(self.reader, self.config)

    def encode(self, centre: NDArray[np.float64]) -> tuple[Box, Embeddings]:
        """The window of ``cop.window_um`` around ``centre`` (model px), on the model's lattice."""
        stride = self.model.stride_px
        side = self.model.input_px or round_up(self.config.cop.window_um / self.model.mpp, stride)
        x0, y0 = (int(np.floor((c - side / 2) / stride)) * stride for c in centre)
        box = Box(x0, y0, x0 + side, y0 + side)
        pixels = read_region(self.reader, box, self.lattice)
        with torch.inference_mode():
            return box, self.model.encode(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].to(self.model.device))


@dataclass(frozen=True, kw_only=True)
class ClickedCell:
    """The cell that a click means.

    Attributes
    ----------
    place
        Name of the click in messages.
    prompt
        (2,): the prompt that it was decoded from, model px of the slide.
    descriptor
        float32 (D,).
    cell
        Its outline; empty when nothing could be outlined.
    doubt
        Sentence on why this may not be a nucleus; empty when the network agrees that it is one.
    """

    place: str
    prompt: NDArray[np.float64]
    descriptor: NDArray[np.float32]
    cell: Cells
    doubt: str = ""


def build_bank(
    reader: SlideReader,
    model: PromptableModel,
    seeds: Seeds,
    lattice: Lattice,
    config: RunConfig,
    *,
    chains: bool,
    on_warning: Callable[[str], None] = logger.warning,
) -> Bank:
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
        ``cop`` and ``masks``.
    chains
        Also run Chain-of-Prompts from every click and fill ``chain`` of each type. Memory does not grow with the number of clicks.
    on_warning
        Called with a sentence for each click where the network finds no nucleus.

    Raises
    ------
    SeedsError
        A click is on glass, or clicks of two types hit the same cell.
    """
    context = _ClickContext(reader=reader, model=model, lattice=lattice, config=config)
    clicked, against = (
        [
            [
                _find_cell(context, f"{seeds.source}: types[{t}].{side}[{i}]", point)
                for i, point in enumerate(getattr(kind, side))
            ]
            for t, kind in enumerate(seeds.types)
        ]
        for side in ("points", "negative")
    )
    _refuse_shared_cells(clicked)
    for click in (click for kind in (*clicked, *against) for click in kind):
        if click.doubt:
            on_warning(click.doubt)
    descriptors = [np.stack([c.descriptor for c in cells]) for cells in clicked]
    types = tuple(
        TypePrototypes(
            name=kind.name,
            color=kind.color,
            clicks=np.array(kind.points, float).reshape(-1, 2),
            clicked=descriptors[t],
            negative=np.array([c.descriptor for c in against[t]], np.float32).reshape(-1, model.descriptor_size),
            negative_clicks=np.array(kind.negative, float).reshape(-1, 2),
            chain=_chain(context, clicked[t], [*descriptors[:t], *descriptors[t + 1 :]]) if chains else None,
        )
        for t, kind in enumerate(seeds.types)
    )
    return Bank(types, Cells.concatenate([c.cell for cells in clicked for c in cells], model.descriptor_size))


def missed_cells(bank: Bank, cells: CellIndex, reach_px0: float) -> Cells:
    """The bank's own cells of the clicks that hit none of ``cells``; a click outside the searched area has none."""
    points = np.concatenate([np.empty((0, 2)), *(of.clicks for of in bank.types)])
    missed = points[match_clicks(points, cells, reach_px0) < 0]
    rows = match_clicks(missed, bank.cells, reach_px0)
    return bank.cells.take(np.unique(rows[rows >= 0]))


def match_bank(
    bank: Bank, cells: CellIndex, descriptors: NDArray[np.float16], reach_px0: float
) -> tuple[Bank, list[NDArray[np.intp]], list[str]]:
    """The bank as the cells of a result say it: each click stands for the cell that it means there.

    Parameters
    ----------
    bank
        Made from the clicks on this slide, or on another one: that is returned as it is.
    cells, descriptors
        Stitched cells, and theirs (N, D).
    reach_px0
        A click beside its cell finds it within this distance, level-0 px.

    Returns
    -------
    bank
        With the descriptors of those cells; a click that means none keeps its own.
    rows
        Per type the rows of its clicks, in order; -1 where there is no cell.
    warnings
        A sentence per click that meets no cell (it lies outside the region or tissue that was searched), or the cell of another type.
    """
    if bank.from_other_slide:
        return bank, [], []
    owner: dict[int, str] = {}
    warnings: list[str] = []
    negative_clicks = [np.empty((0, 2)) if of.negative_clicks is None else of.negative_clicks for of in bank.types]
    matched = match_groups([*(of.clicks for of in bank.types), *negative_clicks], cells, reach_px0)
    rows, against = matched[: len(bank.types)], matched[len(bank.types) :]
    for of, found in zip(bank.types, rows, strict=True):
        for k, row in enumerate(found.tolist()):
            if row >= 0 and owner.setdefault(row, of.name) == of.name:
                continue
            meets = f"the cell that was clicked as {owner[row]}" if row >= 0 else "no cell of the result"
            warnings.append(f"the click on {of.name} at [{of.clicks[k][0]:g}, {of.clicks[k][1]:g}] meets {meets}")
            found[k] = -1
    types = tuple(
        dataclasses.replace(
            of,
            clicked=_descriptors_at(rows[t], descriptors, of.clicked),
            negative=of.negative
            if of.negative_clicks is None
            else _descriptors_at(against[t], descriptors, of.negative),
        )
        for t, of in enumerate(bank.types)
    )
    return dataclasses.replace(bank, types=types), rows, warnings


def _descriptors_at(
    rows: NDArray[np.intp], descriptors: NDArray[np.float16], known: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The descriptors at ``rows``, (k, D), or the known one where there is no row."""
    return np.where(rows[:, None] >= 0, descriptors[rows] if len(descriptors) else known, known).astype(np.float32)


def find_clicked(
    reader: SlideReader,
    model: PromptableModel,
    point: tuple[float, float],
    lattice: Lattice,
    config: RunConfig,
    place: str,
) -> ClickedCell:
    """Find the cell that one click means, as :func:`build_bank` does.

    Parameters
    ----------
    reader, model
        The slide and the network.
    point
        The click, level-0 px.
    lattice
        Between model px and level-0 px.
    config
        ``cop``, ``apg``, ``masks`` and ``tissue``.
    place
        What to call the click in the error: ``seeds.json: types[0].points[0]``.

    Raises
    ------
    SeedsError
        The click is on glass.
    """
    return _find_cell(_ClickContext(reader=reader, model=model, lattice=lattice, config=config), place, point)


def _find_cell(context: _ClickContext, place: str, point: tuple[float, float]) -> ClickedCell:
    """The cell under a click, or within its reach; where the network finds none, what it decodes from the click."""
    config, model = context.config, context.model
    mpp = context.lattice.slide_mpp
    centre = context.lattice.to_model(np.array(point))
    box, embeddings = context.encode(centre)
    corner = np.array([box.x0, box.y0])
    # The click first: on a large or hollow nucleus it may be far from the automatic prompt.
    click = (centre - corner)[None].astype(np.float32)
    prompts = click
    if embeddings.maps is not None:
        automatic = apg_points(
            embeddings.maps[0].float().cpu().numpy(), box.width // embeddings.maps.shape[-1], model.mpp, config.apg
        )
        order = np.argsort(np.hypot(*(automatic - click[0]).T), kind="stable")[:_CANDIDATES]
        prompts = np.vstack([click, automatic[order]])
    settings = dataclasses.replace(config.masks, min_score=config.cop.click_min_score)
    found = [
        trace(masks, box, context.lattice, settings)[0] for masks in decode(model, embeddings, 0, prompts, settings)
    ]
    cells = Cells.concatenate(found, model.descriptor_size)
    reach = config.cop.click_reach_um / mpp
    own = np.flatnonzero((np.abs(cells.points_xy - point) * mpp < _SAME_UM).all(1))
    for candidates in (cells.take(own), cells):  # what the model says of the click itself comes first
        (row,) = match_clicks(np.array([point], float), candidates, reach)
        if row >= 0:
            cell = candidates.take(np.array([row]))
            prompt = context.lattice.to_model(cell.points_xy[0])
            descriptor = cell.descriptors[0].astype(np.float32)
            return ClickedCell(place=place, prompt=prompt, descriptor=descriptor, cell=cell)
    return _decode_doubtful(context, place, point, box, embeddings, cells)


def _decode_doubtful(
    context: _ClickContext, place: str, point: tuple[float, float], box: Box, embeddings: Embeddings, others: Cells
) -> ClickedCell:
    """What the model decodes from a click where it finds no nucleus; somebody saw one there. Glass is refused."""
    lattice = context.lattice
    fault = context.glass.fault(point)
    if fault:
        raise SeedsError(f"{place} = {_at(point)}: {fault}")
    anything = dataclasses.replace(context.config.masks, min_score=0.0)
    centre = lattice.to_model(np.array(point))
    click = (centre - (box.x0, box.y0))[None].astype(np.float32)
    masks = list(decode(context.model, embeddings, 0, click, anything))
    traced = Cells.concatenate([trace(m, box, lattice, anything)[0] for m in masks], context.model.descriptor_size)
    rows = match_clicks(np.array([point], float), traced, context.config.cop.click_reach_um / lattice.slide_mpp)
    cell = traced.take(rows[rows >= 0])
    descriptors = np.concatenate([m.descriptors.float().numpy() for m in masks])
    if len(cell):
        used, descriptor = f"the mask decoded there (score {cell.scores[0]:.2f}) is used", cell.descriptors[0]
    else:
        used, descriptor = "its surroundings are used for typing, and no cell is outlined", descriptors[0]
    near = f"; {describe_nearest(point, others, lattice.slide_mpp)}" if len(others) else ""
    return ClickedCell(
        place=place,
        prompt=centre,
        descriptor=descriptor.astype(np.float32),
        cell=cell,
        doubt=f"{place} = {_at(point)}: the model finds no nucleus there; {used}{near}",
    )


def _at(point: tuple[float, float]) -> str:
    return f"[{point[0]:g}, {point[1]:g}]"


def _refuse_shared_cells(clicked: list[list[ClickedCell]]) -> None:
    """Clicks of two types on one cell contradict each other."""
    owners = [(t, c) for t, kind in enumerate(clicked) for c in kind if len(c.cell)]
    pairs = on_one_cell([t for t, _ in owners], np.array([c.cell.polygons[0] for _, c in owners], object))
    if pairs:
        i, j = pairs[0]
        raise SeedsError(same_cell(owners[j][1].place, owners[i][1].place))


def on_one_cell(types: list[int], polygons: NDArray[np.object_]) -> list[tuple[int, int]]:
    """Pairs of clicks for two types whose cells share more than half of the smaller one; the earlier click first."""
    pairs = []
    for i, j in shapely.STRtree(polygons).query(polygons, predicate="intersects").T:
        shared = polygons[i].intersection(polygons[j]).area / min(polygons[i].area, polygons[j].area)
        if i < j and types[i] != types[j] and shared > 0.5:
            pairs.append((int(i), int(j)))
    return pairs


def same_cell(place: str, other: str) -> str:
    """The sentence on a click that hits the cell of another type's."""
    return f"{place}: hits the same cell as {other.rpartition(': ')[2]}, of another type; remove one of the two"


def _chain(context: _ClickContext, clicked: list[ClickedCell], others: list[NDArray[np.float32]]) -> ChainPrototypes:
    """Prototypes of a type for Chain-of-Prompts; ``others`` holds the descriptors of the other types' clicked cells.

    The reliable places are the clicked cells and what Chain-of-Prompts reaches from them, without what looks more like another type's click.
    """
    config, model = context.config, context.model
    rivals = np.concatenate(others) if others else np.empty((0, model.descriptor_size), np.float32)
    places: list[NDArray[np.float64]] = []
    high: list[NDArray[np.float32]] = []
    low: list[NDArray[np.float32]] = []
    for click in clicked:
        box, embeddings = context.encode(click.prompt)
        corner = np.array([box.x0, box.y0])
        f_high, f_low = (x[0].float().cpu().numpy() for x in (embeddings.high, embeddings.low))
        stride_px = box.width / f_high.shape[2]
        own = click.prompt - corner
        chain = farthest_point_recursion(
            (own[0] / stride_px, own[1] / stride_px), f_high, f_low, stride_px * model.mpp, config.cop
        )
        found = [own[None]]
        for masks in decode(model, embeddings, 0, (chain * stride_px).astype(np.float32), config.masks):
            z = masks.descriptors.float().numpy()
            like_rival = (z @ rivals.T).max(1, initial=-1.0)
            found.append(masks.points_xy.numpy()[z @ click.descriptor >= like_rival])
        points = np.concatenate(found)
        f_low = resize_unit(f_low, f_high.shape[1:])
        column, row = (np.clip((points[:, k] / stride_px).astype(int), 0, f_high.shape[2 - k] - 1) for k in (0, 1))
        places.append(points + corner)
        high.append(f_high[:, row, column].T)
        low.append(f_low[:, row, column].T)
    first = np.cumsum([0, *(len(p) for p in places[:-1])])
    xy, h, f = np.concatenate(places), np.concatenate(high), np.concatenate(low)
    # Windows of neighbouring clicks find the same places; twins would vouch for each other.
    gap = np.hypot(xy[:, None, 0] - xy[None, :, 0], xy[:, None, 1] - xy[None, :, 1]) * model.mpp
    order = np.r_[first, np.setdiff1d(np.arange(len(xy)), first)]
    kept: list[int] = []
    for k in order:
        if not (gap[k, kept] <= config.cop.dedup_um).any():
            kept.append(int(k))
    h, f = h[kept], f[kept]
    rows = _spread(f, config.cop.prototypes, min(len(first), len(kept)))
    floor = _floor(h, f, rows, config.cop.floor_percentile)
    # Components of the similarity map grow together below it; the maps' components do not.
    if config.cop.localise == "maps":
        floor = min(floor, config.cop.highest_floor)
    return ChainPrototypes(h[rows], f[rows], float(np.float32(floor)))


def _spread(rows: NDArray[np.float32], count: int, keep: int) -> NDArray[np.intp]:
    """Farthest-first subset of unit rows (K, C): the first ``keep`` rows (the clicks), at most ``count`` in all."""
    chosen = list(range(min(keep, count)))
    nearest = (rows @ rows[chosen].T).max(1)
    while len(chosen) < min(count, len(rows)):
        chosen.append(int(nearest.argmin()))
        nearest = np.maximum(nearest, rows @ rows[chosen[-1]])
    return np.array(chosen)


def _floor(
    high: NDArray[np.float32], low: NDArray[np.float32], prototypes: NDArray[np.intp], percentile: float
) -> float:
    """Similarity to the prototypes that ``percentile`` % of the reliable places stay below; no place vouches for itself."""
    if len(high) < 3:
        return 0.5  # a lone click: half of a perfect match
    h, f = high @ high[prototypes].T, low @ low[prototypes].T
    h[prototypes, np.arange(len(prototypes))] = f[prototypes, np.arange(len(prototypes))] = 0
    return float(np.percentile(np.clip(h.max(1), 0, 1) * np.clip(f.max(1), 0, 1), percentile))
