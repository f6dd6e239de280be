"""Seeds: the clicks, one or more per cell type. wsiseg's own seeds.json, or points exported from QuPath; told apart by content.

    {"version": 1, "slide": "slide.svs",                                            (schema: seeds.schema.json beside this file)
     "types": [{"name": "tumour", "color": "#c80000", "points": [[10234.5, 8801.0]], "negative": [[10020, 8700]]},
               {"name": "lymphocyte", "points": [[9120, 4410], [9177, 4502]]}]}

``slide``, ``color`` and ``negative`` are optional. Points are absolute level-0 px, corner frame. ``"frame": "qupath"`` (optional) says
that they are relative to the slide's OpenSlide bounds instead, as QuPath's points are; it keeps a converted file right.

QuPath: classified Point and MultiPoint annotations as GeoJSON (also .gz, .zip), or the .tsv of its points dialog. Such points stay as they
are in :func:`read_seeds`; :func:`check_seeds`, which knows the slide, makes them absolute.
Specifications: https://datatracker.ietf.org/doc/html/rfc7946, https://qupath.readthedocs.io/en/stable/docs/advanced/exporting_annotations.html
"""  # fmt: skip

from __future__ import annotations

import difflib
import json
import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from wsiseg.errors import SeedsError
from wsiseg.formats.atomic import atomic_path
from wsiseg.formats.documents import QUPATH_TYPES, iter_features, parse_json, read_texts
from wsiseg.records import UNASSIGNED, Seeds, SeedType, SlideInfo

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

Point = tuple[float, float]
Color = tuple[int, int, int]

VERSION = 1
FILE_KEYS = ("version", "slide", "frame", "types")
TYPE_KEYS = ("name", "color", "points", "negative")
FRAMES = ("slide", "qupath")
MAX_NAME = 100

#: Colours of types that state none: Okabe and Ito (2008), "Color Universal Design", those that show best on pink and violet first.
PALETTE: tuple[Color, ...] = (
    (213, 94, 0), (0, 114, 178), (0, 158, 115), (240, 228, 66), (86, 180, 233), (230, 159, 0), (204, 121, 167), (0, 0, 0),
)  # fmt: skip


@dataclass(frozen=True)
class QuPathSeeds(Seeds):
    """Seeds whose points are relative to the slide's OpenSlide bounds."""


def read_seeds(path: Path) -> Seeds:
    """Read a seeds file of any kind.

    Parameters
    ----------
    path
        seeds.json, QuPath GeoJSON (FeatureCollection, array, single Feature; plain, .gz, .zip), or QuPath points .tsv.

    Returns
    -------
    Seeds
        Types and clicks in the order of the file (QuPath 0.6+ sorts the points of a MultiPoint). ``QuPathSeeds`` when the points are in
        QuPath's frame: pass them through :func:`check_seeds` before use.

    Raises
    ------
    SeedsError
        Anything that cannot be used, as one line with its place in the file.
    """
    clicks = _QuPathClicks(str(path))
    for number, (place, text) in enumerate(read_texts(path, SeedsError)):
        if text.lstrip()[0] not in '{["' and re.match(r"\s*x\ty\t", text):
            clicks.add_table(text, place)
            continue
        document = parse_json(text, place, SeedsError)
        if _is_geojson(document):
            clicks.add_document(document, place)
            continue
        if number:
            raise SeedsError(f"{place}: a second seeds document; one seeds.json, or QuPath exports only, are allowed in a zip")
        return _parse(parse_json(text, place, SeedsError, unique_keys=True), place, str(path))
    return clicks.seeds()


