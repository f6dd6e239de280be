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

import operator
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage
from scipy.special import expit, logit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsiseg.config import ApgConfig

_RINGS = (
    16  #: cells; deeper seeds (of components wider than 8 um at 2 px of 0.25 um) are measured by a distance transform
)
_NEIGHBOURS = sorted(
    (
        (dy, dx, dy**2 + dx**2)
        for dy in range(-_RINGS, _RINGS + 1)
        for dx in range(-_RINGS, _RINGS + 1)
        if 0 < dy**2 + dx**2 <= _RINGS**2
    ),
    key=operator.itemgetter(2),
)  #: rows, columns and squared distances of the cells around one, the nearest first


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
    y, x, seed = _seeds(maps, config)
    components, count = ndimage.label(seed)  # 4-connectivity
    if not count:
        return np.empty((0, 2), np.float32)
    owner = components[y, x]
    # The deepest cell of each component; the first in reading order on ties, so that it does not depend on the tile.
    order = np.lexsort((x, y, -_depth_squared(seed, y, x), owner))
    first = order[np.searchsorted(owner[order], np.arange(1, count + 1))]
    size = np.bincount(owner, minlength=count + 1)[1:]
    keep = size * (stride_px * mpp) ** 2 >= config.min_component_um2  # D2
    points = np.stack([x[first], y[first]], 1)[keep]
    return ((points + 0.5) * stride_px).astype(np.float32)


def _seeds(
    maps: NDArray[np.float32], config: ApgConfig
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.bool_]]:
    """Rows and columns of the seeds in reading order, and the seeds (h, w); probabilities are worked out where the logits allow a seed."""
    margin = 1e-3  # beyond any rounding of the logistic function
    foreground, centre, boundary = (np.float32(logit(p)) for p in (config.foreground, config.centre, config.boundary))
    at = np.flatnonzero(
        maps[0] >= foreground - margin
    )  # a plane of interleaved maps is slow to read: only this one is, whole
    y, x = np.divmod(at, maps.shape[2])
    logits = maps[:, y, x]
    possible = (logits[1] <= centre + margin) & (logits[2] <= boundary + margin)
    y, x = y[possible], x[possible]
    f, c, b = expit(logits[:, possible])
    is_seed = (f >= config.foreground) & (c < config.centre) & (b < config.boundary)
    y, x = y[is_seed], x[is_seed]
    seed = np.zeros(maps.shape[1:], bool)
    seed[y, x] = True
    return y, x, seed


def _depth_squared(seed: NDArray[np.bool_], y: NDArray[np.intp], x: NDArray[np.intp]) -> NDArray[np.int64]:
    """Squared distance (N,) of each seed to the nearest cell that is none (D1), the outside of the map included.

    A distance transform measures the whole map; seeds are a few hundredths of it and shallow, so their surroundings are looked at ring by ring.
    """
    padded = np.zeros((seed.shape[0] + 2 * _RINGS, seed.shape[1] + 2 * _RINGS), bool)
    padded[_RINGS:-_RINGS, _RINGS:-_RINGS] = seed
    flat, width = padded.ravel(), padded.shape[1]
    at, left = (y + _RINGS) * width + x + _RINGS, np.arange(len(y))
    found = np.zeros(len(y), np.int64)
    for dy, dx, squared in _NEIGHBOURS:
        outside = ~flat[at + (dy * width + dx)]
        found[left[outside]] = squared
        at, left = at[~outside], left[~outside]
        if not len(left):
            return found
    far = ndimage.distance_transform_edt(np.pad(seed, 1))[1:-1, 1:-1]
    found[left] = np.rint(far[y[left], x[left]] ** 2).astype(np.int64)
    return found
