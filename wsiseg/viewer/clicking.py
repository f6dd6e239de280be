"""What a click on the page changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from wsiseg.errors import SeedsError
from wsiseg.seeds.matching import describe_nearest
from wsiseg.viewer.session import SIDES, point_of

if TYPE_CHECKING:
    from wsiseg.records import CellIndex
    from wsiseg.viewer.shown import Shown


def click_change(shown: Shown, request: dict[str, Any]) -> dict[str, Any]:
    """The change (session.py) that a click makes: a cell has one type, so a click on it for another takes the first back.

    Parameters
    ----------
    shown
        The cells and the palette.
    request
        ``type``, ``point``; ``negative`` for a click against the type, ``seen`` for a cell under review.

    Raises
    ------
    SeedsError
        There is no such type, no cell at the place, or the cell is clicked so already.
    """
    store, preview = shown.store, shown.preview
    name, side = request.get("type"), "negative" if request.get("negative") else "points"
    if not any(kind.name == name for kind in shown.palette):
        raise SeedsError(f"page: type {str(name)[:40]!r} is unknown; choose one of the palette")
    point = point_of(request.get("point"))
    row = preview.row(point)
    if row < 0:
        where = f"no cell at [{point[0]:g}, {point[1]:g}]"
        near = f"; {describe_nearest(point, cast('CellIndex', store), store.mpp)}" if len(store) else ""
        raise SeedsError(f"{where}{near}; click on a nucleus that is outlined")
    drop = []
    for kind in shown.palette:
        for held in SIDES:
            if kind.name != name and "negative" in (side, held):
                continue  # a cell may be clicked as one type and against others
            drop += [[kind.name, held, list(p)] for p in getattr(kind, held) if preview.row(p) == row]
    if drop and all(d[0] == name and d[1] == side for d in drop):
        raise SeedsError(f"this cell is clicked already {'against' if side == 'negative' else 'as'} {name}")
    seen = [store.points_xy[row].tolist()] if request.get("seen") else []
    return {"kind": "click", "add": [[name, side, list(point)]], "drop": drop, "seen": seen}
