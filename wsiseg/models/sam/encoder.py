"""SAM's image encoder, the same numbers in less time and memory.

Symbol   here       shape                    meaning
q, k, v  q, k, v    (B', heads, S, d)        queries, keys, values of S tokens: a window's 14 x 14, or the grid's 64 x 64
R_h, R_w _relative  (side, side, d)          relative positions: how a query in row y sees keys in row y', and the same for columns
o_h, o_w one_hot    (S, side)                one-hot row and column of each key

SAM adds to the attention logits  q . R_h[y, y'] + q . R_w[x, x']  (Li et al. [1]_, eq. 4), a bias of S x S numbers per head that
is written and read several times. On an accelerator it enters as part of the dot product [2]_::

    q' = [q / sqrt(d), q . R_h[y], q . R_w[x]]     k' = [k, o_h, o_w]     softmax(q' . k') v

which any fused ``scaled_dot_product_attention`` computes without ever holding the S x S matrix. On the CPU, where that would make the
global layers' dot products three times as long, pieces of the logits are formed, used and forgotten.

Windows: 64 tokens are padded to 70 = 5 x 14 with zeros *after* the norm, so that the padding's q, k, v are the projection's bias. They are
filled in, not computed; nothing is computed for the padding after the attention either.

References
----------
.. [1] Li et al.: MViTv2, CVPR 2022, arXiv:2112.01526.
.. [2] The bias is a product of a query vector with a table, so it is a product of longer vectors; exact up to rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

_LOGITS = (
    1 << 19
)  #: attention logits worked on at once on the CPU: 2 MB, the second-level cache (0.6 x the time of all at once)
_ROWS = (
    8192  #: tokens that pass the multilayer perceptron at once on the CPU: its hidden layer stays in the cache's reach
)


def encode(encoder: Any, images: Tensor) -> Tensor:  # noqa: ANN401
    """The image embedding.

    Parameters
    ----------
    encoder
        ``segment_anything.modeling.ImageEncoderViT``, in evaluation mode.
    images
        (B, 3, side, side): standardised, of the encoder's own size.

    Returns
    -------
    Tensor
        (B, 256, grid, grid), as ``encoder(images)`` gives it.
    """
    x = encoder.patch_embed(images)
    if encoder.pos_embed is not None:
        x = x + encoder.pos_embed
    x = x.contiguous()
    for block in encoder.blocks:
        x += _attend(block, block.norm1(x))
        x += _mlp(block, x)
    neck: Tensor = encoder.neck(x.permute(0, 3, 1, 2))
    return neck


def _mlp(block: Any, x: Tensor) -> Tensor:  # noqa: ANN401
    """The block's multilayer perceptron, some rows at a time: its hidden layer has four times the width."""
    rows = x.view(-1, x.shape[-1])
    if x.is_cuda or len(rows) <= _ROWS:
        out: Tensor = block.mlp(block.norm2(x))
        return out
    return torch.cat([block.mlp(block.norm2(part)) for part in rows.split(_ROWS)]).view(x.shape)


