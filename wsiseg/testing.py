"""Models for tests and benchmarks: random weights, to compare what fast paths compute; and discs at a fixed speed, to measure all the rest."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from wsiseg.models.sam.checkpoints import Architecture
from wsiseg.models.sam.modules import build
from wsiseg.records import Embeddings, WindowMasks

if TYPE_CHECKING:
    from torch import Tensor, nn

    from wsiseg.records import PromptExtras

VIT_B = Architecture(dim=768, depth=12, heads=12, global_blocks=(2, 5, 8, 11), window=14, grid=64, patch=16)
VIT_L = Architecture(dim=1024, depth=24, heads=16, global_blocks=(5, 11, 17, 23), window=14, grid=64, patch=16)
VIT_H = Architecture(dim=1280, depth=32, heads=16, global_blocks=(7, 15, 23, 31), window=14, grid=64, patch=16)
VIT_TOY = Architecture(
    dim=48, depth=2, heads=3, global_blocks=(1,), window=14, grid=64, patch=16
)  #: seconds become milliseconds


def random_sam(architecture: Architecture, seed: int = 0) -> nn.ModuleDict:
    """Build an untrained SAM; parameters that start at zero or one (positions, norms) get random values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        networks = build(architecture).eval().requires_grad_(requires_grad=False)
        disturb(networks)
    return networks


def disturb(network: nn.Module) -> None:
    """Random values for positions, norms and biases, in place; the caller seeds."""
    for name, value in network.state_dict().items():
        if not value.is_floating_point():
            continue
        if "pos_embed" in name:
            value.normal_(0, 0.02)
        elif "rel_pos" in name:
            value.normal_(0, 0.2)
        elif name.endswith("running_mean"):
            value.normal_(0, 0.1)
        elif name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight")):
            value.uniform_(0.8, 1.2)
        elif value.ndim == 1:
            value.add_(0.02 * torch.randn_like(value))


class DiscModel:
    """A :class:`~wsiseg.models.contract.PromptableModel` that sees a disc every ``spacing_px``, whatever the pixels.

    Parameters
    ----------
    tile_seconds, prompt_seconds
        Time to encode a tile and to decode a prompt: the thread sleeps, as it does while a GPU works.
    spacing_px, radius_px
        Between the discs, and of each.
    """

    mpp, stride_px, reach_px, input_px, has_maps, supports_full_tile = 0.25, 16, 64, None, True, False
    box_replaces_point, prompts_multiple, descriptor_size, types = False, 1, 8, None
    device = torch.device("cpu")
    prompts = ("points", "boxes")

    def __init__(
        self, tile_seconds: float = 0.0, prompt_seconds: float = 0.0, spacing_px: int = 88, radius_px: float = 20
    ) -> None:
        self.tile_seconds, self.prompt_seconds, self.spacing, self.radius = (
            tile_seconds,
            prompt_seconds,
            spacing_px // 2,
            radius_px,
        )

    def encode(self, images: Tensor) -> Embeddings:
        """uint8 (B, 3, H, W) -> maps with a spot per disc."""
        time.sleep(self.tile_seconds * len(images))
        maps = torch.full((len(images), 3, images.shape[2] // 2, images.shape[3] // 2), 4.0)
        maps[:, 0] = -4.0
        for dy in range(3):
            for dx in range(3):
                spots = maps[:, :, self.spacing // 2 + dy :: self.spacing, self.spacing // 2 + dx :: self.spacing]
                spots[:, 0], spots[:, 1:] = 4.0, -4.0
        feature = torch.ones(len(images), 1, images.shape[2] // 16, images.shape[3] // 16)
        return Embeddings(high=feature, low=feature, maps=maps, extra={})

    def decode(
        self,
        embeddings: Embeddings,  # noqa: ARG002
        batch_index: Tensor,  # noqa: ARG002
        points_xy: Tensor,
        *,
        extras: PromptExtras | None = None,  # noqa: ARG002
        multimask: bool = False,  # noqa: ARG002
        full_tile: bool = False,  # noqa: ARG002
    ) -> WindowMasks:
        """A disc around each point."""
        time.sleep(self.prompt_seconds * len(points_xy))
        origin = (points_xy - 48).floor().long()
        at = torch.arange(48) * 2 + 1.0
        away = [(at - (points_xy - origin)[:, k : k + 1]) ** 2 for k in (0, 1)]
        logits = self.radius - (away[0][:, None, :] + away[1][:, :, None]).sqrt()
        sure = torch.full((len(points_xy),), 0.9)
        descriptors = torch.nn.functional.normalize(torch.ones(len(points_xy), self.descriptor_size), dim=1)
        return WindowMasks(
            logits=logits,
            origin_xy=origin,
            mask_stride_px=2,
            predicted_iou=sure,
            stability=sure,
            descriptors=descriptors,
            points_xy=points_xy,
        )
