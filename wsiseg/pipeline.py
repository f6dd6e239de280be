"""The whole program on one page: tiles -> embeddings -> prompts -> masks -> polygons -> stitched cells -> typed cells -> files."""

from __future__ import annotations

import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from wsiseg import __version__, runs
from wsiseg.config import RunConfig
from wsiseg.errors import SlideError
from wsiseg.formats import FILE_NAMES, load_writer
from wsiseg.formats.parts import part_is_current, read_part, write_part
from wsiseg.masks import decode
from wsiseg.meter import Clock, peak_bytes
from wsiseg.planning import describe, image_tools, open_tools, plan_run
from wsiseg.polygons import trace
from wsiseg.prompts import find_points
from wsiseg.propagation import assign_types, keep_clicks
from wsiseg.records import Cells, Provenance, Typing
from wsiseg.slide import read_region
from wsiseg.stitching import stitch
from wsiseg.tiles import plan_blocks
from wsiseg.workers import map_blocks

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from wsiseg.models.contract import PromptableModel
    from wsiseg.planning import Job, Plan, Tools
    from wsiseg.records import Block, Seeds, SlideInfo, Tile


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
        points = find_points(embeddings, tile.outer.width, model.mpp, job.config, job.bank)
        on_slide = points + np.array([tile.outer.x0, tile.outer.y0], float)
        points = points[tile.core.contains(on_slide) & job.area.holds(job.lattice.to_level0(on_slide))]
    with clock("decode"):
        batches = list(decode(model, embeddings, 0, points, job.config.masks))
    with clock("vectorise"):
        traced = [trace(masks, tile.outer, job.lattice, job.config.masks) for masks in batches]
    cells = Cells.concatenate([cells for cells, _ in traced], model.descriptor_size)
    return cells, {"prompts": len(points), "larger_than_window": sum(touching for _, touching in traced)}


def segment_block(tools: Tools, block: Block) -> BlockReport:
    """A block's tiles into one part file; the next tile is read while one is worked on. A tile that cannot be read is tried twice."""
    job, clock = tools.job, Clock()
    outlines, failures = [], []
    counts = dict.fromkeys(("tiles", "tiles_failed", "prompts", "larger_than_window", "outlines"), 0)

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
            cells, found = segment_tile(tile, pixels, tools, clock)
            outlines.append(cells)
            counts |= {k: counts[k] + v for k, v in found.items()}
    cells = Cells.concatenate(outlines, tools.model.descriptor_size)
    counts |= {"outlines": len(cells), "tiles_failed": len(failures)}
    with clock("write"):
        write_part(job.parts / f"{block.name}.parquet", cells, job.parts_hash, counts)
    return BlockReport(block.name, counts, dict(clock.seconds), failures, peak_bytes())


