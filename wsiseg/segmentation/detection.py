"""Detection on one tile: what a detector finds of each described type, in crowded places on quarters of the tile, as masks on windows.

::

    tile's embedding  ->  a pass per phrase (or per type with examples)  ->  few instances: masks
                                                                         ->  many: quarter of the tile, enlarged, encoded  ->  a pass ...

A detector has a fixed number of queries, 200 in SAM 3 [1]_, and lymphoid tissue has more nuclei on a tile. A pass that finds nearly as many as it
can is repeated on four overlapping quarters, each as large as a tile to the network; a quarter keeps what is centred in its own part.

References
----------
.. [1] Carion et al.: SAM 3: Segment Anything with Concepts, 2025, arXiv:2511.16719.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from wsiseg.models.contract import concept_model
from wsiseg.records import Concept, WindowMasks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from wsiseg.config import DetectionConfig
    from wsiseg.geometry import Box
    from wsiseg.models.contract import PromptableModel
    from wsiseg.records import DescribedType, Detections, Embeddings, Examples

_QUARTER = (
    5 / 8
)  #: side of a quarter: half of its parent and an eighth more, 31 um of SAM 3's 252, so that cells at its inner borders are whole
WINDOW = 64  #: side of a mask's window in cells, as of SAM's masks; larger masks are kept whole
_DESCRIBED = 16  #: masks of the size of a tile that are described together: each pools all features


@dataclass(frozen=True, kw_only=True)
class _Field:
    """A square of the tile that the network sees as if it were a tile.

    Attributes
    ----------
    corner_xy, side_px
        Place on the tile, model px.
    core
        (4,): x0, y0, x1, y1 of the part whose cells it reports, model px of the tile.
    embeddings, index
        Its embedding, as the ``index``-th of those encoded together.
    """

    corner_xy: NDArray[np.float64]
    side_px: int
    core: NDArray[np.float64]
    embeddings: Embeddings
    index: int


@dataclass(frozen=True, kw_only=True)
class _Request:
    """A type to look for on a field: row of the type, and the concept, its boxes in px of the field as the network sees it."""

    row: int
    concept: Concept


class Detector:
    """The detector's work on one tile.

    Parameters
    ----------
    model
        Has a detector.
    types
        The T types that are looked for.
    config
        Thresholds.
    """

    def __init__(self, model: PromptableModel, types: Sequence[DescribedType], config: DetectionConfig) -> None:
        self.model, self.types, self.config = concept_model(model), types, config
        self.detector, self.side = self.model.detector, self.model.input_px

    @torch.inference_mode()
    def find(
        self,
        pixels: NDArray[np.uint8] | None,
        core: Box,
        embeddings: Embeddings,
        index: int,
        examples: Sequence[Examples | None] | None = None,
    ) -> list[WindowMasks]:
        """Find the instances of every type.

        Parameters
        ----------
        pixels
            uint8 of shape (side, side, 3): the tile; without them crowded tiles are not searched in quarters.
        core
            The part of the tile in which an instance's centre must lie, model px of the tile.
        embeddings, index
            The tile's embedding.
        examples
            Of each type; ``None`` for a type that is not looked for here. Absent: phrases alone.

        Returns
        -------
        list of WindowMasks
            On the CPU. ``predicted_iou`` is the detector's score and ``stability`` 1; ``points_xy`` are the masks' centres.
        """
        whole = _Field(
            corner_xy=np.zeros(2), side_px=self.side, core=np.array(core, float), embeddings=embeddings, index=index
        )
        requests = []
        for row, of in enumerate(self.types):
            shown = None if examples is None else examples[row]
            if examples is None or shown is not None:
                requests += [_Request(row=row, concept=_concept(tokens, shown)) for tokens in of.tokens]
        found: list[WindowMasks] = []
        self._search(pixels, whole, whole, requests, found)
        return [masks for masks in found if len(masks.predicted_iou)]

    def _search(
        self,
        pixels: NDArray[np.uint8] | None,
        whole: _Field,
        field: _Field,
        requests: list[_Request],
        found: list[WindowMasks],
    ) -> None:
        """Add what is found on a field to ``found``; crowded requests are passed on to its quarters."""
        smallest_px = self.config.smallest_field_um / self.model.mpp
        limit = self.config.crowded * self.detector.max_instances
        crowded: list[tuple[_Request, NDArray[np.float32]]] = []
        for request in requests:
            detections = self.detector.detect(field.embeddings, field.index, request.concept, self.config.min_score)
            if pixels is not None and len(detections.scores) > limit and field.side_px * _QUARTER >= smallest_px:
                surest = torch.argsort(detections.scores, descending=True, stable=True)
                crowded.append((request, detections.boxes_px[surest].cpu().numpy()))
            else:
                found += self._masks(whole, field, detections, request.row)
        if not crowded or pixels is None:
            return
        for corner_xy, side_px, core in _quarters(field):
            narrowed = [self._narrowed(r, boxes, field, corner_xy, side_px) for r, boxes in crowded]
            wanted = [r for r in narrowed if r is not None]
            if wanted:
                image = _enlarged(pixels, corner_xy, side_px, self.side).to(self.model.device)
                embeddings = self.model.encode(image)
                quarter = _Field(corner_xy=corner_xy, side_px=side_px, core=core, embeddings=embeddings, index=0)
                self._search(pixels, whole, quarter, wanted, found)

    def _narrowed(
        self, request: _Request, found: NDArray[np.float32], field: _Field, corner_xy: NDArray[np.float64], side_px: int
    ) -> _Request | None:
        """The request on a quarter of ``field``; ``None`` when a type that is shown by boxes has none there.

        Without one of the given boxes in a quarter, what the field's own pass ``found`` there, the surest first, stands in.
        """
        concept = request.concept
        if not concept.is_example.any():
            return request
        to_tile, to_quarter = field.side_px / self.side, self.side / side_px

        def placed(boxes: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
            """Boxes of the field in px of the quarter, and which of them lie in it whole."""
            moved = (boxes * to_tile + np.tile(field.corner_xy - corner_xy, 2)) * to_quarter
            inside: NDArray[np.bool_] = np.logical_and.reduce((moved >= 0) & (moved <= self.side), axis=1)
            return moved.astype(np.float32), inside

        boxes, inside = placed(concept.boxes_px)
        if (inside & concept.is_example).any():
            return replace(
                request, concept=replace(concept, boxes_px=boxes[inside], is_example=concept.is_example[inside])
            )
        boxes, inside = placed(found)
        boxes = boxes[inside][: self.config.examples]
        if not len(boxes):
            return None
        return replace(request, concept=replace(concept, boxes_px=boxes, is_example=np.ones(len(boxes), bool)))

    def _masks(self, whole: _Field, field: _Field, detections: Detections, row: int) -> Iterator[WindowMasks]:
        """The masks of what is centred in the field's core: those that fit into windows, then the others."""
        inside = _in_boxes(detections)
        scale = detections.mask_stride_px * field.side_px / self.side  # px of the tile per cell of the masks
        area = inside.sum((1, 2))
        steps = torch.arange(inside.shape[2], device=inside.device) + 0.5
        centre = torch.stack([(inside.sum(axis) * steps).sum(1) / area.clamp_min(1) for axis in (1, 2)], 1).double()
        centre = centre * scale + torch.from_numpy(field.corner_xy).to(centre)
        low, high = torch.from_numpy(field.core).to(centre).view(2, 2)
        seam = self.config.seam_um / self.model.mpp
        own = ((centre >= low - seam) & (centre < high + seam)).all(1) & (area > 0)
        logits, centre, scores = (v[own] for v in (detections.logits, centre, detections.scores))
        start, fits = _window_start(inside[own])
        for rows, corner, side in ((fits, start, WINDOW), (~fits, torch.zeros_like(start), logits.shape[2])):
            if rows.any():
                cut = logits[rows] if side == logits.shape[2] else _cut(logits[rows], corner[rows], side)
                origin = corner[rows].double() * scale + torch.from_numpy(field.corner_xy).to(centre)
                score = scores[rows].float().cpu()
                concept_scores = torch.zeros(len(score), len(self.types))
                concept_scores[:, row] = score
                yield WindowMasks(
                    logits=cut.float().cpu(),
                    origin_xy=origin.cpu(),
                    mask_stride_px=scale,
                    predicted_iou=score,
                    stability=torch.ones_like(score),
                    descriptors=self._describe(whole, cut, origin, scale).half().cpu(),
                    points_xy=centre[rows].float().cpu(),
                    full_tile=side == logits.shape[2],
                    concept_scores=concept_scores,
                )

    def _describe(self, whole: _Field, logits: Tensor, origin: Tensor, scale: float) -> Tensor:
        """Descriptors (N, D) from the features of the whole tile, also for masks of a quarter: cells are compared at one scale."""
        model, cell = self.model, self.model.mask_stride_px
        if math.isclose(scale, cell):
            corner = (origin / model.stride_px).round().long()
        else:
            grid, per_patch = self.side // model.stride_px, round(model.stride_px / cell)
            patches = min(math.ceil(logits.shape[2] * scale / model.stride_px) + 1, grid)
            corner = torch.floor(origin / model.stride_px).long().clamp(0, grid - patches)
            at = corner.double() * model.stride_px
            logits = _resampled(logits.float(), origin, scale, at, cell, patches * per_patch)
        index = torch.full((len(logits),), whole.index, dtype=torch.long, device=logits.device)
        step = max(_DESCRIBED * (self.side / cell / logits.shape[2]) ** 2 // 1, 1)
        parts = [slice(k, k + int(step)) for k in range(0, len(logits), int(step))]
        return torch.cat([model.describe(whole.embeddings, index[p], corner[p], logits[p].float()) for p in parts])


def _concept(tokens: NDArray[np.float32], shown: Examples | None) -> Concept:
    if shown is None:
        return Concept(text=tokens)
    return Concept(
        text=tokens,
        boxes_px=np.concatenate([shown.positive, shown.negative]),
        is_example=np.arange(len(shown.positive) + len(shown.negative)) < len(shown.positive),
    )


def _quarters(field: _Field) -> Iterator[tuple[NDArray[np.float64], int, NDArray[np.float64]]]:
    """Corner, side and core of the four quarters of a field."""
    side = int(np.ceil(field.side_px * _QUARTER))
    middle = field.corner_xy + field.side_px / 2
    for place in itertools.product((0, 1), (0, 1)):
        later = np.array(place, bool)
        corner = field.corner_xy + later * (field.side_px - side)
        low = np.where(later, np.maximum(field.core[:2], middle), field.core[:2])
        high = np.where(later, field.core[2:], np.minimum(field.core[2:], middle))
        if (low < high).all():
            yield corner, side, np.concatenate([low, high])


def _enlarged(pixels: NDArray[np.uint8], corner_xy: NDArray[np.float64], side_px: int, size: int) -> Tensor:
    """A square of the tile, enlarged by bilinear interpolation -> uint8 (1, 3, size, size)."""
    x, y = corner_xy.astype(int)
    part = torch.from_numpy(pixels[y : y + side_px, x : x + side_px].astype(np.float32)).permute(2, 0, 1)[None]
    larger = F.interpolate(part, size=(size, size), mode="bilinear", align_corners=False)
    return larger.round().clamp(0, 255).byte()


def _in_boxes(detections: Detections) -> Tensor:
    """The masks (N, h, w), each inside of its box; where nothing of it is there, as it is.

    A mask may also cover other objects of its kind. The box says which one is meant; tracing keeps the part connected to it.
    """
    inside = detections.logits > 0
    steps = torch.arange(inside.shape[2], device=inside.device) + 0.5
    low, high = (detections.boxes_px / detections.mask_stride_px).view(-1, 2, 2, 1).unbind(1)  # (N, 2, 1), x and y
    across, down = ((steps >= low - 1) & (steps <= high + 1)).unbind(1)
    boxed = inside & across[:, None, :] & down[:, :, None]
    return torch.where(boxed.any(1).any(1)[:, None, None], boxed, inside)


def _window_start(inside: Tensor) -> tuple[Tensor, Tensor]:
    """First column and row (N, 2) of the window round each mask (N, h, w), on multiples of four cells; and which masks fit into one."""
    size = inside.shape[2]
    starts, fits = [], torch.full((len(inside),), size > WINDOW, device=inside.device)
    for axis in (1, 2):
        line = inside.any(axis)  # columns, then rows
        first = line.int().argmax(1)
        last = size - 1 - line.flip(1).int().argmax(1)
        start = ((first + last + 1 - WINDOW) // 8 * 4).clamp(0, max(size - WINDOW, 0))
        fits &= ((first > start) | (start == 0)) & ((last < start + WINDOW - 1) | (start == size - WINDOW))
        starts.append(start)
    return torch.stack(starts, 1), fits


def _cut(logits: Tensor, start: Tensor, side: int) -> Tensor:
    """Windows (N, side, side) of masks (N, h, w)."""
    steps = torch.arange(side, device=logits.device)
    rows, columns = start[:, 1:] + steps, start[:, :1] + steps
    which = torch.arange(len(logits), device=logits.device)
    return logits[which[:, None, None], rows[:, :, None], columns[:, None, :]]


def _resampled(logits: Tensor, origin: Tensor, scale: float, corner: Tensor, cell: float, side: int) -> Tensor:
    """Masks on windows at ``origin`` (N, 2), px, with cells of ``scale`` px -> on windows of ``side`` cells of ``cell`` px at ``corner``, px.

    Outside of their windows there is no mask.
    """
    nothing, size = 10.0, logits.shape[2]
    centres = (torch.arange(side, device=logits.device, dtype=torch.float64) + 0.5) * cell
    at = (corner[:, :, None] + centres - origin[:, :, None]) / scale  # (N, 2, side), cells of the old window
    at = (at / size * 2 - 1).float()
    grid = torch.stack([at[:, 0, None, :].expand(-1, side, -1), at[:, 1, :, None].expand(-1, -1, side)], -1)
    return F.grid_sample(logits[:, None] + nothing, grid, padding_mode="zeros", align_corners=False)[:, 0] - nothing
