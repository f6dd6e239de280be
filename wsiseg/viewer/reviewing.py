"""Review: the cells whose type is least certain, each with a place at which a click means it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import shapely

if TYPE_CHECKING:
    from collections.abc import Iterable

    from wsiseg.viewer.session import Point
    from wsiseg.viewer.shown import Shown

REVIEWED_AT_ONCE = 20  #: cells that are sent in one answer


def least_certain(shown: Shown, only: str | None, seen: Iterable[Point]) -> dict[str, Any]:
    """The cells with the lowest margins, without those clicked or seen already.

    Parameters
    ----------
    shown
        The cells and their types.
    only
        Cells of this type; ``None``: of any type but ``unassigned``.
    seen
        Prompts of cells that were reviewed, level-0 px.
    """
    store, preview, names = shown.store, shown.preview, shown.names
    typed, _ = shown.sample()
    wanted = typed.codes > 0 if only is None else typed.codes == (names.index(only) if only in names else -1)
    done = {preview.row(p) for kind in shown.palette for p in (*kind.points, *kind.negative)}
    before = set(seen)
    found: list[dict[str, Any]] = []
    for k in np.flatnonzero(wanted)[np.argsort(typed.margins[wanted], kind="stable")].tolist():
        row = int(typed.rows[k])
        x, y = store.points_xy[row].tolist()
        if row in done or (round(x, 2), round(y, 2)) in before:
            continue
        outline = store.polygons(np.array([row]))[0]
        point = _point_for(shown, row, outline)
        if point is None:
            continue
        found.append(
            {
                "row": row,
                "point": list(point),
                "centre": store.centres[row].tolist(),
                "kind": int(typed.codes[k]),
                "score": round(float(typed.scores[k]), 3),
                "margin": round(float(typed.margins[k]), 3),
                "ring": np.round(shapely.get_coordinates(outline.exterior), 2).tolist(),
            }
        )
        if len(found) == REVIEWED_AT_ONCE:
            break
    return {"version": store.version, "cells": found, "left": int(wanted.sum())}


def _point_for(shown: Shown, row: int, outline: shapely.Polygon) -> Point | None:
    """A place at which a click means this cell; ``None`` where it lies under a smaller one."""
    store, inside = shown.store, shapely.point_on_surface(outline)
    for x, y in (store.points_xy[row], store.centres[row], (inside.x, inside.y)):
        point = round(float(x), 2), round(float(y), 2)
        if shown.preview.row(point) == row:
            return point
    return None
