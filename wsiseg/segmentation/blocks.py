"""Blocks of tiles -> part files, in one process: reading, the device, tracing and writing overlap, and what lies between them is bounded.

::

    claim a block  ->  read its tiles  ->  encode       ->  find prompts  ->  decode       ->  trace  ->  write its part
    this thread        some threads        this thread      some threads      this thread      one        one

The device waits for nothing but pixels; the share of the time that it works is reported. Blocks that another process has claimed are left to it.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from wsiseg.errors import FormatError, SlideError
from wsiseg.formats.parts import open_part, part_is_current, write_part
from wsiseg.records import Block, Cells
from wsiseg.runtime import machine
from wsiseg.runtime.prefetch import prefetch_map
from wsiseg.runtime.profiling import Clock, peak_bytes
from wsiseg.segmentation.batch_size import Batch, is_out_of_memory
from wsiseg.segmentation.decoding import decode
from wsiseg.segmentation.polygons import trace
from wsiseg.segmentation.prompts import find_points
from wsiseg.segmentation.prompts.grid import grid_points
from wsiseg.segmentation.refinement import refine_masks
from wsiseg.slide import read_region

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from wsiseg.records import Embeddings, Tile, WindowMasks
    from wsiseg.segmentation.worker import RunSpec, WorkerContext

logger = logging.getLogger(__name__)

BLOCK_COUNTS = ("tiles", "tiles_failed", "prompts", "larger_than_window", "outlines")
_NO_BLOCK = Block("", ())
READERS = 4  #: threads that read; one core decodes 60 Mpx/s, a large GPU asks for 200


@dataclass(frozen=True)
class BlockReport:
    """Report of a block: counts and seconds, never cells.

    Attributes
    ----------
    counts, failures
        Counts of the block; a message per tile that could not be read.
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


@dataclass(frozen=True)
class _TileTask:
    """One tile of a block."""

    block: Block
    number: int

    @property
    def tile(self) -> Tile:
        return self.block.tiles[self.number]


@dataclass(frozen=True)
class _TilePixels:
    """A tile's pixels (H, W, 3), or the reason why there are none."""

    task: _TileTask
    pixels: NDArray[np.uint8] | None
    failure: str = ""


@dataclass(frozen=True)
class _EncodedTile:
    """A tile that was encoded, as the ``place``-th of a batch."""

    read: _TilePixels
    embeddings: Embeddings | None = None
    place: int = 0


@dataclass(frozen=True)
class _DecodedTile:
    """A tile's masks on the CPU, and how many prompts they come from."""

    task: _TileTask
    masks: list[WindowMasks]
    prompts: int
    failure: str = ""


@dataclass(frozen=True)
class _TracedTile:
    """A tile's outlines."""

    task: _TileTask
    cells: Cells
    counts: dict[str, int]
    failure: str = ""


def finished_block(spec: RunSpec, block: Block, *, failed: bool = False) -> BlockReport | None:
    """Report of a block whose part exists and is intact; one with tiles that could not be read only if ``failed``."""
    path = spec.parts / f"{block.name}.parquet"
    try:
        part = open_part(path) if part_is_current(path, spec.parts_hash) else None
    except FormatError:  # a good footer over damaged pages
        part = None
    if part is None or (part.counts["tiles_failed"] and not failed):
        return None
    return BlockReport(block.name, part.counts, part.failures, {}, resumed=True)


