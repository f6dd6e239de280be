"""Frames and boxes.

Two continuous frames, both with x right, y down and the origin at the outer corner of the first pixel (pixel i covers [i, i+1)):

- *level-0 px* of the slide: everything stored.
- *model px*: the slide resampled to the model's microns per pixel; one model px is ``Lattice.scale`` level-0 px. Tiles are cut on
  multiples of the model's stride in this frame, so that every tiling samples the network on the same lattice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import shapely

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Box(NamedTuple):
    """Half-open box ``[x0, x1) x [y0, y1)``; the frame is said where it is used."""

    x0: int
    y0: int
    x1: int
    y1: int

    @property
    def width(self) -> int:
        """``x1 - x0``."""
        return self.x1 - self.x0

    @property
    def height(self) -> int:
        """``y1 - y0``."""
        return self.y1 - self.y0

    def grow(self, margin: int) -> Box:
        """The box with ``margin`` added on each side."""
        return Box(self.x0 - margin, self.y0 - margin, self.x1 + margin, self.y1 + margin)

    def contains(self, points_xy: NDArray[np.floating]) -> NDArray[np.bool_]:
        """Test which points (N, 2) lie in the half-open box -> bool (N,)."""
        x, y = points_xy[:, 0], points_xy[:, 1]
        return (x >= self.x0) & (x < self.x1) & (y >= self.y0) & (y < self.y1)


@dataclass(frozen=True)
class Lattice:
    """Transform between model px and level-0 px.

    Attributes
    ----------
    slide_mpp, model_mpp
        Microns per pixel of level 0 and of the model.
    """

    slide_mpp: float
    model_mpp: float

    @property
    def scale(self) -> float:
        """Level-0 px per model px."""
        return self.model_mpp / self.slide_mpp

    def to_level0(self, points_xy: NDArray[np.float64]) -> NDArray[np.float64]:
        """Model px -> level-0 px."""
        return points_xy * self.scale

    def to_model(self, points_xy: NDArray[np.float64]) -> NDArray[np.float64]:
        """Level-0 px -> model px."""
        return points_xy / self.scale

    def model_size(self, size_px0: tuple[int, int]) -> tuple[int, int]:
        """Width and height of the slide in whole model px, rounded up."""
        width, height = size_px0
        return math.ceil(width / self.scale), math.ceil(height / self.scale)


def round_up(value: float, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is not below ``value``."""
    return math.ceil(value / multiple) * multiple


def largest_part(geometry: shapely.Geometry) -> shapely.Polygon:
    """The largest Polygon of a geometry, without holes; an empty Polygon when it has none."""
    parts = [g for g in shapely.get_parts(geometry) if g.geom_type in ("Polygon", "MultiPolygon")]
    if len(parts) == 1 and parts[0].geom_type == "Polygon":
        return shapely.Polygon(parts[0].exterior)
    if not parts:
        return shapely.Polygon()
    return max((largest_part(g) for g in parts), key=lambda g: (g.area, g.wkb))


def z_order(points_xy: NDArray[np.float64]) -> NDArray[np.intp]:
    """Order along a Z-order (Morton) curve of 16-px cells; ties by y, then x."""
    key = np.zeros(len(points_xy), np.uint64)
    cells = np.clip(points_xy / 16, 0, 2**20).astype(np.uint64)
    for bit in range(21):
        for axis in (0, 1):
            key |= ((cells[:, axis] >> np.uint64(bit)) & np.uint64(1)) << np.uint64(2 * bit + axis)
    return np.lexsort((points_xy[:, 0], points_xy[:, 1], key))
