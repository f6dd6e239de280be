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

from typing import TYPE_CHECKING, Any, Self, cast

import torch
import torch.nn.functional as F
from torch import nn

from wsiseg.models.morphology import optical_density
from wsiseg.models.sam import encoder as sam_encoder
from wsiseg.models.sam.checkpoints import recognise
from wsiseg.models.sam.decoder import PointDecoder
from wsiseg.models.sam.instance_decoder import InstanceDecoder
from wsiseg.models.sam.modules import EMBEDDING, build
from wsiseg.models.sam.prompted import PromptedSam
from wsiseg.records import Embeddings

if TYPE_CHECKING:
    from torch import Tensor

    from wsiseg.models.cards import ModelCard
    from wsiseg.models.sam.decoder import Shared

PIXEL_MEAN, PIXEL_SD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  #: of SAM's training images, 0 to 255


class SamModel(PromptedSam):
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

    _bf16 = False
    sam: Any  # (typed attributes: a Module's own are tensors or modules to a type checker)

    def __init__(
        self, sam: nn.ModuleDict, decoder: InstanceDecoder | None, *, mpp: float, normalise: str = "none"
    ) -> None:
        input_px = cast("Any", sam["image_encoder"]).img_size
        super().__init__(
            mpp=mpp,
            input_px=input_px,
            patch=input_px // cast("Any", sam["prompt_encoder"]).image_embedding_size[0],
            channels=EMBEDDING,
            pixel_mean=PIXEL_MEAN,
            pixel_sd=PIXEL_SD,
            normalise=normalise,
        )
        self.sam = sam
        self.decoder = decoder

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
        embedding = self.embed(self.stretched(images))
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
            extra={**vars(shared), "density": optical_density(images.float() / 255, self.mask_stride_px)},
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

    def _prompt_tokens(self, points: Tensor, labels: Tensor, boxes: Tensor | None) -> Tensor:
        """SAM's tokens for points (N, K, 2) with labels 1 and 0, and boxes (N, 4), corner frame -> (N, tokens, 256), fp32."""
        # SAM takes pixel indices and adds half a pixel.
        given = (points - 0.5, labels.to(points.dtype)) if points.shape[1] else None
        tokens: Tensor = self.sam["prompt_encoder"](
            points=given, boxes=None if boxes is None else boxes - 0.5, masks=None
        )[0]
        return tokens
