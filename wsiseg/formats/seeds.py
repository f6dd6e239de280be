"""Seeds: the clicks, one or more per cell type. wsiseg's own seeds.json, or points exported from QuPath; told apart by content.

    {"version": 1, "slide": "slide.svs",                                            (schema: seeds.schema.json beside this file)
     "types": [{"name": "tumour", "color": "#c80000", "points": [[10234.5, 8801.0]], "negative": [[10020, 8700]]},
               {"name": "lymphocyte", "points": [[9120, 4410], [9177, 4502]]}]}

``slide``, ``color`` and ``negative`` are optional; ``"text": ["phrase", ...]`` stands beside ``points`` or in place of them. Points are absolute
level-0 px, corner frame. ``"frame": "qupath"`` (optional) says that they are relative to the slide's OpenSlide bounds instead, as QuPath's points
are; it keeps a converted file right.

QuPath's points (points.py) stay as they are in :func:`read_seeds`; :func:`check_seeds`, which knows the slide, makes them absolute.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsiseg.errors import SeedsError
from wsiseg.formats.json_documents import read_texts
from wsiseg.formats.qupath.points import POINT_SUFFIXES, QuPathClicks, is_geojson, is_table, write_qupath_points
from wsiseg.formats.seed_rules import (
    PALETTE,
    Color,
    Point,
    QuPathSeeds,
    check_clicks,
    check_names,
    check_phrases,
    coordinate,
    default_colors,
    file_name,
    is_number,
    require_points,
    short,
)
from wsiseg.records import Seeds, SeedType, SlideInfo
from wsiseg.runtime.atomic import atomic_path, require_free
from wsiseg.runtime.paths import normal, readable
from wsiseg.runtime.text import did_you_mean, parse_json, show

if TYPE_CHECKING:
    SeedsSource = str | os.PathLike[str] | Mapping[str, Any] | Seeds

__all__ = [
    "PALETTE",
    "QuPathSeeds",
    "check_seeds",
    "convert_seeds",
    "default_colors",
    "read_seeds",
    "seeds_text",
    "write_seeds",
]

VERSION = 1
FILE_KEYS = ("version", "slide", "frame", "types")
TYPE_KEYS = ("name", "color", "points", "negative", "text")
FRAMES = ("slide", "qupath")


def read_seeds(source: SeedsSource) -> Seeds:
    """Read clicks: a seeds file of any kind, a dict as in seeds.json, or Seeds made in Python, which are checked.

    Parameters
    ----------
    source
        Path of a seeds.json, QuPath GeoJSON (FeatureCollection, array, single Feature; plain, .gz, .zip), or QuPath points .tsv; a
        mapping with the keys of seeds.json; or :class:`~wsiseg.records.Seeds`.

    Returns
    -------
    Seeds
        Types and clicks in the order of the file (QuPath 0.6+ sorts the points of a MultiPoint). ``QuPathSeeds`` when the points are in
        QuPath's frame: pass them through :func:`check_seeds` before use.

    Raises
    ------
    SeedsError
        Anything that cannot be used, as one line with its place in the file.

    Examples
    --------
    >>> import wsiseg
    >>> from wsiseg.demo import write_demo
    >>> slide, clicks = write_demo("demo")
    >>> seeds = wsiseg.read_seeds(clicks)
    >>> [kind.name for kind in seeds.types]
    ['epithelium', 'immune', 'stroma']
    >>> wsiseg.read_seeds({"version": 1, "types": [{"name": "tumour", "points": [[424, 112]]}]})
    Seeds(tumour: 1 click)
    """
    if isinstance(source, Seeds):
        return replace(_parse(_document(source), source.source, source.source), notes=source.notes)
    if isinstance(source, Mapping):
        return _parse(_as_json(source), "seeds", "seeds")
    if not isinstance(source, str | os.PathLike):
        raise SeedsError(
            f"seeds: found {show(source)}; pass the path of a seeds file, a dict as in seeds.json, or wsiseg.Seeds"
        )
    return _read(Path(source))[0]


def _read(path: Path) -> tuple[Seeds, bool]:
    """The seeds, and whether they are from QuPath."""
    clicks = QuPathClicks(source=str(path))
    for number, (place, text) in enumerate(read_texts(path, SeedsError)):
        if is_table(text):
            clicks.add_table(text, place)
            continue
        document = parse_json(text, place, SeedsError, any_digits=True)
        if is_geojson(document):
            clicks.add_document(document, place)
            continue
        if number:
            raise SeedsError(f"{place}: a second seeds document; a zip may hold one seeds.json, or only QuPath exports")
        return _parse(parse_json(text, place, SeedsError, unique_keys=True), place, str(path)), False
    return clicks.seeds(), True


def check_seeds(seeds: Seeds, info: SlideInfo) -> tuple[Seeds, list[str]]:
    """Check seeds against the slide they are for, and place them in its frame.

    Parameters
    ----------
    seeds
        From :func:`read_seeds`; not modified.
    info
        The slide.

    Returns
    -------
    tuple of (Seeds, list of str)
        In absolute level-0 px, without repeated clicks; and warnings, one message each.

    Raises
    ------
    SeedsError
        The file names another slide, or a click lies outside this one.
    """
    slide = file_name(info.path)
    if seeds.slide is not None and normal(file_name(seeds.slide)) != normal(slide):
        raise SeedsError(
            f"{seeds.source}: slide: these seeds are for {file_name(seeds.slide)!r}, but the slide is {slide!r}; "
            "give the seeds of this slide, or correct or remove 'slide' in the file"
        )
    warnings = list(seeds.notes)
    shift = (0, 0)
    if isinstance(seeds, QuPathSeeds) and info.bounds is not None:
        shift = info.bounds[:2]
        warnings.append(f"{seeds.source}: QuPath's points moved by the slide's bounds, ({shift[0]}, {shift[1]}) px")
    types = []
    for number, kind in enumerate(seeds.types):
        place = (
            f"{seeds.source}: types[{number}]"
            if not isinstance(seeds, QuPathSeeds)
            else f"{seeds.source}: class {kind.name!r}"
        )
        points = _placed(kind.points, shift, f"{place}.points", info, warnings)
        negative = _placed(kind.negative, shift, f"{place}.negative", info, warnings)
        if kind.name.endswith("*"):
            warnings.append(
                f"{place}: QuPath ignores classes that end in '*' ({kind.name!r}); choose another name to count them there"
            )
        types.append(replace(kind, points=points, negative=negative))
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

    Examples
    --------
    >>> from pathlib import Path
    >>> import wsiseg
    >>> stroma = wsiseg.SeedType("stroma", color=(0, 140, 60), points=((189, 356),))
    >>> write_seeds(Path("seeds.json"), wsiseg.Seeds((stroma,)))
    >>> wsiseg.read_seeds("seeds.json")
    Seeds(stroma: 1 click)
    """
    _parse(_document(seeds), str(path), str(path))
    with atomic_path(path) as partial:
        partial.write_text(seeds_text(seeds), encoding="utf-8")


