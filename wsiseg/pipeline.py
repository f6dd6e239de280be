"""The whole program on one page: tiles -> embeddings -> prompts -> masks -> polygons -> stitched cells -> typed cells -> files."""

from __future__ import annotations

import dataclasses
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from wsiseg import __version__, runs
from wsiseg.errors import FormatError, RunError, SlideError
from wsiseg.formats import FILE_NAMES, load_writer
from wsiseg.formats.bank import write_bank
from wsiseg.formats.parts import part_is_current, read_part, write_part
from wsiseg.masks import decode
from wsiseg.meter import Clock, peak_bytes
from wsiseg.models import find_weights
from wsiseg.models.cards import file_hash
from wsiseg.planning import describe, open_tools, plan_run, slide_path
from wsiseg.polygons import trace
from wsiseg.prompts import find_points
from wsiseg.prompts.grid import grid_points
from wsiseg.propagation import account, assign_types, keep_clicks
from wsiseg.records import Cells, Provenance, Typing, TypingNotes
from wsiseg.second_round import ask_again
from wsiseg.slide import read_region
from wsiseg.stitching import stitch
from wsiseg.workers import map_blocks

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from wsiseg.config import RunConfig
    from wsiseg.planning import Plan, Tools
    from wsiseg.records import Block, SlideInfo, Tile


logger = logging.getLogger(__name__)

BLOCK_COUNTS = ("tiles", "tiles_failed", "prompts", "larger_than_window", "outlines")


@dataclass(frozen=True)
class BlockReport:
    """What a block sends back: counts and seconds, never cells. ``failures`` has a sentence per tile that could not be read."""

    name: str
    counts: dict[str, int]
    seconds: dict[str, float]
    failures: list[str]
    peak_bytes: int


@torch.inference_mode()
def segment_tile(tile: Tile, pixels: NDArray[np.uint8], tools: Tools, clock: Clock) -> tuple[Cells, dict[str, int]]:
    """One tile, start to finish: pixels (H, W, 3) of ``tile.outer`` -> the outlines that ``tile.core`` owns, level-0 px."""
    job, model = tools.job, tools.model
    with clock("encode"):
        embeddings = model.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None].to(model.device))
    with clock("prompt"):
        corner = np.array([tile.outer.x0, tile.outer.y0], float)
        grid = job.config.grid if job.config.method == "amg" else None
        if grid:
            points = (grid_points(tile.core, grid.spacing_um / model.mpp) - corner).astype(np.float32)
        else:
            points = find_points(embeddings, tile.outer.width, model.mpp, job.config, job.bank)
        on_slide = points + corner
        points = points[tile.core.contains(on_slide) & job.area.holds(job.lattice.to_level0(on_slide))]
    with clock("decode"):
        batches = list(decode(model, embeddings, 0, points, job.config.masks, grid=grid))
        if job.config.second_round.enabled:
            batches = ask_again(model, embeddings, tile.outer.width, batches, job.config.masks, job.config.second_round)
    with clock("vectorise"):
        traced = [trace(masks, tile.outer, job.lattice, job.config.masks) for masks in batches]
    cells = Cells.concatenate([cells for cells, _ in traced], model.descriptor_size)
    return cells, {"prompts": len(points), "larger_than_window": sum(touching for _, touching in traced)}


def segment_block(tools: Tools, block: Block) -> BlockReport:
    """A block's tiles into one part file; the next tile is read while one is worked on. A tile that cannot be read is tried twice."""
    job, clock = tools.job, Clock()
    outlines, failures = [], []
    counts = dict.fromkeys(BLOCK_COUNTS, 0)

    def read(tile: Tile) -> NDArray[np.uint8]:
        with clock("read"):
            try:
                return read_region(tools.reader, tile.outer, job.lattice)
            except SlideError:
                return read_region(tools.reader, tile.outer, job.lattice)

    with ThreadPoolExecutor(1) as ahead:
        following = ahead.submit(read, block.tiles[0])
        for i, tile in enumerate(block.tiles):
            current = following
            if i + 1 < len(block.tiles):
                following = ahead.submit(read, block.tiles[i + 1])
            counts["tiles"] += 1
            try:
                with clock("wait_for_read"):
                    pixels = current.result()
            except SlideError as error:
                failures.append(str(error))
                continue
            try:
                cells, found = segment_tile(tile, pixels, tools, clock)
            except torch.OutOfMemoryError as error:
                size = f"{tile.outer.width} px"
                what = "masks.prompts_per_batch in a --config file" if tools.model.input_px else "--tile-size"
                raise RunError(f"{job.slide}: out of GPU memory on a tile of {size}; pass a smaller {what}, or --device cpu") from error
            outlines.append(cells)
            counts |= {k: counts[k] + v for k, v in found.items()}
    cells = Cells.concatenate(outlines, tools.model.descriptor_size)
    counts |= {"outlines": len(cells), "tiles_failed": len(failures)}
    with clock("write"):
        write_part(job.parts / f"{block.name}.parquet", cells, job.parts_hash, counts)
    return BlockReport(block.name, counts, dict(clock.seconds), failures, peak_bytes())


