"""What the page of one slide shows and does: its cells, its clicks, saving, applying. The server (server.py) only passes requests on."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import shapely

from wsiseg.config import CHAINED, from_mapping
from wsiseg.errors import RunError, SeedsError, WsisegError
from wsiseg.formats import FILE_NAMES
from wsiseg.formats.regions import regions_geojson
from wsiseg.formats.seed_rules import PALETTE, file_name
from wsiseg.formats.seeds import check_seeds, read_seeds
from wsiseg.models import load_types
from wsiseg.records import UNASSIGNED, SeedType
from wsiseg.runs.manifest import FINISHED, Status
from wsiseg.runtime.atomic import atomic_path
from wsiseg.runtime.claims import Claims
from wsiseg.seeds.matching import describe_nearest
from wsiseg.viewer.applying import Applying, is_typed_with, typed_hash
from wsiseg.viewer.cells import CellStore, stored_cells, table_version
from wsiseg.viewer.preview import VIEW_CELLS, Preview, TypedRows, thinned
from wsiseg.viewer.session import PageState, Point, Session, palette_change, point_of
from wsiseg.viewer.tiles import TILE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from wsiseg.records import CellIndex
    from wsiseg.runs.folder import RunFolder
    from wsiseg.runs.manifest import Manifest
    from wsiseg.slide import SlideReader
    from wsiseg.viewer.cells import Box4
    from wsiseg.viewer.segmenting import OnDemand
    from wsiseg.viewer.tiles import SlideTiles

logger = logging.getLogger(__name__)

SESSION_NAME, SEEDS_NAME, REGIONS_NAME = "view.json", "seeds.json", "regions.geojson"
CLAIM = "view"  #: the claim of a page on the folder of its run: two pages would write one session
FIRST_TYPES = ("tumour", "immune", "stroma")  #: of a page without any: names to begin with, to be renamed
REVIEWED_AT_ONCE = 20  #: cells that are sent for review in one answer
_GREY = "#808080"


class SlidePage:
    """One slide, the folder of its run, and what was clicked. Methods may be called from several threads.

    Parameters
    ----------
    reader, tiles
        The open slide.
    folder
        Of the run; everything that is written is written there.
    on_demand
        Segments the blocks in view while the run is not finished; ``None`` for a finished run.
    seeds
        Clicks to begin with, in place of those of the session.

    Raises
    ------
    WsisegError
        Another page is open on the folder, or a file of it is damaged.
    """

    def __init__(
        self,
        reader: SlideReader,
        tiles: SlideTiles,
        folder: RunFolder,
        *,
        on_demand: OnDemand | None = None,
        seeds: Path | None = None,
    ) -> None:
        self.reader, self.tiles, self.folder, self.on_demand = reader, tiles, folder, on_demand
        self.slide = file_name(reader.info.path)
        self._lock, self._refreshing = threading.RLock(), threading.Lock()
        self._store: CellStore | None = None
        self._preview: Preview | None = None
        self._read_manifest: tuple[str, Manifest | None] = ("", None)
        self._has_table = False  # the cells are those of a finished run
        self._applied: set[str] = set()
        self.applying = Applying(Path(reader.info.path), self.refresh)
        self.notices: list[str] = []
        self._claims = Claims(folder.parts)
        self._claim()
        try:
            self.refresh()
            self.session = self._open_session(seeds)
        except BaseException:
            self.close()
            raise

    # --- opening and closing ------------------------------------------------------------------------------------------------------

    def _claim(self) -> None:
        self._claims.start()
        if not self._claims.take(CLAIM):
            holder = self._claims.holder(CLAIM) or "another process"
            self._claims.close()
            raise RunError(
                f"{self.folder.path}: is open on another click page ({holder}); use that one, or stop it with Ctrl-C there"
            )

    def _open_session(self, seeds: Path | None) -> Session:
        path = self.folder.path / SESSION_NAME
        session = Session.open(path, self.slide)
        if session is None:
            session = Session(path, self.slide)
            session.change(palette_change(self._types_of_run()))
        if seeds is not None:
            given, warnings = check_seeds(read_seeds(seeds), self.reader.info)
            self.notices += warnings
            if given.types != tuple(kind for kind in session.state.types if kind.points):
                session.change(palette_change(given.types))
        return session

    def _types_of_run(self) -> Sequence[SeedType]:
        """The types to begin with: with the run's clicks if their file is still what the run was typed with, else only its names."""
        manifest = self.folder.manifest()
        if manifest is not None and manifest.seeds:
            with contextlib.suppress(WsisegError, OSError):
                found, _ = check_seeds(read_seeds(Path(manifest.seeds)), self.reader.info)
                if all(is_typed_with(kind, manifest) for kind in found.types):
                    self._applied.add(PageState(found.types).text(self.slide))
                    return found.types
        names = (
            []
            if self._store is None
            else list(zip(self._store.typing.names, self._store.typing.colors, strict=True))[1:]
        )
        if names:
            return [SeedType(name, color) for name, color in names]
        return [SeedType(name, color) for name, color in zip(FIRST_TYPES, PALETTE, strict=False)]

    def close(self) -> None:
        """Stop the work in the background and give the folder back. The session is on disk already."""
        if self.on_demand is not None:
            self.on_demand.close()
        self._claims.close()
        self.reader.close()

    # --- the cells ----------------------------------------------------------------------------------------------------------------

    def refresh(self, *, wait: bool = True) -> None:
        """Take the cells of the folder as they are now: another process may have finished, typed or replaced the run.

        Requests are answered from the cells before while a table is read. Without ``wait``, nothing is done if another thread is reading.
        """
        if not self._refreshing.acquire(blocking=wait):
            return
        try:
            table = self.folder.path / FILE_NAMES["parquet"]
            version = table_version(table)
            if self.on_demand is not None and not (version and self._is_finished()):
                store = self.on_demand.store()
                if store is not None and store is not self._store:
                    self._take(store, self.on_demand.preview(store))
                return
            manifest = self._manifest()
            if not version or manifest is None or (self._store is not None and self._store.version == version):
                return
            config = from_mapping(manifest.config, str(self.folder.manifest_path))
            info = self.reader.info
            store = stored_cells(table, info.size_px0, info.mpp)
            self._take(store, Preview(store, load_types(config.model), config))
            self._has_table = True
            if self.on_demand is not None:  # the run has come to its end, here or in another process
                self.on_demand.close()
        finally:
            self._refreshing.release()

    def _take(self, store: CellStore, preview: Preview) -> None:
        with self._lock:
            self._store, self._preview = store, preview

    def _manifest(self) -> Manifest | None:
        """The manifest, read again when its file is another."""
        version = table_version(self.folder.manifest_path)
        if not version or self._read_manifest[0] != version:
            self._read_manifest = version, self.folder.manifest()
        return self._read_manifest[1]

    def _is_finished(self) -> bool:
        manifest = self._manifest()
        return manifest is not None and (manifest.status in FINISHED or manifest.status == Status.RETYPING)

    @property
    def kinds(self) -> list[dict[str, str]]:
        """Names and colours of the codes that the page gets: unassigned, the palette, and other types of the run."""
        known = [{"name": kind.name, "color": "#" + bytes(kind.color).hex()} for kind in self.session.state.types]
        listed = {kind["name"] for kind in known}
        typing = self._store.typing if self._store is not None else None
        extra = [
            {"name": name, "color": "#" + bytes(color).hex()}
            for name, color in (zip(typing.names, typing.colors, strict=True) if typing else ())
            if name not in listed and name != UNASSIGNED
        ]
        return [{"name": UNASSIGNED, "color": _GREY}, *known, *extra]

    def _as_kinds(self, names: Sequence[str], codes: NDArray[np.int32]) -> NDArray[np.int32]:
        """Codes of a typing as places in ``kinds``; what is not there is unassigned."""
        place = {kind["name"]: k for k, kind in enumerate(self.kinds)}
        return np.array([place.get(name, 0) for name in names], np.int32)[codes]

    def _clicked(self) -> tuple[SeedType, ...]:
        seeds = self.session.state.seeds(self.slide)
        return () if seeds is None else seeds.types

    @property
    def is_applied(self) -> bool:
        """The run's table has the types of these clicks; also when there are none to apply."""
        text = self.session.state.text(self.slide)
        if not text or text in self._applied:
            return self.on_demand is None or self._has_table or not text
        manifest = self._manifest()
        current = self._store is not None and self._store.version == table_version(
            self.folder.path / FILE_NAMES["parquet"]
        )
        if manifest is None or not manifest.retyped or not current:  # the new table is being read
            return False
        return manifest.run_hash == typed_hash(text, json.dumps(manifest.config, sort_keys=True), manifest.parts_hash)

    def _typed(self, rows: NDArray[np.intp], types: tuple[SeedType, ...]) -> TypedRows:
        """Types of cells as the page should show them: of the table, or under the clicks; codes are places in ``kinds``."""
        store, preview = self._cells()
        if types and not self.is_applied:
            found = preview.view(types, rows)
            return replace(found, codes=self._as_kinds(self._names(types), found.codes))
        total = len(rows)
        rows = thinned(rows, max(VIEW_CELLS, 1)) if total > VIEW_CELLS else rows
        typing = store.typing
        codes = self._as_kinds(typing.names, typing.codes[rows])
        return TypedRows(rows, codes, typing.scores[rows], typing.margins[rows], whole=True, total=total)

    def _names(self, types: tuple[SeedType, ...]) -> list[str]:
        """Names of the codes that a preview gives."""
        _, preview = self._cells()
        more = preview.space.class_names if preview.space is not None and preview.config.typing.known_types else ()
        clicked = [kind.name for kind in types]
        return [UNASSIGNED, *clicked, *(name for name in more if name not in clicked)]

    def _cells(self) -> tuple[CellStore, Preview]:
        with self._lock:
            if self._store is None or self._preview is None:
                raise RunError("no cells are outlined here yet; wait for the first block, or zoom in on tissue")
            return self._store, self._preview

    def outlines(self, version: str, column: int, row: int) -> bytes:
        """Outlines of a square of the cells called ``version`` (:meth:`CellStore.outlines`).

        Raises
        ------
        LookupError
            The page shows other cells by now.
        """
        store, _ = self._cells()
        if store.version != version:
            raise LookupError("other cells are shown by now")
        return store.outlines(column, row)

    def types(self, box: Box4) -> bytes:
        """Types of the cells in a box, little endian: uint32 n, total, whole; uint32 rows[n]; uint8 codes, scores, margins [n] of 255."""
        store, _ = self._cells()
        typed = self._typed(store.rows_in(box), self._clicked())
        head = np.array([len(typed.rows), typed.total, typed.whole], "<u4")
        shares = (np.round(np.clip(part, 0, 1) * 255).astype("u1") for part in (typed.scores, typed.margins))
        parts = (typed.rows.astype("<u4"), typed.codes.astype("u1"), *shares)
        return head.tobytes() + b"".join(part.tobytes() for part in parts)

    def density(self, box: Box4, columns: int, lines: int, min_score: float, min_margin: float) -> bytes:
        """Cells per type on squares of a box, little endian: uint32 types, lines, columns, whole; uint32 counts."""
        store, preview = self._cells()
        rows, types = store.rows_in(box), self._clicked()
        if types and not self.is_applied:
            found = preview.view(types, rows)
            codes, scores, margins = self._as_kinds(self._names(types), found.codes), found.scores, found.margins
            share, rows, whole = len(rows) / max(len(found.rows), 1), found.rows, found.whole
        else:
            typing, share, whole = store.typing, 1.0, True
            codes, scores, margins = (
                self._as_kinds(typing.names, typing.codes[rows]),
                typing.scores[rows],
                typing.margins[rows],
            )
        kept = (scores >= min_score) & (margins >= min_margin) | (codes == 0)
        counts = store.counts(box, columns, lines, codes[kept], rows[kept])
        head = np.array([*counts.shape, whole], "<u4")
        return head.tobytes() + np.round(counts * share).astype("<u4").tobytes()

    def counts(self) -> dict[str, Any]:
        """Cells of the slide by type: counted, or estimated from a sample; and what the typing warns of."""
        store, preview = self._cells()
        types = self._clicked()
        names = [kind["name"] for kind in self.kinds]
        warnings: list[str] = []
        if types and not self.is_applied:
            found, said = preview.sample(types)
            codes, whole, warnings = self._as_kinds(self._names(types), found.codes), found.whole, list(said)
            share = len(store) / max(len(found.rows), 1)
        else:
            codes, whole, share = self._as_kinds(store.typing.names, store.typing.codes), True, 1.0
            manifest = self._manifest()
            if types and manifest is not None:
                warnings = [str(warning) for warning in manifest.typing.get("warnings", [])]
        numbers = np.round(np.bincount(codes, minlength=len(names)) * share).astype(int).tolist()
        unclicked = [kind.name for kind in self.session.state.types if not kind.points]
        if types and unclicked:
            warnings.append(f"no cell is clicked as {', '.join(unclicked)}: such types are left out of seeds.json")
        return {
            "counts": dict(zip(names, numbers, strict=False)),
            "cells": len(store),
            "whole": whole,
            "warnings": warnings,
        }

    # --- changes ------------------------------------------------------------------------------------------------------------------

    def do(self, request: dict[str, Any]) -> dict[str, Any]:
        """Carry out one change that the page asks for, and return what holds then.

        Raises
        ------
        SeedsError
            It cannot be done; nothing has changed.
        """
        kind = request.get("kind")
        with self._lock:
            if kind == "click":
                self.session.change(self._click(request))
            elif kind == "unclick":
                drop = [[str(request.get("type")), str(request.get("side")), list(point_of(request.get("point")))]]
                self.session.change({"kind": "click", "add": [], "drop": drop, "seen": []})
            elif kind == "seen":
                point = self._cells()[0].points_xy[self._row_of(request)].tolist()
                self.session.change({"kind": "click", "add": [], "drop": [], "seen": [point]})
            elif kind in ("type", "region"):
                self.session.change(
                    {key: request[key] for key in ("kind", "old", "new", "add", "drop") if key in request}
                )
            elif kind == "undo":
                self.session.undo()
            elif kind == "redo":
                self.session.redo()
            else:
                raise SeedsError(f"page: unknown kind of change {str(kind)[:40]!r}; reload the page")
            return self.state()

    def _row_of(self, request: dict[str, Any]) -> int:
        store, _ = self._cells()
        row = request.get("row")
        if not isinstance(row, int) or not 0 <= row < len(store) or request.get("version") != store.version:
            raise SeedsError("page: other cells are shown by now; look again and repeat")
        return row

    def _click(self, request: dict[str, Any]) -> dict[str, Any]:
        """The change that a click makes: a cell has one type, so a click on it for another takes the first back."""
        store, preview = self._cells()
        name, side = request.get("type"), "negative" if request.get("negative") else "points"
        if not any(kind.name == name for kind in self.session.state.types):
            raise SeedsError(f"page: type {str(name)[:40]!r} is unknown; choose one of the palette")
        point = point_of(request.get("point"))
        row = preview.row(point)
        if row < 0:
            where = f"no cell at [{point[0]:g}, {point[1]:g}]"
            near = f"; {describe_nearest(point, cast('CellIndex', store), store.mpp)}" if len(store) else ""
            raise SeedsError(f"{where}{near}; click on a nucleus that is outlined")
        drop = []
        for kind in self.session.state.types:
            for held in ("points", "negative"):
                if (side == "points" and held == "negative" and kind.name != name) or (
                    side == "negative" and kind.name != name
                ):
                    continue
                drop += [[kind.name, held, list(p)] for p in getattr(kind, held) if preview.row(p) == row]
        if drop and all(d[0] == name and d[1] == side for d in drop):
            raise SeedsError(f"this cell is clicked already {'against' if side == 'negative' else 'as'} {name}")
        seen = [store.points_xy[row].tolist()] if request.get("seen") else []
        return {"kind": "click", "add": [[name, side, list(point)]], "drop": drop, "seen": seen}

    # --- what holds ---------------------------------------------------------------------------------------------------------------

    def about(self) -> dict[str, Any]:
        """What does not change: the slide."""
        info = self.reader.info
        return {
            "slide": self.slide,
            "folder": str(self.folder.path),
            "size": list(info.size_px0),
            "mpp": info.mpp,
            "tile": TILE,
            "zooms": self.tiles.zooms,
            "viewCells": VIEW_CELLS,
            "bounds": list(info.bounds) if info.bounds else None,
        }

    def state(self) -> dict[str, Any]:
        """What may change."""
        with self._lock:
            state, store = self.session.state, self._store
            return {
                "revision": self.session.revision,
                "canUndo": self.session.done > 1,
                "canRedo": self.session.done < len(self.session.changes),
                "types": palette_change(state.types)["types"],
                "kinds": self.kinds,
                "regions": [[list(point) for point in ring] for ring in state.regions],
                "seen": len(state.seen),
                "cells": None
                if store is None
                else {"version": store.version, "count": len(store), "grid": list(store.grid)},
                "reach": 0 if self._preview is None else self._preview.reach_px0,
                "applied": self.is_applied,
                "applying": self.applying.running,
                "applyError": self.applying.error,
                "cannotApply": self._cannot_apply(),
                "notices": self.notices,
                "picture": self.tiles.version,
                "segmenting": None if self.on_demand is None or self._has_table else self.on_demand.progress(),
            }

    def _cannot_apply(self) -> str:
        """Why the clicks cannot be applied now; empty when they can."""
        manifest = self._manifest()
        if manifest is None or not self._is_finished():
            return "the slide is not segmented to its end yet"
        method = manifest.config.get("method")
        if method in CHAINED:
            return f"this run has only cells that looked like its own clicks (--method {method})"
        return ""

    def review(self, only: str | None) -> dict[str, Any]:
        """The cells whose type is least certain: lowest margin first, without those clicked or seen already.

        Parameters
        ----------
        only
            Cells of this type; ``None``: of any type but ``unassigned``.
        """
        store, preview = self._cells()
        types, names = self._clicked(), [kind["name"] for kind in self.kinds]
        if types and not self.is_applied:
            typed, _ = preview.sample(types)
            codes, rows, margins, scores = (
                self._as_kinds(self._names(types), typed.codes),
                typed.rows,
                typed.margins,
                typed.scores,
            )
        else:
            typing = store.typing
            rows = np.arange(len(store))
            codes, margins, scores = self._as_kinds(typing.names, typing.codes), typing.margins, typing.scores
        wanted = codes > 0 if only is None else codes == (names.index(only) if only in names else -1)
        done = {preview.row(p) for kind in self.session.state.types for p in (*kind.points, *kind.negative)}
        seen = set(self.session.state.seen)
        found = []
        for k in np.flatnonzero(wanted)[np.argsort(margins[wanted], kind="stable")].tolist():
            row = int(rows[k])
            x, y = store.points_xy[row].tolist()
            if row in done or (round(x, 2), round(y, 2)) in seen:
                continue
            outline = store.polygons(np.array([row]))[0]
            point = self._point_for(row, outline)
            if point is None:
                continue
            ring = shapely.get_coordinates(outline.exterior)
            found.append(
                {
                    "row": row,
                    "point": list(point),
                    "centre": store.centres[row].tolist(),
                    "kind": int(codes[k]),
                    "score": round(float(scores[k]), 3),
                    "margin": round(float(margins[k]), 3),
                    "ring": np.round(ring, 2).tolist(),
                }
            )
            if len(found) == REVIEWED_AT_ONCE:
                break
        return {"version": store.version, "cells": found, "left": int(wanted.sum())}

    def _point_for(self, row: int, outline: shapely.Polygon) -> Point | None:
        """A place at which a click means this cell; ``None`` where it lies under a smaller one."""
        store, preview = self._cells()
        inside = shapely.point_on_surface(outline)
        for x, y in (store.points_xy[row], store.centres[row], (inside.x, inside.y)):
            point = round(float(x), 2), round(float(y), 2)
            if preview.row(point) == row:
                return point
        return None

    # --- files --------------------------------------------------------------------------------------------------------------------

    def seeds_text(self) -> str:
        """The content of seeds.json.

        Raises
        ------
        SeedsError
            Nothing is clicked.
        """
        text = self.session.state.text(self.slide)
        if not text:
            raise SeedsError("nothing is clicked yet; click one cell of each type first")
        return text

    def regions_text(self) -> str:
        """The drawn regions as GeoJSON for ``--roi`` and QuPath: relative to the slide's bounds, as QuPath counts.

        Raises
        ------
        SeedsError
            None is drawn.
        """
        rings = self.session.state.regions
        if not rings:
            raise SeedsError("no region is drawn yet; draw one first")
        return regions_geojson(rings, self.reader.info)

    def save(self) -> list[str]:
        """Write seeds.json, and the regions if there are any, into the folder of the run; paths of the files written."""
        texts = (
            {SEEDS_NAME: self.seeds_text()}
            if self.session.state.text(self.slide) or not self.session.state.regions
            else {}
        )
        if self.session.state.regions:
            texts[REGIONS_NAME] = self.regions_text()
        written = []
        for name, text in texts.items():
            path = self.folder.path / name
            with atomic_path(path) as partial:
                partial.write_text(text, encoding="utf-8")
            written.append(str(path))
        return written

    def apply(self) -> None:
        """Type the whole run with the clicks, in the background: what ``wsiseg type RUN --seeds RUN/seeds.json`` does.

        Raises
        ------
        WsisegError
            It cannot begin: nothing is clicked, or the run is not finished.
        """
        reason = self._cannot_apply()
        if reason:
            raise RunError(f"{self.folder.path}: {reason}; press Segment the rest, or use wsiseg run")
        with self._lock:
            if self.applying.running:
                raise RunError("the clicks are being applied; wait for the end")
            self.seeds_text()
            self.save()
            self.applying.start(self.folder.path, self.folder.path / SEEDS_NAME, len(self._cells()[0]))
