"""Blocks in view, segmented while somebody looks at them: into the folder of the run, so that `wsiseg run` finds them done.

One thread works on one block after the other, the nearest to the middle of the view first; claims keep it from blocks that another process works
on. What is there is stitched again after each tile, or where that takes long after some tiles: the parts on disk, and the tiles of the block in
progress, which are in memory only until their block is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wsiseg.errors import InterruptedRunError, WsisegError
from wsiseg.records import Typing
from wsiseg.report.page import write_report
from wsiseg.runs.folder import choose_folder, claim_folder, drop_stale_files
from wsiseg.runs.inputs import read_inputs
from wsiseg.runs.manifest import Manifest
from wsiseg.runs.plan import plan_run
from wsiseg.runs.plan_file import keep_plan
from wsiseg.runs.scheduling import recorded_interruption
from wsiseg.runs.slide import segment_slide
from wsiseg.runtime.text import first_line
from wsiseg.segmentation.blocks import finished_block, segment_blocks
from wsiseg.stitching.stitch import stitch
from wsiseg.viewer.cells import CellStore, stitched_store, table_version
from wsiseg.viewer.preview import Preview

if TYPE_CHECKING:
    from pathlib import Path

    from wsiseg.config import RunConfig
    from wsiseg.records import Block, Cells
    from wsiseg.runs.folder import RunFolder
    from wsiseg.runs.plan import PreparedRun
    from wsiseg.slide import SlideReader
    from wsiseg.viewer.cells import Box4

logger = logging.getLogger(__name__)

_POLL_S = 1.0  #: between looks at a block that another process works on
_STITCH_SHARE = 4  #: tiles are stitched at most in one part of so many of the time


@dataclass(frozen=True)
class _Place:
    """A block and where its tiles lie, level-0 px."""

    block: Block
    box: Box4


class OnDemand:
    """The run of a slide, block by block as it is looked at.

    Parameters
    ----------
    slide, config, out
        As for :func:`wsiseg.runs.slide.segment_slide`; without clicks: those of the page type the cells afterwards.

    Raises
    ------
    WsisegError
        The slide cannot be used, or its folder holds another run.
    """

    def __init__(self, slide: str, config: RunConfig, out: Path) -> None:
        self.slide, self.config, self.out = slide, config, out
        inputs = read_inputs(slide, config)
        try:
            folder = choose_folder(out, inputs)
            run = plan_run(inputs, folder.parts)
            self.folder: RunFolder = claim_folder(out, Manifest.of(run.plan), overwrite=False)
            self.run: PreparedRun = run.at(self.folder.parts)
            drop_stale_files(self.folder, set(run.plan.tiles))
            keep_plan(self.folder.parts, self.run.plan, self.run.given)
        except BaseException:
            inputs.reader.close()
            raise
        self.warnings = list(run.plan.warnings)
        scale = self.run.context.spec.lattice.scale
        self._places = [_Place(block, _box(block, scale)) for block in self.run.blocks]
        self._done: set[str] = {
            p.block.name for p in self._places if finished_block(self.run.context.spec, p.block, failed=True)
        }
        self._failures: list[str] = []
        self._queue: list[_Place] = []
        self._now, self._each = "", 0
        self._all = False
        self._tiles = (0, 0)
        self._early: list[Cells] = []  # of the tiles of the block in progress
        self._stitched_at, self._stitch_s = 0.0, 0.0
        self._store: CellStore | None = None
        self._stop, self._wake = threading.Event(), threading.Condition()
        self.run.context.claims.start()
        self._thread = threading.Thread(target=self._work, name="wsiseg-segment", daemon=True)
        self._thread.start()

    @property
    def reader(self) -> SlideReader:
        """The open slide, as the network sees it."""
        return self.run.context.reader

    def look_at(self, box: Box4) -> None:
        """Segment the blocks of a view next, those in its middle first; what was asked for before and is out of view is dropped."""
        x0, y0, x1, y1 = box
        middle = ((x0 + x1) / 2, (y0 + y1) / 2)
        inside = [p for p in self._places if p.box[0] < x1 and p.box[2] > x0 and p.box[1] < y1 and p.box[3] > y0]
        inside.sort(key=lambda p: (_middle(p.box)[0] - middle[0]) ** 2 + (_middle(p.box)[1] - middle[1]) ** 2)
        with self._wake:
            self._queue = [p for p in inside if p.block.name not in self._done]
            self._wake.notify()

    def finish_all(self) -> None:
        """Segment the rest of the slide and write the files, as ``wsiseg run`` does."""
        with self._wake:
            self._all = True
            self._wake.notify()

    def progress(self) -> dict[str, Any]:
        """What is done, what is in progress, and what went wrong."""
        return {
            "blocks": len(self._places),
            "done": len(self._done),
            "now": self._now,
            "early": len(self._early),
            "each": self._each,
            "waiting": len(self._queue),
            "all": self._all,
            "tiles": list(self._tiles),
            "failures": self._failures[-3:],
            "open": [[round(edge) for edge in p.box] for p in self._places if p.block.name not in self._done][:400],
        }

    def store(self) -> CellStore | None:
        """The cells of the blocks that are done; ``None`` before the first."""
        return self._store

    def preview(self, store: CellStore) -> Preview:
        """Typing of these cells."""
        return Preview(store, self.run.context.model.types, self.run.plan.config)

    def close(self) -> None:
        """Stop after the current block; the manifest then says that the run was interrupted."""
        if self._stop.is_set():
            return
        self._stop.set()
        with self._wake:
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        context = self.run.context
        with (
            contextlib.suppress(InterruptedRunError),
            recorded_interruption(self.folder, self.run.plan, context.claims),
        ):
            raise InterruptedRunError(f"{self.folder.path}: the click page was closed")
        context.claims.close()

    def _work(self) -> None:
        if self._done:
            self._stitch()
        while not self._stop.is_set():
            with self._wake:
                self._wake.wait_for(lambda: self._stop.is_set() or self._queue or self._all, timeout=None)
                if self._stop.is_set():
                    return
                place = self._queue.pop(0) if self._queue and not self._all else None
            try:
                if place is None:
                    self._finish()
                    return
                self._segment(place)
            except Exception as error:  # the page says it, and the next view is tried
                self._failures.append(first_line(error))
                self._all = False
                logger.warning("%s: %s", self.slide, error, exc_info=not isinstance(error, WsisegError))

    def _segment(self, place: _Place) -> None:
        block = place.block
        context = self.run.context
        if context.claims.busy([block.name]):  # another process is at it: see later whether it has finished
            with self._wake:
                self._queue.append(place)
            self._stop.wait(_POLL_S)
            return
        self._now, self._each = block.name, len(block.tiles)
        try:
            for report in segment_blocks(context, [block], self._stop.is_set, self._take_tile):
                self._done.add(report.name)
                self._failures += report.failures
            self._early = []
            self._stitch()
        finally:
            self._now, self._early = "", []

    def _take_tile(self, cells: Cells) -> None:
        """Show a tile before its block is done."""
        self._early.append(cells)
        self._stitch_soon()

    def _stitch_soon(self) -> None:
        """Stitch, if that has not just been done: the work that is going on waits meanwhile."""
        if time.monotonic() - self._stitched_at > (_STITCH_SHARE - 1) * self._stitch_s:
            with contextlib.suppress(WsisegError):  # said when all is stitched; the work in progress goes first
                self._stitch()

    def _stitch(self) -> None:
        """Stitch the parts and the tiles that are there."""
        started, plan, early = time.monotonic(), self.run.plan, [cells for cells in self._early if len(cells)]
        parts = [self.folder.parts / f"{p.block.name}.parquet" for p in self._places if p.block.name in self._done]
        minimum = plan.config.masks.min_area_um2 / plan.info.mpp**2
        cells, _ = stitch(
            [*parts, *early], plan.info.size_px0, minimum, plan.config.stitching, descriptor_size=plan.descriptor_size
        )
        named = [*(table_version(part) for part in parts), self._now, str(len(early))]
        version = hashlib.sha256(" ".join(named).encode()).hexdigest()[:16]
        self._store = stitched_store(cells, Typing.untyped(len(cells)), version, plan.info.size_px0, plan.info.mpp)
        self._stitched_at = time.monotonic()
        self._stitch_s = self._stitched_at - started

    def _finish(self) -> None:
        """The rest of the run, as a call of its own on the same folder."""

        def show(done: int, total: int, _: int) -> None:
            self._tiles = (done, total)
            waiting = [p.block for p in self._places if p.block.name not in self._done]
            fresh = {block.name for block in waiting if finished_block(self.run.context.spec, block)}
            self._done |= fresh
            if fresh:
                self._stitch_soon()

        try:
            with contextlib.suppress(InterruptedRunError):
                segment_slide(self.slide, self.config, self.out, on_progress=show, stopped=self._stop.is_set)
                write_report(self.folder.path)
        finally:
            self._all = False


def _box(block: Block, scale: float) -> Box4:
    """The box of a block's cores, level-0 px."""
    cores = [tile.core for tile in block.tiles]
    x0, y0 = min(c.x0 for c in cores), min(c.y0 for c in cores)
    x1, y1 = max(c.x1 for c in cores), max(c.y1 for c in cores)
    return x0 * scale, y0 * scale, x1 * scale, y1 * scale


def _middle(box: Box4) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
