"""Geometry of GeoJSON: the one place that turns ``{"type": ..., "coordinates": ...}`` into points and polygons.

Ambiguous input is refused with a message; unambiguous input is read: unclosed rings are closed, and :func:`repaired` makes valid
what touches or crosses itself. Specification: https://datatracker.ietf.org/doc/html/rfc7946
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import shapely

from wsiseg.formats.json_documents import GEOMETRY_TYPES
from wsiseg.runtime.text import did_you_mean, show

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from wsiseg.errors import WsisegError

FARTHEST_PX = 1e9  #: no slide reaches so far; beyond it areas lose their meaning in float64
MAX_NESTING = 16  #: of geometry collections
AGAIN = "export the file again"


def read_points(geometry: object, place: str, error: type[WsisegError]) -> list[tuple[float, float]]:
    """The points of a geometry.

    Parameters
    ----------
    geometry
        ``geometry`` of a Feature; collections are searched, ``null`` and what has no points are empty.
    place, error
        Place of the Feature for messages, and the class to raise when the geometry is malformed.

    Returns
    -------
    list of (float, float)
        (x, y), px.
    """
    points = []
    for kind, coordinates in _simple(geometry, f"{place}.geometry", error):
        if kind in ("Point", "MultiPoint"):
            where = f"{place}.geometry.coordinates"
            positions = coordinates if kind == "MultiPoint" else [coordinates] if coordinates else []
            points += [_position(position, where, error) for position in positions]
    return points


def read_polygons(geometry: object, place: str, error: type[WsisegError]) -> tuple[list[shapely.Polygon], int]:
    """The polygons of a geometry, as drawn: they may touch, cross or overlap themselves and each other.

    Parameters
    ----------
    geometry
        ``geometry`` of a Feature; collections are searched (QuPath 0.4 and 0.5 write them), ``null`` and what has no area are empty.
    place, error
        Place of the Feature for messages, and the class to raise when the geometry is malformed.

    Returns
    -------
    tuple of (list of shapely.Polygon, int)
        px; and how many rings were not closed.
    """
    polygons, unclosed = [], 0
    for kind, coordinates in _simple(geometry, f"{place}.geometry", error):
        if kind not in ("Polygon", "MultiPolygon"):
            continue
        for part in [coordinates] if kind == "Polygon" else coordinates:
            if not isinstance(part, list):
                raise error(f"{place}.geometry: coordinates are not rings of [x, y] positions; {AGAIN}")
            rings = [_ring(ring, f"{place}.geometry", error) for ring in part]
            unclosed += sum(opened for _, opened in rings)
            if rings:
                polygons.append(shapely.Polygon(rings[0][0], [ring for ring, _ in rings[1:]]))
    return polygons, unclosed


def repaired(shape: shapely.Geometry) -> shapely.Geometry:
    """The area that a Polygon or MultiPolygon encloses, valid.

    Where a ring crosses itself, what it goes round once is inside. Parts that overlap are joined, and holes are cut out of their own part: GEOS alone
    would cut parts out of each other, and make an area of what a hole has outside of its part.
    """
    parts = []
    for part in shapely.get_parts(shape):
        outer = polygonal(shapely.make_valid(shapely.Polygon(part.exterior)))
        holes = [polygonal(shapely.make_valid(shapely.Polygon(hole))) for hole in part.interiors]
        parts.append(polygonal(shapely.difference(outer, shapely.union_all(holes))) if holes else outer)
    return parts[0] if len(parts) == 1 else polygonal(shapely.union_all(parts))


def polygonal(geometry: shapely.Geometry) -> shapely.Geometry:
    """The parts of a geometry that have an area, as one Polygon or MultiPolygon (empty where there is none)."""
    if shapely.get_type_id(geometry) in (shapely.GeometryType.POLYGON, shapely.GeometryType.MULTIPOLYGON):
        return geometry
    parts = shapely.get_parts(shapely.get_parts(geometry))
    return shapely.multipolygons(parts[shapely.get_type_id(parts) == shapely.GeometryType.POLYGON])


def kind_of(geometry: object) -> str:
    """The type of a geometry, for messages."""
    return (
        str(geometry["type"]) if isinstance(geometry, dict) and isinstance(geometry.get("type"), str) else "no geometry"
    )


def _simple(geometry: object, place: str, error: type[WsisegError], depth: int = 0) -> Iterator[tuple[str, list[Any]]]:
    """Type and coordinates of each geometry that is not a collection."""
    if geometry is None:
        return
    if not isinstance(geometry, dict):
        raise error(f"{place}: found {show(geometry)}; an object with 'type' and 'coordinates' is needed; {AGAIN}")
    kind = geometry.get("type")
    if not isinstance(kind, str) or kind not in GEOMETRY_TYPES:
        hint = did_you_mean(kind, GEOMETRY_TYPES)
        raise error(f"{place}: type is {show(kind)}; {hint}allowed are {', '.join(GEOMETRY_TYPES)}; {AGAIN}")
    key = "geometries" if kind == "GeometryCollection" else "coordinates"
    members = geometry.get(key)
    if not isinstance(members, list):
        found = show(members) if key in geometry else "missing"
        raise error(f"{place}.{key}: {found}; no list of {key}, which a {kind} needs; {AGAIN}")
    if kind != "GeometryCollection":
        yield kind, members
        return
    if depth == MAX_NESTING:
        raise error(f"{place}: collections within collections, deeper than {MAX_NESTING}; {AGAIN}")
    for member in members:
        yield from _simple(member, place, error, depth + 1)


def _position(value: object, place: str, error: type[WsisegError]) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) < 2:
        raise error(f"{place}: {show(value)} is not a position [x, y]; {AGAIN}")
    return finite(value[0], place, error), finite(value[1], place, error)


def finite(value: object, place: str, error: type[WsisegError]) -> float:
    """Check that a coordinate is a finite number that fits on a slide."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise error(
            f"{place}: {show(value)} is not a number; coordinates are finite numbers, in level-0 px, without quotes"
        )
    if not -FARTHEST_PX <= value <= FARTHEST_PX:
        why = (
            "is larger than any slide" if abs(value) < float("inf") else "is not finite"
        )  # (NaN is not below infinity)
        raise error(
            f"{place}: {value if isinstance(value, float) else show(value)} {why}; coordinates are finite numbers, in level-0 px"
        )
    return float(value)