def segment_blocks(
    context: WorkerContext, blocks: Sequence[Block], stopped: Callable[[], bool]
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

    Yields
    ------
    BlockReport
        As soon as a block's part is on disk, or one block later.
    """
    line = _TilePipeline(context, stopped)
    try:
        with closing(prefetch_map(line.write, line.finished(blocks), threads=1, limit=2)) as reports:
            yield from reports
    finally:
        for name in line.taken:
            context.claims.release(name)


def segment_tile(
    tile: Tile, pixels: NDArray[np.uint8], context: WorkerContext, clock: Clock
) -> tuple[Cells, dict[str, int]]:
    """Segment one tile: pixels (H, W, 3) of ``tile.outer`` -> the outlines that ``tile.core`` owns, level-0 px."""
    batch = Batch(context.spec.config, context.model.device)
    (encoded,) = _encode(
        context, [_TilePixels(_TileTask(dataclasses.replace(_NO_BLOCK, tiles=(tile,)), 0), pixels)], batch, clock
    )
    traced = _trace(context, _decode(context, encoded, _owned_prompts(context, encoded), batch, clock))
    return traced.cells, traced.counts


class _TilePipeline:
    """The stages of one process, each fed by the one before."""

    def __init__(self, context: WorkerContext, stopped: Callable[[], bool]) -> None:
        self.context, self.stopped = context, stopped
        self.taken: set[str] = set()
        self.readers = min(READERS, machine.cores())
        self.clock = Clock()
        self.batch = Batch(context.spec.config, context.model.device)
        self.resumed: list[BlockReport] = []

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
            closing(prefetch_map(self.trace, self.answers(read), threads=1, limit=3)) as traced,
        ):  # before the slide is
            for tile in traced:
                finished_tiles = done.setdefault(tile.task.block.name, [])
                finished_tiles.append(tile)
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

    def read(self, task: _TileTask) -> _TilePixels:
        """Pixels of a tile; a tile that cannot be read is tried twice."""
        reader, spec = self.context.reader, self.context.spec
        with self.clock("read"):
            for last in (False, True):
                try:
                    return _TilePixels(task, read_region(reader, task.tile.outer, spec.lattice))
                except SlideError as error:
                    failure = str(error)
                    if last:
                        break
        return _TilePixels(task, None, failure)

    def answers(self, read: Iterator[_TilePixels]) -> Iterator[_DecodedTile]:
        """Masks of the tiles: one batch's prompts are found while the next one is encoded."""
        with closing(
            prefetch_map(self.prompts, self.encoded(read), threads=self.readers, limit=self.batch.tiles + 1)
        ) as prompted:
            for tile, points in prompted:
                yield _decode(self.context, tile, points, self.batch, self.clock)

    def encoded(self, read: Iterator[_TilePixels]) -> Iterator[_EncodedTile]:
        """Tiles, encoded in batches; those without pixels pass by."""
        group: list[_TilePixels] = []
        while True:
            with self.clock("wait_for_read"):
                got = next(read, None)
            if got is None or (got.task.number == 0 and self.stopped()):
                break
            if got.pixels is None:
                yield _EncodedTile(got)
                continue
            group.append(got)
            if len(group) >= self.batch.tiles:
                yield from _encode(self.context, group, self.batch, self.clock)
                group = []
        yield from _encode(self.context, group, self.batch, self.clock)

    def prompts(self, tile: _EncodedTile) -> tuple[_EncodedTile, NDArray[np.float32]]:
        """Prompts of a tile."""
        with self.clock("prompt"):
            return tile, _owned_prompts(self.context, tile)

    def trace(self, answer: _DecodedTile) -> _TracedTile:
        """Outlines of a tile."""
        with self.clock("vectorise"):
            return _trace(self.context, answer)

    def write(self, block: BlockReport | list[_TracedTile]) -> BlockReport:
        """A block's part, and its report."""
        if isinstance(block, BlockReport):
            return block
        block = sorted(block, key=lambda tile: tile.task.number)
        name, spec = block[0].task.block.name, self.context.spec
        failures = [tile.failure for tile in block if tile.failure]
        cells = Cells.concatenate([tile.cells for tile in block], self.context.model.descriptor_size)
        counts = {key: sum(tile.counts.get(key, 0) for tile in block) for key in BLOCK_COUNTS}
        counts |= {"tiles": len(block), "tiles_failed": len(failures), "outlines": len(cells)}
        with self.clock("write"):
            write_part(spec.parts / f"{name}.parquet", cells, spec.parts_hash, counts, failures)
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
        )


