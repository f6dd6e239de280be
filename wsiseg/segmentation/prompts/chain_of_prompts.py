"""Chain-of-Prompts: one click propagates to every place that looks like it.   Source: arXiv:2605.29429 [1]_ (method as on its project page).

Symbol   here              shape, range                             paper
F_h      high              (C, h, w), unit norm along C             fine features
F_l      low               (C', h, w) after resizing, unit norm     coarse features
S_h S_l  similarity        (h, w), [0, 1]                           cosine maps of the prompt
S        gated             (h, w), [0, 1]                           S_h * S_l
tau      threshold         scalar                                   mean(S) + sd(S)
R        reliable          (K, 2) grid cells                        reliable set
Steps:   hierarchical_seeds() (HSG)  ->  farthest_point_recursion() (FPR, public, last)
         gate_map(), component_points(): the same similarity against a bank of prototypes, for tiles that hold no click

Departures: D1 both maps are cosines (F_h is unit norm), clamped to [0, 1]. D2 ``gate="candidate"`` thresholds S_h per pixel, then S_l over the
components' centroids; the paper's text multiplies the maps first (``gate="product"``). D3 lengths are microns, not grid cells. D4 a centroid
that falls outside its component is moved to the component's most similar cell. D5 in a tile the threshold is the bank's own floor, not
the tile's mean + sd: that statistic is scale-free and finds "reliable" places in tiles that hold none (and would depend on the tiling).

References
----------
.. [1] Jo et al.: Chain-of-Prompts, One Click per Cell Type Suffices: Training-free Group Interaction for Cell Instance Segmentation,
   MICCAI 2026, arXiv:2605.29429.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsiseg.config import CopConfig

_EIGHT = np.ones((3, 3), bool)


def cosine_map(prototypes: NDArray[np.float32], features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Largest cosine with any prototype, clamped to [0, 1]: (m, C), (C, h, w) -> (h, w)."""
    flat = prototypes @ features.reshape(features.shape[0], -1)
    similarity: NDArray[np.float32] = np.clip(flat.max(0), 0, 1).reshape(features.shape[1:])  # D1
    return similarity


def hierarchical_seeds(
    cell: tuple[int, int], high: NDArray[np.float32], low: NDArray[np.float32], min_area_px: float, config: CopConfig
) -> NDArray[np.float64]:
    """HSG: places that look like one prompt.

    Parameters
    ----------
    cell
        (row, column) of the prompt.
    high, low
        F_h and F_l on the same grid, (C, h, w), unit norm.
    min_area_px
        Smaller components are dropped.
    config
        ``gate``.

    Returns
    -------
    ndarray
        (K, 2) float64: (x, y) in grid cells, corner frame; K = 0 when nothing stands out.
    """
    similarity_high = cosine_map(high[None, :, cell[0], cell[1]], high)
    similarity_low = cosine_map(low[None, :, cell[0], cell[1]], low)
    gated_map = similarity_high * similarity_low if config.gate == "product" else similarity_high
    threshold = gated_map.mean() + gated_map.std()  # tau
    points, cells = _components(gated_map > threshold, gated_map, min_area_px)
    if config.gate == "candidate" and len(points) > 1:  # D2
        at = similarity_low[cells[:, 0], cells[:, 1]]
        points = points[at > at.mean() + at.std()]
    return points


def gate_map(
    high: NDArray[np.float32],
    low: NDArray[np.float32],
    prototypes_high: NDArray[np.float32],
    prototypes_low: NDArray[np.float32],
) -> NDArray[np.float32]:
    """S of a tile against a type's bank: ``max cos(F_h, p_h) * max cos(F_l, p_l)`` -> (h, w), the grid of ``high``.

    ``low`` may be coarser; its similarity is taken from the cell that covers each fine cell.
    """
    coarse = cosine_map(prototypes_low, low)
    factor = high.shape[1] // low.shape[1]
    return cosine_map(prototypes_high, high) * coarse.repeat(factor, 0).repeat(factor, 1)


def component_points(gated_map: NDArray[np.float32], floor: float, min_area_px: float) -> NDArray[np.float64]:
    """Similarity-weighted centres of what lies above ``floor`` -> (K, 2) float64 (x, y) in grid cells, corner frame."""
    return _components(gated_map > floor, gated_map, min_area_px)[0]