def _ring(ring: object, place: str, error: type[WsisegError]) -> tuple[NDArray[np.float64], bool]:
    """Positions of a ring, closed, of shape (N, 2), px; and whether it was not."""
    if ring == []:
        raise error(f"{place}: a ring has no positions; 3 at least are needed; draw it again")
    if isinstance(ring, list) and any(isinstance(n, bool) for at in ring if isinstance(at, list) for n in at):
        raise error(f"{place}: coordinates are not rings of [x, y] positions; {AGAIN}")
    try:
        xy = np.array(ring)
        if xy.ndim != 2:
            raise ValueError("positions of different lengths")  # noqa: TRY301
    except ValueError:
        xy = _ragged(ring, place, error)
    if xy.shape[1] < 2:
        raise error(f"{place}: coordinates are not rings of [x, y] positions; {AGAIN}")
    xy = xy[:, :2]
    if xy.dtype.kind not in "iuf" or not np.isfinite(xy).all():
        raise error(f"{place}: null, text or a non-finite number among the coordinates; {AGAIN}")
    if np.abs(xy).max() > FARTHEST_PX:
        raise error(
            f"{place}: the coordinate {np.abs(xy).max():g} is larger than any slide; coordinates are level-0 px; {AGAIN}"
        )
    if len(xy) < 3:
        raise error(f"{place}: a ring has {len(xy)} positions; 3 at least are needed; draw it again")
    opened = bool((xy[0] != xy[-1]).any())
    if opened or len(xy) == 3:  # closed at three, it goes there and back: no area, but a ring
        xy = np.concatenate([xy, xy[:1]])
    return xy.astype(np.float64), opened


def _ragged(ring: object, place: str, error: type[WsisegError]) -> NDArray[Any]:
    """Positions of which some have a third number."""
    if not isinstance(ring, list) or not all(isinstance(position, list) and len(position) >= 2 for position in ring):
        raise error(f"{place}: coordinates are not rings of [x, y] positions; {AGAIN}")
    try:
        return np.array([(position[0], position[1]) for position in ring]).reshape(len(ring), -1)
    except ValueError as problem:
        raise error(f"{place}: coordinates are not rings of [x, y] positions; {AGAIN}") from problem
