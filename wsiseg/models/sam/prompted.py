"""Networks of Segment Anything's kind: what they do with prompts, whatever encoded the tile.

Points and boxes become tokens, prompts with as many of them are decoded together (decoder.py), and each mask gets its window, its stability
and its descriptor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from wsiseg.models.morphology import MEASUREMENTS, measure, windows
from wsiseg.models.sam.decoder import CPU_PROMPTS, SINGLE, THREE, UP, PointDecoder, Shared, crop_side
from wsiseg.records import WindowMasks

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from wsiseg.records import Embeddings, PromptExtras, TypeSpace

MEASURED_SHARE = 0.3  #: weight of the measurements in the cosine of two descriptors, as in nuclei-compact
#: Mean and sd of the measurements over nuclei in H&E: those that nuclei-compact learnt (its ``standardise``).
MEASURED_MEAN = (3.35, 0.66, 0.65, 1.01, 0.46, 0.19, 0.30, 0.13, 0.34, 0.56, 0.29)
MEASURED_SD = (0.98, 0.17, 0.36, 0.59, 0.27, 0.14, 0.24, 0.10, 0.18, 0.33, 0.16)


class PromptedSam(nn.Module):
    """Prompts, masks and descriptors of a network with SAM's mask decoder. Shapes: B tiles of ``input_px`` squared model px, N prompts.

    A subclass encodes tiles (``encode``), makes tokens of prompts (``_prompt_tokens``), and sets ``points`` when it is ready.

    Parameters
    ----------
    mpp
        Microns per px of the network's input.
    input_px
        Side of the input.
    patch
        Side of an image token, model px.
    channels
        Of the image embedding.
    pixel_mean, pixel_sd
        Of the training images' red, green and blue, 0 to 255.
    normalise
        ``none``: pixels as they are; ``tile-minmax``: each channel of a tile stretched to 0 to 255 first, as micro-sam does it.
    """

    types: TypeSpace | None = None  # what separates types is found on each slide (plda.slide_space)
    supports_full_tile = True
    box_replaces_point = True
    prompts_multiple = CPU_PROMPTS
    prompts: tuple[str, ...] = ("points", "boxes")
    pixel_mean: Tensor
    pixel_sd: Tensor
    measured_mean: Tensor
    measured_sd: Tensor
    points: PointDecoder

    def __init__(
        self,
        *,
        mpp: float,
        input_px: int,
        patch: int,
        channels: int,
        pixel_mean: tuple[float, ...],
        pixel_sd: tuple[float, ...],
        normalise: str,
    ) -> None:
        super().__init__()
        self.mpp = mpp
        self.normalise = normalise
        self.input_px = input_px
        self.patch = self.stride_px = patch
        self.mask_stride_px = patch / UP
        crop = crop_side(input_px // patch)
        self.window_size, self.reach_px = crop * UP, crop // 2 * patch
        self.descriptor_size = channels + MEASUREMENTS
        for name, values, shape in (
            ("pixel_mean", pixel_mean, (1, 3, 1, 1)),
            ("pixel_sd", pixel_sd, (1, 3, 1, 1)),
            ("measured_mean", MEASURED_MEAN, (-1,)),
            ("measured_sd", MEASURED_SD, (-1,)),
        ):
            self.register_buffer(name, torch.tensor(values).view(shape), persistent=False)

    @property
    def has_maps(self) -> bool:
        """True if it makes instance maps."""
        return False

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.pixel_mean.device

    def stretched(self, images: Tensor) -> Tensor:
        """Tiles (B, 3, H, W), each stretched on its own if ``normalise`` says so."""
        if self.normalise == "none":
            return images
        tiles = [torch.from_numpy(self.stretch(x.permute(1, 2, 0).cpu().numpy())).permute(2, 0, 1) for x in images]
        return torch.stack(tiles).to(images.device)

    def stretch(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """One image (H, W, 3), each channel stretched to 0 to 255 if ``normalise`` says so."""
        if self.normalise == "none":
            return image
        low, high = image.min((0, 1)).astype(np.float32), image.max((0, 1)).astype(np.float32)
        stretched: NDArray[np.uint8] = (
            (image.astype(np.float32) - low) / (high - low + np.float32(1e-7)) * 255
        ).astype(np.uint8)
        return stretched

    def decode(
        self,
        embeddings: Embeddings,
        batch_index: Tensor,
        points_xy: Tensor,
        *,
        extras: PromptExtras | None = None,
        multimask: bool = False,
        full_tile: bool = False,
    ) -> WindowMasks:
        """Masks of N prompts.

        Parameters
        ----------
        embeddings
            Result of :meth:`encode`.
        batch_index
            int64 of shape (N,): which of the B tiles each point lies in.
        points_xy
            float32 of shape (N, 2): model pixels of the tile, corner frame.
        extras
            More points and boxes. A prompt with a box is the box and these points: its own ``points_xy`` only places the window.
        multimask
            Give SAM's three answers to an ambiguous prompt instead of one: 3N masks, prompt by prompt.
        full_tile
            Masks on the whole tile instead of a window of ``CROP`` x ``CROP`` image tokens (fewer in small tiles).

        Returns
        -------
        WindowMasks
            ``logits`` (N, 64, 64), or (N, 4g, 4g), on cells of a quarter of a token, as the network gives them; ``predicted_iou`` (N,)
            bounded to [0, 1].
        """
        answers = THREE if multimask else SINGLE
        shared = self.points.shared_type(*(embeddings.extra[name] for name in self.points.shared_type.names()))
        corner = None if full_tile else self.window_origin(points_xy) // self.patch
        logits, quality = self._decode_prompts(shared, batch_index, points_xy, extras, corner, answers)
        count = logits.shape[1]
        corner = torch.zeros(len(points_xy), 2, dtype=torch.long, device=points_xy.device) if corner is None else corner
        batch_index, corner, points_xy = (v.repeat_interleave(count, 0) for v in (batch_index, corner, points_xy))
        logits, quality = logits.flatten(0, 1).float(), quality.flatten().float().clamp(0, 1)
        strict, loose = (logits > 1).sum((1, 2)), (logits > -1).sum((1, 2))
        return WindowMasks(
            logits=logits,
            origin_xy=corner * self.patch,
            mask_stride_px=self.mask_stride_px,
            predicted_iou=quality,
            stability=strict / loose.clamp_min(1),
            descriptors=self.describe(embeddings, batch_index, corner, logits),
            points_xy=points_xy,
            full_tile=full_tile,
        )

    def _decode_prompts(
        self,
        shared: Shared,
        batch_index: Tensor,
        points_xy: Tensor,
        extras: PromptExtras | None,
        corner: Tensor | None,
        answers: slice,
    ) -> tuple[Tensor, Tensor]:
        """Logits (N, M, h, w) and qualities (N, M). Prompts with as many points and boxes go together: SAM sees no empty places."""
        ones = torch.ones_like(points_xy[:, :1])
        found: tuple[Tensor, Tensor]
        if extras is None:
            prompts = self._prompt_tokens(points_xy[:, None], ones, None)
            found = self.points(shared, batch_index, prompts.to(shared.keys.dtype), corner, answers)
            return found
        boxed = extras.boxes.isfinite().all(1)
        points = torch.cat([points_xy[:, None], extras.points_xy], 1)
        labels = torch.cat([ones.masked_fill(boxed[:, None], -1), extras.labels], 1)
        shape = torch.cat([(labels >= 0).long(), boxed[:, None].long()], 1)
        out: list[Tensor] = []
        for pattern in shape.unique(dim=0):
            rows = (shape == pattern).all(1).nonzero()[:, 0]
            given = pattern[:-1].bool()
            boxes = extras.boxes[rows] if pattern[-1] else None
            prompts = self._prompt_tokens(points[rows][:, given], labels[rows][:, given], boxes).to(shared.keys.dtype)
            found = self.points(shared, batch_index[rows], prompts, None if corner is None else corner[rows], answers)
            if not out:
                out = [part.new_empty(len(batch_index), *part.shape[1:]) for part in found]
            for whole, part in zip(out, found, strict=True):
                whole[rows] = part
        return out[0], out[1]

    def window_origin(self, points_xy: Tensor) -> Tensor:
        """Outer corner (N, 2), int64 model px, of the window around each point (N, 2); it lies within the tile."""
        grid, crop = self.input_px // self.patch, self.window_size // UP
        return (torch.floor(points_xy / self.patch).long() - (crop // 2 - 1)).clamp(0, grid - crop) * self.patch

    def describe_masks(self, embeddings: Embeddings, batch_index: Tensor, origin_xy: Tensor, logits: Tensor) -> Tensor:
        """Descriptors (N, D) of masks that come from elsewhere: positive ``logits`` (N, h, h) on windows of :meth:`window_origin`."""
        return self.describe(embeddings, batch_index, origin_xy // self.patch, logits)

    def _prompt_tokens(self, points: Tensor, labels: Tensor, boxes: Tensor | None) -> Tensor:
        """Tokens (N, K', C), fp32, of points (N, K, 2) with labels 1 and 0, and boxes (N, 4), corner frame."""
        raise NotImplementedError

    def describe(self, embeddings: Embeddings, batch_index: Tensor, corner: Tensor, logits: Tensor) -> Tensor:
        """Descriptors (N, C + 11), unit norm: F_l pooled in each mask, and standardised measurements.

        ``logits`` (N, h, w) lie on windows that start at the image token ``corner`` (N, 2), x and y, of the tiles ``batch_index`` (N,).
        """
        hard = (logits > 0).float()
        side = logits.shape[-1]
        coarse = F.avg_pool2d(hard[:, None], UP)
        pooled = (windows(embeddings.low, batch_index, corner, side // UP) * coarse).sum((2, 3))
        density = windows(embeddings.extra["density"], batch_index, corner * UP, side)
        measured = measure(hard, density, self.mask_stride_px * self.mpp)[0]
        measured = ((measured - self.measured_mean) / self.measured_sd).clamp(-4, 4)
        return torch.cat(
            [
                F.normalize(pooled, dim=1) * (1 - MEASURED_SHARE) ** 0.5,
                F.normalize(measured, dim=1) * MEASURED_SHARE**0.5,
            ],
            1,
        )