def farthest_point_recursion(
    click: tuple[float, float], high: NDArray[np.float32], low: NDArray[np.float32], cell_um: float, config: CopConfig
) -> NDArray[np.float64]:
    """FPR: prompt with the farthest reliable point until nothing new is found.

    Parameters
    ----------
    click
        (x, y) in grid cells, corner frame.
    high
        F_h, (C, h, w), unit norm.
    low
        F_l, (C', h', w') with h' <= h; it is resized to the grid of F_h.
    cell_um
        Microns per grid cell.
    config
        Gate, sizes, cap on prompts.

    Returns
    -------
    ndarray
        (K, 2): the reliable set R, (x, y) in grid cells, corner frame, in order of discovery. The click is not in it; K = 0 when it finds nothing.

    Notes
    -----
    Deterministic: ties in the farthest point go to the one found first.
    """
    low = resize_unit(low, high.shape[1:])
    min_area_px, apart = config.min_component_um2 / cell_um**2, config.dedup_um / cell_um
    reliable = used = np.empty((0, 2))
    prompt = np.asarray(click, float)
    for _ in range(config.max_hops):
        row, column = (int(np.clip(prompt[axis], 0, high.shape[2 - axis] - 1)) for axis in (1, 0))
        found = hierarchical_seeds((row, column), high, low, min_area_px, config)
        if len(reliable) and len(found):
            found = found[_distances(found, reliable).min(1) > apart]
        used = np.vstack([used, prompt])
        if not len(found):
            break
        reliable = np.vstack([reliable, found])
        prompt = reliable[_distances(reliable, used).min(1).argmax()]
    return reliable


def resize_unit(features: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Bilinear resize of (C, h, w) to ``shape``, back to unit norm."""
    if features.shape[1:] != shape:
        y, x = ((np.arange(n) + 0.5) * m / n - 0.5 for n, m in zip(shape, features.shape[1:], strict=True))
        y0, x0 = (
            np.clip(np.floor(v).astype(int), 0, m - 2) for v, m in ((y, features.shape[1]), (x, features.shape[2]))
        )
        fy, fx = np.clip(y - y0, 0, 1).astype(np.float32)[:, None], np.clip(x - x0, 0, 1).astype(np.float32)
        top, bottom = features[:, y0], features[:, y0 + 1]
        rows = top * (1 - fy) + bottom * fy
        features = rows[:, :, x0] * (1 - fx) + rows[:, :, x0 + 1] * fx
    unit: NDArray[np.float32] = features / np.maximum(np.linalg.norm(features, axis=0, keepdims=True), 1e-6)
    return unit


def _components(
    mask: NDArray[np.bool_], weight: NDArray[np.float32], min_area_px: float
) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """8-connected components -> weighted centroids (K, 2) xy corner frame, and the (row, column) cell of each."""
    labels, count = ndimage.label(mask, structure=_EIGHT)
    if not count:
        return np.empty((0, 2)), np.empty((0, 2), np.intp)
    y, x = np.nonzero(mask)
    owner, w = labels[y, x] - 1, weight[y, x].astype(float)
    size, total = np.bincount(owner, minlength=count), np.bincount(owner, weights=w, minlength=count)
    centre = np.stack(
        [np.bincount(owner, weights=w * v, minlength=count) / np.maximum(total, 1e-12) for v in (x, y)], 1
    )
    cells = np.rint(centre[:, ::-1]).astype(np.intp)
    outside = labels[cells[:, 0], cells[:, 1]] != np.arange(1, count + 1)
    if outside.any():  # D4
        order = np.lexsort((x, y, -w, owner))
        best = order[np.searchsorted(owner[order], np.flatnonzero(outside))]
        cells[outside] = np.stack([y[best], x[best]], 1)
        centre[outside] = np.stack([x[best], y[best]], 1)
    keep = size >= min_area_px
    return centre[keep] + 0.5, cells[keep]


def _distances(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.hypot(a[:, None, 0] - b[None, :, 0], a[:, None, 1] - b[None, :, 1])
