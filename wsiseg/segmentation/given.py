"""Given outlines as masks on windows, so that the model describes them as if it had found them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import shapely
import torch
from skimage.draw import polygon as fill

from wsiseg.records import WindowMasks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from wsiseg.geometry import Lattice
    from wsiseg.models.contract import PromptableModel
    from wsiseg.records import Embeddings, Tile

_CERTAIN = 10.0  #: logit of a cell of the window that lies inside; outside, the negative


def to_tile(polygons: NDArray[np.object_], tile: Tile, lattice: Lattice) -> NDArray[np.object_]:
    """Polygons (N,) of level-0 px in model px of the tile."""
    corner = np.array([tile.outer.x0, tile.outer.y0], float)
    moved: NDArray[np.object_] = shapely.transform(polygons, lambda xy: xy / lattice.scale - corner)
    return moved


@torch.inference_mode()
def describe_outlines(
    model: PromptableModel,
    embeddings: Embeddings,
    tile: int,
    polygons: NDArray[np.object_],
    points: NDArray[np.float32],
    batch: int,
) -> Iterator[WindowMasks]:
    """Describe outlines.

    Parameters
    ----------
    model, embeddings, tile
        The network, and the embedding of the tile as one of a batch.
    polygons, points
        Outlines (N,) and a point (N, 2) inside each, model px of the tile. What lies outside of the window around the point is not seen.
    batch
        Outlines at a time.

    Yields
    ------
    WindowMasks
        On the CPU, in order; ``predicted_iou`` and ``stability`` are 1.
    """
    side, cell = model.window_size, model.mask_stride_px
    for start in range(0, len(polygons), batch):
        places = torch.from_numpy(points[start : start + batch]).to(model.device)
        origin = model.window_origin(places)
        logits = _rasterised(polygons[start : start + batch], origin.cpu().numpy(), cell, side)
        index = torch.full((len(places),), tile, dtype=torch.long, device=model.device)
        descriptors = model.describe_masks(embeddings, index, origin, torch.from_numpy(logits).to(model.device))
        ones = torch.ones(len(places))
        yield WindowMasks(
            logits=torch.from_numpy(logits),
            origin_xy=origin.cpu(),
            mask_stride_px=cell,
            predicted_iou=ones,
            stability=ones,
            descriptors=descriptors.half().cpu(),
            points_xy=places.cpu(),
        )


def _rasterised(
    polygons: NDArray[np.object_], origin: NDArray[np.int64], cell: float, side: int
) -> NDArray[np.float32]:
    """Logits (N, side, side): positive where the centre of a cell lies inside. The smallest outline has the cell that it lies in."""
    logits = np.full((len(polygons), side, side), -_CERTAIN, np.float32)
    for k, polygon in enumerate(polygons):
        ring = (shapely.get_coordinates(shapely.get_exterior_ring(polygon)) - origin[k]) / cell
        rows, columns = fill(ring[:, 1] - 0.5, ring[:, 0] - 0.5, (side, side))
        if not len(rows):
            column, row = np.clip(np.floor(ring.mean(0)), 0, side - 1).astype(int)
            rows, columns = np.array([row]), np.array([column])
        logits[k, rows, columns] = _CERTAIN
    return logits
