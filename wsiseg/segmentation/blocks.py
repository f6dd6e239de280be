"""Blocks of tiles -> part files, in one process: the steps of ``tile.py`` for many tiles, overlapping in time, with bounded queues between them.

::

    claim a block  ->  read its tiles  ->  encode       ->  find prompts  ->  decode       ->  trace    ->  write its part
    this thread        some threads        this thread      some threads      this thread      one to four  one

The device waits for nothing but pixels; the share of the time that it works is reported. Blocks that another process has claimed are left to it.
"""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from wsiseg.errors import FormatError, SlideError
from wsiseg.formats.parts import open_part, part_is_current, write_part
from wsiseg.records import Cells
from wsiseg.runtime import machine
from wsiseg.runtime.prefetch import prefetch_map
from wsiseg.runtime.profiling import peak_bytes
from wsiseg.segmentation.colours import measure_colours
from wsiseg.slide import read_region
from wsiseg.slide.stain import unrendered

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from wsiseg.records import Block, Tile, WindowMasks
    from wsiseg.segmentation.tile import EncodedTile
    from wsiseg.segmentation.worker import RunSpec, WorkerContext

BLOCK_COUNTS = ("tiles", "tiles_failed", "prompts", "larger_than_window", "outlines")
READERS = 4  #: threads that read; one core decodes 60 Mpx/s, a large GPU asks for 200


@dataclass(frozen=True)
class BlockReport:
    """Report of a block: counts and seconds, never cells.

    Attributes
    ----------
    counts, failures
        Counts of the block; a message per tile that could not be read.
    failed_px0
        The corners of those tiles' cores, level-0 px.
    seconds
        Per stage, since the report before.
    peak_bytes, peak_device_bytes
        Peak memory of the process so far.
    resumed
        The part was there already.
    process
        Process that did the block.
    """

    name: str
    counts: dict[str, int]
    failures: list[str]
    seconds: dict[str, float]
    peak_bytes: int = 0
    peak_device_bytes: int = 0
    resumed: bool = False
    process: str = ""
    failed_px0: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class _TileTask:
    """One tile of a block; ``failure`` says why it could not be read."""

    block: Block
    number: int
    failure: str = ""

    @property
    def tile(self) -> Tile:
        return self.block.tiles[self.number]


@dataclass(frozen=True)
class _TracedTile:
    """A tile's outlines."""

    task: _TileTask
    cells: Cells
    counts: dict[str, int]


def finished_block(spec: RunSpec, block: Block, *, failed: bool = False) -> BlockReport | None:
    """Report of a block whose part exists and is intact; one with tiles that could not be read only if ``failed``."""
    path = spec.parts / f"{block.name}.parquet"
    try:
        part = open_part(path) if part_is_current(path, spec.parts_hash) else None
    except FormatError:  # a good footer over damaged pages
        part = None
    if part is None or (part.counts["tiles_failed"] and not failed):
        return None
    return BlockReport(block.name, part.counts, part.failures, {}, resumed=True, failed_px0=tuple(part.failed_px0))


def segment_blocks(
    context: WorkerContext,
    blocks: Sequence[Block],
    stopped: Callable[[], bool],
    on_tile: Callable[[Cells], None] = lambda _: None,
) -> Iterator[BlockReport]:
    """Segment blocks.

    Parameters
    ----------
    context
        Context of this process.
    blocks
        In any order. A block whose part is there is reported and not repeated; one that another process works on is left out.
    stopped
        When it turns true, the current block is finished and no other is started.
    on_tile
        Called with the outlines of each tile as soon as they are traced, before those of its block are on disk.

    Yields
    ------
    BlockReport
        As soon as a block's part is on disk, or one block later.
    """
    pipeline = _BlockPipeline(context, stopped, on_tile)
    try:
        with closing(prefetch_map(pipeline.write, pipeline.finished(blocks), threads=1, limit=2)) as reports:
            yield from reports
    finally:
        for name in pipeline.taken:
            context.claims.release(name)


