"""What the page of one slide shows and does: its cells, its clicks, saving, applying. The server (server.py) only passes requests on."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsiseg.config import CHAINED, from_mapping
from wsiseg.errors import RunError, SeedsError, WsisegError
from wsiseg.formats import FILE_NAMES
from wsiseg.formats.seed_rules import PALETTE, file_name
from wsiseg.formats.seeds import check_seeds, read_seeds
from wsiseg.models import load_types
from wsiseg.records import SeedType
from wsiseg.runs.manifest import FINISHED, Status
from wsiseg.runtime.claims import Claims
from wsiseg.viewer import saving
from wsiseg.viewer.applying import Applying, is_typed_with, typed_hash
from wsiseg.viewer.cells import CellStore, stored_cells, table_version
from wsiseg.viewer.clicking import click_change
from wsiseg.viewer.preview import VIEW_CELLS, Preview
from wsiseg.viewer.reviewing import least_certain
from wsiseg.viewer.session import PageState, Session, palette_change, point_of
from wsiseg.viewer.shown import Shown, kinds_of
from wsiseg.viewer.tiles import TILE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wsiseg.runs.folder import RunFolder
    from wsiseg.runs.manifest import Manifest
    from wsiseg.slide import SlideReader
    from wsiseg.viewer.cells import Box4
    from wsiseg.viewer.segmenting import OnDemand
    from wsiseg.viewer.tiles import SlideTiles

logger = logging.getLogger(__name__)

SESSION_NAME = "view.json"
CLAIM = "view"  #: the claim of a page on the folder of its run: two pages would write one session
FIRST_TYPES = ("tumour", "immune", "stroma")  #: of a page without any: names to begin with, to be renamed


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

    def _shown(self) -> Shown:
        """The cells as they are shown now.

        Raises
        ------
        RunError
            There are none yet.
        """
        store, preview = self._cells()
        return Shown(store, preview, self.session.state.types, self._clicked(), self.is_applied)

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
        """Types of the cells in a box (:meth:`Shown.types`)."""
        return self._shown().types(box)

    def density(self, box: Box4, columns: int, lines: int, min_score: float, min_margin: float) -> bytes:
        """Cells per type on squares of a box (:meth:`Shown.density`)."""
        return self._shown().density(box, columns, lines, min_score, min_margin)

    def counts(self) -> dict[str, Any]:
        """Cells of the slide by type (:meth:`Shown.counts`), and what there is to warn of."""
        shown, manifest = self._shown(), self._manifest()
        counts = shown.counts()
        if shown.clicked and not shown.is_preview and manifest is not None:
            counts["warnings"] += [str(warning) for warning in manifest.typing.get("warnings", [])]
        unclicked = [kind.name for kind in shown.palette if not kind.points]
        if shown.clicked and unclicked:
            counts["warnings"].append(
                f"no cell is clicked as {', '.join(unclicked)}: such types are left out of seeds.json"
            )
        return counts

    def review(self, only: str | None) -> dict[str, Any]:
        """The cells whose type is least certain (:func:`~wsiseg.viewer.reviewing.least_certain`)."""
        return least_certain(self._shown(), only, self.session.state.seen)

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
                self.session.change(click_change(self._shown(), request))
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
                "kinds": kinds_of(state.types, None if store is None else store.typing),
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

    # --- files --------------------------------------------------------------------------------------------------------------------

    def seeds_text(self) -> str:
        """The content of seeds.json (:func:`~wsiseg.viewer.saving.seeds_text`)."""
        return saving.seeds_text(self.session.state, self.slide)

    def regions_text(self) -> str:
        """The content of regions.geojson (:func:`~wsiseg.viewer.saving.regions_text`)."""
        return saving.regions_text(self.session.state, self.reader.info)

    def save(self) -> list[str]:
        """Write seeds.json and the regions into the folder of the run (:func:`~wsiseg.viewer.saving.save`)."""
        return saving.save(self.folder.path, self.session.state, self.slide, self.reader.info)

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
            self.applying.start(self.folder.path, self.folder.path / saving.SEEDS_NAME, len(self._cells()[0]))
