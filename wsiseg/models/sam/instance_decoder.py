"""The instance decoder of micro-sam and PathoSAM: three maps from SAM's image embedding, by a UNETR [1]_.

Symbol        here       channels, side       meaning
z12           embedding  256, 64              SAM's neck
z9, z6, z3    skips      512/256/128, 128..   z12 through one, two, three deconvolution blocks
z0            finest     64, 1024             and through the fourth
f, c, b       maps       3, 1024              foreground; distance to the centre (0 there); distance to the boundary (1 there), each as a logit

Up(i, o)      x2 by a transposed convolution, or bilinear and a 1 x 1 convolution; a checkpoint has one of the two
Deconv(i, o)  Up, 3 x 3, batch norm, ReLU
Conv(i, o)    twice (instance norm, 3 x 3, ReLU)

    x = Conv(z12);   for skip in z9, z6, z3:   x = Conv([Up(x), middle channels of skip]);   maps = 1 x 1 (Conv([Up(x), z0]))

The skips are cropped in the channels, too: as many as ``Up(x)`` has, from the middle.

Exact savings: the 1 x 1 convolution goes before the bilinear step (both are linear, and its weights sum to 1), on a quarter of the pixels;
batch norms are folded into the convolutions; a convolution of two concatenated inputs is the sum of two, so that nothing is concatenated.

References
----------
.. [1] Hatamizadeh et al.: UNETR, WACV 2022; in the form of Archit et al.: Segment Anything for Microscopy, Nature Methods 2025.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self

import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

if TYPE_CHECKING:
    from torch import Tensor

_LEVELS = 4


class _Up(nn.Module):
    def __init__(self, inputs: int, outputs: int, *, transposed: bool) -> None:
        super().__init__()
        if transposed:
            self.block = nn.ConvTranspose2d(inputs, outputs, 2, 2)
        else:
            self.conv = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "block"):
            up: Tensor = self.block(x)
            return up
        return F.interpolate(self.conv(x), scale_factor=2, mode="bilinear", align_corners=False)


class _Wrapped(nn.Module):
    """A module under the name ``block``, as in the checkpoints' names."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x)
        return out


class _Conv(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            [
                nn.Identity(),
                nn.Conv2d(inputs, outputs, 3, padding=1),
                nn.Identity(),
                nn.Identity(),
                nn.Conv2d(outputs, outputs, 3, padding=1),
            ]
        )

    def forward(self, *parts: Tensor) -> Tensor:
        """The input in one or several parts, which the reference concatenates."""
        first: Any = self.block[1]
        second: Any = self.block[4]
        weights: tuple[Tensor, ...] = first.weight.split([part.shape[1] for part in parts], 1)
        out = F.conv2d(F.instance_norm(parts[0]), weights[0], first.bias, padding=1)
        for part, weight in zip(parts[1:], weights[1:], strict=True):
            out += F.conv2d(F.instance_norm(part), weight, padding=1)
        out = second(F.instance_norm(F.relu_(out)))
        return F.relu_(out)


class InstanceDecoder(nn.Module):
    """The network; attribute names are those of the checkpoints.

    Parameters
    ----------
    width
        Channels of the coarsest level, 512 in all published checkpoints; halved from level to level.
    transposed
        Kind of upsampling: transposed convolutions, or bilinear and 1 x 1.
    embedding
        Channels of the image embedding.
    """

    def __init__(self, width: int = 512, *, transposed: bool = False, embedding: int = 256) -> None:
        super().__init__()
        widths = [embedding, *(width // 2**k for k in range(_LEVELS))]
        for k, (inputs, outputs) in enumerate(pairwise(widths)):
            block = nn.Sequential(
                _Up(inputs, outputs, transposed=transposed),
                _Wrapped(nn.Conv2d(outputs, outputs, 3, padding=1)),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            )
            self.add_module(f"deconv{k + 1}", _Wrapped(block))
        self.base = _Conv(embedding, width)
        self.decoder = nn.ModuleDict(
            {
                "samplers": nn.ModuleList(_Up(i, o, transposed=transposed) for i, o in pairwise(widths[1:])),
                "blocks": nn.ModuleList(_Conv(i, o) for i, o in pairwise(widths[1:])),
            }
        )
        self.deconv_out = _Up(widths[-1], widths[-1], transposed=transposed)
        self.decoder_head = _Conv(2 * widths[-1], widths[-1])
        self.out_conv = nn.Conv2d(widths[-1], 3, 1)

    @classmethod
    def like(cls, tensors: dict[str, Tensor]) -> Self:
        """The network that a checkpoint's tensors belong to; they are not copied into it."""
        transposed = any(".block." in key for key in tensors if key.startswith("decoder.samplers"))
        first = tensors.get("base.block.1.weight")
        return cls(512 if first is None else len(first), transposed=transposed)

    def folded(self) -> Self:
        """Fold the batch norms into their convolutions, in place: for inference."""
        for k in range(1, _LEVELS + 1):
            block = getattr(self, f"deconv{k}").block
            block[1].block, block[2] = fuse_conv_bn_eval(block[1].block, block[2]), nn.Identity()
        return self

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Run it on full square tiles: instance norms take statistics over the whole tile.

        Parameters
        ----------
        embedding
            (B, 256, g, g).

        Returns
        -------
        maps, high
            Logits (B, 3, 16g, 16g) of f, c, b; and the features (B, 128, 4g, 4g) after the second level, for Chain-of-Prompts.
        """
        skips = [embedding]
        for k in range(1, _LEVELS + 1):
            skips.append(getattr(self, f"deconv{k}")(skips[-1]))
        x = self.base(embedding)
        high = x
        stages: Any = self.decoder
        for k, (up, block) in enumerate(zip(stages["samplers"], stages["blocks"], strict=True)):
            x = up(x)
            skip, size = skips[k + 1], x.shape[1]
            skips[k + 1] = x  # the skip may go once it is used
            first = (skip.shape[1] - size) // 2
            x = block(x, skip[:, first : first + size])
            high = x if k == 1 else high
        x = self.decoder_head(self.deconv_out(x), skips[-1])
        return self.out_conv(x), high
