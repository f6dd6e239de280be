"""Networks with random weights, for tests and benchmarks: what a fast path computes can be compared without anybody's checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from wsiseg.models.checkpoints import Architecture
from wsiseg.models.sam_modules import build

if TYPE_CHECKING:
    from torch import nn

VIT_B = Architecture(dim=768, depth=12, heads=12, global_blocks=(2, 5, 8, 11), window=14, grid=64, patch=16)
VIT_L = Architecture(dim=1024, depth=24, heads=16, global_blocks=(5, 11, 17, 23), window=14, grid=64, patch=16)
VIT_H = Architecture(dim=1280, depth=32, heads=16, global_blocks=(7, 15, 23, 31), window=14, grid=64, patch=16)
VIT_TOY = Architecture(dim=48, depth=2, heads=3, global_blocks=(1,), window=14, grid=64, patch=16)  #: seconds become milliseconds


def random_sam(architecture: Architecture, seed: int = 0) -> nn.ModuleDict:
    """SAM as it is before training, but for what starts at zero or one (positions, norms): that gets values that matter."""
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
