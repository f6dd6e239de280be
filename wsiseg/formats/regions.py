"""Regions of interest (``--roi``): polygons drawn in QuPath, as GeoJSON annotations or bare geometry.

    {"type":"FeatureCollection","features":[{"type":"Feature","geometry":{"type":"Polygon","coordinates":[[[x,y],...]]},...}]}

Coordinates are those of QuPath: relative to the slide's OpenSlide bounds when it has them.
Specification: https://datatracker.ietf.org/doc/html/rfc7946
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import shapely

from wsiseg.errors import FormatError, counted
from wsiseg.formats.geojson_geometry import kind_of, read_points, read_polygons, repaired
from wsiseg.formats.json_documents import class_name, iter_features, read_texts
from wsiseg.runtime.text import parse_json

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from wsiseg.records import SlideInfo

UNNAMED = "region"  #: name of a region that has neither class nor name


def read_regions(path: Path, info: SlideInfo) -> tuple[shapely.MultiPolygon | shapely.Polygon, list[str]]:
    """Read the regions to work on.

    Parameters
    ----------
    path
        GeoJSON, plain, .gz or .zip: FeatureCollection, array, Feature, or a bare geometry.
    info
        The slide: its bounds are added to the coordinates, its size limits them.

    Returns
    -------
    tuple of (shapely.MultiPolygon or shapely.Polygon, list of str)
        The union of all polygons in absolute level-0 px, cut at the edge of the slide; valid, with an area. And warnings, one message each:
        what was repaired, closed or left out.

    Raises
    ------
    FormatError
        The file cannot be read, there is no polygon with an area, or all lie outside the slide.
    """
    drawn, _, notes = _read(path)
    return _on_slide(drawn, path, info), notes


def read_named_regions(path: Path, info: SlideInfo) -> dict[str, shapely.MultiPolygon | shapely.Polygon]:
    """Read regions by name: that of the class, else of the annotation, else ``region``; polygons of one name are joined.

    Parameters
    ----------
    path, info
        As for :func:`read_regions`.

    Returns
    -------
    dict of str to shapely.MultiPolygon or shapely.Polygon
        In the order of the file; each as :func:`read_regions` returns them.

    Raises
    ------
    FormatError
        As :func:`read_regions`; also when one of the regions lies outside the slide.
    """
    drawn, names, _ = _read(path)
    named: dict[str, list[shapely.Geometry]] = {}
    for name, shape in zip(names, drawn, strict=True):
        named.setdefault(name, []).append(shape)
    return {name: _on_slide(shapes, path, info) for name, shapes in named.items()}


def _read(path: Path) -> tuple[list[shapely.Geometry], list[str], list[str]]:
    """The polygons as drawn, the name of each, and warnings."""
    drawn: list[shapely.Geometry] = []
    names: list[str] = []
    broken: list[str] = []
    opened: list[str] = []
    empty: list[str] = []
    others: list[str] = []
    points = count = 0
    for place, text in read_texts(path, FormatError):
        document = parse_json(text, place, FormatError, any_digits=True)
        if isinstance(document, dict) and "types" in document and "version" in document:
            raise FormatError(f"{place}: these are clicks (a seeds.json), not regions; did you mean --seeds?")
        for inside, feature in iter_features(document, place, FormatError):
            count += 1
            geometry = feature.get("geometry")
            polygons, unclosed = read_polygons(geometry, f"{place}: {inside}", FormatError)
            if not polygons:
                others.append(f"{inside} ({kind_of(geometry)})")
                points += bool(read_points(geometry, f"{place}: {inside}", FormatError))
                continue
            shape = shapely.MultiPolygon(polygons)
            if not shape.is_valid:
                broken.append(f"{inside} ({' '.join(shapely.is_valid_reason(shape).split())})")
                shape = repaired(shape)
            if unclosed:
                opened.append(inside)
            if shape.area > 0:
                drawn.append(shape)
                properties = feature.get("properties") or {}
                kind = class_name(properties.get("classification"), f"{place}: {inside}", FormatError)
                called = properties.get("name")
                names.append(kind or (called.strip() if isinstance(called, str) else "") or UNNAMED)
            else:
                empty.append(inside)
    if points and not drawn and not empty:
        raise FormatError(f"{path}: {counted(points, 'point')}, and no polygon; did you mean --seeds?")
    if not drawn:
        found = f"{counted(len(empty), 'polygon')} without an area" if empty else "no polygon"
        raise FormatError(
            f"{path}: {counted(count, 'object')}, {found}; draw regions in QuPath and use File > Export objects as GeoJSON"
        )
    notes = [
        f"{path}: {len(found)} of {count} objects {what}; the first is {found[0]}"
        for found, what in (
            (broken, "touch, cross or overlap themselves and were repaired"),
            (opened, "have a line that was not closed; it was closed"),
            (empty, "have no area and were left out"),
            (others, "are not polygons and were left out"),
        )
        if found
    ]
    return drawn, names, notes


def _on_slide(drawn: list[shapely.Geometry], path: Path, info: SlideInfo) -> shapely.MultiPolygon | shapely.Polygon:
    """The union in absolute level-0 px, cut at the edge of the slide."""
    shift = (0, 0) if info.bounds is None else info.bounds[:2]
    width, height = info.size_px0
    united = shapely.transform(shapely.union_all(drawn), lambda xy: xy + shift)
    parts = shapely.get_parts(shapely.get_parts(shapely.intersection(united, shapely.box(0, 0, width, height))))
    parts = parts[(shapely.get_type_id(parts) == shapely.GeometryType.POLYGON) & (shapely.area(parts) > 0)]
    if not len(parts):
        box = ", ".join(f"{value:g}" for value in united.bounds)
        raise FormatError(
            f"{path}: the regions ({box}) lie outside the slide, which has {width} x {height} px; "
            "coordinates are level-0 px; check that the file belongs to this slide"
        )
    return parts[0] if len(parts) == 1 else shapely.MultiPolygon(list(parts))


def regions_geojson(rings: Sequence[Sequence[tuple[float, float]]], info: SlideInfo) -> str:
    """Regions as the text of a GeoJSON file that :func:`read_regions` and QuPath read.

    Parameters
    ----------
    rings
        Corners of each region, absolute level-0 px, not closed.
    info
        The slide: its bounds are subtracted.
    """
    left, top = (0, 0) if info.bounds is None else info.bounds[:2]
    features = [
        {
            "type": "Feature",
            "geometry": {
                "type": "Polygon",
                "coordinates": [[[round(x - left, 2), round(y - top, 2)] for x, y in (*ring, ring[0])]],
            },
            "properties": {"objectType": "annotation", "name": f"{UNNAMED} {number + 1}"},
        }
        for number, ring in enumerate(rings)
    ]
    return json.dumps({"type": "FeatureCollection", "features": features}, indent=1) + "\n"
