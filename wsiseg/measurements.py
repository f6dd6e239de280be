"""Measurements of the cells: shape from moments of the polygon, distance to the nearest other cell, density around; names of all.

Those of colour need pixels and are made with the outlines (segmentation/colours.py).

    area        A   = 1/2 sum c_i,  c_i = x_i y_(i+1) - x_(i+1) y_i                      over the edges of the ring
    centroid    C_x = 1/(6 A) sum (x_i + x_(i+1)) c_i
    moments     I_xx = 1/12 sum (x_i^2 + x_i x_(i+1) + x_(i+1)^2) c_i,  I_yy alike        about the origin, of the filled polygon
                I_xy = 1/24 sum (x_i y_(i+1) + 2 x_i y_i + 2 x_(i+1) y_(i+1) + x_(i+1) y_i) c_i
    ellipse     with the same moments: axes 4 sqrt(l1), 4 sqrt(l2), where l1 >= l2 are the eigenvalues of I / A - C C'

These are the definitions of scikit-image's ``regionprops``, without pixels. The perimeter is that of the polygon.

References
----------
.. [1] C. Steger, On the calculation of arbitrary moments of polygons, Technical report FGBV-96-05, TU Munich, 1996.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import shapely

from wsiseg.records import UNASSIGNED
from wsiseg.runtime import machine
from wsiseg.runtime.prefetch import parallel_map

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from wsiseg.records import Cells, CellSource, Typing

DENSITY_UM = 50.0  #: radius within which cells are counted: some 80 cells in dense tissue, and less than the width of most structures
CHUNK = 5_000  #: cells measured at once, by each thread: 8 MB
NEAREST = "nearest_um"
DENSITY = "density_per_mm2"
SHAPE = ("perimeter_um", "circularity", "solidity", "eccentricity", "major_axis_um", "minor_axis_um", "orientation_deg")
#: What QuPath calls them, or would.
QUPATH_NAMES = {
    "area_um2": "Nucleus: Area µm^2",
    "perimeter_um": "Nucleus: Length µm",
    "circularity": "Nucleus: Circularity",
    "solidity": "Nucleus: Solidity",
    "eccentricity": "Nucleus: Eccentricity",
    "major_axis_um": "Nucleus: Major axis µm",
    "minor_axis_um": "Nucleus: Minor axis µm",
    "orientation_deg": "Nucleus: Orientation °",
    NEAREST: "Distance to nearest detection µm",
    DENSITY: f"Detections within {DENSITY_UM:g} µm per mm^2",
}
PLACES = ("nucleus", "ring")
_QUPATH_DYES = {"haematoxylin": "Hematoxylin", "eosin": "Eosin", "dab": "DAB", "residual": "Residual"}
QUPATH_NAMES |= {
    f"{place}_{dye}_{statistic}": f"{place.capitalize()}: {shown} OD {words}"
    for place in PLACES
    for dye, shown in _QUPATH_DYES.items()
    for statistic, words in (("mean", "mean"), ("sd", "std dev"))
}


def dyes_of(stain: str) -> tuple[str, str, str]:
    """Names of the dyes of a stain, and of what they do not explain."""
    return ("haematoxylin", "eosin" if stain == "he" else "dab", "residual")


def colour_names(stain: str) -> tuple[str, ...]:
    """Names of the measurements of colour, in the order of the files: ``nucleus_haematoxylin_mean`` and so on."""
    return tuple(f"{place}_{dye}_{of}" for place in PLACES for dye in dyes_of(stain) for of in ("mean", "sd"))


def qupath_name(name: str) -> str:
    """Name in QuPath of a measurement."""
    if is_of_type(name):
        return f"Distance to detection {name.removeprefix(f'{NEAREST}: ')} µm"
    return QUPATH_NAMES.get(name, name)


def is_of_type(name: str) -> bool:
    """Tell whether a measurement is the distance to the cells of a type, which changes with the types."""
    return name.startswith(f"{NEAREST}: ")


def measure_shapes(polygons: NDArray[np.object_], mpp: float) -> dict[str, NDArray[np.float32]]:
    """Measure the shape of polygons without holes.

    Parameters
    ----------
    polygons
        shapely Polygons of shape (N,), px.
    mpp
        Microns per px.

    Returns
    -------
    dict of str to NDArray
        ``SHAPE``, each float32 of shape (N,): lengths in microns; circularity 4 pi area / perimeter^2; solidity area / area of the convex hull;
        the orientation of the major axis in degrees from the x axis, counter-clockwise as the slide is seen, in [0, 180). NaN for what has no area.
    """
    count = len(polygons)
    rings = polygons if not shapely.get_num_interior_rings(polygons).any() else shapely.get_exterior_ring(polygons)
    xy, ring = shapely.get_coordinates(rings, return_index=True)
    start = np.searchsorted(ring, np.arange(count))
    filled = np.bincount(ring, minlength=count) > 3
    origin = np.zeros((count, 2))
    origin[filled] = xy[start[filled]]
    x, y = (xy - origin[ring]).T  # about the first vertex: far from the slide's corner, products lose digits
    edge = np.flatnonzero(ring[1:] == ring[:-1]) if len(ring) else np.empty(0, np.intp)
    of, x0, y0, x1, y1 = ring[edge], x[edge], y[edge], x[edge + 1], y[edge + 1]
    cross = x0 * y1 - x1 * y0

    def total(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(of, values, count).astype(np.float64)

    with np.errstate(divide="ignore", invalid="ignore"):
        area = total(cross) / 2
        cx, cy = total((x0 + x1) * cross) / (6 * area), total((y0 + y1) * cross) / (6 * area)
        xx = total((x0 * x0 + x0 * x1 + x1 * x1) * cross) / (12 * area) - cx * cx
        yy = total((y0 * y0 + y0 * y1 + y1 * y1) * cross) / (12 * area) - cy * cy
        xy_ = total((x0 * y1 + 2 * x0 * y0 + 2 * x1 * y1 + x1 * y0) * cross) / (24 * area) - cx * cy
        root = np.hypot((xx - yy) / 2, xy_)
        longest, shortest = (xx + yy) / 2 + root, np.maximum((xx + yy) / 2 - root, 0)
        perimeter = total(np.hypot(x1 - x0, y1 - y0))
        area = np.abs(area)
        columns = (
            perimeter * mpp,
            4 * np.pi * area / perimeter**2,
            area / shapely.area(shapely.convex_hull(polygons)),
            np.sqrt(1 - shortest / longest),
            4 * np.sqrt(longest) * mpp,
            4 * np.sqrt(shortest) * mpp,
            np.degrees(np.arctan2(-2 * xy_, xx - yy)) / 2 % 180,  # y is down, and the angle is seen with y up
        )
        bad = ~(area > 0)
        measured = {
            name: np.where(bad, np.nan, column).astype(np.float32) for name, column in zip(SHAPE, columns, strict=True)
        }
    measured["orientation_deg"] %= np.float32(180)  # float32 rounds up to it
    return measured


def measure_neighbours(xy_um: NDArray[np.float64]) -> dict[str, NDArray[np.float32]]:
    """Distance to the nearest other cell, and density around each.

    Parameters
    ----------
    xy_um
        Centroids (N, 2), microns.

    Returns
    -------
    dict of str to NDArray
        ``nearest_um``, NaN for a lone cell; ``density_per_mm2``: cells with their centroid within ``DENSITY_UM`` of the cell's, itself among them,
        per area of that circle. At the edge of the tissue or region, the circle reaches beyond it.
    """
    from scipy.spatial import cKDTree

    count = len(xy_um)
    nearest, around = np.full(count, np.nan, np.float32), np.zeros(count)
    known = np.flatnonzero(np.isfinite(xy_um).all(1))
    if len(known):
        tree, threads = cKDTree(xy_um[known]), machine.cores()
        if len(known) > 1:
            nearest[known] = tree.query(xy_um[known], k=[2], workers=threads)[0][:, 0]
        for start in range(0, len(known), CHUNK):
            rows = known[start : start + CHUNK]
            around[rows] = tree.query_ball_point(xy_um[rows], DENSITY_UM, return_length=True, workers=threads)
    return {NEAREST: nearest, DENSITY: (around / (np.pi * DENSITY_UM**2) * 1e6).astype(np.float32)}


def measure_types(xy_um: NDArray[np.float64], typing: Typing) -> dict[str, NDArray[np.float32]]:
    """Distance from each cell to the nearest other cell of each type; NaN where there is none.

    Parameters
    ----------
    xy_um
        Centroids (N, 2), microns.
    typing
        Types of the same cells; ``unassigned`` is not one.

    Returns
    -------
    dict of str to NDArray
        ``nearest_um: tumour`` and so on, float32 of shape (N,).
    """
    from scipy.spatial import cKDTree

    threads, finite = machine.cores(), np.isfinite(xy_um).all(1)
    measured = {}
    for code, name in enumerate(typing.names):
        if name == UNASSIGNED:
            continue
        distance = np.full(len(xy_um), np.nan, np.float32)
        own = finite & (typing.codes == code)
        if own.any():
            tree = cKDTree(xy_um[own])
            others = finite & ~own
            distance[others] = tree.query(xy_um[others], workers=threads)[0]
            if own.sum() > 1:
                distance[own] = tree.query(xy_um[own], k=[2], workers=threads)[0][:, 0]
        measured[f"{NEAREST}: {name}"] = distance
    return measured


def measure(cells: CellSource, typing: Typing, mpp: float) -> MeasuredCells:
    """Measure all cells, reading them once, a few at a time.

    Parameters
    ----------
    cells, typing
        The cells of a slide, level-0 px, and their types.
    mpp
        Microns per px.

    Returns
    -------
    MeasuredCells
        The same cells with their measurements: 4 bytes each per cell in memory.
    """
    names = (*SHAPE, *cells.measurement_names)

    def measure_chunk(chunk: Cells) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float32]]]:
        centroid = shapely.centroid(chunk.polygons)
        xy = np.stack([shapely.get_x(centroid), shapely.get_y(centroid)], axis=1)
        return xy, measure_shapes(chunk.polygons, mpp) | chunk.measurements

    measured = list(parallel_map(measure_chunk, cells.chunks(CHUNK)))
    xy_um = np.concatenate([np.empty((0, 2)), *(xy for xy, _ in measured)]) * mpp
    empty = np.empty(0, np.float32)
    columns = {name: np.concatenate([empty, *(values[name] for _, values in measured)]) for name in names}
    return MeasuredCells(cells, columns | measure_neighbours(xy_um) | measure_types(xy_um, typing))


@dataclass(frozen=True)
class MeasuredCells:
    """Cells with their measurements (a :class:`~wsiseg.records.CellSource`).

    Attributes
    ----------
    cells
        The cells.
    columns
        float32 of shape (N,) by name.
    """

    cells: CellSource
    columns: Mapping[str, NDArray[np.float32]]

    def __len__(self) -> int:
        return len(self.cells)

    @property
    def descriptor_size(self) -> int:
        """Size of a descriptor."""
        return self.cells.descriptor_size

    @property
    def total_bounds(self) -> tuple[float, float, float, float] | None:
        """xmin, ymin, xmax, ymax of all polygons, level-0 px."""
        return self.cells.total_bounds

    @property
    def measurement_names(self) -> tuple[str, ...]:
        """Names of the measurements."""
        return tuple(self.columns)

    def chunks(self, rows: int) -> Iterator[Cells]:
        """All cells in order, ``rows`` at a time."""
        start = 0
        for chunk in self.cells.chunks(rows):
            here = slice(start, start + len(chunk))
            yield replace(chunk, measurements={name: column[here] for name, column in self.columns.items()})
            start += len(chunk)