def segment_slide(
    slide: str | Path, config: RunConfig, out: str | Path, *, overwrite: bool = False, on_progress: Callable[[int, int, int], None] | None = None
) -> dict[str, Any]:
    """Segment and type one slide.

    Parameters
    ----------
    slide
        Path or URL of the slide.
    config
        What to do.
    out
        Folder of all runs; the slide's own folder is made below it.
    overwrite
        Replace a run that has another configuration.
    on_progress
        Called with tiles done, tiles in all, outlines so far.

    Returns
    -------
    dict
        The manifest, as written. Its ``status`` is ``incomplete`` when tiles could not be read; the same call again tries just those blocks.

    Raises
    ------
    WsisegError
        Wrong input; nothing has been written then.
    """
    started, clock, peaks = time.perf_counter(), Clock(), [0]
    slide, out = str(slide), Path(out)
    with clock("plan"):
        plan = plan_run(slide, config, out, overwrite=overwrite)
    with plan.tools.reader:
        manifest = describe(plan) | {"wsiseg": __version__, "versions": runs.versions(), "status": "running"}
        folder = runs.claim_folder(out, slide_path(slide), manifest, overwrite=overwrite)
        plan = plan.at(folder.parts)
        runs.drop_stale_files(folder, {b.name for b in plan.blocks})

        finished, todo = _resume(plan)
        failures: list[str] = []
        with clock("tiles"):
            for report in map_blocks(segment_block, todo, partial(open_tools, plan.job), workers=config.workers, tools=plan.tools):
                finished.append(report.counts)
                failures += report.failures
                clock.add(report.seconds)
                peaks.append(report.peak_bytes)
                if on_progress:
                    on_progress(sum(c["tiles"] for c in finished), plan.tile_count, sum(c["outlines"] for c in finished))

    cells, typing, notes, counts, files = _finish(plan, folder, clock)
    model_seconds = (clock.seconds["encode"] + clock.seconds["decode"]) / max(min(config.workers, len(todo)), 1)
    manifest |= {
        "folder": str(folder.path),
        "status": "incomplete" if failures else "complete",
        "failures": failures,
        "warnings": [*plan.warnings, *notes.warnings],
        "counts": {"cells": len(cells), "blocks": len(plan.blocks), "blocks_resumed": len(plan.blocks) - len(todo)}
        | {k: sum(c[k] for c in finished) for k in BLOCK_COUNTS}
        | counts,
        "files": files,
        "types": {name: int((typing.codes == k).sum()) for k, name in enumerate(typing.names)},
        "typing": account(typing, plan.job.bank, notes) if plan.job.bank else {},
        "seconds": {k: round(v, 3) for k, v in clock.seconds.items()} | {"total": round(time.perf_counter() - started, 3)},
        "model_share": round(model_seconds / max(clock.seconds["tiles"], 1e-9), 4),
        "peak_ram_mb": round(max(*peaks, peak_bytes()) / 2**20, 1),
    }
    folder.write_manifest(manifest)
    return manifest


def _resume(plan: Plan) -> tuple[list[dict[str, int]], list[Block]]:
    """Counts of the blocks whose part is there, whole and without failed tiles; and the blocks still to do."""
    finished, todo = [], []
    for block in plan.blocks:
        path = plan.job.parts / f"{block.name}.parquet"
        try:
            counts = read_part(path)[1] if part_is_current(path, plan.job.parts_hash) else {"tiles_failed": 1}
        except FormatError:  # a good footer over damaged pages
            counts = {"tiles_failed": 1}
        todo.append(block) if counts["tiles_failed"] else finished.append(counts)
    return finished, todo


def _finish(plan: Plan, folder: runs.RunFolder, clock: Clock) -> tuple[Cells, Typing, TypingNotes, dict[str, int], list[str]]:
    """Parts -> stitched, typed cells -> files. Also returns counts and the files' names."""
    job, info = plan.job, plan.info
    paths = [job.parts / f"{b.name}.parquet" for b in plan.blocks]
    foreign = [p for p in paths if not part_is_current(p, job.parts_hash)]
    if foreign:
        raise RunError(f"{foreign[0]}: was changed by another run while this one went on; run the command again, one run per folder")
    outlines = Cells.concatenate([read_part(p)[0] for p in paths], plan.tools.model.descriptor_size)
    cells, typing, notes, counts = settle(outlines, plan.tools, info, clock)
    details: dict[str, object] = {"model": job.config.model, "method": job.config.method}
    provenance = Provenance("wsiseg", __version__, Path(job.slide).name, plan.run_hash, details)
    files = []
    with clock("write"):
        for name in job.config.formats:
            written = load_writer(name)(folder.path / FILE_NAMES[name], cells, typing, info, provenance)
            files.append((written or folder.path / FILE_NAMES[name]).name)
        if job.bank is not None and not job.bank.foreign:
            write_bank(folder.bank, job.bank, Path(job.slide).name, file_hash(find_weights(job.config.model)[1]))
            files.append(folder.bank.name)
        folder.drop_old_files(files)
    return cells, typing, notes, counts, files


def settle(outlines: Cells, tools: Tools, info: SlideInfo, clock: Clock) -> tuple[Cells, Typing, TypingNotes, dict[str, int]]:
    """Outlines of all tiles, any order -> stitched cells, their types with notes, and counts.

    The clicked cells compete with the rest, so that a cell that somebody clicked is in the result even if no automatic prompt found it.
    """
    job = tools.job
    config, bank, notes = job.config, job.bank, TypingNotes()
    if bank is not None:
        outlines = Cells.concatenate([outlines, bank.cells.take(job.area.holds(bank.cells.points_xy))], bank.cells.descriptors.shape[1])
    with clock("stitch"):
        cells, counts = stitch(outlines, info.size_px0, config.masks.min_area_um2 / info.mpp**2, config.stitching)
    typing = Typing.untyped(len(cells))
    if bank is not None:
        with clock("type"):
            typing, notes = assign_types(cells.descriptors, cells.points_xy * info.mpp, bank, tools.model.types, config.typing)
            typing, missed = keep_clicks(cells, typing, bank, config.cop.click_reach_um / info.mpp)
            notes = dataclasses.replace(notes, warnings=(*notes.warnings, *missed))
    return cells, typing, notes, dataclasses.asdict(counts)
