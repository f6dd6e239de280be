"""Segmentation and typing of one image in memory: no files, no folder, no tissue search."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wsiseg.config import CHAINED, DETECTING, RunConfig, check
from wsiseg.errors import ConfigError
from wsiseg.formats.seeds import check_seeds
from wsiseg.geometry import Lattice
from wsiseg.measurements import measure
from wsiseg.models import load_model
from wsiseg.records import Cells, DescribedType
from wsiseg.runs.finish import stitch_and_type
from wsiseg.runs.inputs import phrases_as_seeds, require_known_types, resolve
from wsiseg.seeds.bank import build_bank
from wsiseg.seeds.descriptions import describe_types, doubts_of
from wsiseg.segmentation.colours import measure_colours
from wsiseg.segmentation.tile import TileSegmenter
from wsiseg.slide import read_region
from wsiseg.slide.array_reader import ArrayReader
from wsiseg.slide.stain import find_stain, unrendered
from wsiseg.slide.tiling import plan_for_model
from wsiseg.slide.tissue import SearchArea

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from wsiseg.models.contract import PromptableModel
    from wsiseg.records import Bank, Seeds, Typing
    from wsiseg.slide import SlideReader

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
        Clicks in px of the image, corner frame, or phrases; without them every cell stays unassigned.
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
    opened = open_image(image, dataclasses.replace(config or RunConfig(), mpp=mpp), seeds, model)
    model, info, lattice = opened.model, opened.reader.info, opened.lattice
    blocks = plan_for_model(info, model, opened.config.tiling, lambda *_: True)
    tiles = [tile for block in blocks for tile in block.tiles]
    segmenter = TileSegmenter(
        model, opened.config, lattice, SearchArea(None, None), opened.bank, name="image", types=opened.types
    )
    outlines = []
    for tile in tiles:
        cells = segmenter.segment(tile, read_region(opened.reader, tile.outer, lattice))
        pixels = read_region(unrendered(opened.reader), tile.outer, lattice)
        outlines.append(measure_colours(cells, pixels, tile.outer, lattice, info.size_px0, opened.config.stain))
    result = stitch_and_type(
        [Cells.concatenate(outlines, model.descriptor_size)],
        info=info,
        config=opened.config,
        bank=opened.bank,
        types=model.types,
        described=opened.types,
        descriptor_size=model.descriptor_size,
    )
    for warning in result.notes.warnings:
        logger.warning("%s", warning)
    measured = measure(result.cells, result.typing, mpp)
    cells = Cells.concatenate(list(measured.chunks(max(len(measured), 1))), model.descriptor_size)
    return cells, result.typing


@dataclass(frozen=True, kw_only=True)
class OpenedImage:
    """An image in memory that was checked, with the model and the clicked or described types."""

    reader: SlideReader
    config: RunConfig
    model: PromptableModel
    lattice: Lattice
    bank: Bank | None
    types: tuple[DescribedType, ...] = ()


def open_image(
    image: NDArray[np.uint8], config: RunConfig, seeds: Seeds | None = None, model: PromptableModel | None = None
) -> OpenedImage:
    """Check an image in memory (H, W, 3) at ``config.mpp`` and its clicks; load the model unless it is given."""
    if config.mpp is None:
        raise ConfigError("image: the scale is unknown; set mpp (for example mpp=0.25)")
    check(config, "image")
    slide = ArrayReader(image, config.mpp)
    stain = find_stain(slide, config.stain, config.tissue.overview_mpp)
    reader = stain.view(slide)
    for warning in stain.warnings:
        logger.info("%s", warning)
    if config.text and seeds is None:
        seeds = phrases_as_seeds(config.text)
    if seeds:
        seeds, seed_warnings = check_seeds(dataclasses.replace(seeds, slide=None), reader.info)
        for warning in seed_warnings:
            logger.warning("%s", warning)
    model = model or load_model(config.model, config.device, config.precision)
    if config.typing.known_types:
        require_known_types(config.model, model.types)
    resolved = resolve(config, config.model, maps=model.has_maps, prompts=model.prompts, seeds=seeds)
    resolved = dataclasses.replace(resolved, stain=stain.name)
    lattice = Lattice(config.mpp, model.mpp)
    bank, types = None, tuple[DescribedType, ...]()
    if resolved.method in DETECTING:
        types = describe_types(model, resolved, seeds, None)
        for doubt in doubts_of(model, types, stain.name):
            logger.warning("%s", doubt)
    if seeds and resolved.method != "text":
        bank = build_bank(reader, model, seeds, lattice, resolved, chains=resolved.method in CHAINED)
    return OpenedImage(reader=reader, config=resolved, model=model, lattice=lattice, bank=bank, types=types)
