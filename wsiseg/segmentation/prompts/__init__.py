"""Prompts for the mask decoder, one paper per file, and the choice between them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from wsiseg.segmentation.prompts.apg import apg_points
from wsiseg.segmentation.prompts.chain_of_prompts import component_points, gate_map

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsiseg.config import RunConfig
    from wsiseg.records import Bank, Embeddings


def find_points(
    embeddings: Embeddings, width_px: int, mpp: float, config: RunConfig, bank: Bank | None
) -> NDArray[np.float32]:
    """Prompts of one encoded tile.

    Parameters
    ----------
    embeddings
        Embeddings of a batch of one tile.
    width_px
        Width of the tile, model px.
    mpp
        Microns per model px.
    config
        ``method`` (``apg`` or ``cop``), ``apg``, ``cop``.
    bank
        Prototypes; needed by ``cop``.

    Returns
    -------
    ndarray
        (N, 2) float32: model px of the tile, corner frame.
    """
    points = np.empty((0, 2), np.float32)
    if embeddings.maps is not None:
        maps = embeddings.maps[0].float().cpu().numpy()
        points = apg_points(maps, width_px // maps.shape[-1], mpp, config.apg)
    if config.method == "apg" or bank is None:
        return points
    high, low = (x[0].float().cpu().numpy() for x in (embeddings.high, embeddings.low))
    stride_px = width_px / high.shape[2]
    thresholds = [chain.similarity_threshold for chain in bank.chains]
    gates = [gate_map(high, low, chain.high, chain.low) for chain in bank.chains]
    if config.cop.localise == "maps" and embeddings.maps is not None:
        column, row = (points / stride_px).astype(int).T
        passed = np.zeros(len(points), bool)
        for gate, floor in zip(gates, thresholds, strict=True):
            passed |= gate[row, column] >= floor
        return points[passed]
    # No instance maps, or the paper's own localisation: components of each type's similarity; where two coincide, the first type's stays.
    min_area_px = config.cop.min_component_um2 / (stride_px * mpp) ** 2
    found = [component_points(g, floor, min_area_px) * stride_px for g, floor in zip(gates, thresholds, strict=True)]
    return _apart(np.concatenate(found).astype(np.float32), config.cop.dedup_um / mpp)


def _apart(points: NDArray[np.float32], distance: float) -> NDArray[np.float32]:
    """Points without those closer than ``distance`` to an earlier one."""
    from scipy.spatial import cKDTree

    keep = np.ones(len(points), bool)
    if len(points):
        for i, j in sorted(cKDTree(points).query_pairs(distance)):
            if keep[i]:
                keep[j] = False
    return points[keep]