def seeds_text(seeds: Seeds) -> str:
    """The content of a seeds.json: what :func:`write_seeds` writes."""
    head = _document(seeds)
    lines = ",\n  ".join(json.dumps(kind, ensure_ascii=False) for kind in head.pop("types"))
    return json.dumps(head, ensure_ascii=False)[:-1] + f',\n "types": [\n  {lines}\n ]}}\n'


def convert_seeds(
    source: Path, target: Path, info: SlideInfo | None = None, *, earlier: Path | None = None, overwrite: bool = False
) -> tuple[Seeds, list[str]]:
    """Make a seeds.json of QuPath's points, or points for QuPath of a seeds.json; what ``source`` holds decides.

    Parameters
    ----------
    source
        Anything that :func:`read_seeds` reads.
    target
        ``.json`` for QuPath's points, ``.geojson`` or ``.geojson.gz`` for a seeds.json.
    info
        The slide: the clicks are checked against it, and come out absolute in a seeds.json, relative to its OpenSlide bounds for
        QuPath. Without it coordinates are written as they are, and a seeds.json of QuPath's points says ``"frame": "qupath"``.
    earlier
        Clicks that stay, before those of ``source``; types of one name are one type. It needs ``info``, since the two may count from
        different corners.
    overwrite
        Replace ``target``.

    Returns
    -------
    tuple of (Seeds, list of str)
        The seeds as written, and warnings, one message each.

    Raises
    ------
    SeedsError
        The clicks cannot be read or do not fit the slide, or ``target`` has the wrong name or is there already.
    RunError
        ``target`` cannot be written.
    """
    require_free(target, SeedsError, overwrite=overwrite)
    seeds, from_qupath = _read(source)
    with readable(target, SeedsError):
        same_file = target.exists() and target.samefile(source)
    if same_file:
        raise SeedsError(
            f"{target}: this is also the file that is read; the clicks would be lost if writing failed; give the new file another name"
        )
    suffixes = (".json",) if from_qupath else POINT_SUFFIXES
    if not target.name.lower().endswith(suffixes):
        found, made = ("QuPath's points", "a seeds.json") if from_qupath else ("a seeds.json", "points for QuPath")
        raise SeedsError(
            f"{target}: {source} holds {found}, so {made} would be written here; a name in {' or '.join(suffixes)} is needed"
        )
    warnings = list(seeds.notes)
    if info is not None:
        seeds, warnings = check_seeds(seeds, info)
        if earlier is not None:
            seeds, more = _joined(earlier, seeds, info)
            warnings = [*more, *warnings]
        left, top = (0, 0) if info.bounds is None or from_qupath else info.bounds[:2]
        kinds = tuple(
            replace(k, points=_moved(k.points, left, top), negative=_moved(k.negative, left, top)) for k in seeds.types
        )
        seeds = (Seeds if from_qupath else QuPathSeeds)(kinds, seeds.source, file_name(info.path))
        if left or top:
            warnings.append(
                f"{target}: written relative to the slide's bounds, ({left}, {top}) px, where QuPath counts from"
            )
    elif earlier is not None:
        raise SeedsError(
            f"{earlier}: to join two files of clicks the slide is needed, since they may count from different corners; pass --slide"
        )
    elif not from_qupath and not isinstance(seeds, QuPathSeeds):
        warnings.append(
            f"{target}: written without checking the slide; if it has bounds (MRXS and some others), QuPath needs --slide here"
        )
    if from_qupath:
        write_seeds(target, seeds)
    else:
        warnings += _leave_phrases(seeds, target)
        write_qupath_points(target, seeds)
    return seeds, warnings


