"""given.parquet: outlines that a run was given and does not look for, in the folder of its parts, where every worker finds those of its tiles.

    Parquet, zstd, small row groups along a Z-order curve, so that a tile's are in few of them
      geometry    binary     WKB polygon, level-0 px
      x, y        double     a point inside it, level-0 px

Private to a run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from wsiseg.errors import FormatError
from wsiseg.formats.parts import UNREADABLE, polygons_from_wkb
from wsiseg.geometry import z_order
from wsiseg.runtime.atomic import atomic_path
from wsiseg.runtime.text import first_line

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

NAME = "given.parquet.outlines"  # not *.parquet: it is no block's part
ROW_GROUP = 1000  #: a tile of 128 um has up to a few hundred nuclei


def points_inside(polygons: NDArray[np.object_]) -> NDArray[np.float64]:
    """A point (N, 2) inside each polygon: its centroid, or where that lies outside, any."""
    centre = shapely.centroid(polygons)
    outside = ~shapely.contains(polygons, centre)
    if outside.any():
        centre = np.where(outside, shapely.point_on_surface(polygons), centre)
    points: NDArray[np.float64] = shapely.get_coordinates(centre).reshape(-1, 2)
    return points


def write_given(folder: Path, polygons: NDArray[np.object_], points_xy: NDArray[np.float64]) -> None:
    """Write the file into the folder of the parts: polygons (N,) and points (N, 2), level-0 px."""
    order = z_order(points_xy)
    wkb = shapely.to_wkb(polygons[order]) if len(polygons) else []
    table = pa.table({"geometry": pa.array(wkb, pa.binary()), "x": points_xy[order, 0], "y": points_xy[order, 1]})
    with atomic_path(folder / NAME) as partial:
        pq.write_table(table, partial.absolute(), compression="zstd", row_group_size=ROW_GROUP)


class GivenOutlines:
    """The outlines that a run was given, by place.

    Parameters
    ----------
    folder
        Of the parts.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME

    def within(self, x0: float, y0: float, x1: float, y1: float) -> tuple[NDArray[np.object_], NDArray[np.float64]]:
        """Outlines whose point lies in [x0, x1) x [y0, y1), level-0 px: polygons (n,) and points (n, 2), in the order of the file.

        Raises
        ------
        FormatError
            The file is missing or damaged.
        """
        x, y = pa.compute.field("x"), pa.compute.field("y")
        inside = (x >= x0) & (x < x1) & (y >= y0) & (y < y1)
        try:
            table = pq.read_table(self.path, filters=inside, partitioning=None)
            polygons = polygons_from_wkb(table["geometry"])
            return polygons, np.stack([table["x"].to_numpy(), table["y"].to_numpy()], 1)
        except UNREADABLE as error:
            raise FormatError(
                f"{self.path}: damaged ({first_line(error)}); run the slide's command again with --overwrite"
            ) from error
