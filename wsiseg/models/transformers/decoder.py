"""Mask decoder of SAM 2 and of SAM 3's tracker, for many points of a tile: SAM's, with finer features and a rule for the single mask.

Symbol   here          shape                  meaning
s0       fine          (B, S, 16 C / 8)       features at four times the resolution of the tokens, the 16 px of a token together
s1       middle        (B, S, 4 C / 4)        features at twice their resolution, the 4 px of a token together
L_0..L_3 logits        (N, 4, h, w)           the single mask, and three for an ambiguous prompt

What is computed is what ``transformers``' decoder computes [1]_, [2]_, in the order of :mod:`wsiseg.models.sam.decoder`. Added to it::

    upscaling    GELU(norm(up(X) + s1)),  GELU(up(.) + s0)          pixel by pixel, so it stays local to a token (E3)
    single mask  L_0 if |L_0 > d| / |L_0 > -d| >= 0.98, d = 0.05;  else the one of L_1..L_3 with the highest predicted IoU

Departure: in a window the rule counts the logits of the window, which are those of the mask that is kept; on the whole tile it is the library's.

References
----------
.. [1] Ravi et al.: SAM 2: Segment Anything in Images and Videos, ICLR 2025, arXiv:2408.00714.
.. [2] Carion et al.: SAM 3: Segment Anything with Concepts, 2025, arXiv:2511.16719.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from wsiseg.models.sam.decoder import SINGLE, PointDecoder, Shared, transposed

if TYPE_CHECKING:
    from torch import Tensor

_ALL = slice(None)


@dataclass(frozen=True)
class FineShared(Shared):
    """As :class:`Shared`, with s1 (B, S, C) and s0 (B, S, 2 C), of which each token has its own px."""

    middle: Tensor
    fine: Tensor


class FineDecoder(PointDecoder):
    """The fast form of ``Sam2MaskDecoder`` and ``Sam3TrackerMaskDecoder``; it uses the weights of the one that it is made from.

    Parameters
    ----------
    decoder
        One of these, frozen, on its device and in its precision.
    position
        (1, C, g, g): positional encoding of the tokens; of the same device and precision.
    """

    shared_type = FineShared

    def __init__(self, decoder: Any, position: Tensor) -> None:  # noqa: ANN401
        super().__init__(_named_as_sam(decoder), position)
        self.own = decoder

    def share_fine(self, embedding: Tensor, dense: Tensor, middle: Tensor, fine: Tensor) -> FineShared:
        """As :meth:`share`; ``middle`` (B, C, 2g, 2g) and ``fine`` (B, C, 4g, 4g) are the pyramid's levels, not projected yet."""
        return FineShared(
            **vars(self.share(embedding, dense)),
            middle=_by_token(self.own.conv_s1(middle), 2),
            fine=_by_token(self.own.conv_s0(fine), 4),
        )

    def _own_tokens(self) -> Tensor:
        """The token of the object score comes last: it speaks to the others, and is not read."""
        return torch.cat([super()._own_tokens(), self.own.obj_score_token.weight])

    def _decode(
        self,
        shared: FineShared,  # type: ignore[override]  # what its own share_fine makes
        tile: Tensor,
        prompts: Tensor,
        corner: Tensor | None,
        masks: slice,
    ) -> tuple[Tensor, Tensor]:
        tokens, keys = self._transform(shared, tile, prompts)
        by_stability = masks == SINGLE and self.own.dynamic_multimask_via_stability
        weights, quality = self._heads(tokens, _ALL if by_stability else masks)
        middle, fine = (self._crop(x, corner, tile) for x in (shared.middle, shared.fine))
        logits = self._upscale(self._crop(keys, corner), weights, middle, fine)
        return self._single(logits, quality) if by_stability else (logits, quality)

    def _single(self, logits: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
        """One of four masks (N, 4, h, w) per prompt, and its quality: (N, 1, h, w), (N, 1)."""
        delta = self.own.dynamic_multimask_stability_delta
        inner, outer = ((logits[:, 0] > d).sum((1, 2)).float() for d in (delta, -delta))
        stable = torch.where(outer > 0, inner / outer, 1.0) >= self.own.dynamic_multimask_stability_thresh
        chosen = torch.where(stable, 0, 1 + quality[:, 1:].argmax(1))
        rows = torch.arange(len(chosen), device=chosen.device)
        return logits[rows, chosen][:, None], quality[rows, chosen][:, None]

    def _upscale(self, grid: Tensor, weights: Tensor, middle: Tensor, fine: Tensor) -> Tensor:
        """Upscale tokens (N, s, s, C) with the finer features of the same tokens, and weigh them with (N, C / 8, M) -> (N, M, 4s, 4s)."""
        own = self.own
        n, side = grid.shape[:2]
        x = transposed(grid.reshape(-1, grid.shape[-1]), own.upscale_conv1)  # (N s s 2 2, C / 4)
        norm = own.upscale_layer_norm
        x = own.activation(F.layer_norm(x + middle.reshape(x.shape), x.shape[-1:], norm.weight, norm.bias, norm.eps))
        x = transposed(x, own.upscale_conv2)  # (N s s 2 2 2 2, C / 8)
        x = own.activation(x + fine.reshape(x.shape)).view(n, -1, weights.shape[1])
        return self._in_place(torch.bmm(x, weights), side)


def _by_token(feature: Tensor, up: int) -> Tensor:
    """(B, C, up g, up g) -> (B, g g, up up C): of each token its px in the order in which the decoder's upscaling makes them."""
    batch, channels, height, width = feature.shape
    halves = [2] * (up // 2)  # each upscaling doubles
    x = feature.view(batch, channels, height // up, *halves, width // up, *halves)
    k = len(halves)
    rows, columns = range(3, 3 + k), range(4 + k, 4 + 2 * k)
    pairs = [axis for pair in zip(rows, columns, strict=True) for axis in pair]
    return x.permute(0, 2, 3 + k, *pairs, 1).reshape(batch, height // up * (width // up), -1)


class _Attention:
    """One of the library's attentions under the names of SAM's, (N, T, C) in and out."""

    def __init__(self, own: Any) -> None:  # noqa: ANN401
        self.own, self.num_heads, self.internal_dim = own, own.num_attention_heads, own.internal_dim
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = own.q_proj, own.k_proj, own.v_proj, own.o_proj

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = self.own(query=q[:, None], key=k[:, None], value=v[:, None])[0][:, 0]
        return out


def _named_as_sam(decoder: Any) -> Any:  # noqa: ANN401
    """The parts of the library's decoder that :class:`PointDecoder` uses, under the names of ``segment_anything``."""
    layers = [
        SimpleNamespace(
            self_attn=_Attention(layer.self_attn),
            cross_attn_token_to_image=_Attention(layer.cross_attn_token_to_image),
            cross_attn_image_to_token=_Attention(layer.cross_attn_image_to_token),
            mlp=layer.mlp,
            norm1=layer.layer_norm1,
            norm2=layer.layer_norm2,
            norm3=layer.layer_norm3,
            norm4=layer.layer_norm4,
        )
        for layer in decoder.transformer.layers
    ]
    transformer = SimpleNamespace(
        layers=layers,
        final_attn_token_to_image=_Attention(decoder.transformer.final_attn_token_to_image),
        norm_final_attn=decoder.transformer.layer_norm_final_attn,
    )
    return SimpleNamespace(
        iou_token=decoder.iou_token,
        mask_tokens=decoder.mask_tokens,
        transformer=transformer,
        output_hypernetworks_mlps=decoder.output_hypernetworks_mlps,
        iou_prediction_head=decoder.iou_prediction_head,
    )
