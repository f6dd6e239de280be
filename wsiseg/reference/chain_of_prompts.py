"""Chain-of-Prompts on one image as published (arXiv 2605.29429): no bank, no competition between types, the first click wins."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import torch

from wsiseg.config import COP_FORMS, RunConfig
from wsiseg.errors import ConfigError
from wsiseg.formats.seeds import check_seeds
from wsiseg.geometry import Box, round_up
from wsiseg.reference.cop_label_map import Canvas
from wsiseg.runs.image import open_image
from wsiseg.runtime.text import did_you_mean
from wsiseg.segmentation.decoding import decode
from wsiseg.segmentation.prompts.chain_of_prompts import farthest_point_recursion
from wsiseg.slide import read_region

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsiseg.models.contract import PromptableModel
    from wsiseg.records import Seeds, WindowMasks


@torch.inference_mode()
def chain_image(
    image: NDArray[np.uint8],
    *,
    mpp: float,
    seeds: Seeds,
    like: str = "paper",
    config: RunConfig | None = None,
    model: PromptableModel | None = None,
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
    opened = open_image(image, config, None, model)
    seeds, _ = check_seeds(dataclasses.replace(seeds, slide=None), opened.reader.info)
    net, lattice = opened.model, opened.lattice
    width, height = (round(n * mpp / net.mpp) for n in (image.shape[1], image.shape[0]))
    box = Box(0, 0, *(net.input_px or round_up(n, net.stride_px) for n in (width, height)))
    if max(width, height) > min(box.width, box.height) and net.input_px:
        raise ConfigError(
            f"image: {width} x {height} px at the model's scale, more than its input of {net.input_px} px; crop the image"
        )
    pixels = read_region(opened.reader, box, lattice)
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
            chain = farthest_point_recursion(
                (click[0] / stride_px, click[1] / stride_px), high, low, stride_px * net.mpp, cop
            )
            mine = np.vstack([mine, click, chain * stride_px])
        if len(used):  # places that an earlier type has used are its
            mine = mine[np.hypot(*(mine[:, None] - used[None]).T).min(0) * net.mpp > cop.dedup_um]
        used = np.vstack([used, mine])
        for masks in decode(net, embeddings, 0, mine.astype(np.float32), masks_config):
            inside = _painted(masks)
            for mask, score, (x0, y0), point in zip(
                inside, masks.predicted_iou.tolist(), masks.origin_xy.tolist(), masks.points_xy.numpy(), strict=True
            ):
                if canvas.insert(mask, score, int(x0), int(y0)):
                    types.append(t)
                    points.append(point)
    return canvas.labels, np.array(types, np.int32), np.array(points, np.float64).reshape(-1, 2)


def _painted(masks: WindowMasks) -> NDArray[np.bool_]:
    """The masks on model px: a px is inside when the logit that covers its centre is."""
    down, across = (
        torch.arange(round(n * masks.mask_stride_px)).add(0.5).div(masks.mask_stride_px).long()
        for n in masks.logits.shape[1:]
    )
    inside: NDArray[np.bool_] = (masks.logits > 0)[:, down[:, None], across].numpy()
    return inside
