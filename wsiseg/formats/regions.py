"""Regions of interest (``--roi``): polygons drawn in QuPath, as GeoJSON annotations or bare geometry.

    {"type":"FeatureCollection","features":[{"type":"Feature","geometry":{"type":"Polygon","coordinates":[[[x,y],...]]},...}]}

Coordinates are those of QuPath: relative to the slide's OpenSlide bounds when it has them.
Specification: https://datatracker.ietf.org/doc/html/rfc7946
"""  # fmt: skip

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely

from wsiseg.errors import FormatError, counted
from wsiseg.formats.documents import iter_features, parse_json, read_texts

if TYPE_CHECKING:
    from pathlib import Path

    from wsiseg.records import SlideInfo


def read_regions(path: Path, info: SlideInfo) -> shapely.MultiPolygon | shapely.Polygon:
    """Read the regions to work on.

    Parameters
    ----------
    path
        GeoJSON, plain, .gz or .zip: FeatureCollection, array, Feature, or a bare geometry. Anything but polygons is passed over.
    info
        Of the slide: its bounds are added to the coordinates, its size limits them.

    Returns
    -------
    shapely.MultiPolygon or shapely.Polygon
        The union of all polygons in absolute level-0 px, cut at the edge of the slide; valid, with an area.

    Raises
    ------
    FormatError
        There is no polygon, one is invalid, or all lie outside the slide.
    """
    polygons: list[shapely.Polygon] = []
    count = 0
    for place, text in read_texts(path, FormatError):
        for inside, feature in iter_features(parse_json(text, place, FormatError), place, FormatError):
            count += 1
            polygons += _polygons(feature.get("geometry"), f"{place}: {inside}")
    if not polygons:
        raise FormatError(f"{path}: {counted(count, 'object')}, no polygon; draw regions in QuPath and use File > Export objects as GeoJSON")
    shift = (0, 0) if info.bounds is None else info.bounds[:2]
    width, height = info.size_px0
    united = shapely.transform(shapely.union_all(polygons), lambda xy: xy + shift)
    parts = shapely.get_parts(shapely.get_parts(shapely.intersection(united, shapely.box(0, 0, width, height))))
    parts = parts[(shapely.get_type_id(parts) == shapely.GeometryType.POLYGON) & (shapely.area(parts) > 0)]
    if not len(parts):
        box = ", ".join(f"{value:g}" for value in united.bounds)
        raise FormatError(
            f"{path}: the regions ({box}) lie outside the slide, which has {width} x {height} px; "
            "coordinates are level-0 px; check that the file belongs to this slide"
        )
    return parts[0] if len(parts) == 1 else shapely.MultiPolygon(list(parts))


def _polygons(geometry: Any, place: str) -> list[shapely.Polygon]:  # noqa: ANN401
    if not isinstance(geometry, dict):
        return []
    kind = geometry.get("type")
    if kind == "GeometryCollection":  # QuPath 0.4 and 0.5 write them
        return [polygon for member in geometry.get("geometries") or [] for polygon in _polygons(member, place)]
    if kind not in ("Polygon", "MultiPolygon"):
        return []
    coordinates = geometry.get("coordinates")
    parts: list[Any] = [coordinates] if kind == "Polygon" else coordinates or []
    try:
        polygons = [shapely.Polygon(_ring(part[0], place), [_ring(hole, place) for hole in part[1:]]) for part in parts if part]
    except (TypeError, IndexError, KeyError, ValueError, shapely.errors.GEOSException) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{place}.geometry: coordinates are no rings of [x, y] positions; export the regions again") from error
    shape = shapely.MultiPolygon(polygons)
    if not shape.is_valid:
        reason = re.sub(r"\s+", " ", shapely.is_valid_reason(shape))
        raise FormatError(f"{place}.geometry: invalid polygon ({reason}); draw the region again without crossing its own line")
    return [polygon for polygon in polygons if polygon.area > 0]


def _ring(ring: Any, place: str) -> np.ndarray[Any, np.dtype[np.float64]]:  # noqa: ANN401
    xy = np.array([(position[0], position[1]) for position in ring])
    if xy.dtype.kind not in "iuf" or not np.isfinite(xy).all():
        raise FormatError(f"{place}.geometry: null, text or a non-finite number among the coordinates; export the regions again")
    if len(xy) < 4 or (xy[0] != xy[-1]).any():
        raise FormatError(f"{place}.geometry: a ring is not closed; its first position must be repeated at the end, 4 positions at least")
    return xy.astype(np.float64)