def tracers(device: torch.device) -> int:
    """Threads that trace outlines: on a CPU one, since the network needs the cores; beside a GPU one is not enough."""
    return 1 if device.type == "cpu" else min(READERS, machine.cores())


class _BlockPipeline:
    """The stages of one process, each fed by the one before. A tile that could not be read passes through them without pixels."""

    def __init__(self, context: WorkerContext, stopped: Callable[[], bool], on_tile: Callable[[Cells], None]) -> None:
        self.context, self.stopped, self.on_tile = context, stopped, on_tile
        self.segmenter = context.segmenter()
        self.clock, self.batch = self.segmenter.clock, self.segmenter.batch
        self.readers = min(READERS, machine.cores())
        self.tracers = tracers(context.model.device)
        self.taken: set[str] = set()
        self.resumed: list[BlockReport] = []
        self.pixels: dict[tuple[str, int], NDArray[np.uint8]] = {}  # of the tiles on their way, as the slide has them

    def finished(self, blocks: Sequence[Block]) -> Iterator[BlockReport | list[_TracedTile]]:
        """Blocks with all their tiles traced, and reports of those that were finished before."""
        if not blocks:
            return
        outer = blocks[0].tiles[0].outer
        limit = self.batch.read_ahead(outer.width * outer.height * 3) + self.readers
        read = prefetch_map(self.read, self.tasks(blocks), threads=self.readers, limit=limit)
        done: dict[str, list[_TracedTile]] = {}
        with (
            closing(read),
            closing(
                prefetch_map(self.trace, self.decoded(read), threads=self.tracers, limit=self.tracers + 2)
            ) as traced,
        ):  # before the slide is
            for tile in traced:
                finished_tiles = done.setdefault(tile.task.block.name, [])
                finished_tiles.append(tile)
                self.on_tile(tile.cells)
                if len(finished_tiles) == len(tile.task.block.tiles):
                    yield done.pop(tile.task.block.name)
                while self.resumed:
                    yield self.resumed.pop(0)
        yield from self.resumed

    def tasks(self, blocks: Sequence[Block]) -> Iterator[_TileTask]:
        """Tiles of the blocks that this process has claimed."""
        for block in blocks:
            if self.stopped():
                return
            report = finished_block(self.context.spec, block)
            if report:
                self.resumed.append(report)
            elif self.context.claims.take(block.name):
                self.taken.add(block.name)
                report = finished_block(self.context.spec, block)
                if report:  # by the process that held the claim
                    self.resumed.append(report)
                    continue
                yield from (_TileTask(block, number) for number in range(len(block.tiles)))

    def read(self, task: _TileTask) -> tuple[_TileTask, NDArray[np.uint8] | None]:
        """Pixels (H, W, 3) of a tile; a tile that cannot be read is tried twice."""
        with self.clock("read"):
            for last in (False, True):
                try:
                    return task, self._pixels(task)
                except SlideError as error:
                    failure = str(error)
                    if last:
                        break
        return replace(task, failure=failure), None

    def _pixels(self, task: _TileTask) -> NDArray[np.uint8]:
        """What the network sees; the slide's own pixels are kept for :meth:`trace`."""
        reader, lattice = self.context.reader, self.context.spec.lattice
        shown, slide = read_region(reader, task.tile.outer, lattice), unrendered(reader)
        pixels = shown if slide is reader else read_region(slide, task.tile.outer, lattice)
        self.pixels[task.block.name, task.number] = pixels
        return shown

    def encoded(
        self, read: Iterator[tuple[_TileTask, NDArray[np.uint8] | None]]
    ) -> Iterator[tuple[_TileTask, EncodedTile | None]]:
        """Tiles, encoded in batches."""
        tasks: list[_TileTask] = []
        images: list[NDArray[np.uint8]] = []
        while True:
            with self.clock("wait_for_read"):
                task, pixels = next(read, (None, None))
            if task is None or (task.number == 0 and self.stopped()):
                break
            if pixels is None:
                yield task, None
                continue
            tasks.append(task)
            images.append(pixels)
            if len(tasks) >= self.batch.tiles:
                yield from zip(tasks, self.segmenter.encode(images), strict=True)
                tasks, images = [], []
        yield from zip(tasks, self.segmenter.encode(images), strict=True)

    def prompted(
        self, tile: tuple[_TileTask, EncodedTile | None]
    ) -> tuple[_TileTask, EncodedTile | None, NDArray[np.float32]]:
        """A tile with its prompts (N, 2)."""
        task, encoded = tile
        if encoded is None:
            return task, None, np.empty((0, 2), np.float32)
        return task, encoded, self.segmenter.find_prompts(task.tile, encoded)

    def decoded(
        self, read: Iterator[tuple[_TileTask, NDArray[np.uint8] | None]]
    ) -> Iterator[tuple[_TileTask, list[WindowMasks], int]]:
        """Masks of the tiles and how many prompts they come from, a batch at a time; its prompts are found while the next one is encoded."""
        found = prefetch_map(self.prompted, self.encoded(read), threads=self.readers, limit=self.batch.tiles + 1)
        with closing(found):
            together: list[tuple[_TileTask, EncodedTile, NDArray[np.float32]]] = []
            for task, encoded, points in found:
                if encoded is None:
                    yield task, [], 0
                    continue
                together.append((task, encoded, points))
                if encoded.is_last:
                    yield from self._decode(together)
                    together = []

    def _decode(
        self, batch: list[tuple[_TileTask, EncodedTile, NDArray[np.float32]]]
    ) -> Iterator[tuple[_TileTask, list[WindowMasks], int]]:
        tasks, encoded, points = zip(*batch, strict=True)
        masks = self.segmenter.decode([task.tile for task in tasks], encoded, points)
        return zip(tasks, masks, map(len, points), strict=True)

    def trace(self, decoded: tuple[_TileTask, list[WindowMasks], int]) -> _TracedTile:
        """Outlines of a tile."""
        task, masks, prompts = decoded
        cells, touching = self.segmenter.trace(task.tile, masks)
        pixels, spec = self.pixels.pop((task.block.name, task.number), None), self.context.spec
        if pixels is not None:
            with self.clock("measure"):
                size = self.context.reader.info.size_px0
                cells = measure_colours(cells, pixels, task.tile.outer, spec.lattice, size, spec.stain.name)
        return _TracedTile(task, cells, {"prompts": prompts, "larger_than_window": touching})

    def write(self, block: BlockReport | list[_TracedTile]) -> BlockReport:
        """Write a block's part, and report on it."""
        if isinstance(block, BlockReport):
            return block
        block = sorted(block, key=lambda tile: tile.task.number)
        name, spec = block[0].task.block.name, self.context.spec
        failures = [tile.task.failure for tile in block if tile.task.failure]
        cores = [tile.task.tile.core for tile in block if tile.task.failure]
        failed = [(core.x0 * spec.lattice.scale, core.y0 * spec.lattice.scale) for core in cores]
        cells = Cells.concatenate([tile.cells for tile in block], self.context.model.descriptor_size)
        counts = {key: sum(tile.counts.get(key, 0) for tile in block) for key in BLOCK_COUNTS}
        counts |= {"tiles": len(block), "tiles_failed": len(failures), "outlines": len(cells)}
        with self.clock("write"):
            write_part(spec.parts / f"{name}.parquet", cells, spec.parts_hash, counts, failures, failed)
            self.context.claims.release(name)
            self.taken.discard(name)
        device = self.context.model.device
        on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        return BlockReport(
            name,
            counts,
            failures,
            self.clock.take(),
            peak_bytes(),
            on_device,
            process=f"{machine.label()}-{os.getpid()}",
            failed_px0=tuple(failed),
        )
