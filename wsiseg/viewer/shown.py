"""The cells as the page shows them now: with the types of the run's table, or under clicks that are not applied yet."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from wsiseg.records import UNASSIGNED
from wsiseg.viewer.preview import VIEW_CELLS, TypedRows, thinned

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from wsiseg.records import SeedType, Typing
    from wsiseg.viewer.cells import Box4, CellStore
    from wsiseg.viewer.preview import Preview

_GREY = "#595959"  #: seen on tissue of every stain, and on glass


def kinds_of(palette: Sequence[SeedType], typing: Typing | None) -> list[dict[str, str]]:
    """Names and colours of the codes that the page gets: unassigned, the palette, and other types of the run."""
    known = [{"name": kind.name, "color": "#" + bytes(kind.color).hex()} for kind in palette]
    listed = {kind["name"] for kind in known}
    extra = [
        {"name": name, "color": "#" + bytes(color).hex()}
        for name, color in (zip(typing.names, typing.colors, strict=True) if typing else ())
        if name not in listed and name != UNASSIGNED
    ]
    return [{"name": UNASSIGNED, "color": _GREY}, *known, *extra]


@dataclass(frozen=True)
class Shown:
    """Cells and what types them, as they are for one answer.

    Attributes
    ----------
    store, preview
        The cells, and how clicks type them.
    palette
        All types of the page.
    clicked
        Those that have clicks.
    applied
        The types of the table are those of the clicks.
    """

    store: CellStore
    preview: Preview
    palette: tuple[SeedType, ...]
    clicked: tuple[SeedType, ...]
    applied: bool

    @property
    def is_preview(self) -> bool:
        """The clicks type the cells, not the table."""
        return bool(self.clicked) and not self.applied

    @cached_property
    def names(self) -> list[str]:
        """Of the codes that the page gets."""
        return [kind["name"] for kind in kinds_of(self.palette, self.store.typing)]

    def typed(self, rows: NDArray[np.intp]) -> TypedRows:
        """Types of cells; codes are places in ``names``."""
        if self.is_preview:
            found = self.preview.view(self.clicked, rows)
            return replace(found, codes=self._as_shown(self._preview_names, found.codes))
        total, typing = len(rows), self.store.typing
        rows = thinned(rows, VIEW_CELLS)
        codes = self._as_shown(typing.names, typing.codes[rows])
        return TypedRows(rows, codes, typing.scores[rows], typing.margins[rows], whole=True, total=total)

    def sample(self) -> tuple[TypedRows, tuple[str, ...]]:
        """Types of all cells, or under clicks of a sample of them; and what the typing warns of."""
        if self.is_preview:
            found, warnings = self.preview.sample(self.clicked)
            return replace(found, codes=self._as_shown(self._preview_names, found.codes)), warnings
        typing, rows = self.store.typing, np.arange(len(self.store))
        codes = self._as_shown(typing.names, typing.codes)
        return TypedRows(rows, codes, typing.scores, typing.margins, whole=True, total=len(rows)), ()

    @property
    def _preview_names(self) -> list[str]:
        """Names of the codes that a preview gives."""
        space, known = self.preview.space, self.preview.config.typing.known_types
        clicked = [kind.name for kind in self.clicked]
        more = space.class_names if space is not None and known else ()
        return [UNASSIGNED, *clicked, *(name for name in more if name not in clicked)]

    def _as_shown(self, names: Sequence[str], codes: NDArray[np.int32]) -> NDArray[np.int32]:
        """Codes of a typing as places in ``names`` of the page; what is not there is unassigned."""
        place = {name: k for k, name in enumerate(self.names)}
        return np.array([place.get(name, 0) for name in names], np.int32)[codes]

    def types(self, box: Box4) -> bytes:
        """Types of the cells in a box, little endian: uint32 n, total, whole; uint32 rows[n]; uint8 codes, scores, margins [n] of 255."""
        typed = self.typed(self.store.rows_in(box))
        head = np.array([len(typed.rows), typed.total, typed.whole], "<u4")
        shares = (np.round(np.clip(part, 0, 1) * 255).astype("u1") for part in (typed.scores, typed.margins))
        parts = (typed.rows.astype("<u4"), typed.codes.astype("u1"), *shares)
        return head.tobytes() + b"".join(part.tobytes() for part in parts)

    def density(self, box: Box4, columns: int, lines: int, min_score: float, min_margin: float) -> bytes:
        """Cells per type on squares of a box, little endian: uint32 types, lines, columns, whole; uint32 counts."""
        rows = self.store.rows_in(box)
        if self.is_preview:
            typed = self.typed(rows)
        else:
            typing = self.store.typing
            codes = self._as_shown(typing.names, typing.codes[rows])
            typed = TypedRows(rows, codes, typing.scores[rows], typing.margins[rows], whole=True, total=len(rows))
        kept = (typed.scores >= min_score) & (typed.margins >= min_margin) | (typed.codes == 0)
        counts = self.store.counts(box, columns, lines, typed.codes[kept], typed.rows[kept])
        head = np.array([*counts.shape, typed.whole], "<u4")
        share = typed.total / max(len(typed.rows), 1)
        return head.tobytes() + np.round(counts * share).astype("<u4").tobytes()

    def counts(self) -> dict[str, Any]:
        """Cells of the slide by type: counted, or estimated from a sample; and what the typing warns of."""
        typed, warnings = self.sample()
        share = typed.total / max(len(typed.rows), 1)
        numbers = np.round(np.bincount(typed.codes, minlength=len(self.names)) * share).astype(int).tolist()
        return {
            "counts": dict(zip(self.names, numbers, strict=False)),
            "cells": len(self.store),
            "whole": typed.whole,
            "warnings": list(warnings),
        }
