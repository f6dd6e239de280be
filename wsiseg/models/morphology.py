"""Hand-crafted features of a nucleus: size, elongation and stain, inside its mask and just around it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

MEASUREMENTS = 11  #: log area, axis ratio; optical density per channel: mean and sd inside, mean of a 2-um ring outside
RING_UM = 2.0


def optical_density(unit: Tensor, mask_stride_px: float) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] -> optical density on cells of ``mask_stride_px`` px; a px that two cells share counts in both."""
    if mask_stride_px == int(mask_stride_px):
        mean = F.avg_pool2d(unit, int(mask_stride_px))
    else:
        height, width = (round(n / mask_stride_px) for n in unit.shape[2:])
        mean = F.adaptive_avg_pool2d(unit, (height, width))
    return -torch.log(mean.clamp_min(1 / 255))


def measure(hard: Tensor, density: Tensor, cell_um: float) -> tuple[Tensor, Tensor]:
    """Measure masks.

    Parameters
    ----------
    hard
        (N, h, w): 0 or 1.
    density
        (N, 3, h, w): optical density of the same windows.
    cell_um
        Side of a cell.

    Returns
    -------
    measured, ring
        (N, 11), raw; and (N, 1, h, w): cells within ``RING_UM`` around the mask.
    """
    area = hard.sum((1, 2)).clamp_min(1)
    mean = (density * hard[:, None]).sum((2, 3)) / area[:, None]
    variance = ((density - mean[:, :, None, None]).square() * hard[:, None]).sum((2, 3)) / area[:, None]
    reach = max(round(RING_UM / cell_um), 1)
    ring = F.max_pool2d(hard[:, None], 2 * reach + 1, 1, reach) - hard[:, None]
    around = (density * ring).sum((2, 3)) / ring.sum((2, 3)).clamp_min(1)
    measured = torch.cat(
        [
            torch.log(area * cell_um**2)[:, None],
            _axis_ratio(hard, area)[:, None],
            mean,
            variance.clamp_min(1e-6).sqrt(),
            around,
        ],
        1,
    )
    return measured, ring


def windows(feature: Tensor, tile: Tensor, origin: Tensor, size: int) -> Tensor:
    """Windows of ``size`` cells that start at ``origin`` (N, 2) -> (N, C, size, size); zero outside the tile."""
    channels, height, width = feature.shape[1:]
    steps = torch.arange(size, device=feature.device)
    x, y = origin[:, :1] + steps, origin[:, 1:] + steps
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    index = (y.clamp(0, height - 1) * width)[:, :, None] + x.clamp(0, width - 1)[:, None, :]
    index = (index + (tile * (height * width))[:, None, None]).reshape(-1)
    rows = feature.permute(0, 2, 3, 1).reshape(-1, channels)
    out = rows[index].reshape(len(origin), size, size, channels).permute(0, 3, 1, 2)
    return out * inside[:, None].to(feature.dtype)


def _axis_ratio(hard: Tensor, area: Tensor) -> Tensor:
    """Minor over major axis of the masks (N, h, w), from second moments -> (N,) in (0, 1]."""
    steps = torch.arange(hard.shape[1], device=hard.device, dtype=hard.dtype)
    px, py = hard.sum(1) / area[:, None], hard.sum(2) / area[:, None]
    mx, my = (px * steps).sum(1), (py * steps).sum(1)
    dx, dy = steps[None] - mx[:, None], steps[None] - my[:, None]
    xx, yy = (px * dx**2).sum(1) + 1 / 12, (py * dy**2).sum(1) + 1 / 12
    xy = torch.einsum("nyx,ny,nx->n", hard, dy, dx) / area
    root = torch.sqrt(((xx - yy) / 2) ** 2 + xy**2)
    middle = (xx + yy) / 2
    return torch.sqrt((middle - root).clamp_min(1e-4) / (middle + root).clamp_min(1e-4))
