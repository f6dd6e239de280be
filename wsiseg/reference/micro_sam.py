"""micro-sam's automatic prompts [1]_ and seeded watershed on one image, with its checkpoints, preprocessing and thresholds.

For comparison with the papers, and for checking a checkpoint against the program it comes from. Slides get
:func:`wsiseg.runs.slide.segment_slide`, which reads at a stated scale, resolves overlaps by score, and does not depend on tile positions.

References
----------
.. [1] Archit, Pape: Revisiting foundation models for cell instance segmentation, MIDL 2026, arXiv:2603.17845.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from wsiseg.errors import ConfigError
from wsiseg.models.sam.model import SamModel
from wsiseg.reference.ais import AisConfig, ais_labels
from wsiseg.reference.apg_v1 import ApgV1, decode_all, prompts_v1, segment_v1
from wsiseg.reference.score_ordered_merge import ScoreMerge, merge_by_score

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from wsiseg.models.contract import PromptableModel
    from wsiseg.models.sam.decoder import Shared


@torch.inference_mode()
def apg_image(
    image: NDArray[np.uint8], model: PromptableModel, config: ApgV1 | None = None, *, merge: ScoreMerge | None = None
) -> NDArray[np.int32]:
    """Automatic prompt generation, version 1, on one image.

    Parameters
    ----------
    image
        uint8 RGB of shape (H, W, 3); enlarged or reduced so that its longer side is the network's input.
    model
        Model with an instance decoder. Its ``normalise`` says whether the image is stretched first; micro-sam does so (``tile-minmax``).
    config
        The published parameters when absent; sizes in pixels of the image.
    merge
        Settle the masks best score first, by these parameters, as version 2 does and slides have it. Absent: as published, largest first.

    Returns
    -------
    ndarray
        int32 of shape (H, W): 0, or the number of the object, from 1.

    Raises
    ------
    ConfigError
        The image is not uint8 RGB, or the model has no instance decoder.
    """
    config = config or ApgV1()
    seen = _Seen(image, model)

    def from_points(points: NDArray[np.float64]) -> tuple[NDArray[np.float32], NDArray[np.floating]]:
        return seen.decode(torch.from_numpy(points).float()[:, None], None)

    def from_boxes(boxes: NDArray[np.float64]) -> tuple[NDArray[np.float32], NDArray[np.floating]]:
        return seen.decode(None, torch.from_numpy(boxes).float())

    f, c, b = seen.maps()
    if merge is not None:
        points = prompts_v1(f, c, b, foreground=config.foreground, centre=config.centre, boundary=config.boundary)
        masks, iou_pred, stability = decode_all(from_points, points, seen.size, config)
        crops, boxes = [m.mask for m in masks], [m.box for m in masks]
        return merge_by_score(crops, boxes, iou_pred * stability, points, seen.size, merge, iou_pred=iou_pred)[0]
    return segment_v1(f, c, b, from_points, config=config, decode_boxes=from_boxes if config.refine_with_box else None)


@torch.inference_mode()
def ais_image(image: NDArray[np.uint8], model: PromptableModel, config: AisConfig | None = None) -> NDArray[np.int32]:
    """Automatic instance segmentation on one image: a watershed of the instance maps, no prompts.

    Parameters
    ----------
    image
        uint8 RGB of shape (H, W, 3); enlarged or reduced so that its longer side is the network's input.
    model
        With an instance decoder. Its ``normalise`` says whether the image is stretched first; micro-sam does so (``tile-minmax``).
    config
        The published parameters when absent; sizes in pixels of the image.

    Returns
    -------
    ndarray
        int32 of shape (H, W): 0, or the number of the object, from 1.

    Raises
    ------
    ConfigError
        The image is not uint8 RGB, or the model has no instance decoder.
    """
    f, c, b = _Seen(image, model).maps()
    return ais_labels(f, c, b, config=config)


class _Seen:
    """An encoded image, with micro-sam's transforms from its pixels to the network's input and back."""

    def __init__(self, image: NDArray[np.uint8], model: PromptableModel) -> None:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ConfigError(
                f"image: {image.dtype} of shape {image.shape}; it must be uint8 RGB of shape (height, width, 3)"
            )
        if not isinstance(model, SamModel) or model.decoder is None:
            raise ConfigError(
                "image: the model has no instance decoder; use one of micro-sam or PathoSAM, with its decoder"
            )
        self.model, self.decoder = model, model.decoder
        self.size: tuple[int, int] = (image.shape[0], image.shape[1])
        scale = model.input_px / max(self.size)
        height, width = (int(side * scale + 0.5) for side in self.size)
        self.fit = (height, width)
        pixels = np.asarray(Image.fromarray(model.stretch(image)).resize((width, height), Image.Resampling.BILINEAR))
        self.embedding = model.embed(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].to(model.device))
        self.shared: Shared = model.share(self.embedding)

    def maps(self) -> NDArray[np.float32]:
        """(3, H, W): foreground, centre distance, boundary distance, in [0, 1]."""
        return self._back(self.decoder(self.embedding)[0].float().sigmoid())[0].cpu().numpy()

    def decode(self, points: Tensor | None, boxes: Tensor | None) -> tuple[NDArray[np.float32], NDArray[np.floating]]:
        """Logits (N, H, W) and predicted IoU (N,) of points (N, 1, 2), pixel indices, or boxes (N, 4), px of the image."""
        scale = torch.tensor([self.fit[1] / self.size[1], self.fit[0] / self.size[0]])
        given = None if points is None else (points * scale, torch.ones(points.shape[:2]))
        tokens = self.model.sam["prompt_encoder"](
            points=None if given is None else tuple(x.to(self.model.device) for x in given),
            boxes=None if boxes is None else (boxes * scale.repeat(2)).to(self.model.device),
            masks=None,
        )[0].to(self.embedding.dtype)
        which = torch.zeros(len(tokens), dtype=torch.long, device=self.model.device)
        logits, quality = self.model.points(self.shared, which, tokens, None, slice(0, 1))
        return self._back(logits.float())[:, 0].cpu().numpy(), quality[:, 0].float().cpu().numpy()

    def _back(self, x: Tensor) -> Tensor:
        """(N, C, h, w) over the network's input -> (N, C, H, W) over the image."""
        side = self.model.input_px
        x = F.interpolate(x, (side, side), mode="bilinear", align_corners=False)[..., : self.fit[0], : self.fit[1]]
        return F.interpolate(x, self.size, mode="bilinear", align_corners=False)
