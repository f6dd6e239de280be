"""Prompts -> masks: batched decoding, and the few numbers that decide whether a mask is a cell."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import torch

from wsiseg.segmentation.transfer import masks_to_host

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from wsiseg.config import GridConfig, MaskConfig
    from wsiseg.models.contract import PromptableModel
    from wsiseg.records import Embeddings, WindowMasks

_WHOLE = 16  #: a mask on the whole tile has this many times the logits of one on its window


@torch.inference_mode()
def decode(
    model: PromptableModel,
    embeddings: Embeddings,
    tile: int,
    points_xy: NDArray[np.float32],
    config: MaskConfig,
    *,
    grid: GridConfig | None = None,
) -> Iterator[WindowMasks]:
    """Masks of the points of one tile, in batches, on the CPU.

    Parameters
    ----------
    model, embeddings
        The model and what its ``encode`` returned.
    tile
        Index in the batch of the points' tile.
    points_xy
        float32 of shape (N, 2), model px of the tile, corner frame.
    config
        ``prompts_per_batch`` bounds the memory.
    grid
        The points lie on a grid, on nuclei or not: all masks of each point are taken, and stricter thresholds apply.

    Yields
    ------
    WindowMasks
        Masks of the points whose predicted IoU x stability reaches ``config.min_score``, in order; those that a model has to decode again,
        because they reach the border of their window, come last, from left to right, one for equal points.
    """
    for _, masks in _decode(model, embeddings, np.full(len(points_xy), tile), points_xy, config, grid):
        yield masks


@torch.inference_mode()
def decode_tiles(
    model: PromptableModel,
    embeddings: Embeddings,
    tiles: Sequence[int],
    points_xy: Sequence[NDArray[np.float32]],
    config: MaskConfig,
    *,
    grid: GridConfig | None = None,
) -> list[list[WindowMasks]]:
    """Masks of the points of several tiles that were encoded together: a batch of prompts may hold those of more than one tile.

    Parameters
    ----------
    model, embeddings, config, grid
        As for :func:`decode`.
    tiles
        Indices in the batch, each once.
    points_xy
        Points of each of them.

    Returns
    -------
    list of list of WindowMasks
        Per tile what :func:`decode` yields for it.
    """
    owner = np.repeat(np.asarray(tiles, np.int64), [len(points) for points in points_xy])
    found: dict[int, list[WindowMasks]] = {tile: [] for tile in tiles}
    for which, masks in _decode(model, embeddings, owner, np.concatenate(points_xy), config, grid):
        here = np.unique(which)
        for tile in here:
            found[int(tile)].append(masks if len(here) == 1 else masks.take(torch.from_numpy(which == tile)))
    return list(found.values())


def _decode(
    model: PromptableModel,
    embeddings: Embeddings,
    tiles: NDArray[np.int64],
    points_xy: NDArray[np.float32],
    config: MaskConfig,
    grid: GridConfig | None,
) -> Iterator[tuple[NDArray[np.int64], WindowMasks]]:
    """Masks of points (N, 2), each on its tile (N,), and the tiles of the masks."""
    cut: list[NDArray[np.float64]] = []
    for start in range(0, len(points_xy), config.prompts_per_batch):
        batch = slice(start, start + config.prompts_per_batch)
        which, masks = _decode_batch(model, embeddings, tiles[batch], points_xy[batch], config, grid, full_tile=False)
        if model.supports_full_tile:
            again = reaches_border(masks)
            # One answer of several may be cut: the others come again with it, and the first time does not count.
            prompts = np.column_stack([which, masks.points_xy.numpy()])
            asked = np.unique(prompts[again.numpy()], axis=0)
            again = torch.from_numpy((prompts[:, None] == asked).all(2).any(1)) if len(asked) else again
            cut.append(asked)
            which, masks = which[~again.numpy()], masks.take(~again)
        yield which, masks
    left = np.concatenate(cut) if cut else np.empty((0, 3))
    left = left[np.argsort(left[:, 0], kind="stable")]
    step = max(config.prompts_per_batch // _WHOLE, 1)
    for start in range(0, len(left), step):
        part = left[start : start + step]
        which, points = part[:, 0].astype(np.int64), part[:, 1:].astype(np.float32)
        yield _decode_batch(model, embeddings, which, points, config, grid, full_tile=True)


def reaches_border(masks: WindowMasks) -> Tensor:
    """Find masks that touch the border of their window -> bool (N,)."""
    inside = masks.logits > 0
    touches: Tensor = inside[:, :, 0].any(1) | inside[:, :, -1].any(1) | inside[:, 0].any(1) | inside[:, -1].any(1)
    return touches


def _decode_batch(
    model: PromptableModel,
    embeddings: Embeddings,
    tiles: NDArray[np.int64],
    points_xy: NDArray[np.float32],
    config: MaskConfig,
    grid: GridConfig | None,
    *,
    full_tile: bool,
) -> tuple[NDArray[np.int64], WindowMasks]:
    """The good masks of one batch of points (N, 2) on tiles (N,), and their tiles (M,), on the CPU."""
    rows, real = _padded(tiles, model.prompts_multiple)
    points = torch.from_numpy(points_xy[rows]).to(model.device)
    which = torch.from_numpy(tiles[rows]).to(model.device)
    masks = model.decode(embeddings, which, points, multimask=grid is not None, full_tile=full_tile)
    answers = len(masks.predicted_iou) // len(points)
    keep = masks.predicted_iou * masks.stability >= config.min_score
    if grid is not None:
        keep &= (masks.predicted_iou >= grid.min_quality) & (masks.stability >= grid.min_stability)
    kept = np.flatnonzero(keep.cpu().numpy() & np.repeat(real, answers))
    chosen = masks.take(torch.from_numpy(kept).to(model.device))
    return tiles[rows[kept // answers]], masks_to_host(chosen)


def _padded(tiles: NDArray[np.int64], multiple: int) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Fill up the prompts of each tile to a multiple by repeating the last one -> rows (N,), and which of them are not filling.

    How a tile's prompts are computed must not depend on what else is in the batch.
    """
    ends = [*np.flatnonzero(np.diff(tiles)) + 1, len(tiles)]
    rows, real = [], []
    for start, end in itertools.pairwise([0, *ends]):
        missing = -(end - start) % multiple
        rows.append(np.r_[start:end, np.full(missing, end - 1, np.intp)])
        real.append(np.arange(end - start + missing) < end - start)
    return np.concatenate(rows), np.concatenate(real)
