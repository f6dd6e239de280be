"""SAM ViT-B, L and H, and micro-sam's and PathoSAM's, which add an instance decoder: any checkpoint of that family as a promptable model.

The networks are those of the package ``segment-anything`` [1]_; what is computed is what they compute, in less time and memory
(encoder.py, decoder.py, instance_decoder.py). Model px are px of the network's input, 1024 x 1024: a model that was trained on tiles of
512 px at 0.25 um enlarged to 1024, as micro-sam's are, works at 0.125 um.

Chain-of-Prompts needs two scales: F_l is the image embedding; F_h the instance decoder's features at four times its resolution, or, without
one, the image embedding through the mask decoder's upscaling.

References
----------
.. [1] Kirillov et al.: Segment Anything, ICCV 2023, arXiv:2304.02643.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from wsiseg.models.morphology import MEASUREMENTS, measure, optical_density, windows
from wsiseg.models.sam import encoder as sam_encoder
from wsiseg.models.sam.checkpoints import recognise
from wsiseg.models.sam.decoder import CPU_PROMPTS, CROP, UP, PointDecoder, Shared
from wsiseg.models.sam.instance_decoder import InstanceDecoder
from wsiseg.models.sam.modules import EMBEDDING, build
from wsiseg.records import Embeddings, WindowMasks

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from wsiseg.models.cards import ModelCard
    from wsiseg.records import PromptExtras, TypeSpace

PIXEL_MEAN, PIXEL_SD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  #: of SAM's training images, 0 to 255
MEASURED_SHARE = 0.3  #: weight of the measurements in the cosine of two descriptors, as in nuclei-compact
#: Mean and sd of the measurements over nuclei in H&E: those that nuclei-compact learnt (its ``standardise``).
MEASURED_MEAN = (3.35, 0.66, 0.65, 1.01, 0.46, 0.19, 0.30, 0.13, 0.34, 0.56, 0.29)
MEASURED_SD = (0.98, 0.17, 0.36, 0.59, 0.27, 0.14, 0.24, 0.10, 0.18, 0.33, 0.16)


class SamModel(nn.Module):
    """The network. Shapes below: B tiles of ``input_px`` squared model pixels, N prompts.

    Parameters
    ----------
    sam
        SAM's networks (sam_modules.build).
    decoder
        The instance decoder, if there is one.
    mpp
        Microns per px of the network's input.
    normalise
        ``none``: pixels as they are; ``tile-minmax``: each channel of a tile stretched to 0 to 255 first, as micro-sam does it.
    """

    types: TypeSpace | None = None  # what separates types is found on each slide (plda.slide_space)
    supports_full_tile = True
    box_replaces_point = True
    prompts_multiple = CPU_PROMPTS
    _bf16 = False
    pixel_mean: Tensor
    pixel_sd: Tensor
    measured_mean: Tensor
    measured_sd: Tensor
    points: PointDecoder
    sam: Any  # (typed attributes: a Module's own are tensors or modules to a type checker)
    mpp: float
    normalise: str
    input_px: int
    patch: int
    stride_px: int
    mask_stride_px: int
    reach_px: int
    descriptor_size: int

    def __init__(
        self, sam: nn.ModuleDict, decoder: InstanceDecoder | None, *, mpp: float, normalise: str = "none"
    ) -> None:
        super().__init__()
        self.sam = sam
        self.decoder = decoder
        self.mpp = mpp
        self.normalise = normalise
        self.input_px = self.sam["image_encoder"].img_size
        self.patch = self.input_px // self.sam["prompt_encoder"].image_embedding_size[0]
        self.stride_px = self.patch
        self.mask_stride_px = self.patch // UP
        self.reach_px = CROP // 2 * self.patch
        self.descriptor_size = EMBEDDING + MEASUREMENTS
        for name, values, shape in (
            ("pixel_mean", PIXEL_MEAN, (1, 3, 1, 1)),
            ("pixel_sd", PIXEL_SD, (1, 3, 1, 1)),
            ("measured_mean", MEASURED_MEAN, (-1,)),
            ("measured_sd", MEASURED_SD, (-1,)),
        ):
            self.register_buffer(name, torch.tensor(values).view(shape), persistent=False)

    @classmethod
    def of(cls, card: ModelCard, tensors: dict[str, Tensor]) -> Self:
        """Build the network for a converted checkpoint (keys ``sam.`` and ``decoder.``), still empty."""
        parts = [
            {k.removeprefix(kind): v for k, v in tensors.items() if k.startswith(kind)} for kind in ("sam.", "decoder.")
        ]
        sam, decoder = cls._empty(*parts)
        return cls(sam, decoder, mpp=card.mpp, normalise=card.normalise)

    @staticmethod
    def _empty(sam: dict[str, Tensor], decoder: dict[str, Tensor]) -> tuple[nn.ModuleDict, InstanceDecoder | None]:
        """The networks that tensors belong to, without memory of their own."""
        with torch.device("meta"):
            return build(recognise(sam)), InstanceDecoder.like(decoder) if decoder else None

    @classmethod
    def tensors_of(cls, sam: dict[str, Tensor], decoder: dict[str, Tensor]) -> dict[str, torch.Size]:
        """Names and shapes of all tensors of the network that a checkpoint's tensors belong to."""
        network = cls(*cls._empty(sam, decoder), mpp=0.25)
        return {name: value.shape for name, value in network.state_dict().items()}

    def ready(self, device: torch.device, *, bf16: bool) -> Self:
        """Prepare for inference: frozen, on ``device``; encoder and decoders in bf16, prompts always in fp32."""
        self.eval().requires_grad_(requires_grad=False)
        if self.decoder is not None:
            self.decoder.folded()
        kind = torch.bfloat16 if bf16 else torch.float32
        for part in (self.sam["image_encoder"], self.sam["mask_decoder"], self.decoder):
            if part is not None:
                part.to(kind)
        self._bf16 = bf16
        self.to(device)
        self.points = PointDecoder(self.sam["mask_decoder"], self.sam["prompt_encoder"].get_dense_pe().to(kind))
        return self

    @property
    def has_maps(self) -> bool:
        """True if there is an instance decoder."""
        return self.decoder is not None

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.pixel_mean.device

    def encode(self, images: Tensor) -> Embeddings:
        """Encode tiles, once each.

        Parameters
        ----------
        images
            uint8 RGB of shape (B, 3, input_px, input_px), model pixels.

        Returns
        -------
        Embeddings
            ``low`` (B, 256, 64, 64) and ``high`` (B, 128 or 32, 256, 256), unit norm along channels; ``maps`` (B, 3, input_px, input_px) with
            an instance decoder, else ``None``.
        """
        seen = images
        if self.normalise != "none":
            stretched = [
                torch.from_numpy(self.stretch(x.permute(1, 2, 0).cpu().numpy())).permute(2, 0, 1) for x in images
            ]
            seen = torch.stack(stretched).to(images.device)
        embedding = self.embed(seen)
        shared = self.share(embedding)
        maps, high = (
            (None, self.sam["mask_decoder"].output_upscaling(embedding))
            if self.decoder is None
            else self.decoder(embedding)
        )
        low = F.normalize(embedding.float(), dim=1)
        return Embeddings(
            high=F.normalize(high.float(), dim=1),
            low=low,
            maps=None if maps is None else maps.float(),
            extra={
                "keys": shared.keys,
                "k": shared.k,
                "v": shared.v,
                "q": shared.q,
                "density": optical_density(images.float() / 255, self.mask_stride_px),
            },
        )

    def embed(self, images: Tensor) -> Tensor:
        """uint8 RGB (B, 3, h, w), at most ``input_px`` on a side and padded at the end -> image embedding (B, 256, g, g)."""
        height, width = images.shape[2:]
        x = (images.float() - self.pixel_mean) / self.pixel_sd
        x = F.pad(x, (0, self.input_px - width, 0, self.input_px - height))
        return sam_encoder.encode(self.sam["image_encoder"], x.bfloat16() if self._bf16 else x)

    def share(self, embedding: Tensor) -> Shared:
        """Compute what all prompts on image embeddings (B, 256, g, g) share."""
        return self.points.share(embedding, self.sam["prompt_encoder"].no_mask_embed.weight[0].to(embedding.dtype))

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
            Masks on the whole tile instead of a window of 16 x 16 image tokens.

        Returns
        -------
        WindowMasks
            ``logits`` (N, 64, 64), or (N, 256, 256), on cells of 4 px, as SAM gives them; ``predicted_iou`` (N,) bounded to [0, 1].
        """
        answers = slice(1, None) if multimask else slice(0, 1)
        grid = self.input_px // self.patch
        shared = Shared(*(embeddings.extra[k] for k in ("keys", "k", "v", "q")))
        corner = (
            None if full_tile else (torch.floor(points_xy / self.patch).long() - (CROP // 2 - 1)).clamp(0, grid - CROP)
        )
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
            descriptors=self._describe(embeddings, batch_index, corner, logits),
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

    def _prompt_tokens(self, points: Tensor, labels: Tensor, boxes: Tensor | None) -> Tensor:
        """SAM's tokens for points (N, K, 2) with labels 1 and 0, and boxes (N, 4), corner frame -> (N, tokens, 256), fp32."""
        # SAM takes pixel indices and adds half a pixel.
        given = (points - 0.5, labels.to(points.dtype)) if points.shape[1] else None
        tokens: Tensor = self.sam["prompt_encoder"](
            points=given, boxes=None if boxes is None else boxes - 0.5, masks=None
        )[0]
        return tokens

    def _describe(self, embeddings: Embeddings, batch_index: Tensor, corner: Tensor, logits: Tensor) -> Tensor:
        """(N, 256 + 11), unit norm: F_l pooled in each mask, and standardised measurements."""
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