def check_seeds(seeds: Seeds, info: SlideInfo) -> tuple[Seeds, list[str]]:
    """Check seeds against the slide they are for, and place them in its frame.

    Parameters
    ----------
    seeds
        From :func:`read_seeds`; not modified.
    info
        Of the slide.

    Returns
    -------
    tuple of (Seeds, list of str)
        In absolute level-0 px, without repeated clicks; and warnings, one sentence each.

    Raises
    ------
    SeedsError
        The file names another slide, or a click lies outside this one.
    """
    slide = _file_name(info.path)
    if seeds.slide is not None and _file_name(seeds.slide) != slide:
        raise SeedsError(
            f"{seeds.source}: slide: these seeds are for {_file_name(seeds.slide)!r}, but the slide is {slide!r}; "
            "give the seeds of this slide, or correct or remove 'slide' in the file"
        )
    warnings = list(seeds.notes)
    shift = (0, 0)
    if isinstance(seeds, QuPathSeeds) and info.bounds is not None:
        shift = info.bounds[:2]
        warnings.append(f"{seeds.source}: QuPath's points moved by the slide's bounds, ({shift[0]}, {shift[1]}) px")
    types = []
    for number, kind in enumerate(seeds.types):
        place = f"{seeds.source}: types[{number}]" if not isinstance(seeds, QuPathSeeds) else f"{seeds.source}: class {kind.name!r}"
        points = _placed(kind.points, shift, f"{place}.points", info, warnings)
        negative = _placed(kind.negative, shift, f"{place}.negative", info, warnings)
        if kind.name.endswith("*"):
            warnings.append(f"{place}: QuPath ignores classes that end in '*' ({kind.name!r}); choose another name to count them there")
        types.append(SeedType(kind.name, kind.color, points, negative))
    return Seeds(tuple(types), seeds.source, seeds.slide), warnings


def write_seeds(path: Path, seeds: Seeds) -> None:
    """Write wsiseg's own seeds.json, atomically.

    Parameters
    ----------
    path
        The file to write.
    seeds
        ``QuPathSeeds`` keep their frame through the key ``frame``.

    Raises
    ------
    SeedsError
        :func:`read_seeds` would refuse them.
    """
    head: dict[str, object] = {"version": VERSION}
    if seeds.slide is not None:
        head["slide"] = seeds.slide
    if isinstance(seeds, QuPathSeeds):
        head["frame"] = "qupath"
    types = [_type_object(kind) for kind in seeds.types]
    _parse({**head, "types": types}, str(path), str(path))
    lines = ",\n  ".join(json.dumps(kind, ensure_ascii=False) for kind in types)
    text = json.dumps(head, ensure_ascii=False)[:-1] + f',\n "types": [\n  {lines}\n ]}}\n'
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


# --- wsiseg's own file ------------------------------------------------------------------------------------------------------------


def _parse(document: object, place: str, source: str) -> Seeds:
    members = _object(document, place, "a seeds file is an object with 'version' and 'types'")
    _check_keys(members, FILE_KEYS, place)
    version = members.get("version")
    if "version" not in members:
        raise SeedsError(f"{place}: no 'version'; add \"version\": {VERSION}")
    if isinstance(version, bool) or version != VERSION:
        raise SeedsError(f"{place}: version is {_show(version)}; this wsiseg reads version {VERSION}; convert the file or update wsiseg")
    slide = members.get("slide")
    if "slide" in members and (not isinstance(slide, str) or not slide.strip()):
        raise SeedsError(f"{place}: slide is {_show(slide)}; it must be the slide's file name, or be left out")
    frame = members.get("frame", "slide")
    if frame not in FRAMES:
        raise SeedsError(f"{place}: frame is {_show(frame)}; allowed are 'slide' (absolute level-0 px), 'qupath' (relative to the bounds)")
    types = members.get("types")
    if not isinstance(types, list) or not types:
        found = "missing" if types is None else "empty" if types == [] else _show(types)
        raise SeedsError(f"{place}: types is {found}; at least one type with one point is needed; click a cell of each type")
    parsed = [_parse_type(value, number, place, absolute=frame == "slide") for number, value in enumerate(types)]
    colors = default_colors([color for _, color in parsed])
    kinds = tuple(SeedType(k.name, c, k.points, k.negative) for (k, _), c in zip(parsed, colors, strict=True))
    _check_names([kind.name for kind in kinds], [f"{place}: types[{number}]" for number in range(len(kinds))])
    _check_clicks(kinds, [f"{place}: types[{number}]" for number in range(len(kinds))])
    return QuPathSeeds(kinds, source, slide) if frame == "qupath" else Seeds(kinds, source, slide)


