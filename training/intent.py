"""Decoder of an intent: clicked cells in, map of every cell that is meant out.

The clicked cells are described by what the frozen network of :mod:`wsiseg.models.nuclei_compact` sees in them. Their description generates the
last layers that read the tile's features (conditional convolutions [1]_), so that one forward pass over a tile serves any number of intents::

    clicked cells -> description (267) -> set of positives, set of negatives -> query
    tile's p2, p4, p8 -> mixed features at stride 4
    query -> two generated 1x1 convolutions over the mixed features and their similarity to the clicked cells
          -> ``HYPOTHESES`` maps of logits, with the IoU that each is predicted to have

A click does not say whether it means this type or all nuclei; several hypotheses, as SAM answers an ambiguous point, keep them apart.

References
----------
.. [1] Tian, Shen, Chen: Conditional Convolutions for Instance Segmentation, ECCV 2020, arXiv:2003.05664.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsiseg.models.morphology import windows
from wsiseg.models.nuclei_compact import DESCRIPTOR_SIZE, MASK_STRIDE_PX, WINDOW_SIZE
from wsiseg.models.phrases import SIMILAR, WIDTH, WIDTHS, MixedPyramid, generated

if TYPE_CHECKING:
    from wsiseg.records import WindowMasks

HYPOTHESES = 3  #: maps per query
DESCRIPTION_SIZE = sum(WIDTHS.values()) + DESCRIPTOR_SIZE  #: numbers per clicked cell
_SET, _HIDDEN = 96, 16
_SHAPES = ((_HIDDEN, WIDTH + 2), (HYPOTHESES, _HIDDEN))
_PARAMETERS = sum(o * i + o for o, i in _SHAPES)


class Clicked(NamedTuple):
    """Clicked cells of Q queries: descriptions (Q, C, 267), and which are meant: 1, not meant: -1, padding: 0 (Q, C)."""

    descriptions: Tensor
    signs: Tensor


def describe_clicked(pyramid: dict[str, Tensor], batch_index: Tensor, masks: WindowMasks) -> Tensor:
    """Descriptions (N, 267) of cells: the pyramid's mean inside each mask, and the mask's descriptor.

    Parameters
    ----------
    pyramid
        Result of `wsiseg.models.phrases.pyramid_of`, (B, C, H/4, W/4) and for p8 (B, 96, H/8, W/8).
    batch_index
        int64 (N,): tile of each mask.
    masks
        Masks of single clicks, of the packaged network.
    """
    hard = (masks.logits > 0).float()[:, None]
    parts = []
    for name, stride in (("p2", 4), ("p4", 4), ("p8", 8)):
        cells = stride // MASK_STRIDE_PX
        share = F.avg_pool2d(hard, cells)
        seen = windows(
            pyramid[name], batch_index, torch.div(masks.origin_xy, stride, rounding_mode="floor"), WINDOW_SIZE // cells
        )
        parts.append((seen * share).sum((2, 3)) / share.sum((2, 3)).clamp_min(1e-3))
    return torch.cat([*parts, masks.descriptors], 1)


class IntentDecoder(MixedPyramid):
    """Maps of what a set of clicked cells means. Shapes: B tiles of H x W model px, Q queries."""

    def __init__(self) -> None:
        super().__init__()
        self.centre: Tensor
        self.spread: Tensor
        self.register_buffer("centre", torch.zeros(DESCRIPTION_SIZE))
        self.register_buffer("spread", torch.ones(DESCRIPTION_SIZE))
        self.member = nn.Sequential(nn.Linear(DESCRIPTION_SIZE, _SET), nn.ReLU(), nn.Linear(_SET, _SET), nn.ReLU())
        self.anchor = nn.Linear(DESCRIPTION_SIZE, SIMILAR)
        self.query = nn.Sequential(nn.Linear(2 * _SET + 3, 128), nn.ReLU(), nn.Linear(128, _PARAMETERS))
        self.sharpness = nn.Parameter(torch.tensor(8.0))
        self.quality = nn.Sequential(nn.Linear(2 * _SET + 3 + 4, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(
        self, features: Tensor, batch_index: Tensor, clicked: Clicked, *, all_nuclei: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Maps of Q queries.

        Parameters
        ----------
        features
            Result of :meth:`features`, (B, 48, h, w).
        batch_index
            int64 (Q,): tile of each query.
        clicked
            The clicked cells; at least one of each query is meant.
        all_nuclei
            bool (Q,): all nuclei are meant, not one type.

        Returns
        -------
        logits
            (Q, HYPOTHESES, h, w).
        predicted_iou
            (Q, HYPOTHESES), of each map with the cells that are meant, in [0, 1].
        """
        known = (clicked.descriptions - self.centre) / self.spread
        members = self.member(known)
        meant, other = (clicked.signs == 1).float()[..., None], (clicked.signs == -1).float()[..., None]
        sets = [(members * of).sum(1) / of.sum(1).clamp_min(1) for of in (meant, other)]
        facts = torch.cat([all_nuclei[:, None].float(), other.amax(1), meant.sum(1).reciprocal().clamp_max(1)], 1)
        summary = torch.cat([*sets, facts], 1)

        q, (h, w) = len(batch_index), features.shape[2:]
        unit = F.normalize(self.project(features), dim=1).flatten(2)[batch_index]
        anchors = F.normalize(self.anchor(known), dim=2)
        similar = torch.bmm(anchors, unit)  # (Q, C, h * w)
        nearest = [
            similar.masked_fill(~(of[..., 0] > 0)[..., None], -1.0).amax(1, keepdim=True) for of in (meant, other)
        ]
        x = torch.cat([features.flatten(2)[batch_index], *nearest], 1)
        parameters = self.query(summary)
        x = F.relu(generated(x, parameters, _SHAPES, 0))
        logits = generated(x, parameters, _SHAPES, 1)
        lead = (nearest[0] - nearest[1] * other.amax(1, keepdim=True)) * self.sharpness
        logits = logits + lead * (~all_nuclei)[:, None, None]

        chance = logits.detach().sigmoid()
        signs = torch.stack(
            [
                chance.mean(2),
                (chance > 0.5).float().mean(2),
                (chance * (chance > 0.5)).sum(2) / (chance > 0.5).sum(2).clamp_min(1),
                (logits.detach() > 1).sum(2) / (logits.detach() > -1).sum(2).clamp_min(1),
            ],
            2,
        )
        quality = self.quality(torch.cat([summary.detach()[:, None].expand(-1, HYPOTHESES, -1), signs], 2))
        return logits.view(q, HYPOTHESES, h, w), torch.sigmoid(quality[..., 0])
