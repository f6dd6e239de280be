"""SAM's mask decoder for many points of a tile: the same logits with a quarter of the arithmetic.

Symbol   here          shape                meaning
X        keys          (N, S, C)            image tokens as prompt n sees them; S = 64 x 64, C = 256; X0 before the first layer
P        position      (S, C)               their positional encoding
t        tokens        (N, T, C)            output tokens and prompt tokens; T = 7 for a point
h                      8 heads of d = 16    W_q^h, W_k^h, W_v^h: (d, C); W_o^h: (C, d)

Reference: Kirillov et al. [1]_, appendix A, as in ``segment_anything.modeling``. Three changes, all exact up to rounding:

E1  *Absorbed projections.* T x 8 = 56 vectors of a prompt stand against S = 4096 image tokens, so the projections of the image tokens are moved
    over to the 56::

        scores   q_h . W_k^h (X + P)  =  (q_h W_k^h) . X + q_h . (W_k^h P)     (the bias of k shifts all scores of a row: softmax drops it)
        values   A_h (X W_v^hT + b_v) =  (A_h X) W_v^hT + b_v                  (rows of A sum to 1)
        image    out += A_h (v_h W_o^hT)                                       (A: softmax over the 7 tokens)

    and no projection of X is ever made. W_k^h P and W_q^h P are known beforehand.
E2  *First layer once per tile.* X0 is the same for all prompts of a tile, so its projections are made once (with E1 there is no gain in it twice).
E3  *Upscaling where the mask is.* Both transposed convolutions have kernel 2 and stride 2, and the norm between them acts on each pixel: a
    pixel's logit depends on one token alone. 16 x 16 tokens around the point are upscaled (256 px); a mask that reaches the border of that
    crop is cut there, and :func:`wsiseg.models.sam.prompted.PromptedSam.decode` does it again on the whole grid.

References
----------
.. [1] Kirillov et al.: Segment Anything, ICCV 2023, arXiv:2304.02643.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

CROP = 16  #: tokens on each side of the crop (E3)
UP = 4  #: logits per token and side
CPU_PROMPTS = 4  #: prompts worked on at once: their image tokens (4 MB each) stay in the third-level cache
_GPU_PROMPTS = 256
SINGLE, THREE = (
    slice(0, 1),
    slice(1, None),
)  #: the mask for a prompt that means one thing; the masks for one that may mean several


def crop_side(grid: int) -> int:
    """Side of the crop (E3) on a grid of tokens: ``CROP``, or an even number below half of a small grid.

    A tile's halo is half of a crop on each side: one that filled the tile, as for the 224 px that SAMPO adapts SAM to, would leave no core.

    Examples
    --------
    >>> crop_side(64), crop_side(14)
    (16, 6)
    """
    return CROP if grid > CROP else max(grid // 4 * 2, 2)


@dataclass(frozen=True)
class Shared:
    """Tensors that the prompts of B tiles share (E2). ``keys`` (B, S, C); ``k``, ``v``, ``q`` (B, 8, S, 16)."""

    keys: Tensor
    k: Tensor
    v: Tensor
    q: Tensor

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of the tensors, in order."""
        return tuple(field.name for field in fields(cls))


