"""The same path for one image in memory: no files, no folder, no tissue search."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from wsiseg.config import COP_FORMS, RunConfig, check
from wsiseg.errors import ConfigError
from wsiseg.formats.seeds import check_seeds
from wsiseg.geometry import Box, Lattice, round_up
from wsiseg.models import load_model
from wsiseg.records import Cells, Typing
from wsiseg.reference.cop_label_map import Canvas
from wsiseg.runs.plan import RunSpec, WorkerContext, resolve
from wsiseg.runs.plan_file import RunPlan
from wsiseg.runs.slide import stitch_and_type
from wsiseg.runtime.claims import Claims
from wsiseg.runtime.profiling import Clock
from wsiseg.runtime.text import did_you_mean
from wsiseg.seeds.bank import build_bank
from wsiseg.segmentation.blocks import segment_tile
from wsiseg.segmentation.decoding import decode
from wsiseg.segmentation.prompts.chain_of_prompts import farthest_point_recursion
from wsiseg.slide import read_region
from wsiseg.slide.array_reader import ArrayReader
from wsiseg.slide.tiling import plan_blocks
from wsiseg.slide.tissue import SearchArea

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsiseg.models.contract import PromptableModel
    from wsiseg.records import Seeds

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
    tools, sheet = _open_context(image, config, seeds, model)
    blocks = plan_blocks(
        sheet.info.size_px0, tools.job.lattice, config.tiling, stride_px=tools.model.stride_px, reach_px=tools.model.reach_px,
        input_px=tools.model.input_px, wanted=lambda *_: True,
    )  # fmt: skip
    clock = Clock()
    outlines = [
        segment_tile(tile, read_region(tools.reader, tile.outer, tools.job.lattice), tools, clock)[0] for block in blocks for tile in block.tiles
    ]
    cells, typing, notes, _ = stitch_and_type([Cells.concatenate(outlines, sheet.descriptor_size)], sheet, tools.model.types, clock)
    for doubt in notes.warnings:
        logger.warning("%s", doubt)
    return cells.take(slice(None)), typing


@torch.inference_mode()
def chain_image(
    image: NDArray[np.uint8], *, mpp: float, seeds: Seeds, like: str = "paper", config: RunConfig | None = None, model: PromptableModel | None = None
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float64]]:
    """Chain-of-Prompts on one image as published: no bank, no competition between types, the first click wins.

    For comparison with the papers; :func:`segment_image` is what slides get.

    Parameters
    ----------
    image
        uint8 RGB of shape (H, W, 3), small enough to be encoded at once.
    mpp
        Microns per pixel.
    seeds
        Clicks in px of the image, corner frame; types in the order in which they claim cells.
    like
        Key of ``config.COP_FORMS``: ``paper`` gates the product of the similarities, ``demo`` the candidates.
    config
        Defaults when absent; its ``cop`` is replaced by the form, but for sizes in microns.
    model
        A loaded model; loaded from ``config`` when absent.

    Returns
    -------
    labels
        int32 of shape (h, w) at the model's scale: 0, or the number of the cell, from 1.
    types
        int32 of shape (n,): index of each cell's type in ``seeds.types``.
    points
        float64 of shape (n, 2): the prompt of each cell, px of ``labels``, corner frame.
    """
    if like not in COP_FORMS:
        raise ConfigError(f"like={like!r}: {did_you_mean(like, COP_FORMS)}choose from {', '.join(COP_FORMS)}")
    form = COP_FORMS[like]
    config = dataclasses.replace(config or RunConfig(), mpp=mpp, method="auto")  # the method is the form
    cop = dataclasses.replace(config.cop, gate=form.gate, localise=form.localise)
    tools, sheet = _open_context(image, config, None, model)
    seeds, _ = check_seeds(dataclasses.replace(seeds, slide=None), sheet.info)
    net, lattice = tools.model, tools.job.lattice
    width, height = (round(n * mpp / net.mpp) for n in (image.shape[1], image.shape[0]))
    box = Box(0, 0, *(net.input_px or round_up(n, net.stride_px) for n in (width, height)))
    if max(width, height) > min(box.width, box.height) and net.input_px:
        raise ConfigError(f"image: {width} x {height} px at the model's scale, more than its input of {net.input_px} px; cut the image")
    pixels = read_region(tools.reader, box, lattice)
    embeddings = net.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None].to(net.device))
    high, low = (x[0].float().cpu().numpy() for x in (embeddings.high, embeddings.low))
    stride_px = box.width / high.shape[2]
    masks_config = dataclasses.replace(config.masks, min_score=0.0)  # the method has no threshold on the score
    canvas = Canvas.blank(height, width)
    types: list[int] = []
    points: list[NDArray[np.float64]] = []
    used = np.empty((0, 2))
    for t, kind in enumerate(seeds.types):
        mine = np.empty((0, 2))
        for click in lattice.to_model(np.array(kind.points, float)):
            chain = farthest_point_recursion((click[0] / stride_px, click[1] / stride_px), high, low, stride_px * net.mpp, cop)
            mine = np.vstack([mine, click, chain.points * stride_px])
        if len(used):  # places that an earlier type has used are its
            mine = mine[np.hypot(*(mine[:, None] - used[None]).T).min(0) * net.mpp > cop.dedup_um]
        used = np.vstack([used, mine])
        for masks in decode(net, embeddings, 0, mine.astype(np.float32), masks_config):
            inside = (masks.logits > 0).repeat_interleave(masks.mask_stride_px, 1).repeat_interleave(masks.mask_stride_px, 2).numpy()
            for mask, score, (x0, y0), point in zip(inside, masks.predicted_iou.tolist(), masks.origin_xy.tolist(), masks.points_xy.numpy(), strict=True):
                if canvas.insert(mask, score, int(x0), int(y0)):
                    types.append(t)
                    points.append(point)
    return canvas.labels, np.array(types, np.int32), np.array(points, np.float64).reshape(-1, 2)


def _open_context(
    image: NDArray[np.uint8], config: RunConfig, seeds: Seeds | None = None, model: PromptableModel | None = None
) -> tuple[WorkerContext, RunPlan]:
    """The tools for one image in memory (H, W, 3) at ``config.mpp``, and what its end needs."""
    if config.mpp is None:
        raise ConfigError("image: microns per pixel are not known; set mpp (for example mpp=0.25)")
    check(config, "image")
    reader = ArrayReader(image, config.mpp)
    if seeds:
        seeds, doubts = check_seeds(dataclasses.replace(seeds, slide=None), reader.info)
        for doubt in doubts:
            logger.warning("%s", doubt)
    model = model or load_model(config.model, config.device, config.precision)
    resolved = resolve(config, config.model, maps=model.has_maps, clicked=seeds is not None)
    lattice = Lattice(config.mpp, model.mpp)
    bank = build_bank(reader, model, seeds, lattice, resolved, chains=resolved.method == "cop") if seeds else None
    job = RunSpec("image", resolved, lattice, SearchArea(None, None), bank, Path(), "")
    sheet = RunPlan(reader.info, resolved, bank, {}, "", "", "", model.descriptor_size, 0.0)
    return WorkerContext(job, reader, model, Claims(Path())), sheet