def _joined(earlier: Path, seeds: Seeds, info: SlideInfo) -> tuple[Seeds, list[str]]:
    """Earlier clicks and new ones, both absolute."""
    old, warnings = check_seeds(read_seeds(earlier), info)
    new = {kind.name: kind for kind in seeds.types}
    kinds = [
        replace(
            kind,
            points=tuple(dict.fromkeys((*kind.points, *new[kind.name].points))),
            negative=tuple(dict.fromkeys((*kind.negative, *new[kind.name].negative))),
            text=tuple(dict.fromkeys((*kind.text, *new[kind.name].text))),
        )
        if kind.name in new
        else kind
        for kind in old.types
    ]
    kinds += [kind for name, kind in new.items() if name not in {known.name for known in old.types}]
    return Seeds(tuple(kinds), seeds.source, seeds.slide), warnings


def _leave_phrases(seeds: Seeds, target: Path) -> list[str]:
    """A warning about phrases, which QuPath's points cannot hold; a type that has nothing else is refused."""
    require_points(seeds, f"{target}, a file of QuPath's points,")
    named = [kind.name for kind in seeds.types if kind.text]
    return [f"{target}: the phrases of {', '.join(named)} are not in it; QuPath's points have none"] if named else []


def _moved(points: tuple[Point, ...], left: int, top: int) -> tuple[Point, ...]:
    """Points relative to (left, top); what floating point leaves behind the sixth decimal stays out of the file."""
    return tuple((round(x - left, 6), round(y - top, 6)) for x, y in points)


