"""The image encoders of SAM 2 and SAM 3, the same numbers in less time and memory.

Symbol   here      shape             meaning
x        x         (B, h, w, C)      image tokens
         rows      window rows       a strip of the image as high as a window

Inside windows a block sees nothing of other windows, and its norms and multilayer perceptron see one token alone. So a block is applied to one
strip of windows after the other [1]_, by the library's own module: the queries, keys, values and hidden layers of a strip stay in the cache, and
those of the whole image never exist. Blocks that attend to the whole image do the attention at once, and the rest in strips too. The necks compute
the levels that are used, without their positional encodings, which only video needs.

References
----------
.. [1] Windows: Li et al.: Exploring Plain Vision Transformer Backbones for Object Detection, ECCV 2022, arXiv:2203.16527, and Ryali et al.: Hiera,
   ICML 2023, arXiv:2306.00989.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_HEADS = 4  #: of a layer that attends to the whole image, worked on at once
_TOKENS = 2048  #: of a strip, about: fewer make products too small, more leave the cache (SAM 2.1's Hiera-T: 2.2, 2.3, 2.4 s at 2048, 4096, 16384)


def hiera_levels(encoder: Any, images: Tensor) -> list[Tensor]:  # noqa: ANN401
    """The feature pyramid of ``Sam2VisionModel``, finest level first: (B, C, h, w) each, as many as the checkpoint uses.

    Parameters
    ----------
    encoder
        A ``Sam2VisionModel`` in evaluation mode.
    images
        (B, 3, side, side), standardised.
    """
    backbone, neck = encoder.backbone, encoder.neck
    x = backbone.patch_embed(images)
    x = (x + _hiera_position(backbone, x.shape[1:3])).contiguous()
    levels: list[Tensor] = []
    for i, block in enumerate(backbone.blocks):
        x = _in_strips(block, x, block.window_size) if block.window_size else _attend_to_all(block, block.attn, x)
        if i in backbone.stage_ends:  # the lateral convolution at once: nothing else of a stage is needed later
            levels.append(neck.convs[len(backbone.stage_ends) - 1 - len(levels)](x.permute(0, 3, 1, 2)))
    for i in range(len(levels) - 2, -1, -1):
        if i in neck.fpn_top_down_levels:
            levels[i] += F.interpolate(levels[i + 1].float(), scale_factor=2.0, mode="nearest").to(x.dtype)
    return levels[: encoder.num_feature_levels]


def _hiera_position(backbone: Any, size: Sequence[int]) -> Tensor:  # noqa: ANN401
    """Positional encoding (1, h, w, C): that of the whole image, and in each window the same."""
    whole = F.interpolate(backbone.pos_embed, size=tuple(size), mode="bicubic")
    window = backbone.pos_embed_window
    step = window.shape[-1]
    whole.view(*whole.shape[:2], size[0] // step, step, size[1] // step, step).add_(window[:, :, None, :, None, :])
    return whole.permute(0, 2, 3, 1)


def vit_features(trunk: Any, images: Tensor) -> Tensor:  # noqa: ANN401
    """Features (B, C, g, g) of ``Sam3ViTModel``, as its last layer leaves them.

    Parameters
    ----------
    trunk
        A ``Sam3ViTModel`` in evaluation mode.
    images
        (B, 3, side, side), standardised.
    """
    grid = images.shape[-1] // trunk.config.patch_size
    x = trunk.layer_norm(trunk.embeddings(images).view(len(images), grid, grid, -1))
    for layer in trunk.layers:
        to_all = partial(_vit_attention, layer)
        x = _in_strips(layer, x, layer.window_size) if layer.window_size else _attend_to_all(layer, to_all, x)
    features: Tensor = x.permute(0, 3, 1, 2)
    return features


def _vit_attention(layer: Any, x: Tensor) -> Tensor:  # noqa: ANN401
    """Attention of all tokens (B, h, w, C) to all, with rotary positions, some heads at a time: their queries and keys are held in fp32."""
    attention, (batch, height, width, channels) = layer.attention, x.shape
    cos, sin = layer.rotary_emb(x, layer.position_ids)
    tokens, d = x.reshape(batch, -1, channels), attention.head_dim
    out = torch.empty_like(tokens)
    for start in range(0, channels, _HEADS * d):
        rows = slice(start, start + _HEADS * d)
        q, k, v = (
            F.linear(tokens, p.weight[rows], p.bias[rows]).view(batch, height * width, -1, d).transpose(1, 2)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        seen = F.scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v, scale=attention.scaling)
        out[..., rows] = seen.transpose(1, 2).flatten(2)
    projected: Tensor = attention.o_proj(out).view(x.shape)
    return projected


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of channels of (B, heads, S, d) by the angles of their positions, cos and sin (1, S, d)."""
    x32 = x.float()
    turned = torch.stack([-x32[..., 1::2], x32[..., ::2]], -1).flatten(-2)
    return turned.mul_(sin).addcmul_(x32, cos).to(x.dtype)


