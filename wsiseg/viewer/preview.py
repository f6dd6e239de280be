"""What the clicks of the page mean for the cells in view, before they are applied to the whole slide.

The same function types the view, the slide and a run (:func:`wsiseg.celltypes.assignment.assign_types`); what differs is which cells it gets.
Where a slide has few cells it gets all of them, and the page shows what Apply will write. Else it gets the cells in view, at most
``VIEW_CELLS``; those at the edge of the view miss their neighbours, and cells beyond it do not tell the shift of the slide. For the counts of
the slide it gets a sample of all cells without local shifts, whose squares cost more than the cells.
"""

from __future__ import annotations

import dataclasses
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from wsiseg.celltypes.assignment import assign_types, set_click_labels
from wsiseg.errors import SeedsError
from wsiseg.records import Bank, Cells, TypePrototypes, Typing
from wsiseg.seeds.bank import same_cell

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from wsiseg.config import RunConfig
    from wsiseg.records import SeedType, TypeSpace
    from wsiseg.viewer.cells import CellStore

VIEW_CELLS = 6000  #: outlined and typed at once: 0.15 s on one core of 2020, and each some ten px of a screen wide
SAMPLE = 6000  #: cells of the slide behind an estimated count: a share of one half is known to 1.3 %
SQUARES = 600  #: squares of local shifts in a slide that is typed whole, about 3 mm x 3 mm


@dataclass(frozen=True)
class TypedRows:
    """Types of some cells.

    Attributes
    ----------
    rows
        (n,): of the store.
    codes, scores, margins
        (n,): as in :class:`~wsiseg.records.Typing`; codes are those of the page's palette, 0 for unassigned.
    whole
        What a run that is typed with these clicks has for these cells; else a preview of it.
    total
        Cells that the rows stand for: all those in view, of which the rows are a sample if there are too many.
    """

    rows: NDArray[np.intp]
    codes: NDArray[np.int32]
    scores: NDArray[np.float32]
    margins: NDArray[np.float32]
    whole: bool
    total: int


