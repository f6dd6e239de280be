"""Masks of one image into labels, the best score first: for what has one mask per prompt and may hold masks of whole clusters.

Symbol  here          meaning
s       scores        order of the visit, usually predicted IoU x stability
q       iou_pred      predicted IoU; masks below ``score_threshold`` are not visited
a       areas         pixels that each kept mask got

Overlap:  a mask of which more than ``max_overlap`` is taken already is refused
Cluster:  a mask that covers more than ``cluster_cover`` of what ``cluster`` or more other prompts got joins what is apart, and is refused
Size:     a mask for which fewer than ``min_size`` free pixels remain is refused
Paint:    a kept mask takes its free pixels

The order, ``max_overlap``, ``score_threshold`` and ``min_size`` are those of the second version of automatic prompt generation, which its authors
([1]_) develop in the open and have not published; they measured them on light microscopy, not on stained tissue. The rule on clusters is ours.

Limits: L1 a cluster's mask that scores better than all its members comes first, when nothing is there that it could cover: it stays, and they
are refused. L2 what a kept mask got need not be connected.
Not stated: U1 a prompt counts as covered by the pixels it got, whether or not its point lies in the mask.

On slides this is not used: overlaps are resolved among polygons, best score first, so that the order of tiles does not matter (stitching/resolve.py).

References
----------
.. [1] Archit, Pape: Revisiting foundation models for cell instance segmentation, MIDL 2026, arXiv:2603.17845 (the first version).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

    from wsiseg.geometry import Box


@dataclass(frozen=True, kw_only=True)
class ScoreMerge:
    """Conditions for refusing a mask. Sizes are in pixels of the image.

    Attributes
    ----------
    max_overlap
        Share of a mask that may be taken already.
    score_threshold
        Predicted IoU that a mask must reach.
    min_size
        Free pixels that must remain.
    cluster
        Prompts of other components, from this number on, that one mask must not cover.
    cluster_cover
        A prompt is covered when more than this share of its pixels is.
    """

    max_overlap: float = 0.15
    score_threshold: float = 0.6
    min_size: int = 50
    cluster: int = 2
    cluster_cover: float = 0.9


def merge_by_score(
    crops: Sequence[NDArray[np.bool_]],
    boxes: Sequence[Box],
    scores: ArrayLike,
    prompts: NDArray[np.floating],
    shape: tuple[int, int],
    config: ScoreMerge | None = None,
    *,
    iou_pred: ArrayLike | None = None,
) -> tuple[NDArray[np.int32], NDArray[np.intp]]:
    """Masks into one label image; time grows with the sum of their boxes, not with the number of pairs.

    Parameters
    ----------
    crops
        bool, each of the shape of its box.
    boxes
        Half-open, inside the image.
    scores
        Shape (N,): the best is visited first, ties by the lower index.
    prompts
        Shape (N, 2), any frame: masks with the same prompt belong to the same component.
    shape
        Height and width of the image.
    config
        Defaults when absent.
    iou_pred
        Shape (N,), for ``score_threshold``; ``scores`` when absent.

    Returns
    -------
    labels
        int32 of shape ``shape``: 0, or the number of the kept mask, from 1.
    kept
        intp: index of each kept mask, in the order of their numbers.
    """
    config = config or ScoreMerge()
    scores = np.asarray(scores, float)
    quality = scores if iou_pred is None else np.asarray(iou_pred, float)
    names = [tuple(p) for p in np.asarray(prompts).tolist()]
    labels = np.zeros(shape, np.int32)
    kept: list[int] = []
    areas: list[int] = []
    order = np.argsort(-scores, kind="stable")
    for k in order[quality[order] >= config.score_threshold].tolist():
        box, mask = boxes[k], crops[k]
        window = labels[box.y0 : box.y1, box.x0 : box.x1]
        below = window[mask]
        taken = below[below > 0]
        free = len(below) - len(taken)
        if free < max(config.min_size, 1) or len(taken) / len(below) > config.max_overlap:
            continue
        covered = {names[kept[n]] for n in _covered(taken, areas, config.cluster_cover)} - {names[k]}
        if len(covered) >= config.cluster:
            continue
        kept.append(k)
        areas.append(free)
        window[mask & (window == 0)] = len(kept)
    return labels, np.array(kept, np.intp)


def _covered(taken: NDArray[np.int32], areas: list[int], cover: float) -> list[int]:
    """Indices in ``areas`` of the labels of which more than the share ``cover`` lies under a mask, whose pixels have labels ``taken`` (n,)."""
    numbers, counts = np.unique(taken, return_counts=True)
    return [n - 1 for n, count in zip(numbers.tolist(), counts.tolist(), strict=True) if count / areas[n - 1] > cover]