class VitNeck:
    """The levels of a ``Sam3VisionNeck`` at the resolution of the features and above.

    Of a level, the last enlargement and the projection after it are one linear map, and are applied as one. The 3 x 3 convolution at the end sees one
    row more on each side, so that a level is made in strips too.

    Parameters
    ----------
    neck
        In evaluation mode, on its device and in its precision.
    """

    def __init__(self, neck: Any) -> None:  # noqa: ANN401
        self.levels = [_VitLevel(layer) for layer in neck.fpn_layers if layer.scale_factor >= 1]

    def __call__(self, features: Tensor) -> list[Tensor]:
        """Features (B, C, g, g) -> levels, finest first."""
        return [level(features) for level in self.levels]


class _VitLevel:
    def __init__(self, layer: Any) -> None:  # noqa: ANN401
        self.up = int(layer.scale_factor)
        self.last = layer.proj2
        *before, merge = layer.scale_layers or [None]
        self.before: list[Any] = before
        self.projection, self.enlarge = layer.proj1, merge
        if merge is not None:  # (in, mid, 2, 2) then (out, mid)
            project = layer.proj1.weight[:, :, 0, 0].float()
            weight = torch.einsum("imkl,om->iokl", merge.weight.float(), project)
            self.weight = weight.to(merge.weight.dtype)
            self.bias = (project @ merge.bias.float() + layer.proj1.bias.float()).to(merge.weight.dtype)

    def __call__(self, features: Tensor) -> Tensor:
        batch, _, height, width = features.shape
        up, step = self.up, height if features.is_cuda else max(_TOKENS // (batch * width), 1)
        level = features.new_empty(batch, self.last.out_channels, up * height, up * width)
        for start in range(0, height, step):
            stop = min(start + step, height)
            above, below = min(start, 1), min(height - stop, 1)  # rows of features that are seen for their edge
            x = self._enlarged(features[:, :, start - above : stop + below])
            x = x[:, :, (up - 1) * above : x.shape[2] - (up - 1) * below]
            x = F.pad(x, (0, 0, 1 - above, 1 - below))
            level[:, :, up * start : up * stop] = F.conv2d(x, self.last.weight, self.last.bias, padding=(0, 1))
        return level

    def _enlarged(self, x: Tensor) -> Tensor:
        if self.enlarge is None:
            projected: Tensor = self.projection(x)
            return projected
        for layer in self.before:
            x = layer(x)
        return F.conv_transpose2d(x, self.weight, self.bias, stride=2)


def _in_strips(block: Any, x: Tensor, window: int) -> Tensor:  # noqa: ANN401
    """A block that attends within windows of ``window`` rows; in place where it keeps the shape."""
    batch, height, width, _ = x.shape
    rows = height if x.is_cuda else max(_TOKENS // (batch * width * window), 1) * window
    if rows >= height:
        whole: Tensor = block(x)
        return whole
    strips = x.split(rows, 1)
    if getattr(block, "dim", None) != getattr(block, "dim_out", None) or getattr(block, "query_stride", None):
        return torch.cat([block(strip) for strip in strips], 1)
    for strip in strips:
        strip.copy_(block(strip))
    return x


def _attend_to_all(block: Any, attention: Any, x: Tensor) -> Tensor:  # noqa: ANN401
    """A block that attends to the whole image."""
    if x.is_cuda or getattr(block, "query_stride", None):
        whole: Tensor = block(x)
        return whole
    x = x + attention(block.layer_norm1(x))
    for strip in x.split(max(_TOKENS // x.shape[2] // len(x), 1), 1):
        strip.add_(block.mlp(block.layer_norm2(strip)))
    return x
