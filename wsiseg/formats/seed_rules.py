"""Rules of every file of clicks, seeds.json and QuPath's points alike: names, numbers, colours, no contradicting clicks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wsiseg.errors import SeedsError
from wsiseg.formats.geojson_geometry import finite
from wsiseg.records import UNASSIGNED, Seeds, SeedType
from wsiseg.runtime.text import show

if TYPE_CHECKING:
    from collections.abc import Iterable

Point = tuple[float, float]
Color = tuple[int, int, int]

MAX_NAME = 100
MAX_PHRASES = 32  #: of all types: each costs a pass of the detector on every tile
MAX_WORDS = 30  #: of a phrase: SAM 3 reads 32 tokens, of which two are the ends
#: In lower case: our name for cells without a type, and QuPath's, which shows cells of such a class as if they had none.
RESERVED_NAMES = (UNASSIGNED, "unclassified")

#: Colours of types that state none: Okabe and Ito (2008), "Color Universal Design", those that show best on pink and violet first.
PALETTE: tuple[Color, ...] = (
    (213, 94, 0),
    (0, 114, 178),
    (0, 158, 115),
    (240, 228, 66),
    (86, 180, 233),
    (230, 159, 0),
    (204, 121, 167),
    (0, 0, 0),
)


@dataclass(frozen=True, repr=False)
class QuPathSeeds(Seeds):
    """Seeds whose points are relative to the slide's OpenSlide bounds."""


def default_colors(stated: Iterable[Color | None]) -> list[Color]:
    """Colours of the types in order: as stated, else the next unused one of ``PALETTE`` (repeated from the 9th on)."""
    stated = list(stated)
    free = [color for color in PALETTE if color not in stated] or list(PALETTE)
    missing = iter([free[k % len(free)] for k in range(stated.count(None))])
    return [next(missing) if color is None else color for color in stated]


def check_names(names: list[str], places: list[str]) -> None:
    """Refuse names that could not be told apart, or that QuPath would read as something else."""
    first: dict[str, str] = {}
    for name, place in zip(names, places, strict=True):
        where = f"{place}.name" if place.endswith("]") else place
        if not name.strip():
            raise SeedsError(f"{where}: the name is blank; write the name of a cell type")
        if name != name.strip():
            raise SeedsError(f"{where}: {show(name)} has leading or trailing blanks; remove them")
        if ":" in name:
            raise SeedsError(
                f"{where}: {show(name)} has a ':', where QuPath splits class names; use a plain name without ':'"
            )
        if not name.isprintable():
            raise SeedsError(f"{where}: {show(name)} has a line break or a control character; use printable text")
        if len(name) > MAX_NAME:
            raise SeedsError(f"{where}: the name has {len(name)} characters; {MAX_NAME} are allowed; shorten it")
        key = name.casefold()
        if key in RESERVED_NAMES:
            raise SeedsError(f"{where}: {show(name)} is reserved for cells without a type; choose another name")
        if key in first:
            raise SeedsError(
                f"{where}: {show(name)} appears twice (as {show(first[key])}, case does not count); join or rename one"
            )
        first[key] = name


def check_clicks(kinds: tuple[SeedType, ...], places: list[str]) -> None:
    """Refuse the same click for two types, or for and against one."""
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
                raise SeedsError(
                    f"{place}.negative[{index}]: the click {click} is both for and against {kind.name!r}; remove one of the two"
                )


def check_phrases(kinds: tuple[SeedType, ...], places: list[str]) -> None:
    """Refuse phrases that are blank, too long, too many, or given for two types."""
    owner: dict[str, tuple[int, str]] = {}
    for number, (kind, place) in enumerate(zip(kinds, places, strict=True)):
        for index, phrase in enumerate(kind.text):
            where = f"{place}.text[{index}]"
            if not phrase.strip():
                raise SeedsError(
                    f"{where}: the phrase is blank; write what a cell of the type looks like, or remove it"
                )
            if not phrase.isprintable():
                raise SeedsError(f"{where}: {show(phrase)} has a line break or a control character; use printable text")
            words = len(phrase.split())
            if words > MAX_WORDS:
                raise SeedsError(
                    f"{where}: the phrase has {words} words; {MAX_WORDS} are allowed; a few words work best"
                )
            other, first = owner.setdefault(" ".join(phrase.casefold().split()), (number, where))
            if other != number or first != where:
                raise SeedsError(
                    f"{where}: {show(phrase)} is also {first.rsplit(': ', 1)[-1]}; a phrase describes one type; remove one of the two"
                )
    phrases = sum(len(kind.text) for kind in kinds)
    if phrases > MAX_PHRASES:
        raise SeedsError(
            f"{places[0].rsplit(': ', 1)[0]}: {phrases} phrases; {MAX_PHRASES} are allowed, since each is searched for on every tile; remove some"
        )


def require_points(seeds: Seeds, purpose: str) -> None:
    """Refuse seeds of which a type has no clicks.

    Parameters
    ----------
    seeds
        The seeds.
    purpose
        What needs the clicks: ``--method apg``.

    Raises
    ------
    SeedsError
        Names the first such type.
    """
    for number, kind in enumerate(seeds.types):
        if not kind.points:
            raise SeedsError(
                f"{seeds.source}: types[{number}]: type {kind.name!r} has only phrases, and {purpose} needs clicks; click a cell of it "
                "(phrases alone are for `wsiseg run --method text`)"
            )


def require_phrases(seeds: Seeds, purpose: str) -> None:
    """Refuse seeds of which a type has no phrases; ``purpose`` says what needs them.

    Raises
    ------
    SeedsError
        Names the first such type.
    """
    for number, kind in enumerate(seeds.types):
        if not kind.text:
            raise SeedsError(
                f'{seeds.source}: types[{number}]: type {kind.name!r} has no phrase, which {purpose} needs; add "text": ["..."] to it'
            )


def coordinate(value: object, place: str) -> float:
    """Check a coordinate of a click."""
    return finite(value, place, SeedsError)


def is_number(value: object) -> bool:
    """Tell whether a JSON value is a number; ``true`` is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def short(point: Point) -> list[float]:
    """Format a click for JSON: whole numbers without ``.0``."""
    return [int(number) if float(number).is_integer() else float(number) for number in point]


def file_name(path: str) -> str:
    """The last part of a path of any system."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]
