"""Masks from an accelerator to the host: what tracing needs of them, not whole windows.

A nucleus covers a tenth of its window, and tracing looks at the logits on both sides of its border only: the box around what is inside, with a
rim of one, as fixed-point numbers of 16 bits (half precision would have 30 times their error near the limits). That is 0.4 kB a mask instead of
16. A crossing moves by about 1e-5 of a cell, which now and then rounds a vertex to the next point of its grid.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from wsiseg.records import WindowMasks

OUTSIDE = -4.0  #: logit where there is nothing; tracing clips there
_STEPS = 8191  #: per unit: 4 is 32764


class PackedLogits(NamedTuple):
    """Logits of N masks inside their boxes.

    Attributes
    ----------
    values
        int16 of shape (V,): mask after mask, row after row, in units of 1/8191.
    boxes
        int16 of shape (N, 4): first row and column, and their numbers; none of a mask without anything inside.
    shape
        Rows and columns of a window.
    """

    values: Tensor
    boxes: Tensor
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes that are copied."""
        return self.values.nbytes + self.boxes.nbytes


def pack(logits: Tensor) -> PackedLogits:
    """Pack logits (N, h, w), on their device."""
    height, width = logits.shape[1:]
    inside = logits > 0
    sides = []
    for axis, size in ((2, height), (1, width)):
        line = inside.any(axis)
        first = line.int().argmax(1)
        last = size - 1 - line.flip(1).int().argmax(1)
        start, stop = (first - 1).clamp_min(0), (last + 2).clamp_max(size)
        sides.append((start, torch.where(line.any(1), stop - start, 0)))
    (row, rows), (column, columns) = sides
    count = rows * columns
    owner = torch.repeat_interleave(torch.arange(len(logits), device=logits.device), count)
    within = torch.arange(len(owner), device=logits.device) - (count.cumsum(0) - count)[owner]
    y, x = row[owner] + within // columns[owner], column[owner] + within % columns[owner]
    values = logits[owner, y, x].float().clamp(OUTSIDE, -OUTSIDE)
    steps = (values.abs() * _STEPS).round().clamp_min(1) * values.sign()  # the side of 0 stays
    return PackedLogits(steps.short(), torch.stack([row, column, rows, columns], 1).short(), (height, width))


def unpack(packed: PackedLogits) -> Tensor:
    """The logits, float32 (N, h, w), ``OUTSIDE`` beyond their boxes."""
    height, width = packed.shape
    row, column, rows, columns = packed.boxes.long().unbind(1)
    count = rows * columns
    owner = torch.repeat_interleave(torch.arange(len(count)), count)
    within = torch.arange(len(owner)) - (count.cumsum(0) - count)[owner]
    logits = torch.full((len(count), height, width), OUTSIDE)
    logits[owner, row[owner] + within // columns[owner], column[owner] + within % columns[owner]] = (
        packed.values.float() / _STEPS
    )
    return logits


def logits_to_host(logits: Tensor) -> Tensor:
    """Logits (N, h, w) on the CPU: as they are, or packed on the way from an accelerator."""
    if logits.device.type == "cpu":
        return logits.float()
    packed = pack(logits)
    return unpack(PackedLogits(packed.values.cpu(), packed.boxes.cpu(), packed.shape))


def masks_to_host(masks: WindowMasks) -> WindowMasks:
    """Masks on the CPU, descriptors in half precision; from an accelerator in three copies, each of which waits for its work once."""
    numbers = torch.cat(
        [
            masks.origin_xy.float(),  # whole, and far below 2^24
            masks.points_xy.float(),
            masks.predicted_iou.float()[:, None],
            masks.stability.float()[:, None],
            masks.descriptors.float(),
        ],
        1,
    ).cpu()
    return dataclasses.replace(
        masks,
        logits=logits_to_host(masks.logits),
        origin_xy=numbers[:, :2].to(masks.origin_xy.dtype),
        points_xy=numbers[:, 2:4],
        predicted_iou=numbers[:, 4],
        stability=numbers[:, 5],
        descriptors=numbers[:, 6:].half(),
    )
