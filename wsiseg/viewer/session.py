"""view.json: what was clicked and drawn on the page of one slide. A log of changes, so that each can be undone, and nothing is lost.

    {"version": 1, "slide": "slide.svs", "done": 2, "changes": [
       {"kind": "palette", "types": [{"name": "tumour", "color": "#d55e00", "points": [], "negative": []}]},
       {"kind": "click", "add": [["tumour", "points", [10234.5, 8801.0]]], "drop": [], "seen": []}]}

The first ``done`` changes hold; those after them were undone, and can be redone. The file is written whole after each change.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from wsiseg.errors import FormatError, SeedsError
from wsiseg.formats.seed_rules import MAX_NAME, PALETTE, check_names
from wsiseg.formats.seeds import seeds_text
from wsiseg.records import Seeds, SeedType
from wsiseg.runtime.atomic import write_json
from wsiseg.runtime.paths import read_text, refusal

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

VERSION = 1
SIDES = ("points", "negative")
MAX_CHANGES = 20_000  #: a file of some megabytes; a day of clicks has some hundreds

MAX_TYPES = 100  #: the page gets a type as one byte, and the run may have others beside these

Point = tuple[float, float]
Click = tuple[str, str, Point]  #: name of the type, ``points`` or ``negative``, place


@dataclass(frozen=True)
class PageState:
    """What holds after the changes so far.

    Attributes
    ----------
    types
        The palette with its clicks, level-0 px; types without clicks are among them.
    regions
        Rings of drawn regions, level-0 px, not closed.
    seen
        Cells that were reviewed: the prompt of each, level-0 px.
    """

    types: tuple[SeedType, ...] = ()
    regions: tuple[tuple[Point, ...], ...] = ()
    seen: tuple[Point, ...] = ()

    def seeds(self, slide: str) -> Seeds | None:
        """The clicks as a seeds file holds them; ``None`` without one. A type needs a click of its own to be in it."""
        clicked = tuple(kind for kind in self.types if kind.points)
        return Seeds(clicked, "the page's clicks", slide) if clicked else None

    def text(self, slide: str) -> str:
        """The content of seeds.json; empty without clicks."""
        seeds = self.seeds(slide)
        return "" if seeds is None else seeds_text(seeds)


def replay(changes: Iterable[dict[str, Any]]) -> PageState:
    """The state after changes, in order.

    Raises
    ------
    SeedsError
        A change is not one, or does not fit what was before it.
    """
    state = PageState()
    for change in changes:
        state = apply_change(state, change)
    return state


def apply_change(state: PageState, change: dict[str, Any]) -> PageState:
    """The state after one more change.

    Raises
    ------
    SeedsError
        The change is not one, or does not fit.

    Examples
    --------
    >>> palette = {"kind": "palette", "types": [{"name": "tumour", "color": "#d55e00", "points": [], "negative": []}]}
    >>> state = apply_change(PageState(), palette)
    >>> click = {"kind": "click", "add": [["tumour", "points", [12.5, 8]]], "drop": [], "seen": []}
    >>> apply_change(state, click).types[0].points
    ((12.5, 8.0),)
    """
    try:
        kind = change["kind"]
        if kind == "palette":
            return replace(state, types=checked(tuple(_type_of(value) for value in change["types"])))
        if kind == "type":
            return replace(state, types=_with_type(state.types, change))
        if kind == "click":
            return _with_clicks(state, change)
        if kind == "region":
            return _with_region(state, change)
    except SeedsError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise SeedsError(f"page: not a change ({str(error)[:80]}); reload the page") from error
    raise SeedsError(f"page: unknown kind of change {str(kind)[:40]!r}; reload the page")


def checked(types: tuple[SeedType, ...]) -> tuple[SeedType, ...]:
    """The types, if their names can be told apart and are names that a seeds file may have."""
    check_names([kind.name for kind in types], ["types" for _ in types])
    if len(types) > MAX_TYPES:
        raise SeedsError(f"types: {len(types)} types; the page shows {MAX_TYPES} at most; remove some")
    return types


def palette_change(types: Iterable[SeedType]) -> dict[str, Any]:
    """The change that makes these the types of the page, with the clicks that they have."""
    return {
        "kind": "palette",
        "types": [
            {
                "name": kind.name,
                "color": "#" + bytes(kind.color).hex(),
                "points": [list(point) for point in kind.points],
                "negative": [list(point) for point in kind.negative],
            }
            for kind in types
        ],
    }


def point_of(value: object) -> Point:
    """Two finite numbers.

    Raises
    ------
    SeedsError
        They are not.
    """
    if isinstance(value, list | tuple) and len(value) == 2:
        x, y = value
        numbers = all(isinstance(part, int | float) and not isinstance(part, bool) for part in value)
        if numbers and abs(x) < 1e9 and abs(y) < 1e9:  # false for NaN as well
            return round(float(x), 2), round(float(y), 2)
    raise SeedsError(f"page: {str(value)[:40]!r} is not a point; a point is [x, y] in level-0 px")


def unused_color(types: Iterable[SeedType]) -> tuple[int, int, int]:
    """The next colour of the palette of types that is not taken."""
    taken = {kind.color for kind in types}
    return next((color for color in PALETTE if color not in taken), PALETTE[len(taken) % len(PALETTE)])


def _type_of(value: dict[str, Any]) -> SeedType:
    name, color = value["name"], value["color"]
    if not isinstance(name, str) or not isinstance(color, str) or len(color) != 7 or color[0] != "#":
        raise SeedsError(f"page: {str(value)[:60]!r} is not a type; a type has a name and a colour #rrggbb")
    red, green, blue = bytes.fromhex(color[1:])
    points, negative = (tuple(point_of(point) for point in value.get(side, ())) for side in SIDES)
    return SeedType(name[: MAX_NAME + 1], (red, green, blue), points, negative)


def _with_type(types: tuple[SeedType, ...], change: dict[str, Any]) -> tuple[SeedType, ...]:
    """A type added (no ``old``), changed, or removed (no ``new``)."""
    old, new = change.get("old"), change.get("new")
    if old is None:
        return checked((*types, replace(_type_of(dict(new or {})), points=(), negative=())))
    place = _place(types, old)
    if new is None:
        return types[:place] + types[place + 1 :]
    fresh = _type_of(dict(new))
    return checked((*types[:place], replace(types[place], name=fresh.name, color=fresh.color), *types[place + 1 :]))


def _with_clicks(state: PageState, change: dict[str, Any]) -> PageState:
    types = list(state.types)
    for name, side, point in (_click_of(value) for value in change["drop"]):
        place = _place(state.types, name)
        left = tuple(p for p in getattr(types[place], side) if p != point)
        types[place] = _with_side(types[place], side, left)
    for name, side, point in (_click_of(value) for value in change["add"]):
        place = _place(state.types, name)
        if point not in getattr(types[place], side):
            types[place] = _with_side(types[place], side, (*getattr(types[place], side), point))
    seen = tuple(dict.fromkeys((*state.seen, *(point_of(value) for value in change.get("seen", ())))))
    return replace(state, types=tuple(types), seen=seen)


def _with_side(kind: SeedType, side: str, points: tuple[Point, ...]) -> SeedType:
    return replace(kind, points=points) if side == "points" else replace(kind, negative=points)


def _with_region(state: PageState, change: dict[str, Any]) -> PageState:
    if "drop" in change:
        place = int(change["drop"])
        if not 0 <= place < len(state.regions):
            raise SeedsError(f"page: region {place + 1} is unknown; reload the page")
        return replace(state, regions=state.regions[:place] + state.regions[place + 1 :])
    ring = tuple(point_of(point) for point in change["add"])
    if len(set(ring)) < 3:
        raise SeedsError("page: a region needs three corners or more; draw it larger")
    return replace(state, regions=(*state.regions, ring))


def _click_of(value: object) -> Click:
    if not isinstance(value, list | tuple) or len(value) != 3 or value[1] not in SIDES or not isinstance(value[0], str):
        raise SeedsError(f"page: {str(value)[:60]!r} is not a click; reload the page")
    return value[0], str(value[1]), point_of(value[2])


def _place(types: tuple[SeedType, ...], name: object) -> int:
    for place, kind in enumerate(types):
        if kind.name == name:
            return place
    raise SeedsError(f"page: type {str(name)[:40]!r} is unknown; reload the page")


@dataclass
class Session:
    """The log and its file. Its methods may be called from several threads.

    Attributes
    ----------
    path
        ``view.json`` in the folder of the run.
    slide
        File name of the slide.
    changes, done
        As in the file.
    revision
        Grows with every change, undo and redo of this process.
    """

    path: Path
    slide: str
    changes: list[dict[str, Any]] = field(default_factory=list)
    done: int = 0
    revision: int = 0
    state: PageState = field(default_factory=PageState)
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    @staticmethod
    def open(path: Path, slide: str) -> Session | None:
        """Read the file; ``None`` when there is none.

        Raises
        ------
        FormatError
            It is damaged, of another version or of another slide; it is not touched.
        """
        advice = "rename the file and start again; the clicks in it are text"
        try:
            note: Any = json.loads(read_text(path))
            if note["version"] != VERSION:
                raise FormatError(f"{path}: version {note['version']!r}; this wsiseg reads version {VERSION}; {advice}")
            if note["slide"] != slide:
                raise FormatError(f"{path}: is of {str(note['slide'])[:60]!r}, the slide is {slide!r}; {advice}")
            changes, done = list(note["changes"]), int(note["done"])
            if not 0 <= done <= len(changes):
                raise FormatError(f"{path}: damaged (done is {done} of {len(changes)}); {advice}")
            return Session(path, slide, changes, done, 0, replay(changes[:done]))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise FormatError(f"{path}: {refusal(error)}; {advice}") from error
        except SeedsError as error:
            raise FormatError(f"{path}: damaged ({error}); {advice}") from error
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, FormatError):
                raise
            raise FormatError(f"{path}: damaged ({str(error)[:80]}); {advice}") from error

    def change(self, change: dict[str, Any]) -> PageState:
        """Add a change and write the file; on an error nothing has changed."""
        with self._lock:
            if self.done >= MAX_CHANGES:
                raise SeedsError(f"{self.path}: {MAX_CHANGES} changes, and no more fit; save, and rename the file")
            state = apply_change(self.state, change)
            self._keep([*self.changes[: self.done], change], self.done + 1, state)
            return state

    def undo(self) -> PageState:
        """Take the last change back. The first, which made the palette, stays."""
        return self._go(self.done - 1)

    def redo(self) -> PageState:
        """Do what was undone again."""
        return self._go(self.done + 1)

    def _go(self, done: int) -> PageState:
        with self._lock:
            if 1 <= done <= len(self.changes):
                self._keep(self.changes, done, replay(self.changes[:done]))
            return self.state

    def _keep(self, changes: list[dict[str, Any]], done: int, state: PageState) -> None:
        """Write first: what the page shows is on disk."""
        write_json(self.path, {"version": VERSION, "slide": self.slide, "done": done, "changes": changes})
        self.changes, self.done, self.state, self.revision = changes, done, state, self.revision + 1