def _parse_type(value: object, number: int, file_place: str, *, absolute: bool) -> tuple[SeedType, Color | None]:
    place = f"{file_place}: types[{number}]"
    members = _object(value, place, "a type is an object with 'name' and 'points'")
    _check_keys(members, TYPE_KEYS, place)
    for key in ("name", "points"):
        if key not in members:
            raise SeedsError(f"{place}: no {key!r}; every type needs 'name' and 'points'")
    name = members["name"]
    if not isinstance(name, str):
        raise SeedsError(f"{place}.name: {_show(name)} is no text; write the name of a cell type in quotes")
    points = _points(members["points"], f"{place}.points", absolute=absolute)
    if not points:
        raise SeedsError(f"{place}.points: type {name!r} has no points; click at least one cell of it, or remove the type")
    negative = _points(members.get("negative", []), f"{place}.negative", absolute=absolute)
    color = _parse_color(members["color"], f"{place}.color") if "color" in members else None
    return SeedType(name, color or (0, 0, 0), points, negative), color


def _points(value: object, place: str, *, absolute: bool) -> tuple[Point, ...]:
    if not isinstance(value, list):
        raise SeedsError(f"{place}: {_show(value)} is no list of points; write [[x, y], ...] in level-0 px")
    points = []
    for number, pair in enumerate(value):
        where = f"{place}[{number}]"
        if not isinstance(pair, list) or len(pair) != 2:
            hint = "; one point is written [[x, y]], with two brackets" if number == 0 and _is_number(pair) else ""
            raise SeedsError(f"{where}: {_show(pair)} is no point; a point is [x, y] in level-0 px{hint}")
        x, y = (_coordinate(part, where) for part in pair)
        if absolute and (x < 0 or y < 0):
            raise SeedsError(f"{where}: ({x:g}, {y:g}) is negative; level-0 px begin at 0; click inside the slide")
        points.append((x, y))
    return tuple(points)