# --- wsiseg's own file ------------------------------------------------------------------------------------------------------------


def _parse(document: object, place: str, source: str) -> Seeds:
    members = _object(document, place, "a seeds file is an object with 'version' and 'types'")
    _check_keys(members, FILE_KEYS, place)
    version = members.get("version")
    if "version" not in members:
        raise SeedsError(f"{place}: no 'version'; add \"version\": {VERSION}")
    if isinstance(version, bool) or version != VERSION:
        raise SeedsError(
            f"{place}: version is {show(version)}; this wsiseg reads version {VERSION}; convert the file or update wsiseg"
        )
    slide = members.get("slide")
    if "slide" in members and (not isinstance(slide, str) or not slide.strip()):
        raise SeedsError(f"{place}: slide is {show(slide)}; it must be the slide's file name, or be left out")
    frame = members.get("frame", "slide")
    if frame not in FRAMES:
        allowed = "allowed are 'slide' (absolute level-0 px), 'qupath' (relative to the bounds)"
        raise SeedsError(f"{place}: frame is {show(frame)}; {did_you_mean(frame, FRAMES)}{allowed}")
    types = members.get("types")
    if not isinstance(types, list) or not types:
        found = "missing" if types is None else "empty" if types == [] else show(types)
        raise SeedsError(
            f"{place}: types is {found}; at least one type with one point is needed; click a cell of each type"
        )
    parsed = [_parse_type(value, number, place, absolute=frame == "slide") for number, value in enumerate(types)]
    colors = default_colors([color for _, color in parsed])
    kinds = tuple(replace(kind, color=color) for (kind, _), color in zip(parsed, colors, strict=True))
    places = [f"{place}: types[{number}]" for number in range(len(kinds))]
    check_names([kind.name for kind in kinds], places)
    check_clicks(kinds, places)
    check_phrases(kinds, places)
    return QuPathSeeds(kinds, source, slide) if frame == "qupath" else Seeds(kinds, source, slide)


def _parse_type(value: object, number: int, file_place: str, *, absolute: bool) -> tuple[SeedType, Color | None]:
    place = f"{file_place}: types[{number}]"
    members = _object(value, place, "a type is an object with 'name' and 'points'")
    _check_keys(members, TYPE_KEYS, place)
    if "name" not in members or not members.keys() & {"points", "text"}:
        missing = "'points'" if "name" in members else "'name'"
        raise SeedsError(f"{place}: no {missing}; every type needs 'name' and 'points', or 'text' in place of points")
    name = members["name"]
    if not isinstance(name, str):
        raise SeedsError(f"{place}.name: {show(name)} is not text; write the name of a cell type in quotes")
    text = _phrases(members.get("text", []), f"{place}.text")
    if "text" in members and not text:
        raise SeedsError(f"{place}.text: is empty; write at least one phrase, or leave 'text' out")
    points = _points(members.get("points", []), f"{place}.points", absolute=absolute)
    if not points and not text:
        raise SeedsError(
            f"{place}.points: type {name!r} has no points; click at least one cell of it, or remove the type"
        )
    negative = _points(members.get("negative", []), f"{place}.negative", absolute=absolute)
    if negative and not points:
        raise SeedsError(
            f"{place}.negative: type {name!r} has no points; a negative click says what is not like them; click a cell of the type as well"
        )
    color = _parse_color(members["color"], f"{place}.color") if "color" in members else None
    return SeedType(name, color or (0, 0, 0), points, negative, text), color


def _phrases(value: object, place: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(phrase, str) for phrase in value):
        raise SeedsError(f'{place}: {show(value)} is not a list of phrases; write ["small round dark nucleus", ...]')
    return tuple(value)


