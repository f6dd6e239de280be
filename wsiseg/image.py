"""The same path for one image in memory: no files, no folder, no tissue search."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from wsiseg.config import RunConfig, check
from wsiseg.errors import ConfigError
from wsiseg.formats.seeds import check_seeds
from wsiseg.geometry import Lattice
from wsiseg.meter import Clock
from wsiseg.models import load_model
from wsiseg.pipeline import segment_tile, settle
from wsiseg.planning import Job, Tools, resolve
from wsiseg.records import Cells, Typing
from wsiseg.seeding import build_bank
from wsiseg.slide import read_region
from wsiseg.slide.array_reader import ArrayReader
from wsiseg.tiles import plan_blocks
from wsiseg.tissue import SearchArea

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from wsiseg.models.contract import PromptableModel
    from wsiseg.records import Seeds, SlideInfo

logger = logging.getLogger(__name__)


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
    tools, info = _open_tools(image, config, seeds, model)
    blocks = plan_blocks(
        info.size_px0, tools.job.lattice, config.tiling, stride_px=tools.model.stride_px, reach_px=tools.model.reach_px, wanted=lambda *_: True
    )
    clock = Clock()
    outlines = [
        segment_tile(tile, read_region(tools.reader, tile.outer, tools.job.lattice), tools, clock)[0] for block in blocks for tile in block.tiles
    ]
    cells, typing, notes, _ = settle(Cells.concatenate(outlines, tools.model.descriptor_size), tools, info, clock)
    for doubt in notes.warnings:
        logger.warning("%s", doubt)
    return cells, typing


def _open_tools(
    image: NDArray[np.uint8], config: RunConfig, seeds: Seeds | None = None, model: PromptableModel | None = None
) -> tuple[Tools, SlideInfo]:
    """The tools for one image in memory (H, W, 3) at ``config.mpp``."""
    if config.mpp is None:
        raise ConfigError("image: microns per pixel are not known; set mpp (for example mpp=0.25)")
    check(config, "image")
    reader = ArrayReader(image, config.mpp)
    if seeds:
        seeds, doubts = check_seeds(dataclasses.replace(seeds, slide=None), reader.info)
        for doubt in doubts:
            logger.warning("%s", doubt)
    resolved = resolve(config, clicked=seeds is not None)
    model = model or load_model(config.model, config.device, resolved.precision)
    lattice = Lattice(config.mpp, model.mpp)
    bank = build_bank(reader, model, seeds, lattice, resolved, chains=resolved.method == "cop") if seeds else None
    job = Job("image", resolved, lattice, SearchArea(None, None), bank, Path(), "")
    return Tools(job, reader, model), reader.info
