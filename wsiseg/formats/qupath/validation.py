"""Validator of GeoJSON for QuPath (0.4 to 0.7): the rules of what its import refuses or silently drops.

One bad Feature aborts the whole import, with a message that names neither the Feature nor the reason, and a broken entry of a zip
disappears without any message. Each rule below was measured with QuPath's own reader; the places are given as in
``features[3].geometry``. Specification of the container: https://datatracker.ietf.org/doc/html/rfc7946; of the members:
https://qupath.readthedocs.io/en/stable/docs/advanced/exporting_annotations.html
"""

from __future__ import annotations

import json
import math
import uuid
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely

from wsiseg.errors import FormatError
from wsiseg.formats.json_documents import read_texts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

QUPATH_SUFFIXES = (".geojson", ".json", ".geojson.gz", ".json.gz", ".zip")
OBJECT_TYPES = ("detection", "cell", "annotation", "tile")
NESTING = {
    "Point": 0,
    "MultiPoint": 1,
    "LineString": 1,
    "MultiLineString": 2,
    "Polygon": 2,
    "MultiPolygon": 3,
}  #: of positions
MAX_PROBLEMS = 100


class _Rule(Exception):  # noqa: N818 - not an error of the program: one broken rule of the file being checked
    """A broken rule: what is wrong with one member."""


@dataclass(kw_only=True)
class GeoJsonSummary:
    """Content of a GeoJSON file as QuPath would import it.

    Attributes
    ----------
    problems
        One message per problem, beginning with its place (``features[3].geometry: ...``); empty when QuPath 0.4 to 0.7 imports
        everything. After ``MAX_PROBLEMS`` the rest is only said to exist, and not counted.
    objects
        Number of objects by their type: ``detection``, ``annotation``, ...
    classes
        Number of objects by the name of their class; objects without class are left out.
    ids
        Ids seen so far, in the canonical form of a UUID.
    """

    problems: list[str] = field(default_factory=list)
    objects: Counter[str] = field(default_factory=Counter)
    classes: Counter[str] = field(default_factory=Counter)
    ids: set[str] = field(default_factory=set, repr=False)


def validate_geojson(path: Path) -> list[str]:
    """List what would stop QuPath from importing the file, or make it silently drop something.

    Parameters
    ----------
    path
        As for :func:`summarise_geojson`.

    Returns
    -------
    list of str
        ``problems`` of :func:`summarise_geojson`.
    """
    return summarise_geojson(path).problems


def summarise_geojson(path: Path) -> GeoJsonSummary:
    """Check a file by the rules of QuPath's import, and count its objects.

    Parameters
    ----------
    path
        ``.geojson``, ``.json``, either with ``.gz``, or ``.zip``.

    Returns
    -------
    GeoJsonSummary
        A file that cannot be read has that as its problem.
    """
    found = GeoJsonSummary()
    problems = found.problems
    if not path.name.lower().endswith(QUPATH_SUFFIXES):
        problems.append(f"name: QuPath reads nothing from {path.name!r}; call it .geojson or .geojson.gz")
    try:
        if path.name.lower().endswith(".zip"):
            problems += _zip_names(path)
        for place, text in read_texts(path, FormatError, utf8_only=True):
            prefix = "" if place == str(path) else place.removeprefix(f"{path}: ") + ": "
            for problem in _document_problems(text, found):
                problems.append(prefix + problem)
                if len(problems) >= MAX_PROBLEMS:
                    problems.append(f"and more: only the first {MAX_PROBLEMS} problems are listed")
                    return found
    except FormatError as error:
        problems.append(str(error))
    return found


