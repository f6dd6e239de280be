"""The encoders that were compared (`compare_encoders.py`). The one that ships, the convolutional pyramid, lives in the package.

All give the same three maps, p2 (32), p4 (64) and p8 (96) at strides 2, 4 and 8, and all are local: no layer looks further than its window, so
that two tiles that share pixels agree. They share the stem and the top-down path and differ in what computes strides 4 to 16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsiseg.models.nuclei_compact import Pyramid, conv_block


class _NextBlock(nn.Module):
    """Depth-wise 7 x 7, then a pointwise network of four times the width (ConvNeXt, arXiv:2201.03545); batch norm, which folds away."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depth = nn.Sequential(nn.Conv2d(width, width, 7, 1, 3, groups=width, bias=False), nn.BatchNorm2d(width))
        self.wide, self.narrow = nn.Conv2d(width, 4 * width, 1), nn.Conv2d(4 * width, width, 1)
        self.scale = nn.Parameter(torch.full((width, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.narrow(F.gelu(self.wide(self.depth(x))))


class ConvNextPyramid(Pyramid):
    """Stages of ConvNeXt blocks at strides 4, 8 and 16."""

    def __init__(self) -> None:
        super().__init__()
        self.stage4 = nn.Sequential(conv_block(32, 64, 2), _NextBlock(64), _NextBlock(64))
        self.stage8 = nn.Sequential(conv_block(64, 128, 2), *(_NextBlock(128) for _ in range(4)))
        self.stage16 = nn.Sequential(conv_block(128, 192, 2), *(_NextBlock(192) for _ in range(4)))


class _Attention(nn.Module):
    """Attention of every place to the 7 x 7 places around it (neighbourhood attention, arXiv:2204.07143) with a learnt bias per offset."""

    SIDE = 7

    def __init__(self, width: int, heads: int = 6) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)
        self.bias = nn.Parameter(torch.zeros(heads, self.SIDE**2))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(x).chunk(3, 1)
        k, v = (
            F.unfold(t, self.SIDE, padding=self.SIDE // 2).view(b, self.heads, c // self.heads, -1, h * w)
            for t in (k, v)
        )
        q = q.reshape(b, self.heads, c // self.heads, h * w) * (c // self.heads) ** -0.5
        near = torch.einsum("nhcp,nhcsp->nhsp", q, k) + self.bias[None, :, :, None]
        inside = F.unfold(torch.ones(1, 1, h, w, device=x.device), self.SIDE, padding=self.SIDE // 2)[:, None]
        near = near.masked_fill(inside == 0, -1e4).softmax(2).to(v.dtype)
        return self.out(torch.einsum("nhsp,nhcsp->nhcp", near, v).reshape(b, c, h, w))


class _Transformer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.attention = nn.BatchNorm2d(width), _Attention(width)
        self.between = nn.BatchNorm2d(width)
        self.network = nn.Sequential(nn.Conv2d(width, 3 * width, 1), nn.GELU(), nn.Conv2d(3 * width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        return x + self.network(self.between(x))


class VitPyramid(Pyramid):
    """A convolutional stem down to stride 8, then six transformer blocks at stride 16."""

    def __init__(self) -> None:
        super().__init__()
        self.stage4 = nn.Sequential(conv_block(32, 64, 2), conv_block(64, 64))
        self.stage8 = nn.Sequential(conv_block(64, 128, 2), conv_block(128, 128))
        self.stage16 = nn.Sequential(conv_block(128, 192, 2), *(_Transformer(192) for _ in range(6)))


ENCODERS = {
    "convolutional pyramid (shipped)": Pyramid,
    "ConvNeXt blocks": ConvNextPyramid,
    "transformer, convolutional stem": VitPyramid,
}
