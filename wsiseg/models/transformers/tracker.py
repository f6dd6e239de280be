"""What SAM 2 and SAM 3's tracker have in common: prompt encoder and mask decoder of the library transformers, on a pyramid of any encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch

from wsiseg.errors import WeightsError
from wsiseg.models.morphology import optical_density
from wsiseg.models.sam.prompted import PromptedSam
from wsiseg.models.transformers.decoder import FineDecoder
from wsiseg.models.transformers.recipe import Recipe
from wsiseg.records import Embeddings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from wsiseg.models.cards import ModelCard

    #: Three levels of a pyramid, (B, C, 4g, 4g), (B, C, 2g, 2g) and (B, C, g, g).
    Levels = tuple[Tensor, Tensor, Tensor]


class HubModel(PromptedSam):
    """A network of the library transformers that encodes square tiles and answers prompts.

    Parameters
    ----------
    recipe
        Of the network.
    mpp, normalise
        As for :class:`PromptedSam`.
    sizes
        Of the input and of an image token, as the configuration has them: a side, or height and width; and the pyramid's channels.
    """

    points: FineDecoder
    _kind = torch.float32

    def __init__(self, recipe: Recipe, *, mpp: float, normalise: str, sizes: tuple[Any, Any, int]) -> None:
        image, patch, channels = sizes
        super().__init__(
            mpp=mpp,
            input_px=_side(image, "image_size"),
            patch=_side(patch, "patch_size"),
            channels=channels,
            pixel_mean=recipe.pixel_mean,
            pixel_sd=recipe.pixel_sd,
            normalise=normalise,
        )
        self.recipe = recipe

    @classmethod
    def of(cls, card: ModelCard, tensors: dict[str, Tensor]) -> Self:  # noqa: ARG003 - the recipe says which they are
        """Build the network for a file of `wsiseg models import`, still empty."""
        network = cls(Recipe.of(card.weights), mpp=card.mpp, normalise=card.normalise)  # type: ignore[call-arg]
        network.compute_constants()
        return network

    def compute_constants(self) -> None:
        """Compute what no checkpoint holds."""

    def tracker(self) -> Any:  # noqa: ANN401
        """The module with ``prompt_encoder``, ``mask_decoder`` and ``no_memory_embedding``."""
        raise NotImplementedError

    def prepare(self, parts: Sequence[nn.Module], device: torch.device, *, bf16: bool) -> None:
        """Freeze the network and move it to ``device``, ``parts`` in bf16; prompts stay in fp32."""
        self.eval().requires_grad_(requires_grad=False)
        self._kind = torch.bfloat16 if bf16 else torch.float32
        for part in parts:
            constants = [
                (module, name, module._buffers[name])
                for module in part.modules()
                for name in module._non_persistent_buffers_set
            ]
            part.to(self._kind)
            for module, name, value in constants:  # angles of rotary positions would be off by tenths of a radian
                module._buffers[name] = value
        self.to(device)

    def make_decoder(self) -> None:
        """Make the fast decoder of the weights as they are now."""
        tracker = self.tracker()
        position = tracker.get_image_wide_positional_embeddings().to(self._kind)
        self.points = FineDecoder(tracker.mask_decoder, position)

    def standardised(self, images: Tensor) -> Tensor:
        """uint8 RGB (B, 3, H, W) -> what the encoder takes."""
        return ((self.stretched(images).float() - self.pixel_mean) / self.pixel_sd).to(self._kind)

    def three_levels(self, levels: Sequence[Tensor]) -> Levels:
        """Find the levels at 4, 2 and 1 times the image tokens' resolution.

        Their number differs between checkpoints: by size, a coarser level that some leave out is not taken for the embedding.
        """
        grid = self.input_px // self.patch
        by_size = {level.shape[-1]: level for level in levels if level.shape[-1] == level.shape[-2]}
        missing = [up * grid for up in (4, 2, 1) if up * grid not in by_size]
        if missing:
            found = ", ".join(f"{h} x {w}" for h, w in (level.shape[-2:] for level in levels))
            raise WeightsError(
                f"the feature pyramid has levels of {found}, none of {missing[0]} x {missing[0]}; the configuration is not SAM 2's or SAM 3's"
            )
        return by_size[4 * grid], by_size[2 * grid], by_size[grid]

    def share_levels(self, levels: Levels) -> dict[str, Tensor]:
        """Compute what the prompts of tiles share, from the tracker's pyramid: for ``Embeddings.extra``."""
        tracker = self.tracker()
        no_memory = tracker.no_memory_embedding.view(1, -1, 1, 1).to(self._kind)
        no_mask = tracker.prompt_encoder.no_mask_embed.weight[0].to(self._kind)
        return vars(self.points.share_fine(levels[2] + no_memory, no_mask, levels[1], levels[0]))

    def embeddings(
        self, images: Tensor, fine: Tensor, coarse: Tensor, extra: dict[str, Tensor], *, spare: bool
    ) -> Embeddings:
        """Embeddings with F_h and F_l of two levels of a pyramid, which may be written over if they are ``spare``."""
        density = optical_density(images.float() / 255, self.mask_stride_px)
        high, low = (_unit(x, spare=spare) for x in (fine, coarse))
        return Embeddings(high=high, low=low, maps=None, extra={"density": density, **extra})

    def _prompt_tokens(self, points: Tensor, labels: Tensor, boxes: Tensor | None) -> Tensor:
        # the library takes pixel indices and adds half a pixel
        given = points.shape[1] > 0
        tokens: Tensor = self.tracker().prompt_encoder(
            input_points=points[None] - 0.5 if given else None,
            input_labels=labels[None].long() if given else None,
            input_boxes=None if boxes is None else boxes[None] - 0.5,
            input_masks=None,
        )[0][0]
        return tokens.to(self.points.position.dtype)


def _unit(x: Tensor, *, spare: bool) -> Tensor:
    """float32, unit norm along channels; in place if nobody else needs ``x``: F_h has 64 MB a tile."""
    x32 = x.float()
    norm = torch.linalg.vector_norm(x32, dim=1, keepdim=True).clamp_min_(1e-12)
    return x32.div_(norm) if spare or x32 is not x else x32 / norm


def _side(size: int | Sequence[int], name: str) -> int:
    """Side of a square."""
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) > 1:
        raise WeightsError(f"{name} is {size}; only square images are supported")
    return sides.pop()
