"""Mask refinement: instances are prompted again with box, point, and the neighbours' points as background.   Source: APG, unreleased version 2 [1]_.

Symbol  here       meaning
m1, m2             an instance's mask of the first and of the second round, on the same window
owner   owner      (h, w): which instance each cell of the tile belongs to after the first round, best score first; -1 for none

Steps: suppress overlaps of the first round on the tile  ->  prompt each kept instance with box, point and ``neighbours`` negative points
       ->  take m2 where IoU(m1, m2) >= ``agree`` and at most ``max_overlap`` of m2 lies on other instances; else m1 stays

Instances that the first round drops here are only left out as neighbours: the stitching decides about them, as always.

References
----------
.. [1] Archit, Pape: Revisiting foundation models for cell instance segmentation, MIDL 2026, arXiv:2603.17845; this step: their development branch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.spatial import cKDTree

from wsiseg.records import PromptExtras, WindowMasks

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsiseg.config import MaskConfig, RefinementConfig
    from wsiseg.models.contract import PromptableModel
    from wsiseg.records import Embeddings


@torch.inference_mode()
def refine_masks(
    model: PromptableModel,
    embeddings: Embeddings,
    size_px: int,
    batches: list[WindowMasks],
    masks_config: MaskConfig,
    config: RefinementConfig,
    which: int = 0,
) -> list[WindowMasks]:
    """Improve the masks of one tile.

    Parameters
    ----------
    model, embeddings
        The model and what its ``encode`` returned for the tile.
    size_px
        Side of the tile, model px.
    batches
        Masks of the first round, on the CPU; masks on the whole tile stay as they are.
    masks_config, config
        ``prompts_per_batch``; thresholds.
    which
        Tile of the encoded batch.

    Returns
    -------
    list of WindowMasks
        As many masks as before, in the same order.
    """
    small = [k for k, b in enumerate(batches) if not b.full_tile and len(b.predicted_iou)]
    if not small:
        return batches
    first = WindowMasks.concatenate([batches[k] for k in small])
    tile = _Tile(first, size_px)
    kept = tile.suppress_overlaps(config.max_overlap)
    better = first
    for start in range(0, len(kept), masks_config.prompts_per_batch):
        rows = kept[start : start + masks_config.prompts_per_batch]
        found = _decode(model, embeddings, which, tile, rows, kept, config)
        good = [i for i, row in enumerate(rows) if tile.accepts(row, found.logits[i].numpy() > 0, config)]
        better = _put(better, rows[good], found.take(torch.tensor(good, dtype=torch.long)))
    out = list(batches)
    ends = np.cumsum([len(batches[k].predicted_iou) for k in small])
    for k, end in zip(small, ends, strict=True):
        out[k] = better.take(torch.arange(end - len(batches[k].predicted_iou), end))
    return out


class _Tile:
    """Masks of the first round on the tile's grid, overlaps suppressed."""

    def __init__(self, masks: WindowMasks, size_px: int) -> None:
        self.masks = masks
        self.inside: NDArray[np.bool_] = masks.logits.numpy() > 0
        self.corner = np.floor_divide(masks.origin_xy.numpy(), masks.mask_stride_px).astype(np.int64)
        side = int(size_px // masks.mask_stride_px)
        self.margin = self.inside.shape[1]  # windows reach beyond the tile
        self.owner = np.full((side + 2 * self.margin, side + 2 * self.margin), -1, np.int32)

    def window(self, row: int) -> NDArray[np.int32]:
        """Owners of the cells of a mask's window, a view."""
        x, y = self.corner[row] + self.margin
        h, w = self.inside.shape[1:]
        return self.owner[y : y + h, x : x + w]

    def suppress_overlaps(self, max_overlap: float) -> NDArray[np.intp]:
        """Masks that keep their place, best score first; rows in order of the prompts."""
        kept = []
        for row in np.argsort(-(self.masks.predicted_iou * self.masks.stability).numpy(), kind="stable"):
            mask, owner = self.inside[row], self.window(row)
            free = mask & (owner < 0)
            if mask.any() and free.sum() >= (1 - max_overlap) * mask.sum():
                owner[free] = row
                kept.append(row)
        return np.sort(np.array(kept, np.intp))

    def box(self, row: int) -> tuple[float, float, float, float]:
        """Box of a mask, model px of the tile, corner frame."""
        columns, lines = np.flatnonzero(self.inside[row].any(0)), np.flatnonzero(self.inside[row].any(1))
        (x, y), cell = self.corner[row], self.masks.mask_stride_px
        return (x + columns[0]) * cell, (y + lines[0]) * cell, (x + columns[-1] + 1) * cell, (y + lines[-1] + 1) * cell

    def accepts(self, row: int, second: NDArray[np.bool_], config: RefinementConfig) -> bool:
        """Tell whether the second mask is the same instance and does not overlap the others."""
        first, owner = self.inside[row], self.window(row)
        same = (first & second).sum() / max((first | second).sum(), 1)
        elsewhere = (second & (owner >= 0) & (owner != row)).sum() / max(second.sum(), 1)
        return bool(same >= config.agree and elsewhere <= config.max_overlap)


def _decode(
    model: PromptableModel,
    embeddings: Embeddings,
    number: int,
    tile: _Tile,
    rows: NDArray[np.intp],
    kept: NDArray[np.intp],
    config: RefinementConfig,
) -> WindowMasks:
    """The second round's masks of ``rows``, on the CPU."""
    points = tile.masks.points_xy[torch.from_numpy(rows)]
    kept_xy = np.unique(tile.masks.points_xy.numpy()[kept], axis=0)  # several masks of one point are not neighbours
    count = min(config.neighbours, len(kept_xy) - 1)
    negative = torch.empty(len(rows), 0, 2)
    if count:
        _, near = cKDTree(kept_xy).query(points.numpy(), k=count + 1)
        negative = torch.from_numpy(kept_xy[np.atleast_2d(near)[:, 1:]])
    labels = torch.zeros(negative.shape[:2])  # background
    if model.box_replaces_point:
        negative, labels = torch.cat([points[:, None], negative], 1), torch.cat([torch.ones(len(rows), 1), labels], 1)
    boxes = torch.tensor([tile.box(row) for row in rows], dtype=torch.float32)
    more = -len(rows) % model.prompts_multiple
    extras = PromptExtras(*(_padded(x.float(), more).to(model.device) for x in (negative, labels, boxes)))
    which = torch.full((len(rows) + more,), number, dtype=torch.long, device=model.device)
    found = model.decode(embeddings, which, _padded(points, more).to(model.device), extras=extras).take(
        torch.arange(len(rows))
    )
    return replace(
        found,
        logits=found.logits.float().cpu(),
        origin_xy=found.origin_xy.cpu(),
        predicted_iou=found.predicted_iou.float().cpu(),
        stability=found.stability.float().cpu(),
        descriptors=found.descriptors.half().cpu(),
        points_xy=found.points_xy.cpu(),
    )


def _padded(x: torch.Tensor, more: int) -> torch.Tensor:
    return torch.cat([x, x[-1:].expand(more, *x.shape[1:])])


def _put(masks: WindowMasks, rows: NDArray[np.intp], found: WindowMasks) -> WindowMasks:
    """``masks`` with those at ``rows`` replaced."""
    where = torch.from_numpy(rows)

    def changed(name: str) -> torch.Tensor:
        value: torch.Tensor = getattr(masks, name).clone()
        value[where] = getattr(found, name)
        return value

    return replace(
        masks,
        logits=changed("logits"),
        predicted_iou=changed("predicted_iou"),
        stability=changed("stability"),
        descriptors=changed("descriptors"),
    )
