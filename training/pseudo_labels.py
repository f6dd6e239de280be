"""Labels that the network gives itself while it is trained: masks at annotated dots, and where an unlabelled nucleus may be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from training.data import INCOMPLETE, load_points
from wsiseg.finetune.crops import Field, distances_of
from wsiseg.models.nuclei_compact import MASK_STRIDE_PX, NucleiCompact

if TYPE_CHECKING:
    from pathlib import Path

    from wsiseg.records import Embeddings

DOUBTFUL_AREA = 40  #: px; smaller spots of foreground are noise
BORDER = 3  #: px around an outline that stay known: there the network's outline and the annotator's differ


@torch.no_grad()
def pseudo_masks(model: NucleiCompact, root: Path, device: torch.device, split: str = "train") -> list[Field]:
    """One mask per dot of brca_m2c from the network itself; doubtful places get weight 0."""
    fields = []
    for name, image, points in load_points(root, "brca_m2c", split):
        height, width = image.shape[:2]
        e, foreground = _encode(model, image, device)
        xy = torch.from_numpy(points[:, :2]).to(device)
        masks = model.decode(e, torch.zeros(len(xy), dtype=torch.long, device=device), xy)
        score = (masks.predicted_iou * masks.stability).cpu().numpy()
        logits = (
            F.interpolate(masks.logits[:, None], scale_factor=MASK_STRIDE_PX, mode="bilinear", align_corners=False)[
                :, 0
            ]
            .cpu()
            .numpy()
        )
        best = np.zeros((height, width), np.float32)
        label = np.zeros((height, width), np.int32)
        for i, (ox, oy) in enumerate(masks.origin_xy.tolist()):
            y0, y1, x0, x1 = max(oy, 0), min(oy + 128, height), max(ox, 0), min(ox + 128, width)
            if score[i] < 0.45 or y1 <= y0 or x1 <= x0:
                continue
            here = (logits[i, y0 - oy : y1 - oy, x0 - ox : x1 - ox] > 0) & (best[y0:y1, x0:x1] < score[i])
            label[y0:y1, x0:x1][here] = i + 1
            best[y0:y1, x0:x1][here] = score[i]
        area = np.bincount(label.ravel(), minlength=len(points) + 1)
        keep = (area > 120) & (area < 8000)
        keep[0] = False
        weight = np.where((label == 0) & (foreground > 0.25), 0.0, 1.0).astype(np.float32)
        weight[(label > 0) & ~keep[label]] = 0
        renumber = np.cumsum(keep) * keep
        types = np.concatenate([[0], points[keep[1:], 2].astype(np.int64)])
        label = renumber[label].astype(np.int32)
        fields.append(Field(name, "brca_m2c", image, label, distances_of(label), weight, types, diameter=26.0))
    return fields


@torch.no_grad()
def mark_doubtful(model: NucleiCompact, fields: list[Field], device: torch.device) -> float:
    """Give weight 0 to what ``model`` takes for a nucleus and nobody outlined, in collections whose annotators left out blurred nuclei.

    Without that the network learns to leave out blurred and pale nuclei everywhere.

    Returns
    -------
    float
        Share of these collections' area that is doubtful now.
    """
    shares = []
    for field in fields:
        if field.collection not in INCOMPLETE:
            continue
        _, foreground = _encode(model, field.image, device)
        far = ndimage.distance_transform_edt(field.label == 0)
        spots, count = ndimage.label((foreground > 0.5) & (far > BORDER))
        large = np.bincount(spots.ravel(), minlength=count + 1) >= DOUBTFUL_AREA
        large[0] = False
        doubtful = ndimage.binary_dilation(large[spots], iterations=2) & (far > BORDER - 1)
        field.weight = np.where(doubtful, 0, 1).astype(np.float32)
        shares.append(doubtful.mean())
    return float(np.mean(shares)) if shares else 0.0


def _encode(model: NucleiCompact, image: np.ndarray, device: torch.device) -> tuple[Embeddings, np.ndarray]:
    """Embeddings of an image of any size, and the probability of foreground at its pixels."""
    height, width = image.shape[:2]
    pad = [(0, -n % model.stride_px) for n in (height, width)]
    padded = np.pad(image, [*pad, (0, 0)], mode="reflect")
    e = model.encode(torch.from_numpy(padded).permute(2, 0, 1)[None].to(device))
    logits = F.interpolate(e.maps[:, :1], scale_factor=MASK_STRIDE_PX, mode="bilinear", align_corners=False)[0, 0]
    return e, logits.sigmoid().cpu().numpy()[:height, :width]
