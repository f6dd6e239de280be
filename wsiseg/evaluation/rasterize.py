"""Polygons -> label image, for metrics that count pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import shapely
from skimage.draw import polygon as fill

if TYPE_CHECKING:
    from numpy.typing import NDArray


def rasterise(polygons: NDArray[np.object_], shape: tuple[int, int]) -> NDArray[np.int32]:
    """Label image of polygons.

    Parameters
    ----------
    polygons
        shapely Polygons or MultiPolygons of shape (N,), px of the image, corner frame. Holes stay open.
    shape
        (height, width).

    Returns
    -------
    ndarray
        int32 of ``shape``: 0 is background, i + 1 the i-th polygon. A pixel belongs to the polygon that holds its centre, the later one if two do.
    """
    label = np.zeros(shape, np.int32)
    for i, one in enumerate(polygons):
        for part in shapely.get_parts(one):
            rows, columns = _inside(part.exterior, shape)
            if len(part.interiors):
                flat = rows * shape[1] + columns
                holes = [r * shape[1] + c for r, c in (_inside(hole, shape) for hole in part.interiors)]
                flat = flat[~np.isin(flat, np.concatenate(holes))]
                rows, columns = np.divmod(flat, shape[1])
            label[rows, columns] = i + 1
    return label


def _inside(ring: shapely.LinearRing, shape: tuple[int, int]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    x, y = shapely.get_coordinates(ring).T
    rows, columns = fill(y - 0.5, x - 0.5, shape)
    return rows, columns
