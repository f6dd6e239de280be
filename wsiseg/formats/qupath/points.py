"""Clicks as QuPath's points: classified Point and MultiPoint annotations as GeoJSON, or the .tsv of its points dialog (read only).

    {"type":"FeatureCollection","features":[
    {"type":"Feature","id":"<uuid>","geometry":{"type":"Point","coordinates":[10234.5,8801]},
     "properties":{"objectType":"annotation","classification":{"name":"tumour","color":[200,0,0]}}},
    {"type":"Feature","id":"<uuid>","geometry":{"type":"Point","coordinates":[10020,8700]},
     "properties":{"objectType":"annotation","classification":{"name":"tumour","color":[200,0,0]},"name":"not this type"}}
    ],"wsiseg":{"tool":...,"version":...,"slide":...,"frame":...}}

An export without points may hold detections or cells in their place, whose class somebody has corrected: each is a click inside it.

QuPath has no clicks *against* a class. Here such a click is a point of the class whose annotation has the name ``not this type``: QuPath
shows names beside points, lets people edit them, and keeps them in both kinds of export. JSON null is never written: in most places it
aborts QuPath's import.

Specification: https://datatracker.ietf.org/doc/html/rfc7946; QuPath: https://qupath.readthedocs.io/en/stable/docs/advanced/exporting_annotations.html
"""

from __future__ import annotations

import gzip
import json
import re
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import shapely

from wsiseg.errors import SeedsError, counted
from wsiseg.formats.geojson_geometry import kind_of, read_points, read_polygons
from wsiseg.formats.json_documents import QUPATH_TYPES, class_name, iter_features
from wsiseg.formats.seed_rules import (
    Color,
    Point,
    QuPathSeeds,
    check_clicks,
    check_names,
    coordinate,
    default_colors,
    is_number,
    short,
)
from wsiseg.formats.text_tables import columns_of, read_table
from wsiseg.records import Seeds, SeedType
from wsiseg.runtime.atomic import atomic_path
from wsiseg.runtime.text import show
from wsiseg.runtime.version import __version__

if TYPE_CHECKING:
    from pathlib import Path

NEGATIVE_NAME = "not this type"  #: name of the annotation of a click against its class
POINT_SUFFIXES = (".geojson", ".geojson.gz")  #: that are written
OUTLINED = ("detection", "cell")  #: kinds of object that are one cell each
MOST_OUTLINED = 2000  #: more were corrected by nobody: it is the export of a whole run
COLUMNS = ("x", "y", "class", "name", "color")  #: of the table of points


