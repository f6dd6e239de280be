"""Types of a tile's cells by the maps of phrases: for ``--method text`` with a model that answers a phrase with a map, not with instances.

Cells are found by automatic prompts; a cell counts as a type by as much as the map of the type's phrases covers it, and as none below a threshold.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from wsiseg.models.phrases import share_inside

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from wsiseg.config import DetectionConfig
    from wsiseg.models.phrases import PhraseDecoder
    from wsiseg.records import DescribedType, Embeddings, WindowMasks


class PhraseTyping:
    """The decoder's work on one tile.

    Parameters
    ----------
    decoder
        Answers phrases with maps.
    types
        The T types, each with at least one phrase.
    config
        ``min_score``.
    """

    def __init__(self, decoder: PhraseDecoder, types: Sequence[DescribedType], config: DetectionConfig) -> None:
        self.decoder, self.config = decoder, config
        vectors = torch.cat([torch.from_numpy(tokens) for of in types for tokens in of.tokens])
        self.phrases = vectors.to(decoder.sharpness.device)
        self.counts = [len(of.tokens) for of in types]

    @torch.inference_mode()
    def keep(self, embeddings: Embeddings, tile: int, masks: Sequence[WindowMasks]) -> list[WindowMasks]:
        """The masks on a tile that are meant by a type, each with its score as every type: the best of the type's phrases."""
        if not masks:
            return []
        maps = self.decoder.maps(embeddings, tile, self.phrases).to(masks[0].logits.device)
        return [self._keep(maps, of) for of in masks]

    def _keep(self, maps: Tensor, masks: WindowMasks) -> WindowMasks:
        each = share_inside(maps, masks).split(self.counts, 1)
        scores = torch.stack([of.amax(1) for of in each], 1)
        meant = (scores.amax(1) >= self.config.min_score).nonzero()[:, 0]
        return dataclasses.replace(masks, concept_scores=scores).take(meant)