class _Cross:
    """An attention between tokens and image, taken apart for E1. ``image`` is what it knows of the positions: (8, S, 16)."""

    def __init__(self, attention: Any, position: Tensor, *, to_image: bool) -> None:  # noqa: ANN401
        self.heads: int = attention.num_heads
        self.scale: float = (attention.internal_dim // self.heads) ** -0.5
        self.attention = attention
        known = attention.q_proj if to_image else attention.k_proj
        self.image = self.split(F.linear(position, known.weight, known.bias if to_image else None)[None])[0]

    def split(self, x: Tensor) -> Tensor:
        """(N, M, 128) -> (N, 8, M, 16)."""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def _weight(self, name: str) -> Tensor:
        """A projection's weight by heads: (8, 16, C)."""
        weight: Tensor = getattr(self.attention, name).weight
        return weight.view(self.heads, -1, weight.shape[1])

    def known_scores(self, tokens: Tensor) -> Tensor:
        """Tokens (N, 8, T, 16) against the positions -> (N, 8, T, S), a view."""
        n, heads, count, d = tokens.shape
        flat = tokens.transpose(0, 1).reshape(heads, n * count, d)
        return (flat @ self.image.transpose(1, 2)).view(heads, n, count, -1).transpose(0, 1)

    def _scores(self, projected: Tensor, weight: str, keys: Tensor) -> Tensor:
        """Scaled scores of tokens (N, 8, T, 16) against image tokens (N, S, C) -> (N, 8, T, S)."""
        n, heads, count, _ = projected.shape
        absorbed = (projected @ self._weight(weight)).flatten(1, 2)  # (N, 56, C)
        scores = torch.bmm(absorbed, keys.transpose(1, 2)).view(n, heads, count, -1)
        return scores.add_(self.known_scores(projected))

    def to_tokens(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Tokens (N, T, C) look at image tokens (N, S, C) -> (N, T, C)."""
        n, count, _ = queries.shape
        q = self.split(self.attention.q_proj(queries)) * self.scale
        attended = torch.bmm(self._scores(q, "k_proj", keys).softmax(-1).flatten(1, 2), keys).view(
            n, self.heads, count, -1
        )
        values = attended @ self._weight("v_proj").transpose(1, 2)  # (N, 8, T, 16)
        return self._out(values + self.attention.v_proj.bias.view(self.heads, 1, -1))

    def to_image(self, keys: Tensor, tokens: Tensor, values: Tensor) -> Tensor:
        """Image tokens (N, S, C) look at tokens (N, T, C) -> keys + what they see, (N, S, C)."""
        k = self.split(self.attention.k_proj(tokens)) * self.scale
        return self.spread(keys, self._scores(k, "q_proj", keys), values)

    def spread(self, keys: Tensor, scores: Tensor, values: Tensor) -> Tensor:
        """Keys + softmax over the tokens of scores (N, 8, T, S), applied to the values of (N, T, C)."""
        v = self.split(self.attention.v_proj(values))
        out = self.attention.out_proj
        by_head = out.weight.view(-1, self.heads, v.shape[-1]).permute(1, 2, 0)  # (8, 16, C)
        spoken = (v @ by_head).flatten(1, 2)  # (N, 56, C)
        attended = scores.softmax(2).flatten(1, 2)
        return torch.baddbmm(keys + out.bias, attended.transpose(1, 2), spoken)

    def _out(self, values: Tensor) -> Tensor:
        projected: Tensor = self.attention.out_proj(values.transpose(1, 2).flatten(2))
        return projected


class PointDecoder:
    """The fast form of ``segment_anything.modeling.MaskDecoder``; it uses the weights of the one that it is made from.

    Parameters
    ----------
    decoder
        A MaskDecoder, frozen, on its device and in its precision.
    position
        (1, C, g, g), from ``PromptEncoder.get_dense_pe()``; of the same device and precision.
    """

    shared_type: type[Shared] = Shared

    def __init__(self, decoder: Any, position: Tensor) -> None:  # noqa: ANN401
        self.reference = decoder
        self.grid = position.shape[-1]
        self.crop = crop_side(self.grid)
        self.position = position.flatten(2)[0].T.contiguous()
        self.layers = list(decoder.transformer.layers)
        self.look = [_Cross(layer.cross_attn_token_to_image, self.position, to_image=False) for layer in self.layers]
        self.answer = [_Cross(layer.cross_attn_image_to_token, self.position, to_image=True) for layer in self.layers]
        self.last_look = _Cross(decoder.transformer.final_attn_token_to_image, self.position, to_image=False)

    def share(self, embedding: Tensor, dense: Tensor) -> Shared:
        """Compute what all prompts of a tile share (E2): image embeddings (B, C, g, g) and SAM's "no mask" embedding (C,)."""
        keys = embedding.flatten(2).transpose(1, 2) + dense
        placed = keys + self.position
        look, answer = self.look[0], self.answer[0]
        return Shared(
            keys,
            look.split(look.attention.k_proj(placed)).contiguous(),
            look.split(look.attention.v_proj(keys)).contiguous(),
            answer.split(answer.attention.q_proj(placed)).contiguous(),
        )

    def __call__(
        self, shared: Shared, tile: Tensor, prompts: Tensor, corner: Tensor | None, masks: slice
    ) -> tuple[Tensor, Tensor]:
        """Decode prompts.

        Parameters
        ----------
        shared
            Shared tensors of B tiles.
        tile
            int64 (N,): which of them.
        prompts
            (N, K, C): the prompts' tokens.
        corner
            int64 (N, 2): first column and row, in tokens, of each prompt's crop of ``CROP`` tokens; ``None``: the whole grid.
        masks
            Selection among the four masks: ``SINGLE`` the one, ``THREE`` those for ambiguous prompts.

        Returns
        -------
        logits, quality
            (N, M, side, side) with ``side`` = 4 x tokens, and (N, M): predicted IoU, as SAM gives it (not bounded).
        """
        step = _GPU_PROMPTS if prompts.is_cuda else CPU_PROMPTS
        parts = [
            self._decode(
                shared,
                tile[s : s + step],
                prompts[s : s + step],
                None if corner is None else corner[s : s + step],
                masks,
            )
            for s in range(0, len(prompts), step)
        ]
        return torch.cat([logits for logits, _ in parts]), torch.cat([quality for _, quality in parts])

    def _decode(
        self, shared: Shared, tile: Tensor, prompts: Tensor, corner: Tensor | None, masks: slice
    ) -> tuple[Tensor, Tensor]:
        tokens, keys = self._transform(shared, tile, prompts)
        weights, quality = self._heads(tokens, masks)
        return self._logits(self._crop(keys, corner), weights), quality

    def _transform(self, shared: Shared, tile: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """The two-way transformer -> tokens (N, T, C): that of the quality, those of the masks, others; and image tokens (N, S, C)."""
        decoder = self.reference
        given = self._own_tokens().to(prompts.dtype)
        given = torch.cat([given.expand(len(prompts), -1, -1), prompts], 1)  # (N, T, C)
        tokens, keys = self._first_layer(shared, tile, given)
        for layer, look, answer in list(zip(self.layers, self.look, self.answer, strict=True))[1:]:
            placed = tokens + given
            tokens = layer.norm1(tokens + layer.self_attn(q=placed, k=placed, v=tokens))
            tokens = layer.norm2(tokens + look.to_tokens(tokens + given, keys))
            tokens = layer.norm3(tokens + layer.mlp(tokens))
            keys = layer.norm4(answer.to_image(keys, tokens + given, tokens))
        tokens = decoder.transformer.norm_final_attn(tokens + self.last_look.to_tokens(tokens + given, keys))
        return tokens, keys

    def _own_tokens(self) -> Tensor:
        """The decoder's learnt tokens (M, C), the quality's first, then those of the masks."""
        return torch.cat([self.reference.iou_token.weight, self.reference.mask_tokens.weight])

    def _heads(self, tokens: Tensor, masks: slice) -> tuple[Tensor, Tensor]:
        """Weights of the masks' logits (N, C / 8, M), and predicted IoUs (N, M)."""
        decoder = self.reference
        weights = torch.stack(
            [mlp(tokens[:, 1 + i]) for i, mlp in list(enumerate(decoder.output_hypernetworks_mlps))[masks]], 2
        )
        return weights, decoder.iou_prediction_head(tokens[:, 0])[:, masks]

    def _first_layer(self, shared: Shared, tile: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
        """The layer whose image tokens are the tile's own (E2) -> tokens (N, T, C), keys (N, S, C)."""
        layer, look, answer = self.layers[0], self.look[0], self.answer[0]
        tokens = layer.norm1(layer.self_attn(q=given, k=given, v=given))
        q = look.split(look.attention.q_proj(tokens + given)) * look.scale
        seen = _per_tile(
            lambda b, rows: _product(_product(rows, shared.k[b].transpose(1, 2)).softmax(-1), shared.v[b]), tile, q
        )
        tokens = layer.norm2(tokens + look._out(seen))
        tokens = layer.norm3(tokens + layer.mlp(tokens))
        k = answer.split(answer.attention.k_proj(tokens + given)) * answer.scale
        scores = _per_tile(lambda b, rows: _product(rows, shared.q[b].transpose(1, 2)), tile, k)
        return tokens, layer.norm4(answer.spread(shared.keys[tile], scores, tokens))

    def _crop(self, keys: Tensor, corner: Tensor | None, which: Tensor | None = None) -> Tensor:
        """Image tokens (N, S, C), or those of the tiles ``which`` (N,) of B, of the crops -> (N, side, side, C)."""
        grid = keys.view(len(keys), self.grid, self.grid, -1)
        if corner is None:
            return grid if which is None else grid[which]
        which = torch.arange(len(keys), device=keys.device) if which is None else which
        steps = torch.arange(self.crop, device=keys.device)
        x, y = corner[:, :1] + steps, corner[:, 1:] + steps
        return grid[which[:, None, None], y[:, :, None], x[:, None, :]]

    def _logits(self, grid: Tensor, weights: Tensor) -> Tensor:
        """Upscale tokens (N, s, s, C) and weigh them with (N, C / 8, M) -> (N, M, 4s, 4s)."""
        first, norm, activate, second, _ = self.reference.output_upscaling
        n, side = grid.shape[:2]
        x = transposed(grid.reshape(-1, grid.shape[-1]), first)  # (N s s 2 2, C / 4)
        x = activate(F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps))
        x = activate(transposed(x, second)).view(n, -1, weights.shape[1])
        return self._in_place(torch.bmm(x, weights), side)

    @staticmethod
    def _in_place(logits: Tensor, side: int) -> Tensor:
        """Logits (N, s s 16, M) in the order of the upscaling -> (N, M, 4s, 4s)."""
        n = len(logits)
        parts = logits.view(n, side, side, 2, 2, 2, 2, -1)  # rows and columns: token, first, second convolution
        return parts.permute(0, 7, 1, 3, 5, 2, 4, 6).reshape(n, -1, UP * side, UP * side)


def transposed(x: Tensor, convolution: Any) -> Tensor:  # noqa: ANN401
    """A transposed convolution of kernel 2 and stride 2 as one product: (M, C) -> (M * 4, C'), the four pixels in reading order."""
    weight = convolution.weight.permute(0, 2, 3, 1).flatten(1)
    return torch.addmm(convolution.bias.repeat(4), x, weight).view(-1, convolution.out_channels)


def _product(rows: Tensor, table: Tensor) -> Tensor:
    """(N, 8, T, A) x (8, A, B) -> (N, 8, T, B), one product per head for all prompts together."""
    n, heads, count, a = rows.shape
    return (rows.transpose(0, 1).reshape(heads, n * count, a) @ table).view(heads, n, count, -1).transpose(0, 1)


def _per_tile(function: Callable[[int, Tensor], Tensor], tile: Tensor, rows: Tensor) -> Tensor:
    """``function(b, rows)`` for the rows of each tile b, put back in their places."""
    present = tile.unique().tolist()
    if len(present) == 1:
        return function(present[0], rows)
    places = [(tile == b).nonzero()[:, 0] for b in present]
    results = torch.cat([function(b, rows[place]) for b, place in zip(present, places, strict=True)])
    return results[torch.cat(places).argsort()]