@dataclass(kw_only=True)
class QuPathClicks:
    """Points of one or more QuPath exports, gathered by class."""

    source: str
    points: dict[str, list[Point]] = field(default_factory=dict)
    negative: dict[str, list[Point]] = field(default_factory=dict)
    colors: dict[str, Color | None] = field(default_factory=dict)
    unclassified: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    outlined: list[tuple[str, Color | None, Point, str]] = field(default_factory=list)
    features: int = 0
    regions: int = 0

    def add_document(self, document: object, place: str) -> None:
        """Take the Point and MultiPoint Features of a GeoJSON document, and its detections."""
        for inside, feature in iter_features(document, place, SeedsError):
            self.features += 1
            where = f"{place}: {inside}"
            geometry = feature.get("geometry")
            clicks = read_points(geometry, where, SeedsError)
            if kind_of(geometry) not in ("Point", "MultiPoint") and not clicks:
                self.skipped.append(f"{inside} ({kind_of(geometry)})")
                polygons = read_polygons(geometry, where, SeedsError)[0]
                if polygons and (feature.get("properties") or {}).get("objectType") in OUTLINED:
                    self._add_outlined(feature, polygons[0], where, inside)
                else:
                    self.regions += bool(polygons)
                continue
            if clicks:  # "Create points for all classes" leaves empty annotations
                properties = feature.get("properties") or {}
                name = class_name(properties.get("classification"), where, SeedsError)
                color = _color_of(properties.get("classification"))
                self._add(name, color, clicks, inside, negative=_is_negative(properties.get("name")))

    def _add_outlined(self, feature: dict[str, Any], polygon: shapely.Polygon, where: str, inside: str) -> None:
        classification = feature["properties"].get("classification")
        name = class_name(classification, where, SeedsError)
        spot = shapely.point_on_surface(polygon if polygon.is_valid else shapely.make_valid(polygon))
        if name and not spot.is_empty:
            self.outlined.append((name, _color_of(classification), (spot.x, spot.y), inside))

    def add_table(self, text: str, place: str) -> None:
        """Take the rows of the .tsv of the points dialog, or of such a table from a spreadsheet."""
        table = read_table(text, place, SeedsError, known=COLUMNS, numbers=("x", "y"))
        for line, row in table.rows:
            self.features += 1
            where = f"{place}: line {line}"
            x, y = (table.number(row.get(axis, "")) for axis in ("x", "y"))
            if x is None or y is None:
                found = show(f"{row.get('x', '')} {row.get('y', '')}")
                raise SeedsError(f"{where}: x and y are {found}; two numbers are needed; save the table again")
            packed = row.get("color", "")
            color = _unpacked(int(packed)) if re.fullmatch(r"-?[0-9]{1,10}", packed) else None
            click = (coordinate(x, where), coordinate(y, where))
            self._add(row.get("class", ""), color, [click], f"line {line}", negative=_is_negative(row.get("name")))

    def _add(self, name: str, color: Color | None, clicks: list[Point], inside: str, *, negative: bool) -> None:
        if not name:
            self.unclassified.append(inside)
            return
        points, against = self.points.setdefault(name, []), self.negative.setdefault(name, [])
        (against if negative else points).extend(clicks)
        if self.colors.get(name) is None:
            self.colors[name] = color

    def seeds(self) -> QuPathSeeds:
        """Check the gathered points and return them as seeds."""
        notes = []
        if not self.points and not self.unclassified and self.outlined:
            if len(self.outlined) > MOST_OUTLINED:
                raise SeedsError(
                    f"{self.source}: {counted(len(self.outlined), 'detection')} with a class; at most {MOST_OUTLINED} are taken as clicks: "
                    "in QuPath select the ones that you corrected, and export 'Selected objects'"
                )
            for name, color, click, inside in self.outlined:
                self._add(name, color, [click], inside, negative=False)
            notes.append(f"{self.source}: no points in it; {counted(len(self.outlined), 'detection')} taken as clicks")
            self.skipped = []
        remedy = (
            "in QuPath select the points, choose a class in the Annotations tab, press 'Set selected', and export again"
        )
        if not self.points and self.unclassified:
            raise SeedsError(
                f"{self.source}: {self.unclassified[0]}: the points have no class, so their cell type is unknown; {remedy}"
            )
        if not self.points:
            found = f"{counted(self.features, 'object')}, but no points" if self.features else "no objects"
            if self.regions:
                raise SeedsError(
                    f"{self.source}: {counted(self.regions, 'region')}, and no points; seeds are points with a class; did you mean --roi?"
                )
            raise SeedsError(
                f"{self.source}: {found} in it; seeds are points with a class; in QuPath click cells with the Points tool, one class per "
                "cell type, and use File > Export objects as GeoJSON"
            )
        names = list(self.points)
        colors = default_colors(self.colors[name] for name in names)
        kinds = tuple(
            SeedType(name, color, tuple(self.points[name]), tuple(self.negative[name]))
            for name, color in zip(names, colors, strict=True)
        )
        places = [f"{self.source}: class {name!r}" for name in names]
        check_names(names, [f"{self.source}: class"] * len(names))
        for kind, place in zip(kinds, places, strict=True):
            if not kind.points:
                raise SeedsError(
                    f"{place}: all its points are named {NEGATIVE_NAME!r}, so it has no points; click at least one cell of it, or remove the class"
                )
        check_clicks(kinds, places)
        if self.unclassified:
            notes.append(
                f"{self.source}: {len(self.unclassified)} point annotations without a class were skipped; {remedy}"
            )
        if self.skipped:
            first = self.skipped[0]
            notes.append(
                f"{self.source}: {counted(len(self.skipped), 'object')} other than points skipped, the first is {first}"
            )
        return QuPathSeeds(kinds, self.source, None, tuple(notes))


