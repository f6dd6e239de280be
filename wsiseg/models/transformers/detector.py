"""SAM 3's detector: every instance of a concept on a tile, the concept being a phrase, boxes around examples, or both [1]_.

The networks are those of ``Sam3Model`` in the package ``transformers`` [2]_, and what is computed is what it computes. The order differs: text is
encoded once, not per image; a phrase is not padded, so that no attention needs a mask for it; masks are made of those queries only that are asked
for; and boxes need no torchvision (:func:`roi_align`), which many installations of torch do not have.

References
----------
.. [1] Carion et al.: SAM 3: Segment Anything with Concepts, 2025, arXiv:2511.16719.
.. [2] Hugging Face transformers 5, ``models/sam3``, Apache-2.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from wsiseg.errors import WeightsError
from wsiseg.records import Detections
from wsiseg.runtime.paths import kind_of
from wsiseg.runtime.text import first_line

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from wsiseg.records import Concept, Embeddings

_STRIP = 36  #: rows of a level decoded at a time: an eighth of SAM 3's finest
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")  #: the first alone, or the other two, in a hub folder


def read_tokenizer(folder: Path) -> str:
    """Read the tokenizer of a folder as the hub's tools leave it -> its ``tokenizer.json``, which is data: nothing in it is run.

    Raises
    ------
    WeightsError
        The folder has no tokenizer, or one that cannot be read.
    """
    from tokenizers import Tokenizer

    whole, vocabulary, merges = (folder / name for name in TOKENIZER_FILES)
    try:
        if kind_of(whole, WeightsError) == "file":
            return str(Tokenizer.from_file(str(whole)).to_str())
        if kind_of(vocabulary, WeightsError) == kind_of(merges, WeightsError) == "file":
            from transformers import CLIPTokenizer

            return str(CLIPTokenizer(str(vocabulary), str(merges)).backend_tokenizer.to_str())
    except Exception as error:  # tokenizers raises plain Exception
        raise WeightsError(
            f"{folder}: its tokenizer cannot be read ({first_line(error)}); download the folder again"
        ) from error
    raise WeightsError(
        f"{folder}: no tokenizer, which phrases need; download tokenizer.json (or vocab.json and merges.txt) as well"
    )


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one pass says about its Q queries; their masks are made by :meth:`Sam3Detector.masks`.

    Attributes
    ----------
    logits
        float32 of shape (Q,): is the query an instance of the concept?
    presence
        float32 of shape (): logit; is the concept on the tile at all?
    boxes
        float32 of shape (Q, 4): x0, y0, x1, y1 as shares of the tile.
    queries
        (Q, C): the queries at the end of the decoder.
    encoded
        (1, h * w, C): the tile, seen with the concept in mind.
    prompt
        (1, L, C): tokens of the concept.
    """

    logits: Tensor
    presence: Tensor
    boxes: Tensor
    queries: Tensor
    encoded: Tensor
    prompt: Tensor

    @property
    def scores(self) -> Tensor:
        """(Q,): sigmoid(logit) x sigmoid(presence)."""
        return self.logits.sigmoid() * self.presence.sigmoid()


