"""Outlines on the grid of 0.25 px, on which QuPath imports them unchanged, as polygons and as the text of GeoJSON coordinates.

Rounding can make a ring touch itself. Whether it did costs GEOS more than all the rest, so first a proof is tried that it did not: seen from
some point inside, the vertices of a star-shaped ring turn one way only, and once round. On the grid these numbers are exact. Whatever cannot
be proved so goes to :func:`snap_polygons`; the result is the same.

The area is kept: an outline that falls apart on the grid is joined again where it was thinnest, and where rounding changes the area of a small
one by more than ``AREA_TOLERANCE``, single vertices go to another point of the grid.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import orjson
import shapely

from wsiseg.formats.geojson_geometry import polygonal

if TYPE_CHECKING:
    from numpy.typing import NDArray

GRID_PX = 0.25  #: 0 of 10,000 shapes abort QuPath 0.6+ on it, at any offset (plain rounding to 0.01 px: 8)
AREA_TOLERANCE = 0.02  #: share by which the area of an outline may change
QUPATH_PX = 0.01  #: QuPath 0.6+ moves vertices to this grid, and edges to vertices that are as near
_SAFE_EDGE_PX = 8.0  #: two points of the grid and an edge up to this long between two others are at least 1.1 QUPATH_PX / sqrt(2) apart
_THIN = 0.03  #: and longer edges of a star do not pass another vertex so closely when their line misses the middle by this share of its distance
_NECK_PX = (0.2, 0.3, 0.4)  #: what is thinner than twice this is widened by it; the smallest that does is used
_MOVES = 8  #: vertices that are moved for the area
_FINE = 64.0  #: 1 / px: grid of the point inside
_LARGEST = 2.0**19  #: px: products of two distances up to it, in steps of 1 / _FINE, are exact in float64
_FARTHEST = 2.0**40  #: px


def outline_texts(polygons: NDArray[np.object_], origin: tuple[float, float]) -> list[bytes]:
    """The outlines on the grid, as GeoJSON coordinates without their outer brackets.

    Parameters
    ----------
    polygons
        shapely geometries of shape (N,), px; may be invalid.
    origin
        Offset to subtract; on the grid.

    Returns
    -------
    list of bytes
        ``b"[10.25,5],...,[10.25,5]"`` of what :func:`snap_polygons` gives, without repeated vertices and without ``.0``; further rings follow
        after ``],[``. Empty where nothing is left.
    """
    texts = [b""] * len(polygons)
    rows = _single_rings(polygons)
    xy, starts = _snapped(polygons[rows])
    stars = _are_stars(xy, starts, shapely.area(polygons[rows]))
    if not stars.all():
        xy, starts, rows = (
            xy[:, np.repeat(stars, np.diff(starts))],
            np.concatenate([[0], np.cumsum(np.diff(starts)[stars])]),
            rows[stars],
        )
    for row, text in zip(rows.tolist(), _ring_texts(xy, starts, np.arange(len(starts)), origin), strict=True):
        texts[row] = text
    if len(rows) < len(polygons):
        others = np.setdiff1d(np.arange(len(polygons)), rows)
        snapped = snap_polygons(polygons[others])
        kept = ~shapely.is_missing(snapped)
        for row, text in zip(others[kept].tolist(), _polygon_texts(snapped[kept], origin), strict=True):
            texts[row] = text
    return texts


def snap_polygons(polygons: NDArray[np.object_]) -> NDArray[np.object_]:
    """Polygons on the 0.25-px grid that QuPath imports unchanged.

    Parameters
    ----------
    polygons
        shapely geometries of shape (N,), px; may be invalid. Not modified.

    Returns
    -------
    NDArray
        Valid Polygons of shape (N,), without holes smaller than the grid; ``None`` where nothing is left. Their areas differ from those of the
        polygons by at most ``AREA_TOLERANCE``, unless these are hardly larger than the grid.
    """
    # Rounding each vertex is all that set_precision does, at six times the cost, unless it makes the ring touch itself.
    with np.errstate(invalid="ignore"):  # NaN among the coordinates: _repair drops the polygon
        snapped = np.asarray(shapely.set_precision(polygons, GRID_PX, mode="pointwise"), dtype=object)
        fine = (
            shapely.is_valid(snapped)
            & (shapely.get_type_id(snapped) == shapely.GeometryType.POLYGON)
            & ~shapely.is_empty(snapped)
        )
        extent = np.diff(shapely.bounds(snapped).reshape(-1, 2, 2), axis=1).max((1, 2), initial=0)
        changed = np.abs(shapely.area(snapped) - shapely.area(polygons)) > AREA_TOLERANCE * shapely.area(polygons)
    for index in np.flatnonzero(~fine):
        snapped[index] = _repair(polygons[index])
    for index in np.flatnonzero(fine & (extent > _SAFE_EDGE_PX)):
        snapped[index] = _without_needles(snapped[index])
    for index in np.flatnonzero(fine & changed):
        snapped[index] = _with_area(snapped[index], polygons[index].area)
    return snapped


def _repair(polygon: shapely.Geometry | None) -> shapely.Polygon | None:
    """make_valid, the largest polygonal part, set_precision; what fell apart there is joined. ``None`` when nothing is left."""
    if polygon is None or not np.isfinite(shapely.get_coordinates(polygon)).all():
        return None
    parts = shapely.get_parts(polygonal(shapely.make_valid(polygon)))
    if not len(parts):
        return None
    whole = max(parts, key=lambda part: (part.area, part.wkb))
    area = float(whole.area)
    snapped = _in_one_part(whole)
    return None if snapped is None else _with_area(_without_needles(snapped), area)


def _in_one_part(polygon: shapely.Polygon) -> shapely.Polygon | None:
    """On the grid, with necks widened as far as it takes to hold it together; the largest part where nothing does, ``None`` where nothing is left."""
    fallback = None
    for width in (0, *_NECK_PX):
        body = shapely.buffer(shapely.buffer(polygon, -width), 1.1 * width) if width else polygon
        wider = shapely.union(polygon, shapely.buffer(shapely.difference(polygon, body), width)) if width else polygon
        parts = shapely.get_parts(shapely.set_precision(wider, GRID_PX))
        parts = parts[shapely.is_valid(parts) & (shapely.area(parts) > 0)]
        if not len(parts):
            break
        largest = max(parts, key=lambda part: (part.area, part.wkb))
        if largest.area >= (1 - AREA_TOLERANCE) * polygon.area:
            return largest
        fallback = largest if fallback is None else fallback
    return fallback


def _without_needles(polygon: shapely.Polygon) -> shapely.Polygon:
    """Cut off spikes that are thinner than QuPath's own grid, where its import aborts."""
    reduced = shapely.set_precision(polygon, QUPATH_PX)
    plain = shapely.remove_repeated_points(polygon)
    if shapely.get_num_coordinates(reduced) == shapely.get_num_coordinates(plain):
        return polygon
    parts = shapely.get_parts(shapely.set_precision(reduced, GRID_PX))
    return max(parts, key=lambda part: (part.area, part.wkb)) if len(parts) else polygon


def _with_area(polygon: shapely.Polygon, area: float) -> shapely.Polygon:
    """Move single vertices to a neighbouring point of the grid, each once, until the area is right."""
    moved: list[int] = []
    for _ in range(min(_MOVES, shapely.get_num_points(polygon.exterior) - 1)):
        if abs(polygon.area - area) <= AREA_TOLERANCE * area:
            break
        ring = shapely.get_coordinates(polygon.exterior)[:-1]
        across = np.roll(ring, -1, axis=0) - np.roll(ring, 1, axis=0)
        # By the shoelace formula: what a step right, left, down or up of each vertex adds to the area.
        gain = 0.5 * GRID_PX * np.stack([across[:, 1], -across[:, 1], -across[:, 0], across[:, 0]], axis=1)
        gain *= 1 if polygon.exterior.is_ccw else -1
        error = np.abs(polygon.area + gain - area)
        error[moved] = np.inf
        vertex, step = np.unravel_index(int(error.argmin()), error.shape)
        moved.append(int(vertex))
        ring[vertex] += GRID_PX * np.array([(1, 0), (-1, 0), (0, 1), (0, -1)])[step]
        candidate = shapely.Polygon(np.concatenate([ring, ring[:1]]), polygon.interiors)
        nearer = candidate.is_valid and abs(candidate.area - area) < abs(polygon.area - area)
        if nearer and len(shapely.get_parts(shapely.set_precision(candidate, QUPATH_PX))) == 1:
            polygon = candidate
    return polygon


def _single_rings(polygons: NDArray[np.object_]) -> NDArray[np.intp]:
    """Rows of the polygons of one ring that are not too large to count exactly."""
    bounds = shapely.bounds(polygons).reshape(-1, 4)
    with np.errstate(invalid="ignore"):
        exact = (np.abs(bounds) < _FARTHEST).all(1) & (bounds[:, 2:] - bounds[:, :2] < _LARGEST).all(
            1
        )  # no bounds (NaN): not exact
    plain = (shapely.get_type_id(polygons) == shapely.GeometryType.POLYGON) & (
        shapely.get_num_interior_rings(polygons) == 0
    )
    return np.flatnonzero(exact & plain)


def _snapped(polygons: NDArray[np.object_]) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Vertices on the grid without repetitions, of shape (2, V), and where each ring starts, of shape (N + 1,)."""
    xy = np.ascontiguousarray(shapely.get_coordinates(polygons).T)
    starts = np.concatenate([[0], np.cumsum(shapely.get_num_coordinates(polygons))])
    xy /= GRID_PX
    rounded = np.rint(xy)
    rounded += xy - rounded == 0.5  # halves go up, as in GEOS
    rounded *= GRID_PX
    return _without_repeats(rounded, starts)


def _without_repeats(xy: NDArray[np.float64], starts: NDArray[np.intp]) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Vertices of shape (2, V) without those that are where the one before in their ring is, and the new starts."""
    keep = np.ones(xy.shape[1], bool)
    keep[1:] = (xy[0, 1:] != xy[0, :-1]) | (xy[1, 1:] != xy[1, :-1])
    keep[starts[:-1]] = True
    if keep.all():
        return xy, starts
    return xy[:, keep], np.concatenate([[0], np.cumsum(keep)])[starts]


def _are_stars(xy: NDArray[np.float64], starts: NDArray[np.intp], areas: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Find rings (closed, on the grid) that are star-shaped around the mean of their vertices, and therefore valid, and need nothing more.

    Nothing more: the area is that of ``areas`` (N,), and no edge passes another vertex so closely that QuPath would join them.
    """
    if len(starts) == 1:
        return np.zeros(0, bool)
    lengths, firsts, lasts = np.diff(starts), starts[:-1], starts[1:] - 1
    middle = np.rint(np.add.reduceat(xy, firsts, axis=1) / lengths * _FINE) / _FINE
    x, y = xy - np.repeat(middle, lengths, axis=1)
    turn = np.empty_like(x)
    turn[:-1] = x[:-1] * y[1:] - x[1:] * y[:-1]
    turn[lasts] = turn[lasts - 1]  # the last vertex is the first again; a ring of one vertex has no turn
    below = y < 0
    up = np.zeros(len(x), np.intp)
    up[:-1] = below[:-1] & ~below[1:]
    up[lasts] = 0
    one_way = (np.minimum.reduceat(turn, firsts) > 0) | (np.maximum.reduceat(turn, firsts) < 0)
    twice = np.abs(np.add.reduceat(turn, firsts) - turn[lasts])
    kept = np.abs(twice - 2 * areas) <= 2 * AREA_TOLERANCE * areas
    thin = np.zeros(len(x), bool)
    long = np.flatnonzero(np.diff(x) ** 2 + np.diff(y) ** 2 > _SAFE_EDGE_PX**2)
    reach = np.maximum(np.hypot(x[long], y[long]), np.hypot(x[long + 1], y[long + 1]))
    edge = np.hypot(x[long + 1] - x[long], y[long + 1] - y[long])
    thin[long] = np.abs(turn[long]) < _THIN * reach * edge
    thin[lasts] = False
    plain = kept & ~np.logical_or.reduceat(thin, firsts)
    return np.asarray(one_way & plain & (np.add.reduceat(up, firsts) == 1) & (lengths > 3))


def _polygon_texts(polygons: NDArray[np.object_], origin: tuple[float, float]) -> list[bytes]:
    """Format polygons on the grid like :func:`_ring_texts`."""
    if not len(polygons):
        return []
    _, xy, (ring_starts, polygon_starts) = shapely.to_ragged_array(polygons, include_z=False)
    xy, ring_starts = _without_repeats(np.ascontiguousarray(xy.T), ring_starts)
    return _ring_texts(xy, ring_starts, polygon_starts, origin)


def _ring_texts(
    xy: NDArray[np.float64],
    ring_starts: NDArray[np.intp],
    polygon_starts: NDArray[np.intp],
    origin: tuple[float, float],
) -> list[bytes]:
    """``[x,y],[x,y],...`` of each polygon; ``],[`` between its rings.

    Each vertex is seven fields of four bytes, taken from tables and filled up with NUL, which is taken out at the end: a third of orjson's time.
    """
    moved = xy - np.array(origin)[:, None]
    if moved.size and not (moved.min() > -_DIGITS and moved.max() < _DIGITS):
        return _long_texts(moved, ring_starts, polygon_starts)
    quarters = (moved / GRID_PX).astype(np.intp)
    negative = quarters < 0
    np.abs(quarters, out=quarters)
    whole = quarters >> 2
    quarters &= 3
    thousands = whole // 1000
    whole -= 1000 * thousands
    whole[thousands == 0] += 1000  # without leading zeros where nothing precedes
    thousands[negative] += 1000
    text = np.empty((moved.shape[1], 7), np.uint32)
    text[:, 0] = _NEXT_VERTEX
    text[ring_starts[:-1], 0] = _NEXT_RING
    text[ring_starts[polygon_starts[:-1]], 0] = _NEXT_POLYGON
    for axis in (0, 1):
        for field, table, places in ((1, _THOUSANDS, thousands), (2, _UNITS, whole), (3, _QUARTERS[axis], quarters)):
            text[:, 3 * axis + field] = table.take(
                places[axis], mode="clip"
            )  # all are inside; "clip" does not look for that
    return text.tobytes().translate(None, b"\0").split(b"\n")[1:]


def _long_texts(
    xy: NDArray[np.float64], ring_starts: NDArray[np.intp], polygon_starts: NDArray[np.intp]
) -> list[bytes]:
    """Format coordinates of any size."""
    rows = np.ascontiguousarray(xy.T)
    rings = [
        orjson.dumps(rows[a:b], option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].replace(b".0", b"")
        for a, b in pairwise(ring_starts.tolist())
    ]
    return [b"],[".join(rings[a:b]) for a, b in pairwise(polygon_starts.tolist())]


def _table(texts: list[bytes]) -> NDArray[np.uint32]:
    return np.array(texts, "S4").view(np.uint32)


_DIGITS = 1e6  #: numbers of six digits before the point fit the tables
_NEXT_VERTEX, _NEXT_RING, _NEXT_POLYGON = _table([b",[", b"],[[", b"\n["])
_THOUSANDS = _table([sign + number for sign in (b"", b"-") for number in (b"", *(b"%d" % k for k in range(1, 1000)))])
_UNITS = _table([*(b"%03d" % k for k in range(1000)), *(b"%d" % k for k in range(1000))])
_QUARTERS = (_table([b",", b".25,", b".5,", b".75,"]), _table([b"]", b".25]", b".5]", b".75]"]))
