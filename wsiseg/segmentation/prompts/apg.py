"""Automatic prompt generation: one point per nucleus from the model's instance maps.   Source: arXiv:2603.17845 [1]_, steps 1-4.

Symbol  here                 shape, range
f       foreground           (h, w), [0, 1]
c       centre distance      (h, w), [0, 1]; 0 at the centre
b       boundary distance    (h, w), [0, 1]; 0 innermost, 1 at the boundary

Steps: seed = (f >= t_f) & (c < t_c) & (b < t_b)  ->  4-connected components  ->  one point each, where the component is deepest.

Departures: D1 depth is measured to the component's own outside only (two components that touch diagonally do not shorten each other).
D2 components smaller than ``min_component_um2`` are dropped. D3 maps stay at the model's own resolution; they are not upsampled.

References
----------
.. [1] Archit, Pape: Revisiting foundation models for cell instance segmentation, MIDL 2026, arXiv:2603.17845.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage
from scipy.special import expit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsiseg.config import ApgConfig


def apg_points(maps: NDArray[np.float32], stride_px: int, mpp: float, config: ApgConfig) -> NDArray[np.float32]:
    """Points from instance maps.

    Parameters
    ----------
    maps
        float of shape (3, h, w): logits of f, c, b.
    stride_px, mpp
        Model px per map cell, microns per model px.
    config
        Thresholds.

    Returns
    -------
    ndarray
        float32 of shape (N, 2): x, y in model px of the tile, corner frame, in reading order of the components. N = 0 is valid.
    """
    f, c, b = expit(maps)
    seed = (f >= config.foreground) & (c < config.centre) & (b < config.boundary)
    components, count = ndimage.label(seed)  # 4-connectivity
    if not count:
        return np.empty((0, 2), np.float32)
    depth = ndimage.distance_transform_edt(np.pad(seed, 1))[1:-1, 1:-1]  # D1
    y, x = np.nonzero(seed)
    owner = components[y, x]
    # The deepest cell of each component; the first in reading order on ties, so that it does not depend on the tile.
    order = np.lexsort((x, y, -depth[y, x], owner))
    first = order[np.searchsorted(owner[order], np.arange(1, count + 1))]
    size = np.bincount(owner, minlength=count + 1)[1:]
    keep = size * (stride_px * mpp) ** 2 >= config.min_component_um2  # D2
    points = np.stack([x[first], y[first]], 1)[keep]
    return ((points + 0.5) * stride_px).astype(np.float32)