def _coordinate(value: object, place: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise SeedsError(f"{place}: {_show(value)} is no number; coordinates are finite numbers, in level-0 px, without quotes")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise SeedsError(f"{place}: {number} is not finite; coordinates are finite numbers, in level-0 px")
    return number


def _parse_color(value: object, place: str) -> Color:
    if not isinstance(value, str) or not re.fullmatch(r"#[0-9a-fA-F]{6}", value):
        raise SeedsError(f'{place}: {_show(value)} is no colour; write "#rrggbb", e.g. "#c80000", or leave it out')
    return int(value[1:3], 16), int(value[3:5], 16), int(value[5:7], 16)


def default_colors(stated: Iterable[Color | None]) -> list[Color]:
    """The colours of types in their order: as stated, else the next of ``PALETTE`` that nobody states (from the 9th on, repeated)."""
    stated = list(stated)
    free = [color for color in PALETTE if color not in stated] or list(PALETTE)
    missing = iter([free[k % len(free)] for k in range(stated.count(None))])
    return [next(missing) if color is None else color for color in stated]


def _object(value: object, place: str, needed: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SeedsError(f"{place}: found {_show(value)}; {needed}")
    return value


def _check_keys(members: dict[str, Any], allowed: tuple[str, ...], place: str) -> None:
    for key in members:
        if key not in allowed:
            near = difflib.get_close_matches(key.lower(), allowed, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise SeedsError(f"{place}: unknown key {key!r}; {hint}allowed are {', '.join(allowed)}; rename or remove it")


# --- what holds for both kinds ----------------------------------------------------------------------------------------------------


def _check_names(names: list[str], places: list[str]) -> None:
    first: dict[str, str] = {}
    for name, place in zip(names, places, strict=True):
        where = f"{place}.name" if place.endswith("]") else place
        if not name.strip():
            raise SeedsError(f"{where}: the name is blank; write the name of a cell type")
        if name != name.strip():
            raise SeedsError(f"{where}: {_show(name)} has blanks at its ends; remove them")
        if ":" in name:
            raise SeedsError(f"{where}: {_show(name)} has a ':', where QuPath splits class names; use a plain name without ':'")
        if not name.isprintable():
            raise SeedsError(f"{where}: {_show(name)} has a line break or a control character; use printable text")
        if len(name) > MAX_NAME:
            raise SeedsError(f"{where}: the name has {len(name)} characters; {MAX_NAME} are allowed; shorten it")
        key = name.casefold()
        if key == UNASSIGNED:
            raise SeedsError(f"{where}: {_show(name)} is reserved for cells without a type; choose another name")
        if key in first:
            raise SeedsError(f"{where}: {_show(name)} is there twice (as {_show(first[key])}, case does not count); join or rename one")
        first[key] = name


def _check_clicks(kinds: tuple[SeedType, ...], places: list[str]) -> None:
    """The same click must not stand for two types, nor for and against one."""
    owner: dict[Point, tuple[int, str]] = {}
    for number, (kind, place) in enumerate(zip(kinds, places, strict=True)):
        for index, point in enumerate(kind.points):
            other, where = owner.setdefault(point, (number, f"{place}.points[{index}]"))
            if other != number:
                raise SeedsError(
                    f"{place}.points[{index}]: the click ({point[0]:g}, {point[1]:g}) of {kind.name!r} is also a click of "
                    f"{kinds[other].name!r} ({where.rsplit(': ', 1)[-1]}); a cell has one type; remove one of the two"
                )
        for index, point in enumerate(kind.negative):
            if point in kind.points:
                click = f"({point[0]:g}, {point[1]:g})"
                raise SeedsError(f"{place}.negative[{index}]: the click {click} is for and against {kind.name!r}; remove one of the two")


def _placed(points: tuple[Point, ...], shift: tuple[int, int], place: str, info: SlideInfo, warnings: list[str]) -> tuple[Point, ...]:
    width, height = info.size_px0
    placed: dict[Point, int] = {}
    for number, (x, y) in enumerate(points):
        point = (x + shift[0], y + shift[1])
        if not (0 <= point[0] < width and 0 <= point[1] < height):
            found = f"({point[0]:g}, {point[1]:g})" + (f", with the bounds ({shift[0]}, {shift[1]}) added," if shift != (0, 0) else "")
            raise SeedsError(
                f"{place}[{number}]: the click {found} is outside {_file_name(info.path)}, which has {width} x {height} px; "
                "clicks are level-0 px, not microns or px of another level; check that the file belongs to this slide"
            )
        if point in placed:
            warnings.append(f"{place}[{number}]: the same click as [{placed[point]}]; it counts once")
        else:
            placed[point] = number
    return tuple(placed)


# --- QuPath -----------------------------------------------------------------------------------------------------------------------


@dataclass
class _QuPathClicks:
    """Gathers the points of one or more QuPath exports by class."""

    source: str
    points: dict[str, list[Point]] = field(default_factory=dict)
    colors: dict[str, Color | None] = field(default_factory=dict)
    unclassified: list[str] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)
    features: int = 0

    def add_document(self, document: object, place: str) -> None:
        """Take the Point and MultiPoint Features of a GeoJSON document."""
        for inside, feature in iter_features(document, place, SeedsError):
            self.features += 1
            where = f"{place}: {inside}"
            geometry = feature.get("geometry")
            kind = geometry.get("type") if isinstance(geometry, dict) else None
            if not isinstance(geometry, dict) or kind not in ("Point", "MultiPoint"):
                self.passed_over.append(f"{inside} ({kind})")
                continue
            coordinates = geometry.get("coordinates")
            if not isinstance(coordinates, list):
                raise SeedsError(f"{where}.geometry: no list of coordinates; export the points from QuPath again")
            positions = coordinates if kind == "MultiPoint" else [coordinates] if coordinates else []
            clicks = [_position(position, f"{where}.geometry.coordinates") for position in positions]
            if clicks:  # "Create points for all classes" leaves empty annotations
                properties = feature.get("properties")
                name, color = _class_of(properties.get("classification") if isinstance(properties, dict) else None, where)
                self._add(name, color, clicks, inside)

    def add_table(self, text: str, place: str) -> None:
        """Take the rows of the .tsv of the points dialog."""
        header, *lines = text.splitlines()
        columns = header.lstrip().split("\t")
        for number, line in enumerate(lines, start=2):
            if not line.strip():
                continue
            self.features += 1
            row = dict(zip(columns, line.split("\t"), strict=False))
            where = f"{place}: line {number}"
            try:
                x, y = float(row["x"]), float(row["y"])
            except (KeyError, ValueError) as error:
                found = _show(f"{row.get('x', '')} {row.get('y', '')}")
                raise SeedsError(f"{where}: x and y are {found}; numbers with a decimal point are needed; save them again") from error
            packed = row.get("color", "").strip()
            color = _unpacked(int(packed)) if re.fullmatch(r"-?\d+", packed) else None
            self._add(row.get("class", "").strip(), color, [(_coordinate(x, where), _coordinate(y, where))], f"line {number}")

    def _add(self, name: str, color: Color | None, clicks: list[Point], inside: str) -> None:
        if not name:
            self.unclassified.append(inside)
            return
        self.points.setdefault(name, []).extend(clicks)
        if self.colors.get(name) is None:
            self.colors[name] = color

    def seeds(self) -> QuPathSeeds:
        """Everything gathered, checked."""
        remedy = "in QuPath select the points, choose a class in the Annotations tab, press 'Set selected', and export again"
        if not self.points and self.unclassified:
            raise SeedsError(f"{self.source}: {self.unclassified[0]}: the points have no class, so their cell type is unknown; {remedy}")
        if not self.points:
            found = f"{self.features} objects, but no points" if self.features else "no objects"
            raise SeedsError(
                f"{self.source}: {found} in it; seeds are points with a class; in QuPath click cells with the Points tool, one class per "
                "cell type, and use File > Export objects as GeoJSON"
            )
        names = list(self.points)
        colors = default_colors(self.colors[name] for name in names)
        kinds = tuple(SeedType(name, color, tuple(self.points[name])) for name, color in zip(names, colors, strict=True))
        places = [f"{self.source}: class {name!r}" for name in names]
        _check_names(names, [f"{self.source}: class"] * len(names))
        _check_clicks(kinds, places)
        notes = []
        if self.unclassified:
            notes.append(f"{self.source}: {len(self.unclassified)} point annotations without a class were passed over; {remedy}")
        if self.passed_over:
            first = self.passed_over[0]
            notes.append(f"{self.source}: {len(self.passed_over)} objects that are no points were passed over, the first is {first}")
        return QuPathSeeds(kinds, self.source, None, tuple(notes))


def _is_geojson(document: object) -> bool:
    if isinstance(document, dict):
        return "features" in document or str(document.get("type")) in QUPATH_TYPES
    return isinstance(document, list)


def _position(value: object, place: str) -> Point:
    if not isinstance(value, list) or len(value) < 2:
        raise SeedsError(f"{place}: {_show(value)} is no position [x, y]; export the points from QuPath again")
    return _coordinate(value[0], place), _coordinate(value[1], place)


def _class_of(value: object, place: str) -> tuple[str, Color | None]:
    """Name (empty: unclassified) and colour of a QuPath classification in any of its forms since 0.2."""
    if value is None:
        return "", None
    if isinstance(value, str):
        return value.strip(), None
    if not isinstance(value, dict):
        raise SeedsError(f"{place}.properties.classification: {_show(value)} is no class; export the points from QuPath again")
    names = value.get("names")
    name = ": ".join(map(str, names)) if isinstance(names, list) else str(value.get("name") or "")
    parent = value.get("parentClass")
    if parent is not None:
        name = f"{_class_of(parent, place)[0]}: {name}"
    color = value.get("color")
    if isinstance(color, list) and len(color) >= 3 and all(_is_number(part) and 0 <= part <= 255 for part in color[:3]):
        return name.strip(), (int(color[0]), int(color[1]), int(color[2]))
    packed = value.get("colorRGB", color)
    return name.strip(), _unpacked(packed) if isinstance(packed, int) and not isinstance(packed, bool) else None


def _unpacked(argb: int) -> Color:
    return argb >> 16 & 255, argb >> 8 & 255, argb & 255


def _type_object(kind: SeedType) -> dict[str, object]:
    color = "#" + bytes(kind.color).hex()
    value: dict[str, object] = {"name": kind.name, "color": color, "points": [_short(point) for point in kind.points]}
    if kind.negative:
        value["negative"] = [_short(point) for point in kind.negative]
    return value


def _short(point: Point) -> list[float]:
    return [int(number) if float(number).is_integer() else float(number) for number in point]


def _file_name(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _show(value: object) -> str:
    """``value`` as JSON, at most 40 characters of it."""
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."