class Preview:
    """Types of cells under the clicks of the page; one at a time, the last ones are kept."""

    def __init__(self, store: CellStore, space: TypeSpace | None, config: RunConfig) -> None:
        self.store, self.space, self.config = store, space, config
        self._lock = threading.Lock()
        self._rows: dict[tuple[float, float], int] = {}
        self._whole: tuple[tuple[SeedType, ...], Typing, tuple[str, ...]] | None = None
        self._sample: tuple[tuple[SeedType, ...], Typing, tuple[str, ...]] | None = None

    @property
    def reach_px0(self) -> float:
        """A click beside its cell finds it within this distance."""
        return self.config.cop.click_reach_um / self.store.mpp

    @property
    def is_small(self) -> bool:
        """The slide is typed whole at every click."""
        if len(self.store) > VIEW_CELLS:
            return False
        if not len(self.store):
            return True
        side_um = np.ptp(self.store.points_xy, axis=0) * self.store.mpp
        return bool(np.prod(np.floor(side_um / self.config.typing.local_shift_um) + 1) <= SQUARES)

    def row(self, point: tuple[float, float]) -> int:
        """The cell of a click; -1: none."""
        if point not in self._rows:
            self._rows[point] = self.store.clicked_row(point, self.reach_px0)
        return self._rows[point]

    def bank(self, types: Sequence[SeedType]) -> tuple[Bank, list[NDArray[np.intp]]]:
        """The clicked cells of the types that have clicks, as ``wsiseg type`` finds them, and their rows type by type.

        Raises
        ------
        SeedsError
            A click means no cell, or two types' clicks mean the same.
        """
        size = self.store.descriptors.shape[1]
        prototypes, rows, owner = [], [], dict[int, str]()
        for kind in types:
            mine, against = (
                np.array([self._known_row(kind.name, point) for point in side], np.intp)
                for side in (kind.points, kind.negative)
            )
            for row, point in zip(mine.tolist(), kind.points, strict=True):
                if owner.setdefault(row, kind.name) != kind.name:
                    raise SeedsError(same_cell(f"{kind.name} {_place(point)}", owner[row]))
            rows.append(mine)
            prototypes.append(
                TypePrototypes(
                    name=kind.name,
                    color=kind.color,
                    clicks=np.array(kind.points, float).reshape(-1, 2),
                    clicked=self.store.descriptors[mine].astype(np.float32),
                    negative=self.store.descriptors[against].astype(np.float32),
                    negative_clicks=np.array(kind.negative, float).reshape(-1, 2),
                )
            )
        return Bank(tuple(prototypes), Cells.empty(size)), rows

    def _known_row(self, name: str, point: tuple[float, float]) -> int:
        row = self.row(point)
        if row < 0:
            raise SeedsError(
                f"{name}: the click at {_place(point)} meets no cell of this run; take it back, or click on a nucleus"
            )
        return row

    def view(self, types: Sequence[SeedType], rows: NDArray[np.intp]) -> TypedRows:
        """Type the cells of a view; of too many, every k-th.

        Parameters
        ----------
        types
            Those of the palette that have clicks, in its order.
        rows
            Cells in view, ascending: in the order of the run's table, in which neighbours are near.
        """
        kinds, total = tuple(types), len(rows)
        if self.is_small:
            typing, _ = self.whole(kinds)
            return TypedRows(
                rows, typing.codes[rows], typing.scores[rows], typing.margins[rows], whole=True, total=total
            )
        rows = thinned(rows, VIEW_CELLS)
        with self._lock:
            typing, _ = self._assign(kinds, rows, local=total <= VIEW_CELLS)
        return TypedRows(rows, typing.codes, typing.scores, typing.margins, whole=False, total=total)

    def sample(self, types: Sequence[SeedType]) -> tuple[TypedRows, tuple[str, ...]]:
        """Type the slide, or a sample of it; and the warnings of the typing."""
        kinds, everything = tuple(types), np.arange(len(self.store))
        if self.is_small:
            typing, warnings = self.whole(kinds)
            return TypedRows(
                everything, typing.codes, typing.scores, typing.margins, whole=True, total=len(self.store)
            ), warnings
        rows = thinned(everything, SAMPLE)
        with self._lock:
            if self._sample is None or self._sample[0] != kinds:
                self._sample = (kinds, *self._assign(kinds, rows, local=False))
            _, typing, warnings = self._sample
        return TypedRows(
            rows, typing.codes, typing.scores, typing.margins, whole=False, total=len(self.store)
        ), warnings

    def whole(self, kinds: tuple[SeedType, ...]) -> tuple[Typing, tuple[str, ...]]:
        """Type all cells, as Apply will."""
        with self._lock:
            if self._whole is None or self._whole[0] != kinds:
                typing, warnings = self._assign(kinds, np.arange(len(self.store)), local=True)
                self._whole = (kinds, typing, warnings)
            return self._whole[1:]

    def _assign(
        self, kinds: tuple[SeedType, ...], rows: NDArray[np.intp], *, local: bool
    ) -> tuple[Typing, tuple[str, ...]]:
        bank, clicked = self.bank(kinds)
        config = self.config.typing
        if not local:
            config = dataclasses.replace(config, local_shift=0.0)
        xy_um = self.store.points_xy[rows] * self.store.mpp
        typing, notes = assign_types(self.store.descriptors[rows], xy_um, bank, self.space, config, self.config.stain)
        places = [_places(rows, mine) for mine in clicked]
        return set_click_labels(typing, places), notes.warnings


def thinned(rows: NDArray[np.intp], most: int) -> NDArray[np.intp]:
    """At most ``most`` of the rows, evenly."""
    return rows if len(rows) <= most else rows[np.linspace(0, len(rows) - 1, most).astype(np.intp)]


def _places(rows: NDArray[np.intp], wanted: NDArray[np.intp]) -> NDArray[np.intp]:
    """Where the wanted ones are among ascending rows; -1 where they are not."""
    at = np.searchsorted(rows, wanted)
    found = np.zeros(len(wanted), bool)
    inside = at < len(rows)
    found[inside] = rows[at[inside]] == wanted[inside]
    return np.where(found, at, -1)


def _place(point: tuple[float, float]) -> str:
    return f"[{point[0]:g}, {point[1]:g}]"
