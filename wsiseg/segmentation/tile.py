"""The story of one tile: encode its pixels, find prompts, decode their masks, trace the outlines.

``runs/image.py`` takes the steps one after the other; ``blocks.py`` lets those of several tiles overlap in time.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from wsiseg.records import Cells
from wsiseg.runtime.profiling import Clock
from wsiseg.segmentation.batch_size import Batch, is_out_of_memory
from wsiseg.segmentation.decoding import decode
from wsiseg.segmentation.polygons import trace
from wsiseg.segmentation.prompts import find_points
from wsiseg.segmentation.prompts.grid import grid_points
from wsiseg.segmentation.refinement import refine_masks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from wsiseg.config import RunConfig
    from wsiseg.geometry import Lattice
    from wsiseg.models.contract import PromptableModel
    from wsiseg.records import Bank, Embeddings, Tile, WindowMasks
    from wsiseg.slide.tissue import SearchArea


@dataclass(frozen=True)
class EncodedTile:
    """A tile's embedding, as the ``batch_index``-th of those encoded together."""

    embeddings: Embeddings
    batch_index: int


class TileSegmenter:
    """The steps of one tile, each a method; they keep within the memory that there is.

    Parameters
    ----------
    model
        The network.
    config
        Settings; method and precision are not ``auto``.
    lattice
        Between model px and level-0 px.
    area
        Area in which cells are wanted.
    bank
        Prototypes of the clicked types, of runs with clicks.
    name
        Name of the slide in messages.

    Attributes
    ----------
    batch
        Tiles and prompts taken at a time; fewer after memory ran out.
    clock
        Seconds per step.
    """

    def __init__(
        self,
        model: PromptableModel,
        config: RunConfig,
        lattice: Lattice,
        area: SearchArea,
        bank: Bank | None,
        *,
        name: str,
    ) -> None:
        self.model, self.config, self.bank = model, config, bank
        self.lattice, self.area, self.name = lattice, area, name
        self.batch = Batch(config, model.device)
        self.clock = Clock()

    def segment(self, tile: Tile, pixels: NDArray[np.uint8]) -> Cells:
        """Segment one tile: pixels (H, W, 3) of ``tile.outer`` -> the outlines that ``tile.core`` owns, level-0 px."""
        (encoded,) = self.encode([pixels])
        points = self.find_prompts(tile, encoded)
        masks = self.decode(tile, encoded, points)
        cells, _ = self.trace(tile, masks)
        return cells

    def encode(self, pixels: Sequence[NDArray[np.uint8]]) -> list[EncodedTile]:
        """Encode tiles (H, W, 3) of one size together; in two halves when memory runs out."""
        if not pixels:
            return []
        try:
            with self.clock("encode"), torch.inference_mode():
                batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
                embeddings = self.model.encode(batch.to(self.model.device))
            return [EncodedTile(embeddings, k) for k in range(len(pixels))]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(pixels) <= self.batch.tiles:  # else it was put together before the batch became smaller
                self.batch.halve(self.name, error)
        half = max(len(pixels) // 2, 1)
        return self.encode(pixels[:half]) + self.encode(pixels[half:])

    @torch.inference_mode()
    def find_prompts(self, tile: Tile, encoded: EncodedTile) -> NDArray[np.float32]:
        """Find the prompts (N, 2) that the tile owns, model px of the tile: each point of the slide belongs to one core."""
        with self.clock("prompt"):
            corner = np.array([tile.outer.x0, tile.outer.y0], float)
            if self.config.method == "amg":
                spacing = self.config.grid.spacing_um / self.model.mpp
                points = (grid_points(tile.core, spacing) - corner).astype(np.float32)
            else:
                alone = _one_of(encoded.embeddings, encoded.batch_index)
                points = find_points(alone, tile.outer.width, self.model.mpp, self.config, self.bank)
            on_slide = points + corner
            is_owned: NDArray[np.bool_] = tile.core.contains(on_slide) & self.area.holds(
                self.lattice.to_level0(on_slide)
            )
            owned: NDArray[np.float32] = points[is_owned]
            return owned

    def decode(self, tile: Tile, encoded: EncodedTile, points: NDArray[np.float32]) -> list[WindowMasks]:
        """Decode the masks of prompts (N, 2), to the CPU; fewer prompts at a time when memory runs out."""
        while True:
            try:
                with self.clock("decode"), torch.inference_mode():
                    masks = self._decode(tile, encoded, points)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self.batch.halve(self.name, error)
            else:
                self.batch.learn()
                return masks

    def _decode(self, tile: Tile, encoded: EncodedTile, points: NDArray[np.float32]) -> list[WindowMasks]:
        config, embeddings, k = self.config, encoded.embeddings, encoded.batch_index
        kept = dataclasses.replace(config.masks, prompts_per_batch=self.batch.prompts)
        grid = config.grid if config.method == "amg" else None
        masks = list(decode(self.model, embeddings, k, points, kept, grid=grid))
        if config.refinement.enabled:
            masks = refine_masks(self.model, embeddings, tile.outer.width, masks, kept, config.refinement, k)
        return masks

    def trace(self, tile: Tile, masks: Sequence[WindowMasks]) -> tuple[Cells, int]:
        """Trace masks to outlines, level-0 px; also returns how many masks touch the border of their window."""
        with self.clock("vectorise"):
            traced = [trace(m, tile.outer, self.lattice, self.config.masks) for m in masks]
            cells = Cells.concatenate([cells for cells, _ in traced], self.model.descriptor_size)
            return cells, sum(touching for _, touching in traced)


def _one_of(embeddings: Embeddings, k: int) -> Embeddings:
    """One tile of a batch, for prompting."""
    maps = None if embeddings.maps is None else embeddings.maps[k : k + 1]
    return dataclasses.replace(
        embeddings, high=embeddings.high[k : k + 1], low=embeddings.low[k : k + 1], maps=maps, extra={}
    )