def _zip_names(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
    except (OSError, zipfile.BadZipFile):
        return []  # said by read_texts
    ignored = [name for name in names if not name.lower().endswith((".geojson", ".json"))]
    return [f"{name}: QuPath skips this entry; call it .geojson" for name in ignored]


def _document_problems(text: str, found: GeoJsonSummary) -> Iterator[str]:
    """Problems of one document; Features become objects one at a time, so that memory is the text and one Feature."""
    scanner = _Scanner(text)
    members: dict[str, Any] = {}
    try:
        opening = scanner.next_token()
        if opening == "[":
            for index, feature in enumerate(scanner.items()):
                yield from _feature_problems(feature, f"[{index}]", found)
        elif opening == "{":
            for key in scanner.members():
                if key == "features" and scanner.peek() == "[":
                    scanner.next_token()
                    members[key] = True
                    for index, feature in enumerate(scanner.items()):
                        yield from _feature_problems(feature, f"features[{index}]", found)
                else:
                    members[key] = scanner.value()
        else:
            yield f"document: not JSON, it starts with {opening!r}; write a FeatureCollection, an array of Features or one Feature"
            return
        if scanner.peek():
            yield "document: text after its end; one JSON document is allowed, not one per line; write a FeatureCollection"
            return
    except (json.JSONDecodeError, RecursionError) as error:
        yield f"document: not JSON ({error}); QuPath imports nothing"
        return
    if opening == "{":
        yield from _top_problems(members, found)


def _top_problems(members: dict[str, Any], found: GeoJsonSummary) -> Iterator[str]:
    kind = members.get("type")
    if kind == "FeatureCollection":
        if members.get("features") is not True:
            yield "features: missing or not a list; QuPath imports nothing"
    elif kind == "Feature":
        yield from _feature_problems(members, "Feature", found)
    elif isinstance(kind, str) and (kind in NESTING or kind == "GeometryCollection"):
        try:
            _check_geometry(members)
        except _Rule as rule:
            yield f"geometry: {rule}"
    else:
        yield f"type: {kind!r} gives no objects and no error in QuPath; it must be exactly 'FeatureCollection'"


class _Scanner:
    """Reader of a JSON text, value by value."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
            self.at += 1
        return self.text[self.at : self.at + 1]

    def next_token(self) -> str:
        """Consume the next character."""
        token = self.peek()
        self.at += 1
        return token

    def value(self) -> Any:  # noqa: ANN401
        """Read the next value."""
        self.peek()
        value, self.at = self.decoder.raw_decode(self.text, self.at)
        return value

    def items(self) -> Iterator[Any]:
        """Values up to the closing bracket of an array whose opening was passed."""
        if self.peek() == "]":
            self.at += 1
            return
        while True:
            yield self.value()
            if self._ends("]"):
                return

    def members(self) -> Iterator[str]:
        """Keys up to the closing brace of an object; the caller takes each value before the next key."""
        if self.peek() == "}":
            self.at += 1
            return
        while True:
            key = self.value()
            if not isinstance(key, str) or self.next_token() != ":":
                raise json.JSONDecodeError("a key and ':' are needed", self.text, self.at)
            yield key
            if self._ends("}"):
                return

    def _ends(self, closing: str) -> bool:
        token = self.next_token()
        if token not in (closing, ",") or not token:
            raise json.JSONDecodeError(f"',' or '{closing}' is needed", self.text, self.at)
        return token == closing


def _feature_problems(feature: Any, place: str, found: GeoJsonSummary) -> Iterator[str]:  # noqa: ANN401
    if not isinstance(feature, dict) or feature.get("type") != "Feature":
        yield f"{place}: not an object of type 'Feature'; QuPath does not make an object of it"
        return
    properties = feature.get("properties", {})
    checks: list[tuple[str, Callable[[], None]]] = [
        ("id", lambda: _check_id(feature, found)),
        ("geometry", lambda: _check_geometry(feature.get("geometry"))),
        ("nucleusGeometry", lambda: _check_nucleus(feature)),
    ]
    if isinstance(properties, dict):
        checks += [
            ("properties.objectType", lambda: _check_object_type(properties)),
            ("properties.name", lambda: _check_not_null(properties, "name")),
            ("properties.classification", lambda: _check_classification(properties.get("classification"))),
            ("properties.measurements", lambda: _check_measurements(properties.get("measurements"))),
        ]
    else:
        yield f"{place}.properties: {properties!r} aborts the import; write an object"
    for member, check in checks:
        try:
            check()
        except _Rule as rule:
            yield f"{place}.{member}: {rule}"
    if isinstance(properties, dict):
        _count(properties, found)
        for key in ("childObjects", "children"):
            children = properties.get(key)
            for index, child in enumerate(children if isinstance(children, list) else []):
                yield from _feature_problems(child, f"{place}.properties.{key}[{index}]", found)


def _count(properties: dict[str, Any], found: GeoJsonSummary) -> None:
    """Count an object by type and class, as far as they are sound."""
    kind = _object_type(properties)
    found.objects[kind if kind in OBJECT_TYPES else "annotation"] += 1
    value = properties.get("classification")
    names = value.get("names", [value.get("name")]) if isinstance(value, dict) else [value]
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        found.classes[": ".join(names)] += 1


def _object_type(properties: dict[str, Any]) -> Any:  # noqa: ANN401
    return properties.get("objectType", properties.get("object_type", properties.get("type")))


def _check_not_null(members: dict[str, Any], key: str) -> None:
    if key in members and members[key] is None:
        raise _Rule("null aborts the import; leave the member out")


def _check_id(feature: dict[str, Any], found: GeoJsonSummary) -> None:
    _check_not_null(feature, "id")
    if "id" not in feature:
        return
    try:
        key = str(uuid.UUID(feature["id"]))
    except (ValueError, AttributeError, TypeError) as error:
        raise _Rule(
            f"{feature['id']!r} is not a UUID, so QuPath replaces it by a random one; write a UUID or leave it out"
        ) from error
    if key in found.ids:
        raise _Rule(f"{key} appears twice; ids must be unique")
    found.ids.add(key)


def _check_object_type(properties: dict[str, Any]) -> None:
    _check_not_null(properties, "objectType")
    kind = _object_type(properties)
    if kind == "tmaCore":
        raise _Rule("'tmaCore' is skipped by the import; allowed are detection, cell, annotation, tile")
    if kind not in OBJECT_TYPES:
        found = "missing" if kind is None else repr(kind)
        raise _Rule(f"{found}: the object becomes an annotation; allowed are detection, cell, annotation, tile")


def _check_classification(value: Any) -> None:  # noqa: ANN401
    if value is None:
        return
    if isinstance(value, str):
        _check_class_name(value)
        return
    if not isinstance(value, dict):
        raise _Rule(f"{value!r} aborts the import; write {{'name': ..., 'color': [r, g, b]}}")
    names = value.get("names", [value.get("name")])
    if not isinstance(names, list) or not names:
        raise _Rule("'names' must be a list of class names")
    for name in names:
        _check_class_name(name)
    if "color" not in value and "colorRGB" in value:
        if any(":" in name for name in names):
            raise _Rule(
                "'colorRGB' with ':' in the name makes a class that only looks like the derived one; write 'color': [r, g, b]"
            )
        return
    if "color" not in value:
        raise _Rule("an object without 'color' aborts the import; write 'color': [r, g, b]")
    color = value["color"]
    numbers = (
        isinstance(color, list)
        and len(color) in (3, 4)
        and all(_is_number(part) and 0 <= part <= 255 for part in color)
    )
    if color is not None and not numbers and not (_is_number(color) and isinstance(color, int)):
        raise _Rule(f"color {color!r} aborts the import; write [r, g, b] with 0 to 255")


def _check_class_name(name: Any) -> None:  # noqa: ANN401
    if not isinstance(name, str) or not name.strip():
        raise _Rule(f"class name {name!r} aborts the import; it must be text that is not blank")
    if "\n" in name or "\r" in name:
        raise _Rule(f"class name {name!r} has a line break, which aborts the import")


def _check_measurements(value: Any) -> None:  # noqa: ANN401
    if value is None:
        return
    if isinstance(value, list):  # the old form
        if not all(isinstance(item, dict) and isinstance(item.get("name"), str) for item in value):
            raise _Rule("the list form needs objects with 'name' and 'value'")
        value = {item["name"]: item.get("value") for item in value}
    if not isinstance(value, dict):
        raise _Rule(f"{type(value).__name__} instead of an object of name and number")
    for name, number in value.items():
        if not _is_number(number):
            raise _Rule(
                f"{name!r} is {number!r}: text aborts the import, anything else is dropped; write a number or leave it out"
            )
        if not math.isfinite(number):
            raise _Rule(f"{name!r} is {number!r}: QuPath 0.4 aborts on it; leave it out")


def _check_nucleus(feature: dict[str, Any]) -> None:
    _check_not_null(feature, "nucleusGeometry")
    if feature.get("nucleusGeometry"):
        _check_geometry(feature["nucleusGeometry"])


def _check_geometry(geometry: Any) -> None:  # noqa: ANN401
    if not isinstance(geometry, dict):
        raise _Rule("missing or null aborts the import; every Feature needs one")
    kind, coordinates = geometry.get("type"), geometry.get("coordinates")
    if not isinstance(kind, str) or kind not in NESTING:
        raise _Rule(f"type {kind!r} aborts the import (0.6+); allowed are {', '.join(NESTING)}")
    if not isinstance(coordinates, list):
        raise _Rule("no list of coordinates, which aborts the import")
    if not coordinates:
        raise _Rule("no coordinates: the object has an empty shape; leave it out")
    if kind == "Polygon":
        _check_polygons([coordinates])
    elif kind == "MultiPolygon":
        if len(coordinates) == 1:
            raise _Rule("a MultiPolygon with a single part aborts the import (0.4, 0.5); write a Polygon")
        _check_polygons(coordinates)
    else:
        _check_positions(coordinates, NESTING[kind])


def _check_positions(value: Any, nesting: int) -> None:  # noqa: ANN401
    if not isinstance(value, list):
        raise _Rule(f"{value!r} among the coordinates aborts the import; a position is [x, y]")
    if nesting:
        for item in value:
            _check_positions(item, nesting - 1)
    elif len(value) < 2 or not all(_is_number(number) and math.isfinite(number) for number in value):
        raise _Rule(f"position {value!r} aborts the import; two finite numbers are needed")


def _check_polygons(parts: list[Any]) -> None:
    exact = [[_ring(ring) for ring in part] if isinstance(part, list) and part else _no_rings() for part in parts]
    for dtype, when in ((np.float64, "is invalid"), (np.float32, "becomes invalid in float32, which QuPath stores")):
        stored = [[ring.astype(dtype).astype(np.float64) for ring in rings] for rings in exact]
        polygons = [shapely.Polygon(rings[0], rings[1:]) for rings in stored]
        shape = polygons[0] if len(polygons) == 1 else shapely.MultiPolygon(polygons)
        if not shape.convex_hull.area > 0:  # (the signed area of a bow-tie may be 0, too)
            raise _Rule("the polygon has no area: QuPath makes an object with an empty shape; leave it out")
        if not shape.is_valid:
            reason = shapely.is_valid_reason(shape)
            raise _Rule(
                f"the polygon {when} ({reason}): QuPath 0.6+ aborts the import; repair with make_valid and set_precision(0.25)"
            )


def _no_rings() -> list[NDArray[np.float64]]:
    raise _Rule("a polygon without rings: the object has an empty shape; leave it out")


def _ring(ring: Any) -> NDArray[np.float64]:  # noqa: ANN401
    try:
        xy = np.array([(position[0], position[1]) for position in ring])
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise _Rule("a ring is not a list of [x, y] positions, which aborts the import") from error
    if xy.dtype.kind not in "iuf" or not np.isfinite(xy).all():
        raise _Rule("null, text or a non-finite number among the coordinates aborts the import")
    if not len(xy) or (xy[0] != xy[-1]).any():
        raise _Rule("a ring is not closed, which aborts the import; repeat its first position at the end")
    if len(np.unique(xy, axis=0)) < 3:
        raise _Rule("a ring has fewer than 3 distinct points: QuPath makes an object with an empty shape; leave it out")
    return xy.astype(np.float64)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
