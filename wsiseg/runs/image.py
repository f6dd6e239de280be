"""Segmentation and typing of one image in memory: no files, no folder, no tissue search."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from wsiseg.config import RunConfig, check
from wsiseg.errors import ConfigError
from wsiseg.formats.seeds import check_seeds
from wsiseg.geometry import Lattice
from wsiseg.models import load_model
from wsiseg.records import Cells, Typing
from wsiseg.runs.plan import resolve
from wsiseg.runs.plan_file import RunPlan
from wsiseg.runs.slide import stitch_and_type
from wsiseg.runtime.claims import Claims
from wsiseg.runtime.profiling import Clock
from wsiseg.seeds.bank import build_bank
from wsiseg.segmentation.blocks import segment_tile
from wsiseg.segmentation.worker import RunSpec, WorkerContext
from wsiseg.slide import read_region
from wsiseg.slide.array_reader import ArrayReader
from wsiseg.slide.tiling import plan_blocks
from wsiseg.slide.tissue import SearchArea

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from wsiseg.models.contract import PromptableModel
    from wsiseg.records import Seeds

logger = logging.getLogger(__name__)


def segment_image(
    image: NDArray[np.uint8],
    *,
    mpp: float,
    seeds: Seeds | None = None,
    config: RunConfig | None = None,
    model: PromptableModel | None = None,
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
        Types of the cells.
    """
    config = dataclasses.replace(config or RunConfig(), mpp=mpp)
    context, plan = open_image_context(image, config, seeds, model)
    blocks = plan_blocks(
        plan.info.size_px0,
        context.spec.lattice,
        config.tiling,
        stride_px=context.model.stride_px,
        reach_px=context.model.reach_px,
        input_px=context.model.input_px,
        wanted=lambda *_: True,
    )
    clock = Clock()
    outlines = [
        segment_tile(tile, read_region(context.reader, tile.outer, context.spec.lattice), context, clock)[0]
        for block in blocks
        for tile in block.tiles
    ]
    result = stitch_and_type([Cells.concatenate(outlines, plan.descriptor_size)], plan, context.model.types, clock)
    for warning in result.notes.warnings:
        logger.warning("%s", warning)
    return result.cells.take(slice(None)), result.typing


def open_image_context(
    image: NDArray[np.uint8], config: RunConfig, seeds: Seeds | None = None, model: PromptableModel | None = None
) -> tuple[WorkerContext, RunPlan]:
    """Open the context for one image in memory (H, W, 3) at ``config.mpp``, and what its end needs."""
    if config.mpp is None:
        raise ConfigError("image: the scale is unknown; set mpp (for example mpp=0.25)")
    check(config, "image")
    reader = ArrayReader(image, config.mpp)
    if seeds:
        seeds, seed_warnings = check_seeds(dataclasses.replace(seeds, slide=None), reader.info)
        for warning in seed_warnings:
            logger.warning("%s", warning)
    model = model or load_model(config.model, config.device, config.precision)
    resolved = resolve(config, config.model, maps=model.has_maps, clicked=seeds is not None)
    lattice = Lattice(config.mpp, model.mpp)
    bank = build_bank(reader, model, seeds, lattice, resolved, chains=resolved.method == "cop") if seeds else None
    spec = RunSpec("image", resolved, lattice, SearchArea(None, None), bank, Path(), "")
    plan = RunPlan(reader.info, resolved, bank, {}, "", "", "", model.descriptor_size, 0.0)
    return WorkerContext(spec, reader, model, Claims(Path())), plan
