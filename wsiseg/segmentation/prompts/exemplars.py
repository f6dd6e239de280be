"""Examples for a detector on one tile: boxes round cells that the clicks' bank is surest of, so that a click per type reaches every tile.

Where to look is Chain-of-Prompts' answer (chain_of_prompts.py): places whose similarity to a type's bank reaches the type's threshold. The cells
there are decoded from points on the same embedding, and compared with the clicked cells by descriptor. A cell is an example of the type that it
is most like, the surest first; its margin is the difference to the cell clicked as another type, or against the type, that it is most like.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from wsiseg.records import Cells, Examples
from wsiseg.segmentation.decoding import decode
from wsiseg.segmentation.polygons import trace
from wsiseg.segmentation.prompts.chain_of_prompts import component_points, gate_map

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from wsiseg.config import DetectionConfig, MaskConfig, RunConfig
    from wsiseg.geometry import Box, Lattice
    from wsiseg.models.contract import PromptableModel
    from wsiseg.records import Bank, Embeddings, TypePrototypes

_ALIKE = 0.02  #: a lead of a clicked cell below this, in cosine, tells nothing: its type looks like another one to the network
_SAME_PX0 = 1e-2  #: prompts this close are one


def likely_places(
    embeddings: Embeddings, width_px: int, mpp: float, bank: Bank, min_component_um2: float, count: int
) -> NDArray[np.float32]:
    """Places on a tile that look most like the clicks.

    Parameters
    ----------
    embeddings
        Embeddings of a batch of one tile.
    width_px, mpp
        Width of the tile, and microns per model px.
    bank
        With prototypes for Chain-of-Prompts.
    min_component_um2
        Smaller places are noise.
    count
        Places per type.

    Returns
    -------
    ndarray
        (N, 2) float32: model px of the tile, corner frame; type by type, the most similar first.
    """
    high, low = (x[0].float().cpu().numpy() for x in (embeddings.high, embeddings.low))
    stride_px = width_px / high.shape[2]
    found = [np.empty((0, 2))]
    for chain in bank.chains:
        gate = gate_map(high, low, chain.high, chain.low)
        points = component_points(gate, chain.similarity_threshold, min_component_um2 / (stride_px * mpp) ** 2)
        column, row = (np.clip(points[:, k].astype(int), 0, gate.shape[1 - k] - 1) for k in (0, 1))
        best = np.argsort(-gate[row, column], kind="stable")[:count]
        found.append(points[best] * stride_px)
    return np.concatenate(found).astype(np.float32)


def relative_lead(descriptors: NDArray[np.float32], types: Sequence[TypePrototypes]) -> NDArray[np.float32]:
    """How sure it is that cells (N, D) are of each type -> (N, T), > 0 for at most one type of each.

    The lead of the largest cosine with a clicked cell of the type over that with a cell clicked as another type or against this one, relative to
    the lead that the clicked cells have themselves: 0 half way between two types, 1 like the click. Without rivals, the cosine itself.
    """
    sure = _leads(descriptors, types)
    for t, of in enumerate(types):
        sure[:, t] /= max(float(_leads(of.clicked, types)[:, t].max()), _ALIKE)
    return sure


def _leads(descriptors: NDArray[np.float32], types: Sequence[TypePrototypes]) -> NDArray[np.float32]:
    like = np.stack([_most_like(descriptors, of.clicked) for of in types], 1)
    leads = like.copy()
    for t, of in enumerate(types):
        rivals = [np.delete(like, t, 1), *([_most_like(descriptors, of.negative)[:, None]] if len(of.negative) else [])]
        rival = np.concatenate(rivals, 1)
        if rival.shape[1]:
            leads[:, t] -= rival.max(1)
    return leads


def _most_like(descriptors: NDArray[np.float32], clicked: NDArray[np.float32]) -> NDArray[np.float32]:
    """Largest cosine with any clicked cell -> (N,)."""
    # Not by BLAS, whose last bits depend on the number of threads: the choice must not.
    cosines: NDArray[np.float32] = np.einsum("ij,kj->ik", descriptors, clicked).max(1)
    return cosines


def choose(sure: NDArray[np.float32], boxes: NDArray[np.float32], config: DetectionConfig) -> list[NDArray[np.float32]]:
    """The surest boxes of each type, of those sure enough: (N, T), (N, 4) -> T arrays (at most ``examples``, 4)."""
    chosen = []
    for column in sure.T:
        order = np.argsort(-column, kind="stable")[: config.examples]
        chosen.append(boxes[order[column[order] >= config.min_lead]])
    return chosen


def find_examples(
    model: PromptableModel,
    embeddings: Embeddings,
    index: int,
    points: NDArray[np.float32],
    outer: Box,
    lattice: Lattice,
    bank: Bank,
    config: RunConfig,
) -> list[Examples | None]:
    """Find examples of each type on one tile.

    Parameters
    ----------
    model, embeddings, index
        The network, and the tile's embedding.
    points
        Result of :func:`likely_places`.
    outer
        The tile's outer box, model px of the slide.
    lattice
        Between model px and level-0 px.
    bank
        The clicked cells; of clicks on this tile, the cells themselves are the examples.
    config
        ``masks``, ``cop`` and ``detection``.

    Returns
    -------
    list
        Per type of the bank; ``None`` for one that nothing on the tile is sure to be. Examples of the other types are the negative ones.
    """
    count = config.detection.examples

    def cells_at(prompts: NDArray[np.float32], masks: MaskConfig) -> tuple[Cells, NDArray[np.float32]]:
        found = [trace(m, outer, lattice, masks)[0] for m in decode(model, embeddings, index, prompts, masks)]
        cells = Cells.concatenate(found, model.descriptor_size)
        boxes = lattice.to_model(cells.bounds) - np.tile((outer.x0, outer.y0), 2)
        return cells, np.clip(boxes, 0, outer.width).astype(np.float32)

    cells, boxes = cells_at(points, config.masks)
    shown = choose(relative_lead(cells.descriptors.astype(np.float32), bank.types), boxes, config.detection)
    nothing = np.empty((0, 2))
    clicks = [of.clicks for of in bank.types]
    clicks += [nothing if of.negative_clicks is None else of.negative_clicks for of in bank.types]
    corner = np.array([outer.x0, outer.y0])
    at = lattice.to_model(np.concatenate([nothing, *clicks])) - corner
    here = ((at >= 0) & (at < outer.width)).all(1)
    own = [np.empty((0, 4), np.float32) for _ in clicks]
    if here.any():
        anything = dataclasses.replace(config.masks, min_score=config.cop.click_min_score)
        clicked, around = cells_at(at[here].astype(np.float32), anything)
        gap = np.abs(clicked.points_xy[:, None] - np.concatenate(clicks)[None]).max(2)  # (cells, clicks)
        owner = np.repeat(np.arange(len(clicks)), [len(c) for c in clicks])
        for row, click in zip(*np.nonzero(gap < _SAME_PX0), strict=True):
            own[owner[click]] = np.vstack([own[owner[click]], around[row]])
    positive = [mine if len(mine) else sure for mine, sure in zip(own, shown, strict=False)]
    examples: list[Examples | None] = []
    for t, mine in enumerate(positive):
        others = [box for rank in range(count) for o in positive[:t] + positive[t + 1 :] for box in o[rank : rank + 1]]
        against = np.concatenate([own[len(bank.types) + t], *(box[None] for box in others[:count])])
        examples.append(Examples(positive=mine, negative=against) if len(mine) else None)
    return examples
