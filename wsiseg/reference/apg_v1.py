"""Automatic prompt generation on one image as published: maps to prompts to masks to labels.   Source: arXiv:2603.17845 [1]_, steps 1-7.

Symbol  here                 shape, range
f       foreground           (h, w), [0, 1]
c       centre distance      (h, w), [0, 1]; 0 at the centre
b       boundary distance    (h, w), [0, 1]; 0 innermost, 1 at the boundary
s       score                predicted IoU x stability, one per mask

Steps: prompts_v1(): seed = (c < t_c) & (b < t_b) & not (f < t_f)  ->  4-connected components  ->  one point each
       decode(), stability_v1(): one mask per point, its predicted IoU and its stability
       filter_and_nms_v1(): area > min_size, then greedy suppression of masks by s
       paint_v1(): largest first into what is free, then fragments become objects

Departures: D1 the distance transform is exact over the whole image; the reference computes it in blocks of 512 px with a halo of 16 px, which
can move the point of a component deeper than that. D2 boxes are clipped with x to the width and y to the height; the reference has the two
swapped, which shows on images that are not square. D3 an empty first mask is not decoded again from its box: it has none. D4 of equal scores,
depths or areas the first comes first, so that the result is the same on every machine.
Not stated: U1 a box grows by its own width and height, not by the image's; these run from the first pixel to the last.

Compared with micro-sam 1.8.14 on the same masks and scores, at four settings: the same labels in every pixel.

Kept as published: nothing is refused for a low score, and where masks compete the larger one wins, so that a mask of a whole cluster swallows
its members unless their IoU with it exceeds ``nms``. On slides this is not used: overlaps are resolved best score first. For one image without that
flaw see score_ordered_merge.py.

References
----------
.. [1] Archit, Pape: Revisiting foundation models for cell instance segmentation, MIDL 2026, arXiv:2603.17845.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import ndimage
from skimage.measure import label
from skimage.segmentation import find_boundaries

from wsiseg.errors import ConfigError
from wsiseg.geometry import Box

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import ArrayLike, NDArray

    Decoder = Callable[[NDArray[np.float64]], tuple[NDArray[np.float32], NDArray[np.floating]]]


@dataclass(frozen=True, kw_only=True)
class ApgV1:
    """The published parameters. Sizes are in pixels of the image.

    Attributes
    ----------
    foreground, centre, boundary
        A seed has foreground at or above, and both distances below these.
    min_size
        A mask is kept when its area is greater, a painted fragment when it is not smaller.
    nms
        A mask is suppressed when its overlap with a better one is greater.
    intersection_over_min
        Overlap is the intersection over the smaller area, not over the union.
    mask_threshold
        Logits above it are in the mask.
    batch
        Prompts per call of the decoder.
    refine_with_box
        Decode a second time, from the box of the first mask.
    box_extension
        Share of its width and height by which that box grows on each side.
    """

    foreground: float = 0.5
    centre: float = 0.5
    boundary: float = 0.5
    min_size: int = 25
    nms: float = 0.9
    intersection_over_min: bool = False
    mask_threshold: float = 0.0
    batch: int = 32
    refine_with_box: bool = False
    box_extension: float = 0.01


class Cutout(NamedTuple):
    """A mask without the empty image around it.

    Attributes
    ----------
    box
        Half-open, px of the image; of width and height 0 when the mask is empty.
    mask
        bool of shape (box.height, box.width).
    """

    box: Box
    mask: NDArray[np.bool_]


def prompts_v1(
    f: NDArray[np.floating],
    c: NDArray[np.floating],
    b: NDArray[np.floating],
    *,
    foreground: float = ApgV1.foreground,
    centre: float = ApgV1.centre,
    boundary: float = ApgV1.boundary,
) -> NDArray[np.float64]:
    """One point per component of the seeds, where it is deepest (steps 1-4).

    Depth is the distance to the nearest boundary pixel: a background pixel beside a component, a pixel where two components touch at a corner,
    or any pixel of the image's first and last rows and columns.

    Parameters
    ----------
    f, c, b
        Maps of shape (h, w), probabilities; not smoothed.
    foreground, centre, boundary
        Thresholds.

    Returns
    -------
    ndarray
        float64 of shape (N, 2): x, y of pixels (integers, pixel-centre frame), in reading order of the components' first pixels. Of equally deep
        pixels it is the first in reading order. N = 0 is valid.
    """
    seed = (c < centre) & (b < boundary)
    seed[f < foreground] = False
    components, count = ndimage.label(seed)  # 4-connectivity
    if not count:
        return np.empty((0, 2))
    outer = find_boundaries(components, mode="outer")
    outer[[0, -1], :] = True
    outer[:, [0, -1]] = True
    points = np.empty((count, 2))
    for k, (rows, columns) in enumerate(ndimage.find_objects(components)):
        # Grown by one pixel, a component's box holds its nearest boundary pixels: its own outline on the axes is never farther. Hence exact: D1.
        y0, x0 = max(rows.start - 1, 0), max(columns.start - 1, 0)
        window = np.s_[y0 : rows.stop + 1, x0 : columns.stop + 1]
        depth = ndimage.distance_transform_edt(~outer[window])
        depth[components[window] != k + 1] = -1
        y, x = np.unravel_index(depth.argmax(), depth.shape)  # D4
        points[k] = x0 + x, y0 + y
    return points


def stability_v1(
    logits: NDArray[np.floating], threshold: float = ApgV1.mask_threshold, offset: float = 1.0
) -> NDArray[np.float64]:
    """Stability of masks under a change of their threshold.

    Parameters
    ----------
    logits
        Logits of shape (N, h, w).
    threshold
        Logit at which a mask is cut.
    offset
        Offset by which it is raised and lowered.

    Returns
    -------
    ndarray
        float64 of shape (N,), [0, 1]: area above ``threshold + offset`` over area above ``threshold - offset``; 0 where the latter is 0.
    """
    high = (logits > threshold + offset).sum((1, 2)).astype(float)
    low = (logits > threshold - offset).sum((1, 2))
    return np.asarray(high / np.maximum(low, 1))


def cut_out(masks: NDArray[np.bool_]) -> list[Cutout]:
    """Masks without the empty image around them.

    Parameters
    ----------
    masks
        bool of shape (N, h, w).

    Returns
    -------
    list of Cutout
        Copies, so that ``masks`` can be freed.
    """
    found = []
    for mask in masks:
        rows = np.flatnonzero(mask.any(1))
        if not len(rows):
            found.append(Cutout(Box(0, 0, 0, 0), np.zeros((0, 0), bool)))
            continue
        y0, y1 = int(rows[0]), int(rows[-1]) + 1
        columns = np.flatnonzero(mask[y0:y1].any(0))
        x0, x1 = int(columns[0]), int(columns[-1]) + 1
        found.append(Cutout(Box(x0, y0, x1, y1), mask[y0:y1, x0:x1].copy()))
    return found


def grown_boxes(
    masks: Sequence[Cutout], shape: tuple[int, int], extension: float = ApgV1.box_extension
) -> NDArray[np.float64]:
    """Box prompts of masks.

    Parameters
    ----------
    masks
        Not empty ones.
    shape
        Height and width of the image.
    extension
        Share of its width and height by which a box grows on each side.

    Returns
    -------
    ndarray
        float64 of shape (N, 4): x0, y0, x1, y1, pixel indices of the first and last pixel (SAM's boxes), grown, inside the image.
    """
    boxes = np.array([m.box for m in masks], float).reshape(-1, 4) - (0, 0, 1, 1)
    growth = np.tile(boxes[:, 2:] - boxes[:, :2], 2) * extension  # U1
    height, width = shape
    return np.clip(boxes + growth * (-1, -1, 1, 1), 0, (width, height, width, height))  # D2


def filter_and_nms_v1(
    masks: NDArray[np.bool_] | Sequence[Cutout],
    iou_pred: ArrayLike,
    stability: ArrayLike,
    *,
    min_size: int = ApgV1.min_size,
    nms: float = ApgV1.nms,
    intersection_over_min: bool = ApgV1.intersection_over_min,
) -> NDArray[np.intp]:
    """Filter masks by area and suppress duplicates (steps 6 and 7).

    Parameters
    ----------
    masks
        bool of shape (N, h, w), or their cut-outs.
    iou_pred, stability
        Arrays of shape (N,); their product is the score.
    min_size
        Area that a mask must exceed, px.
    nms
        A mask is suppressed when its overlap with one kept before it is greater.
    intersection_over_min
        Overlap is the intersection over the smaller area, not over the union.

    Returns
    -------
    ndarray
        intp: indices of those kept, best score first, of equal scores the lower index first. No pair of them overlaps by more than ``nms``.
    """
    masks = _cutouts(masks)
    score = np.asarray(iou_pred, float) * np.asarray(stability, float)
    areas = np.array([m.mask.sum() for m in masks], np.int64)
    boxes = np.array([m.box for m in masks], np.int64).reshape(-1, 4)
    order = np.argsort(-score, kind="stable")  # D4
    order = order[areas[order] > max(min_size, 0)]
    kept: list[int] = []
    while len(order):
        best, order = int(order[0]), order[1:]
        kept.append(best)
        # Boxes and areas bound what two masks share, and the bound decides nearly all pairs.
        sides = np.minimum(boxes[order, 2:], boxes[best, 2:]) - np.maximum(boxes[order, :2], boxes[best, :2])
        bound = np.minimum(np.maximum(sides, 0).prod(1), np.minimum(areas[order], areas[best]))
        near = np.flatnonzero(_overlap(bound, areas[order], areas[best], intersection_over_min) > nms)
        shared = np.array([_shared(masks[best], masks[j]) for j in order[near]], np.int64)
        same = _overlap(shared, areas[order[near]], areas[best], intersection_over_min) > nms
        order = np.delete(order, near[same])
    return np.array(kept, np.intp)


def _overlap(
    shared: NDArray[np.int64], areas: NDArray[np.int64], area: np.int64, over_min: bool
) -> NDArray[np.float64]:
    """IoU, or intersection over the smaller area, of masks (n,) with one mask, from the pixels that they share with it."""
    return np.asarray(shared / (np.minimum(areas, area) if over_min else areas + area - shared))


def _shared(one: Cutout, two: Cutout) -> int:
    """Pixels that are in both masks."""
    a, b = one.box, two.box
    x0, y0, x1, y1 = max(a.x0, b.x0), max(a.y0, b.y0), min(a.x1, b.x1), min(a.y1, b.y1)
    if x0 >= x1 or y0 >= y1:
        return 0
    parts = (m.mask[y0 - m.box.y0 : y1 - m.box.y0, x0 - m.box.x0 : x1 - m.box.x0] for m in (one, two))
    return int(np.count_nonzero(np.logical_and(*parts)))


def paint_v1(
    masks: NDArray[np.bool_] | Sequence[Cutout], shape: tuple[int, int], *, min_size: int = ApgV1.min_size
) -> NDArray[np.int32]:
    """Masks into one label image, the largest first (step 7).

    Parameters
    ----------
    masks
        bool of shape (N, h, w), or their cut-outs; of equal areas the first is painted first.
    shape
        Height and width of the image.
    min_size
        Smaller fragments are dropped, px.

    Returns
    -------
    ndarray
        int32 of shape ``shape``: 0, or the number of the object, from 1, in reading order of their first pixels. An object is a 4-connected part
        of what a mask got: the pixels that no larger mask had taken.
    """
    masks = _cutouts(masks)
    painted = np.zeros(shape, np.int32)
    areas = np.array([m.mask.sum() for m in masks], np.int64)
    for number, k in enumerate(np.argsort(-areas, kind="stable"), 1):  # D4
        box, mask = masks[k]
        window = painted[box.y0 : box.y1, box.x0 : box.x1]
        window[mask & (window == 0)] = number
    fragments: NDArray[np.intp] = label(painted, connectivity=1)
    keep = np.bincount(fragments.ravel()) >= min_size
    keep[0] = False
    return np.where(keep, np.cumsum(keep), 0).astype(np.int32)[fragments]


def segment_v1(
    f: NDArray[np.floating],
    c: NDArray[np.floating],
    b: NDArray[np.floating],
    decode: Decoder,
    *,
    config: ApgV1 | None = None,
    decode_boxes: Decoder | None = None,
) -> NDArray[np.int32]:
    """Run the whole method on one image. Full-size masks are held for one batch at a time.

    Parameters
    ----------
    f, c, b
        Maps of shape (h, w), probabilities.
    decode
        Takes points (n, 2) of :func:`prompts_v1`, n <= ``config.batch``; gives logits (n, h, w) and predicted IoU (n,), one mask per point.
    config
        The published parameters when absent.
    decode_boxes
        The same for boxes (n, 4) of :func:`grown_boxes`; needed for ``refine_with_box``.

    Returns
    -------
    ndarray
        int32 of shape (h, w): 0, or the number of the object, from 1.

    Raises
    ------
    ConfigError
        ``refine_with_box`` without ``decode_boxes``.
    """
    config = config or ApgV1()
    if config.refine_with_box and decode_boxes is None:
        raise ConfigError("refine_with_box=True: pass decode_boxes, which decodes masks from boxes")
    height, width = f.shape
    shape = (height, width)
    points = prompts_v1(f, c, b, foreground=config.foreground, centre=config.centre, boundary=config.boundary)
    masks, iou_pred, stability = decode_all(decode, points, shape, config)
    if config.refine_with_box and decode_boxes is not None:
        found = [k for k, m in enumerate(masks) if m.mask.size]  # D3
        boxes = grown_boxes([masks[k] for k in found], shape, config.box_extension)
        again, iou_pred[found], stability[found] = decode_all(decode_boxes, boxes, shape, config)
        for k, mask in zip(found, again, strict=True):
            masks[k] = mask
    kept = filter_and_nms_v1(
        masks,
        iou_pred,
        stability,
        min_size=config.min_size,
        nms=config.nms,
        intersection_over_min=config.intersection_over_min,
    )
    return paint_v1([masks[k] for k in kept], shape, min_size=config.min_size)


def decode_all(
    decode: Decoder, prompts: NDArray[np.float64], shape: tuple[int, int], config: ApgV1
) -> tuple[list[Cutout], NDArray[np.float64], NDArray[np.float64]]:
    """Masks of all prompts, batch by batch.

    Parameters
    ----------
    decode
        As for :func:`segment_v1`.
    prompts
        (N, ...): what ``decode`` takes.
    shape
        Height and width of its logits.
    config
        ``batch`` and ``mask_threshold``.

    Returns
    -------
    masks, iou_pred, stability
        Cut-outs, and two float64 of shape (N,).
    """
    masks: list[Cutout] = []
    iou_pred, stability = np.empty(len(prompts)), np.empty(len(prompts))
    for start in range(0, len(prompts), config.batch):
        part = slice(start, start + config.batch)
        logits, iou_pred[part] = decode(prompts[part])
        if logits.shape[1:] != shape:
            raise ValueError(
                f"logits of shape {logits.shape[1:]}: the maps' shape is {shape}; upsample the logits to it"
            )
        stability[part] = stability_v1(logits, config.mask_threshold)
        masks += cut_out(logits > config.mask_threshold)
    return masks, iou_pred, stability


def _cutouts(masks: NDArray[np.bool_] | Sequence[Cutout]) -> Sequence[Cutout]:
    return cut_out(masks) if isinstance(masks, np.ndarray) else masks
