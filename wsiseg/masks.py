"""Prompts -> masks: batched decoding, and the few numbers that decide whether a mask is a cell."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from wsiseg.records import WindowMasks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from wsiseg.config import MaskConfig
    from wsiseg.models.contract import PromptableModel
    from wsiseg.records import Embeddings


#: Batches are filled up to a multiple of this: small matrix products round differently with the number of threads.
PADDING = 32


@torch.inference_mode()
def decode(
    model: PromptableModel, embeddings: Embeddings, tile: int, points_xy: NDArray[np.float32], config: MaskConfig
) -> Iterator[WindowMasks]:
    """Masks of the points of one tile, in batches, on the CPU.

    Parameters
    ----------
    model, embeddings
        The model and what its ``encode`` returned.
    tile
        Which tile of the batch the points lie in.
    points_xy
        float32 of shape (N, 2), model px of the tile, corner frame.
    config
        ``prompts_per_batch`` bounds the memory. Batches never mix tiles: a tile's masks do not depend on its neighbours in the queue.

    Yields
    ------
    WindowMasks
        Of the points whose predicted IoU x stability reaches ``config.min_score``, in order.
    """
    for start in range(0, len(points_xy), config.prompts_per_batch):
        batch = points_xy[start : start + config.prompts_per_batch]
        padded = np.concatenate([batch, np.repeat(batch[-1:], -len(batch) % PADDING, 0)])
        points = torch.from_numpy(padded).to(model.device)
        which = torch.full((len(points),), tile, dtype=torch.long, device=model.device)
        masks = model.decode(embeddings, which, points)
        keep = masks.quality * masks.stability >= config.min_score
        keep[len(batch) :] = False
        yield WindowMasks(
            logits=masks.logits[keep].float().cpu(),
            origin_xy=masks.origin_xy[keep].cpu(),
            cell_px=masks.cell_px,
            quality=masks.quality[keep].float().cpu(),
            stability=masks.stability[keep].float().cpu(),
            descriptors=masks.descriptors[keep].half().cpu(),
            points_xy=points[keep].cpu(),
        )