def _encode(context: WorkerContext, group: list[_TilePixels], batch: Batch, clock: Clock) -> list[_EncodedTile]:
    """Encode tiles together; in two halves when memory runs out."""
    if not group:
        return []
    try:
        with clock("encode"), torch.inference_mode():
            pixels = torch.from_numpy(np.stack([read.pixels for read in group if read.pixels is not None]))
            embeddings = context.model.encode(pixels.permute(0, 3, 1, 2).to(context.model.device))
        return [_EncodedTile(read, embeddings, k) for k, read in enumerate(group)]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if len(group) <= batch.tiles:  # else it was put together before the batch became smaller
            batch.halve(context.spec.slide, error)
    half = max(len(group) // 2, 1)
    return [tile for part in (group[:half], group[half:]) for tile in _encode(context, part, batch, clock)]


def _decode(
    context: WorkerContext, tile: _EncodedTile, points: NDArray[np.float32], batch: Batch, clock: Clock
) -> _DecodedTile:
    """Decode masks of a tile's prompts, on the CPU; fewer prompts at a time when memory runs out."""
    if tile.embeddings is None:
        return _DecodedTile(tile.read.task, [], 0, tile.read.failure)
    while True:
        try:
            with clock("decode"), torch.inference_mode():
                masks = _masks(context, tile, tile.embeddings, points, batch.prompts)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            batch.halve(context.spec.slide, error)
        else:
            batch.learn()
            return _DecodedTile(tile.read.task, masks, len(points))


def _one(embeddings: Embeddings, k: int) -> Embeddings:
    """One tile of a batch, for prompting."""
    maps = None if embeddings.maps is None else embeddings.maps[k : k + 1]
    return dataclasses.replace(
        embeddings, high=embeddings.high[k : k + 1], low=embeddings.low[k : k + 1], maps=maps, extra={}
    )


@torch.inference_mode()
def _owned_prompts(context: WorkerContext, encoded: _EncodedTile) -> NDArray[np.float32]:
    """Prompts (N, 2) that the tile owns, model px of the tile."""
    spec, model, tile = context.spec, context.model, encoded.read.task.tile
    if encoded.embeddings is None:
        return np.empty((0, 2), np.float32)
    corner = np.array([tile.outer.x0, tile.outer.y0], float)
    if spec.config.method == "amg":
        points = (grid_points(tile.core, spec.config.grid.spacing_um / model.mpp) - corner).astype(np.float32)
    else:
        points = find_points(
            _one(encoded.embeddings, encoded.place), tile.outer.width, model.mpp, spec.config, spec.bank
        )
    on_slide = points + corner
    is_owned: NDArray[np.bool_] = tile.core.contains(on_slide) & spec.area.holds(spec.lattice.to_level0(on_slide))
    owned: NDArray[np.float32] = points[is_owned]
    return owned


def _masks(
    context: WorkerContext, encoded: _EncodedTile, embeddings: Embeddings, points: NDArray[np.float32], prompts: int
) -> list[WindowMasks]:
    """Masks of the prompts of a tile, on the CPU."""
    config, model, tile, k = context.spec.config, context.model, encoded.read.task.tile, encoded.place
    masks = dataclasses.replace(config.masks, prompts_per_batch=prompts)
    batches = list(decode(model, embeddings, k, points, masks, grid=config.grid if config.method == "amg" else None))
    if config.second_round.enabled:
        batches = refine_masks(model, embeddings, tile.outer.width, batches, masks, config.second_round, k)
    return batches


def _trace(context: WorkerContext, answer: _DecodedTile) -> _TracedTile:
    spec = context.spec
    traced = [trace(masks, answer.task.tile.outer, spec.lattice, spec.config.masks) for masks in answer.masks]
    cells = Cells.concatenate([cells for cells, _ in traced], context.model.descriptor_size)
    counts = {"prompts": answer.prompts, "larger_than_window": sum(touching for _, touching in traced)}
    return _TracedTile(answer.task, cells, counts, answer.failure)