def _attend(block: Any, x: Tensor) -> Tensor:  # noqa: ANN401
    """Attention of one block on (B, h, w, C), inside windows or over the whole grid, projected; without the residual."""
    attention, window = block.attn, block.window_size
    batch, height, width, _ = x.shape
    heads = attention.num_heads
    qkv = attention.qkv(x)  # (B, h, w, 3C), real tokens only
    side_h, side_w = (window, window) if window else (height, width)
    if window:
        qkv = _windows(qkv, attention.qkv.bias, window)
    # (B', S, 3, heads, d) -> q, k, v (B', heads, S, d)
    q, k, v = qkv.view(len(qkv), side_h * side_w, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    out = _relative_attention(q, k, v, attention, (side_h, side_w))
    out = out.transpose(1, 2).reshape(len(qkv), side_h, side_w, -1)
    if window:
        out = _unwindow(out, batch, height, width)
    projected: Tensor = attention.proj(out)
    return projected


def _relative_attention(q: Tensor, k: Tensor, v: Tensor, attention: Any, size: tuple[int, int]) -> Tensor:  # noqa: ANN401
    """softmax(q . k / sqrt(d) + relative positions) v -> (B', heads, S, d)."""
    groups, heads, tokens, d = q.shape
    height, width = size
    q, k, v = (t.reshape(groups * heads, tokens, d) for t in (q, k, v))
    grid = q.view(-1, height, width, d)
    # One product per row (column) of queries: all queries of a row see the same table.
    table_h, table_w = (
        _relative(t, side).to(q.dtype) for t, side in ((attention.rel_pos_h, height), (attention.rel_pos_w, width))
    )
    to_rows = torch.matmul(grid, table_h.transpose(1, 2)).view(-1, tokens, height)
    to_columns = torch.matmul(grid.transpose(1, 2), table_w.transpose(1, 2)).transpose(1, 2).reshape(-1, tokens, width)
    attend = _fused_attention if q.is_cuda else _chunked_attention
    return attend(q * d**-0.5, k, v, to_rows, to_columns).view(groups, heads, tokens, d)


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, to_rows: Tensor, to_columns: Tensor) -> Tensor:
    """Attend on accelerators: q', k' through a fused kernel. All (., S, d)."""
    tokens, d = q.shape[1:]
    height, width = to_rows.shape[2], to_columns.shape[2]
    fill = -(d + height + width) % 8  # fused kernels want multiples of 8
    query = torch.cat([q, to_rows, to_columns, q.new_zeros(len(q), tokens, fill)], 2)
    place = torch.arange(tokens, device=q.device)
    one_hot = torch.cat([F.one_hot(place // width, height), F.one_hot(place % width, width + fill)], 1).to(q.dtype)
    key = torch.cat([k, one_hot.expand(len(k), -1, -1)], 2)
    return F.scaled_dot_product_attention(query[:, None], key[:, None], v[:, None], scale=1.0)[:, 0]


def _chunked_attention(q: Tensor, k: Tensor, v: Tensor, to_rows: Tensor, to_columns: Tensor) -> Tensor:
    """Attend on the CPU: the logits of some heads, or of some rows of one head, at a time, so that they never leave the cache. All (., S, d)."""
    tokens = q.shape[1]
    width = to_columns.shape[2]
    heads = max(_LOGITS // tokens**2, 1)
    rows = tokens if heads > 1 else max(_LOGITS // tokens // width, 1) * width
    out = torch.empty_like(q)
    for h in range(0, len(q), heads):
        keys, values = k[h : h + heads].transpose(1, 2), v[h : h + heads]
        for s in range(0, tokens, rows):
            part = (slice(h, h + heads), slice(s, s + rows))
            logits = (to_rows[part][..., :, None] + to_columns[part][..., None, :]).flatten(2)
            logits.baddbmm_(q[part], keys)
            out[part] = logits.softmax(-1) @ values
    return out


def _relative(table: Tensor, side: int) -> Tensor:
    """(2 side - 1, d) -> (side, side, d): row ``[a, b]`` is the entry for a query at a and a key at b."""
    place = torch.arange(side, device=table.device)
    if len(table) != 2 * side - 1:  # another input size than the weights': as SAM does it
        table = F.interpolate(table.T[None], size=2 * side - 1, mode="linear")[0].T
    return table[place[:, None] - place + side - 1]


def _windows(qkv: Tensor, bias: Tensor, window: int) -> Tensor:
    """(B, h, w, 3C) -> (B * windows, window, window, 3C); places beyond the grid hold the bias, which is what zeros project to."""
    batch, height, width, channels = qkv.shape
    more_h, more_w = -height % window, -width % window
    if more_h or more_w:
        padded = bias.to(qkv.dtype).expand(batch, height + more_h, width + more_w, channels).clone()
        padded[:, :height, :width] = qkv
        qkv = padded
    rows, columns = qkv.shape[1] // window, qkv.shape[2] // window
    parts = qkv.view(batch, rows, window, columns, window, channels).transpose(2, 3)
    return parts.reshape(-1, window, window, channels)


def _unwindow(parts: Tensor, batch: int, height: int, width: int) -> Tensor:
    """(B * windows, window, window, C) -> (B, h, w, C), the padding dropped."""
    window, channels = parts.shape[1], parts.shape[3]
    rows, columns = -(-height // window), -(-width // window)
    grid = parts.view(batch, rows, columns, window, window, channels).transpose(2, 3)
    return grid.reshape(batch, rows * window, columns * window, channels)[:, :height, :width]