def _points(value: object, place: str, *, absolute: bool) -> tuple[Point, ...]:
    if not isinstance(value, list):
        raise SeedsError(f"{place}: {show(value)} is not a list of points; write [[x, y], ...] in level-0 px")
    points = []
    for number, pair in enumerate(value):
        where = f"{place}[{number}]"
        if not isinstance(pair, list) or len(pair) != 2:
            hint = "; one point is written [[x, y]], with two brackets" if number == 0 and is_number(pair) else ""
            raise SeedsError(f"{where}: {show(pair)} is not a point; a point is [x, y] in level-0 px{hint}")
        x, y = (coordinate(part, where) for part in pair)
        if absolute and (x < 0 or y < 0):
            raise SeedsError(f"{where}: ({x:g}, {y:g}) is negative; level-0 px begin at 0; click inside the slide")
        points.append((x, y))
    return tuple(points)


def _parse_color(value: object, place: str) -> Color:
    if not isinstance(value, str) or not re.fullmatch(r"#[0-9a-fA-F]{6}", value):
        raise SeedsError(f'{place}: {show(value)} is not a colour; write "#rrggbb", e.g. "#c80000", or leave it out')
    return int(value[1:3], 16), int(value[3:5], 16), int(value[5:7], 16)


def _object(value: object, place: str, needed: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SeedsError(f"{place}: found {show(value)}; {needed}")
    return value


def _check_keys(members: dict[str, Any], allowed: tuple[str, ...], place: str) -> None:
    for key in members:
        if key not in allowed:
            raise SeedsError(
                f"{place}: unknown key {key[:40]!r}; {did_you_mean(key, allowed)}allowed are {', '.join(allowed)}; rename or remove it"
            )


# --- what holds for both kinds ----------------------------------------------------------------------------------------------------


def _placed(
    points: tuple[Point, ...], shift: tuple[int, int], place: str, info: SlideInfo, warnings: list[str]
) -> tuple[Point, ...]:
    width, height = info.size_px0
    placed: dict[Point, int] = {}
    for number, (x, y) in enumerate(points):
        point = (x + shift[0], y + shift[1])
        if not (0 <= point[0] < width and 0 <= point[1] < height):
            found = f"({point[0]:g}, {point[1]:g})" + (
                f", with the bounds ({shift[0]}, {shift[1]}) added," if shift != (0, 0) else ""
            )
            raise SeedsError(
                f"{place}[{number}]: the click {found} is outside {file_name(info.path)}, which has {width} x {height} px; "
                "clicks are level-0 px, not microns or px of another level; check that the file belongs to this slide"
            )
        if point in placed:
            warnings.append(f"{place}[{number}]: the same click as [{placed[point]}]; it counts once")
        else:
            placed[point] = number
    return tuple(placed)


def _document(seeds: Seeds) -> dict[str, Any]:
    """Seeds as the object that seeds.json holds."""
    document: dict[str, Any] = {"version": VERSION}
    if seeds.slide is not None:
        document["slide"] = seeds.slide
    if isinstance(seeds, QuPathSeeds):
        document["frame"] = "qupath"
    try:
        document["types"] = [_type_object(kind) for kind in seeds.types]
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise SeedsError(
            f"{seeds.source}: not made as clicks are ({error}); Seeds hold a tuple of "
            "SeedType(name, (red, green, blue), ((x, y), ...)), colours from 0 to 255"
        ) from error
    return document


def _as_json(mapping: Mapping[str, Any]) -> object:
    """A mapping made in Python as JSON has it: lists in place of tuples and arrays."""
    try:
        return json.loads(json.dumps(dict(mapping), default=lambda value: value.tolist()))
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise SeedsError(
            f"seeds: the dict holds what seeds.json cannot ({error}); use texts, numbers and lists, as in seeds.json"
        ) from error


def _type_object(kind: SeedType) -> dict[str, object]:
    color = "#" + bytes(kind.color).hex()
    value: dict[str, object] = {"name": kind.name, "color": color}
    if kind.points or not kind.text:
        value["points"] = [short(point) for point in kind.points]
    if kind.negative:
        value["negative"] = [short(point) for point in kind.negative]
    if kind.text:
        value["text"] = list(kind.text)
    return value
