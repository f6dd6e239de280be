"""SAM 2 and 2.1 as promptable models: ``Sam2Model`` of the library transformers, with any of its Hiera encoders.

Chain-of-Prompts needs two scales: F_h is level 0 of the feature pyramid (stride 4: the lateral convolution of Hiera's first stage alone), F_l its
level 2 (stride 16), both before the decoder's own projections [1]_.

References
----------
.. [1] Ravi et al.: SAM 2: Segment Anything in Images and Videos, ICLR 2025, arXiv:2408.00714.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch

from wsiseg.models.transformers.networks import configuration, library, without_memory
from wsiseg.models.transformers.tracker import HubModel
from wsiseg.models.transformers.trunks import hiera_levels

if TYPE_CHECKING:
    from torch import Tensor

    from wsiseg.models.transformers.recipe import Recipe
    from wsiseg.records import Embeddings

_SIZES = {(96, 12): "T", (96, 16): "S", (112, 24): "B+", (144, 48): "L"}  # width of the first stage, number of blocks


class Sam2(HubModel):
    """The network. Shapes below: B tiles of ``input_px`` squared model px; g image tokens on a side.

    Parameters
    ----------
    recipe
        Its configuration is that of ``Sam2Model`` or ``Sam2VideoModel``.
    mpp
        Microns per px of the network's input.
    normalise
        As for :class:`PromptedSam`.
    """

    def __init__(self, recipe: Recipe, *, mpp: float, normalise: str = "none") -> None:
        config = configuration(recipe.config)
        with without_memory():
            sam = library().Sam2Model(config)
            prompts, channels = config.prompt_encoder_config, config.vision_config.fpn_hidden_size
            sizes = (prompts.image_size, prompts.patch_size, channels)
        super().__init__(recipe, mpp=mpp, normalise=normalise, sizes=sizes)
        self.sam: Any = sam

    @staticmethod
    def architecture(content: dict[str, Any]) -> str:
        """Name of the network in words, from the content of its ``config.json``."""
        backbone = configuration(content).vision_config.backbone_config
        width, blocks = backbone.hidden_size, sum(backbone.blocks_per_stage)
        version = "SAM 2.1" if content.get("enable_occlusion_spatial_embedding") else "SAM 2"  # what 2.1 added
        size = _SIZES.get((width, blocks))
        return f"{version}, Hiera-{size}" if size else f"{version}, Hiera of width {width} and depth {blocks}"

    def tracker(self) -> Any:  # noqa: ANN401, D102
        return self.sam

    def ready(self, device: torch.device, *, bf16: bool) -> Self:
        """Prepare for inference: frozen, on ``device``; encoder and decoder in bf16, prompts always in fp32."""
        self.prepare((self.sam.vision_encoder, self.sam.mask_decoder), device, bf16=bf16)
        self.make_decoder()
        return self

    def encode(self, images: Tensor) -> Embeddings:
        """Encode tiles, once each.

        Parameters
        ----------
        images
            uint8 RGB of shape (B, 3, input_px, input_px), model pixels.

        Returns
        -------
        Embeddings
            ``low`` (B, C, g, g) and ``high`` (B, C, 4g, 4g), unit norm along channels; no maps.
        """
        levels = self.pyramid(self.standardised(images))
        return self.embeddings(images, levels[0], levels[2], self.share_levels(levels), spare=True)

    def pyramid(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Levels of the feature pyramid of standardised tiles (B, 3, input_px, input_px), finest first."""
        return self.three_levels(hiera_levels(self.sam.vision_encoder, x))

    def check_pyramid(self) -> None:
        """Run the encoder without weights.

        Raises
        ------
        WeightsError
            It does not run, or its pyramid lacks a level.
        """
        with without_memory():
            self.pyramid(torch.empty(1, 3, self.input_px, self.input_px))