class Sam3Detector:
    """SAM 3's detector on features that are there already. Shapes below: C channels of the features, L tokens, Q queries.

    Parameters
    ----------
    model
        A ``Sam3Model`` of transformers. It is referred to, not owned: precision and device are the owner's business.
    tokenizer
        Content of a ``tokenizer.json`` (see :func:`read_tokenizer`); ``None``: no phrases can be encoded.

    Notes
    -----
    :meth:`detect` finds the levels of the detector's own neck, ``fpn0`` (finest) to ``fpn2``, in ``Embeddings.extra``; :meth:`levels` picks them.
    """

    def __init__(self, model: Any, tokenizer: str | None = None) -> None:  # noqa: ANN401
        from tokenizers import Tokenizer

        self.model = model
        self.tokenizer = None
        if tokenizer is not None:
            self.tokenizer = Tokenizer.from_str(tokenizer)
            self.tokenizer.no_padding()
            self.tokenizer.no_truncation()

    @property
    def max_tokens(self) -> int:
        """Tokens that a phrase may have, with those for its start and end."""
        return int(self.model.config.text_config.max_position_embeddings)

    @property
    def max_instances(self) -> int:
        """Q: one pass finds no more."""
        return int(self.model.config.detr_decoder_config.num_queries)

    @property
    def reads_text(self) -> bool:
        """There is a tokenizer."""
        return self.tokenizer is not None

    def levels(self, fpn: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Pick the levels (B, C, h, w) that the detector sees of all those of its neck: down to the patches' own grid.

        A neck has one level more in SAM 3, and may have it not in others: neither is taken for granted.
        """
        scales = self.model.config.vision_config.scale_factors
        return tuple(level for level, scale in zip(fpn, scales, strict=True) if scale >= 1)

    def count_tokens(self, phrase: str) -> int:
        """Tokens of a phrase, with those for its start and end."""
        return len(self._token_ids(phrase))

    def encode_text(self, phrase: str) -> Tensor:
        """Encode a phrase of at most ``max_tokens`` tokens -> its tokens (L, C), on the model's device."""
        ids = torch.tensor([self._token_ids(phrase)], device=self.model.text_projection.weight.device)
        tokens: Tensor = self.model.get_text_features(input_ids=ids, return_dict=True).pooler_output[0]
        return tokens

    def _token_ids(self, phrase: str) -> list[int]:
        if self.tokenizer is None:
            raise WeightsError(
                "the model was imported without a tokenizer, which phrases need; import a folder that has tokenizer.json"
            )
        return list(self.tokenizer.encode(phrase).ids)

    def encode_boxes(self, levels: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        """Encode boxes around examples.

        Parameters
        ----------
        levels
            (1, C, h, w) each, finest first, of one tile (:meth:`levels`).
        boxes
            float32 of shape (K, 4): centre x, centre y, width, height, as shares of the tile.
        labels
            int of shape (K,): 1 an instance, 0 not one, -10 no box at all.

        Returns
        -------
        Tensor
            (k + 1, C): a token per box and one for all of them.
        """
        geometry, grid = self.model.geometry_encoder, levels[-1]
        boxes, labels = boxes[labels != -10].float(), labels[labels != -10]
        kind, size = grid.dtype, grid.shape[-1]
        normal = geometry.vision_layer_norm(grid.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        centre, extent = boxes[:, :2], boxes[:, 2:]
        corners = torch.cat([centre - extent / 2, centre + extent / 2], 1) * size
        pooled = geometry.boxes_pool_project(roi_align(normal[0], corners, geometry.roi_size)).flatten(1)
        across, down = geometry.position_encoding.encode_1d_positions(centre[:, 0], centre[:, 1])
        position = torch.cat([down, across, extent.flip(1)], 1)
        tokens = (
            geometry.boxes_direct_project(boxes.to(kind))
            + pooled
            + geometry.boxes_pos_enc_project(position.to(kind))
            + geometry.label_embed(labels.long())
        )
        tokens = torch.cat([tokens, geometry.cls_embed.weight])[None]
        tokens = geometry.prompt_layer_norm(geometry.final_proj(tokens))
        seen, position = (v.flatten(2).transpose(1, 2) for v in (grid, self._positions(grid)))
        for layer in geometry.layers:
            tokens = layer(tokens, seen, position, None)
        encoded: Tensor = geometry.output_layer_norm(tokens)[0]
        return encoded

    def answer(self, levels: Sequence[Tensor], prompt: Tensor) -> Answer:
        """One pass: what of a concept is on a tile.

        Parameters
        ----------
        levels
            (1, C, h, w) each, finest first, of one tile (:meth:`levels`).
        prompt
            (L, C): tokens of a phrase and, after them, of boxes.
        """
        model, grid, prompt = self.model, levels[-1], prompt[None].to(levels[-1].dtype)
        seen = model.detr_encoder(
            vision_features=[grid], text_features=prompt, vision_pos_embeds=[self._positions(grid)], return_dict=True
        )
        decoded = model.detr_decoder(
            vision_features=seen.last_hidden_state,
            text_features=prompt,
            vision_pos_encoding=seen.pos_embeds_flattened,
            spatial_shapes=seen.spatial_shapes,
            return_dict=True,
        )
        last = decoded.intermediate_hidden_states[-1:]
        start = decoded.reference_boxes[-1].float().clamp(0, 1)
        start = torch.log(start.clamp_min(1e-3) / (1 - start).clamp_min(1e-3))
        centre, extent = (start + model.detr_decoder.box_head(last[0]).float())[0].sigmoid().chunk(2, 1)
        return Answer(
            logits=model.dot_product_scoring(last, prompt)[0, 0, :, 0].float(),
            presence=decoded.presence_logits[-1, 0, 0].float(),
            boxes=torch.cat([centre - extent / 2, centre + extent / 2], 1),
            queries=last[0, 0],
            encoded=seen.last_hidden_state,
            prompt=prompt,
        )

    def masks(self, levels: Sequence[Tensor], answer: Answer, rows: Tensor) -> Tensor:
        """Mask logits (n, h, w) of the queries at ``rows`` (n,), on the grid of the finest level."""
        head, grid = self.model.mask_decoder, levels[-1]
        encoded = answer.encoded
        looked, _ = head.prompt_cross_attn(head.prompt_cross_attn_norm(encoded), answer.prompt, answer.prompt)
        encoded = (encoded + looked).transpose(1, 2).reshape(grid.shape)
        pixels = _decode_pixels(head.pixel_decoder, levels[:-1], encoded)[0]
        wanted, project = head.mask_embedder(answer.queries[rows]), head.instance_projection
        # (a 1 x 1 convolution of all pixels, then a product with n queries: the queries take the convolution's part instead)
        logits = torch.einsum("nc,chw->nhw", wanted @ project.weight[:, :, 0, 0], pixels)
        logits += (wanted @ project.bias)[:, None, None]
        return logits

    def detect(self, embeddings: Embeddings, tile: int, concept: Concept, min_score: float) -> Detections:
        """Find all instances of a concept on a tile.

        Parameters
        ----------
        embeddings, tile
            A batch of tiles, and the index of this one in it.
        concept
            A phrase (``text``), boxes around examples, or both. Without a phrase ``text`` is that of "visual", as in training.
        min_score
            Least score of what is returned.

        Returns
        -------
        Detections
            In the order of the queries; without instances the work of the masks is spared.
        """
        levels = tuple(embeddings.extra[f"fpn{k}"][tile : tile + 1] for k in range(self._level_count))
        device, size = levels[0].device, self.model.config.vision_config.image_size
        prompt = torch.as_tensor(concept.text, device=device, dtype=levels[-1].dtype)
        if len(concept.boxes_px):
            corners = torch.as_tensor(concept.boxes_px, device=device, dtype=torch.float32) / size
            boxes = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1)
            labels = torch.as_tensor(concept.is_example, device=device).long()
            prompt = torch.cat([prompt, self.encode_boxes(levels, boxes, labels)])
        answer = self.answer(levels, prompt)
        rows = (answer.scores >= min_score).nonzero()[:, 0]
        fine = levels[0].shape[-1]
        logits = self.masks(levels, answer, rows) if len(rows) else levels[0].new_empty(0, fine, fine)
        return Detections(
            scores=answer.scores[rows],
            boxes_px=answer.boxes[rows] * size,
            logits=logits.float(),
            mask_stride_px=size / fine,
        )

    @property
    def _level_count(self) -> int:
        return sum(scale >= 1 for scale in self.model.config.vision_config.scale_factors)

    def _positions(self, grid: Tensor) -> Tensor:
        """Position encoding of a level (1, C, h, w)."""
        encoding: Tensor = self.model.vision_encoder.neck.position_encoding(grid.shape, grid.device, grid.dtype)
        return encoding


def _decode_pixels(decoder: Any, levels: Sequence[Tensor], coarse: Tensor) -> Tensor:  # noqa: ANN401
    """``Sam3PixelDecoder``: features (1, C, h, w) at the finest of ``levels``, from the encoded tile and the levels above it.

    In strips of rows, and norms in place group by group: the sum that a convolution reads, and its norm, never exist as a whole (85 MB each).
    """
    for conv, norm, level in zip(decoder.conv_layers, decoder.norms, reversed(levels), strict=False):
        height, out = level.shape[2], torch.empty_like(level)
        for row in range(0, height, _STRIP):
            first, last = max(row - 1, 0), min(row + _STRIP + 1, height)
            above = coarse[:, :, torch.arange(first, last, device=level.device) // 2].repeat_interleave(2, 3)
            above += level[:, :, first:last]
            above = F.pad(above, (1, 1, int(row == 0), int(row + _STRIP >= height)))
            out[:, :, row : row + _STRIP] = F.conv2d(above, conv.weight, conv.bias)
        size = out.shape[1] // norm.num_groups
        for start in range(0, out.shape[1], size):
            part = slice(start, start + size)
            out[:, part] = F.group_norm(out[:, part], 1, norm.weight[part], norm.bias[part], norm.eps).relu_()
        coarse = out
    return coarse


def roi_align(features: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Pool features in boxes: RoIAlign [1]_ with torchvision's defaults, which SAM 3 was trained with.

    Parameters
    ----------
    features
        (C, h, w).
    boxes
        float32 of shape (K, 4): x0, y0, x1, y1 in cells; a coordinate is the index of a cell (``aligned=False``).
    size
        Bins per side.

    Returns
    -------
    Tensor
        (K, C, size, size), of the features' type: means over bins of bilinear samples, ``ceil(extent / size)`` of them per bin and axis.

    Notes
    -----
    The samples of a box lie on a grid, so that their means are a product with one matrix per axis.

    References
    ----------
    .. [1] He et al.: Mask R-CNN, ICCV 2017, arXiv:1703.06870, section 3.
    """
    rows, columns = (
        torch.stack(
            [_bins(float(low), float(high), size, length, features) for low, high in boxes[:, axis::2].tolist()]
        )
        for axis, length in ((1, features.shape[1]), (0, features.shape[2]))
    )
    pooled = torch.einsum("kph,chw,kqw->kcpq", rows, features.float(), columns)
    return pooled.to(features.dtype)


def _bins(low: float, high: float, size: int, length: int, like: Tensor) -> Tensor:
    """Weights (size, length) of the cells of one axis in the bins of [low, high]."""
    extent = max(high - low, 1.0)
    each = max(-int(-extent // size), 1)
    at = low + (torch.arange(size * each, device=like.device) + 0.5) * (extent / (size * each))
    inside = ((at >= -1) & (at <= length)).float() / each
    at = at.clamp(0, length - 1)
    below = at.floor().long()
    above = (below + 1).clamp_max(length - 1)
    share = at - below
    weights = torch.zeros(size, length, device=like.device)
    bins = torch.arange(size, device=like.device).repeat_interleave(each)
    weights.index_put_((bins, below), (1 - share) * inside, accumulate=True)
    weights.index_put_((bins, above), share * inside, accumulate=True)
    return weights
