"""Prompts -> masks: batched decoding, and the few numbers that decide whether a mask is a cell."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from wsiseg.records import WindowMasks
from wsiseg.segmentation.transfer import logits_to_host

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    from wsiseg.config import GridConfig, MaskConfig
    from wsiseg.models.contract import PromptableModel
    from wsiseg.records import Embeddings

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
        ``prompts_per_batch`` bounds the memory. Batches never mix tiles: a tile's masks do not depend on its neighbours in the queue.
    grid
        The points lie on a grid and may mean anything: all answers to each are taken, and have to be surer.

    Yields
    ------
    WindowMasks
        Masks of the points whose predicted IoU x stability reaches ``config.min_score``, in order; those that a model has to decode again,
        because they reach the border of their window, come last, from left to right, and of equal points once.
    """
    cut: list[NDArray[np.float32]] = []
    for start in range(0, len(points_xy), config.prompts_per_batch):
        batch = points_xy[start : start + config.prompts_per_batch]
        masks = _decode_batch(model, embeddings, tile, batch, config, grid, full_tile=False)
        if model.supports_full_tile:
            again = reaches_border(masks)
            # One answer of several may be cut: the others come again with it, and the first time does not count.
            asked = np.unique(masks.points_xy[again].numpy(), axis=0)
            again = torch.from_numpy((masks.points_xy.numpy()[:, None] == asked).all(2).any(1)) if len(asked) else again
            cut.append(asked)
            masks = masks.take(~again)
        yield masks
    cut_points = np.concatenate(cut) if cut else np.empty((0, 2), np.float32)
    step = max(config.prompts_per_batch // _WHOLE, 1)
    for start in range(0, len(cut_points), step):
        yield _decode_batch(model, embeddings, tile, cut_points[start : start + step], config, grid, full_tile=True)


def reaches_border(masks: WindowMasks) -> Tensor:
    """Find masks that touch the border of their window -> bool (N,)."""
    inside = masks.logits > 0
    touches: Tensor = inside[:, :, 0].any(1) | inside[:, :, -1].any(1) | inside[:, 0].any(1) | inside[:, -1].any(1)
    return touches


def _decode_batch(
    model: PromptableModel,
    embeddings: Embeddings,
    tile: int,
    batch: NDArray[np.float32],
    config: MaskConfig,
    grid: GridConfig | None,
    *,
    full_tile: bool,
) -> WindowMasks:
    """The good masks of one batch, on the CPU."""
    padded = np.concatenate([batch, np.repeat(batch[-1:], -len(batch) % model.prompts_multiple, 0)])
    points = torch.from_numpy(padded).to(model.device)
    which = torch.full((len(points),), tile, dtype=torch.long, device=model.device)
    masks = model.decode(embeddings, which, points, multimask=grid is not None, full_tile=full_tile)
    answers = len(masks.predicted_iou) // len(points)
    keep = masks.predicted_iou * masks.stability >= config.min_score
    if grid is not None:
        keep &= (masks.predicted_iou >= grid.min_quality) & (masks.stability >= grid.min_stability)
    keep[len(batch) * answers :] = False
    return WindowMasks(
        logits=logits_to_host(masks.logits[keep]),
        origin_xy=masks.origin_xy[keep].cpu(),
        mask_stride_px=masks.mask_stride_px,
        predicted_iou=masks.predicted_iou[keep].float().cpu(),
        stability=masks.stability[keep].float().cpu(),
        descriptors=masks.descriptors[keep].half().cpu(),
        points_xy=masks.points_xy[keep].cpu(),
        full_tile=masks.full_tile,
    )