def write_qupath_points(path: Path, seeds: Seeds) -> None:
    """Write clicks as point annotations for QuPath (>= 0.4), atomically; same input, same bytes.

    Parameters
    ----------
    path
        ``.geojson`` or ``.geojson.gz``.
    seeds
        One annotation is written per click, type by type, the negative clicks of a type last. Coordinates are written as they are:
        QuPath places them right when they are relative to the slide's OpenSlide bounds, or the slide has none.

    Raises
    ------
    SeedsError
        QuPath reads no file of that name, or :func:`wsiseg.formats.seeds.read_seeds` would refuse what is written.
    RunError
        The file cannot be written.
    """
    if not path.name.lower().endswith(POINT_SUFFIXES):
        raise SeedsError(
            f"{path}: points for QuPath are written as .geojson or .geojson.gz; give the new file such a name"
        )
    names = [kind.name for kind in seeds.types]
    check_names(names, [f"{path}: types[{number}]" for number in range(len(names))])
    check_clicks(seeds.types, [f"{path}: types[{number}]" for number in range(len(names))])
    features = ",\n".join(
        json.dumps(feature, ensure_ascii=False, separators=(",", ":")) for feature in _features(seeds)
    )
    frame = "relative to the slide's OpenSlide bounds" if isinstance(seeds, QuPathSeeds) else "absolute"
    note = {"tool": "wsiseg", "version": __version__, "frame": f"level-0 px, {frame}"} | (
        {"slide": seeds.slide} if seeds.slide else {}
    )
    text = f'{{"type":"FeatureCollection","features":[\n{features}\n],"wsiseg":{json.dumps(note, ensure_ascii=False)}}}\n'.encode()
    with atomic_path(path) as partial:
        partial.write_bytes(gzip.compress(text, mtime=0) if path.name.lower().endswith(".gz") else text)


def _features(seeds: Seeds) -> list[dict[str, Any]]:
    features = []
    for kind in seeds.types:
        clicks = [(point, "points", number) for number, point in enumerate(kind.points)]
        clicks += [(point, "negative", number) for number, point in enumerate(kind.negative)]
        for point, key, number in clicks:
            properties: dict[str, Any] = {
                "objectType": "annotation",
                "classification": {"name": kind.name, "color": list(kind.color)},
            }
            if key == "negative":
                properties["name"] = NEGATIVE_NAME
            # The same click has the same id, so that QuPath asks before it imports it a second time.
            identity = uuid.uuid5(uuid.NAMESPACE_URL, f"wsiseg:{kind.name}:{key}:{number}:{point[0]!r}:{point[1]!r}")
            geometry = {"type": "Point", "coordinates": short(point)}
            features.append({"type": "Feature", "id": str(identity), "geometry": geometry, "properties": properties})
    return features


def is_geojson(document: object) -> bool:
    """Tell whether a JSON document is QuPath's rather than a seeds.json."""
    if isinstance(document, dict):
        return "features" in document or str(document.get("type")) in QUPATH_TYPES
    return isinstance(document, list)


def is_table(text: str) -> bool:
    """Tell whether a text is a table of points, as the .tsv of QuPath's points dialog."""
    return text.lstrip()[0] not in "{[" and {"x", "y"} <= set(columns_of(text, COLUMNS))


def _is_negative(name: object) -> bool:
    return isinstance(name, str) and " ".join(name.split()).casefold() == NEGATIVE_NAME


def _color_of(value: object) -> Color | None:
    """The colour of a QuPath classification, where it says one."""
    if not isinstance(value, dict):
        return None
    color = value.get("color")
    if isinstance(color, list) and len(color) >= 3 and all(is_number(part) and 0 <= part <= 255 for part in color[:3]):
        return int(color[0]), int(color[1]), int(color[2])
    packed = value.get("colorRGB", color)
    return _unpacked(packed) if isinstance(packed, int) and not isinstance(packed, bool) else None


def _unpacked(argb: int) -> Color:
    return argb >> 16 & 255, argb >> 8 & 255, argb & 255