def segment_slide(
    slide: str, config: RunConfig, out: Path, *, overwrite: bool = False, on_progress: Callable[[int, int, int], None] | None = None
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
    with clock("plan"):
        plan = plan_run(slide, config, out)
    runs.claim_folder(plan.folder, plan.run_hash, overwrite=overwrite)
    manifest = describe(plan) | {"wsiseg": __version__, "versions": runs.versions()}
    plan.folder.write_manifest(manifest | {"status": "running"})
    runs.drop_stale_parts(plan.folder, {b.name for b in plan.blocks})

    finished, todo, failures = *_resume(plan), list[str]()
    setup = partial(open_tools, plan.job) if config.workers > 1 else lambda: plan.tools
    with clock("tiles"):
        for report in map_blocks(segment_block, todo, setup, workers=config.workers):
            finished.append(report.counts)
            failures += report.failures
            clock.add(report.seconds)
            peaks.append(report.peak_bytes)
            if on_progress:
                on_progress(sum(c["tiles"] for c in finished), plan.tile_count, sum(c["outlines"] for c in finished))

    cells, typing, counts, files = _finish(plan, clock)
    counts = {k: sum(c[k] for c in finished) for k in (finished[0] if finished else ())} | counts
    manifest |= {
        "status": "incomplete" if failures else "complete",
        "failures": failures,
        "warnings": plan.warnings,
        "counts": {"cells": len(cells), "blocks": len(plan.blocks), "blocks_resumed": len(plan.blocks) - len(todo)} | counts,
        "files": files,
        "types": {name: int((typing.codes == k).sum()) for k, name in enumerate(typing.names)},
        "seconds": {k: round(v, 3) for k, v in clock.seconds.items()} | {"total": round(time.perf_counter() - started, 3)},
        "model_share": round((clock.seconds["encode"] + clock.seconds["decode"]) / max(clock.seconds["tiles"], 1e-9), 4),
        "peak_ram_mb": round(max(*peaks, peak_bytes()) / 2**20, 1),
    }
    plan.folder.write_manifest(manifest)
    return manifest


def _resume(plan: Plan) -> tuple[list[dict[str, int]], list[Block]]:
    """Counts of the blocks whose part is there, whole and without failed tiles; and the blocks still to do."""
    finished, todo = [], []
    for block in plan.blocks:
        path = plan.folder.parts / f"{block.name}.parquet"
        counts = read_part(path)[1] if part_is_current(path, plan.job.parts_hash) else {"tiles_failed": 1}
        todo.append(block) if counts["tiles_failed"] else finished.append(counts)
    return finished, todo


def _finish(plan: Plan, clock: Clock) -> tuple[Cells, Typing, dict[str, int], list[str]]:
    """Parts -> stitched, typed cells -> files."""
    job, info = plan.job, plan.info
    outlines = [read_part(job.parts / f"{b.name}.parquet")[0] for b in plan.blocks]
    cells, typing, counts = settle(Cells.concatenate(outlines, plan.tools.model.descriptor_size), job, info, clock, plan.warnings)
    details: dict[str, object] = {"model": job.config.model, "method": job.config.method}
    provenance = Provenance("wsiseg", __version__, Path(job.slide).name, plan.run_hash, details)
    files = []
    with clock("write"):
        for name in job.config.formats:
            written = load_writer(name)(plan.folder.path / FILE_NAMES[name], cells, typing, info, provenance)
            files.append((written or plan.folder.path / FILE_NAMES[name]).name)
    plan.folder.keep_only(files)
    return cells, typing, counts, files


def settle(outlines: Cells, job: Job, info: SlideInfo, clock: Clock, warnings: list[str]) -> tuple[Cells, Typing, dict[str, int]]:
    """Outlines of all tiles, any order -> stitched cells and their types; doubts about the types are added to ``warnings``."""
    config, bank = job.config, job.bank
    with clock("stitch"):
        cells, counts = stitch(outlines, info.size_px0, config.masks.min_area_um2 / info.mpp**2, config.stitching)
    typing = Typing.untyped(len(cells))
    if bank is not None:
        with clock("type"):
            typing, doubts = assign_types(cells.descriptors, bank, config.typing)
            typing = keep_clicks(cells, typing, bank, config.typing.click_reach_um / info.mpp)
            warnings.extend(doubts)
    return cells, typing, dataclasses.asdict(counts)


def segment_image(
    image: NDArray[np.uint8], *, mpp: float, seeds: Seeds | None = None, config: RunConfig | None = None, model: PromptableModel | None = None
) -> tuple[Cells, Typing]:
    """Segment and type one image in memory; writes nothing.

    Parameters
    ----------
    image
        uint8 RGB of shape (H, W, 3).
    mpp
        Microns per pixel.
    seeds
        Clicks in px of the image, corner frame; without them every cell stays unassigned.
    config
        Defaults when absent. The whole image is searched.
    model
        A loaded model, to use it for many images; loaded from ``config`` when absent.

    Returns
    -------
    cells
        Polygons in px of the image.
    typing
        One verdict per cell.
    """
    config = dataclasses.replace(config or RunConfig(), mpp=mpp)
    tools, info = image_tools(image, config, seeds, model)
    blocks = plan_blocks(
        info.size_px0, tools.job.lattice, config.tiling, stride_px=tools.model.stride_px, reach_px=tools.model.reach_px, wanted=lambda *_: True
    )
    clock = Clock()
    outlines = [
        segment_tile(tile, read_region(tools.reader, tile.outer, tools.job.lattice), tools, clock)[0] for block in blocks for tile in block.tiles
    ]
    cells, typing, _ = settle(Cells.concatenate(outlines, tools.model.descriptor_size), tools.job, info, clock, [])
    return cells, typing
