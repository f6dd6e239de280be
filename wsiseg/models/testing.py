"""Models for tests and benchmarks: random weights, to compare what fast paths compute; and discs at a fixed speed, to measure all the rest."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

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


def tiny_hub_model(kind: str, *, queries: int = 20, levels: int = 3) -> Any:  # noqa: ANN401
    """Build an untrained model of the library transformers that takes a second where the published ones take minutes.

    Parameters
    ----------
    kind
        ``sam2``, ``sam2_video``, ``sam3`` (detector), ``sam3_tracker`` or ``sam3_video`` (both); SAM 2 takes tiles of 320 px, SAM 3 of 280 px.
    queries
        Of SAM 3's detector.
    levels
        Of SAM 2's feature pyramid; the published models have 3.

    Returns
    -------
    PreTrainedModel
        In evaluation mode. Random, and such that masks and their predicted IoUs differ between prompts.
    """
    from wsiseg.models.transformers.networks import library

    names = {
        "sam2": "Sam2Model",
        "sam2_video": "Sam2VideoModel",
        "sam3": "Sam3Model",
        "sam3_tracker": "Sam3TrackerModel",
        "sam3_video": "Sam3VideoModel",
    }
    config = _tiny_sam2(kind, levels) if kind.startswith("sam2") else _tiny_sam3(kind, queries)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(library(), names[kind])(config).eval().requires_grad_(requires_grad=False)
        disturb(model)
        for name, value in model.named_parameters():
            if "no_memory_embedding" in name:
                value.normal_(0, 0.2)
            elif "hypernetworks" in name and value.ndim == 2:
                value.mul_(20)
            elif "iou_prediction_head" in name and value.ndim == 2:
                value.mul_(6)
            elif "upscale_conv" in name and value.ndim == 4:
                value.mul_(8)
    return model


def _tiny_sam2(kind: str, levels: int) -> Any:  # noqa: ANN401
    from wsiseg.models.transformers.networks import library

    backbone = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": 8,
        "image_size": [320, 320],
        "blocks_per_stage": [1, 2, 3, 1],
        "embed_dim_per_stage": [8, 16, 32, 64],
        "num_attention_heads_per_stage": [1, 1, 2, 2],
        "window_size_per_stage": [8, 4, 14, 7],  # 20 tokens in windows of 14: padding, as in the published models
        "global_attention_blocks": [4],
    }
    content = {
        "vision_config": {
            "model_type": "sam2_vision_model",
            "backbone_config": backbone,
            "backbone_channel_list": [64, 32, 16, 8],
            "backbone_feature_sizes": [[80, 80], [40, 40], [20, 20]],
            "fpn_hidden_size": 32,
            "num_feature_levels": levels,
        },
        "prompt_encoder_config": {"hidden_size": 32, "image_size": 320},
        "mask_decoder_config": _TINY_MASK_DECODER,
    }
    if kind == "sam2":
        return library().Sam2Config.from_dict(content)
    content |= {"image_size": 320, "memory_attention_hidden_size": 32, "memory_encoder_hidden_size": 32}
    return library().Sam2VideoConfig.from_dict(content)


def _tiny_sam3(kind: str, queries: int) -> Any:  # noqa: ANN401
    from wsiseg.models.transformers.networks import library

    backbone = {
        "model_type": "sam3_vit_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 280,
        "window_size": 10,
        "global_attn_indexes": [1],
        "pretrain_image_size": 140,
    }
    vision = {
        "model_type": "sam3_vision_model",
        "backbone_config": backbone,
        "fpn_hidden_size": 32,
        "backbone_feature_sizes": [[80, 80], [40, 40], [20, 20]],
    }
    tracker = {
        "vision_config": vision,
        "prompt_encoder_config": {"hidden_size": 32, "image_size": 280, "patch_size": 14},
        "mask_decoder_config": _TINY_MASK_DECODER,
    }
    layers = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_layers": 2}
    detector = {
        "vision_config": vision,
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": 120,
            "hidden_size": 32,
            "intermediate_size": 64,
            "projection_dim": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
            "hidden_act": "gelu",
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
        },
        "geometry_encoder_config": layers,
        "detr_encoder_config": layers,
        "detr_decoder_config": {**layers, "num_queries": queries},
        "mask_decoder_config": {"hidden_size": 32, "num_attention_heads": 4},
    }
    if kind == "sam3":
        return library().Sam3Config.from_dict(detector)
    if kind == "sam3_tracker":
        return library().Sam3TrackerConfig.from_dict(tracker)
    both = {
        "detector_config": {"model_type": "sam3", **detector},
        "tracker_config": {"model_type": "sam3_tracker_video", "image_size": 280, **tracker},
    }
    return library().Sam3VideoConfig.from_dict(both)


_TINY_MASK_DECODER = {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 2, "iou_head_hidden_dim": 32}


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
    mask_stride_px, window_size = 2, 48

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
        origin = self.window_origin(points_xy)
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

    def window_origin(self, points_xy: Tensor) -> Tensor:
        """A window of 96 px around each point."""
        return (points_xy - 48).floor().long()

    def describe_masks(
        self,
        embeddings: Embeddings,  # noqa: ARG002
        batch_index: Tensor,  # noqa: ARG002
        origin_xy: Tensor,  # noqa: ARG002
        logits: Tensor,
    ) -> Tensor:
        """All masks look alike."""
        return torch.nn.functional.normalize(torch.ones(len(logits), self.descriptor_size), dim=1)
