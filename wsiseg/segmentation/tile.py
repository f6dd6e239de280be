"""One tile: encode its pixels, find prompts, decode their masks, trace the outlines.

``runs/image.py`` takes the steps one after the other; ``blocks.py`` lets those of several tiles overlap in time.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from wsiseg.config import DETECTING
from wsiseg.geometry import Box
from wsiseg.models.contract import detector_of, vocabulary_of
from wsiseg.records import Cells
from wsiseg.runtime.profiling import BusyClock, Clock
from wsiseg.segmentation.batch_size import Batch, is_out_of_memory
from wsiseg.segmentation.competition import compete
from wsiseg.segmentation.decoding import decode_tiles
from wsiseg.segmentation.detection import Detector
from wsiseg.segmentation.given import describe_outlines, to_tile
from wsiseg.segmentation.phrases import PhraseTyping
from wsiseg.segmentation.polygons import trace
from wsiseg.segmentation.prompts import find_points
from wsiseg.segmentation.prompts.exemplars import find_examples, likely_places
from wsiseg.segmentation.prompts.grid import grid_points
from wsiseg.segmentation.refinement import refine_masks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from wsiseg.config import MaskConfig, RunConfig
    from wsiseg.formats.given import GivenOutlines
    from wsiseg.geometry import Lattice
    from wsiseg.models.contract import PromptableModel
    from wsiseg.records import Bank, DescribedType, Embeddings, Tile, WindowMasks
    from wsiseg.slide.tissue import SearchArea


@dataclass(frozen=True)
class EncodedTile:
    """A tile's embedding, as the ``batch_index``-th of those encoded together; with its pixels, where a detector may look closer."""

    embeddings: Embeddings
    batch_index: int
    pixels: NDArray[np.uint8] | None = None

    @property
    def is_last(self) -> bool:
        """Whether it is the last tile of its batch."""
        return self.batch_index == len(self.embeddings.high) - 1


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
    types
        The types that are asked for, of ``--method text`` and ``exemplar``.
    given
        Outlines that are kept as they are and only described, of ``--method outlines``.

    Attributes
    ----------
    batch
        Tiles and prompts taken at a time; fewer after memory ran out.
    clock
        Seconds per step, and those in which the device works (``busy``).
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
        types: Sequence[DescribedType] = (),
        given: GivenOutlines | None = None,
    ) -> None:
        self.model, self.config, self.bank = model, config, bank
        self.lattice, self.area, self.name = lattice, area, name
        self.given = given
        self.batch = Batch(config, model.device)
        self.clock = Clock()
        self.busy = BusyClock(self.clock, model.device)
        self.detector = self.phrases = None
        if config.method in DETECTING and detector_of(model) is not None:
            self.detector = Detector(model, types, config.detection)
        elif vocabulary := vocabulary_of(model) if config.method == "text" else None:
            self.phrases = PhraseTyping(vocabulary.decoder, types, config.detection)

    def segment(self, tile: Tile, pixels: NDArray[np.uint8]) -> Cells:
        """Segment one tile: pixels (H, W, 3) of ``tile.outer`` -> the outlines that ``tile.core`` owns, level-0 px."""
        (encoded,) = self.encode([pixels])
        points = self.find_prompts(tile, encoded)
        (masks,) = self.decode([tile], [encoded], [points])
        cells, _ = self.trace(tile, masks)
        return cells

    def encode(self, pixels: Sequence[NDArray[np.uint8]]) -> list[EncodedTile]:
        """Encode tiles (H, W, 3) of one size together; in two halves when memory runs out."""
        if not pixels:
            return []
        try:
            with self.clock("encode"), self.busy(), torch.inference_mode():
                batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
                embeddings = self.model.encode(batch.to(self.model.device))
            return [EncodedTile(embeddings, k, image if self.detector else None) for k, image in enumerate(pixels)]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(pixels) <= self.batch.tiles:  # else it was put together before the batch became smaller
                self.batch.halve(self.name, error)
        half = max(len(pixels) // 2, 1)
        return self.encode(pixels[:half]) + self.encode(pixels[half:])

    @torch.inference_mode()
    def find_prompts(self, tile: Tile, encoded: EncodedTile) -> NDArray[np.float32]:
        """Find the prompts (N, 2) that the tile owns, model px of the tile: each point of the slide belongs to one core.

        For a detector the prompts only locate the example cells that it is shown: they may lie anywhere on the tile, and there are none for phrases.
        """
        with self.clock("prompt"):
            if self.detector is not None:
                return self._example_prompts(tile, encoded)
            if self.given is not None:
                return self._given_in(self.given, tile)[1]
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

    def decode(
        self, tiles: Sequence[Tile], encoded: Sequence[EncodedTile], points: Sequence[NDArray[np.float32]]
    ) -> list[list[WindowMasks]]:
        """Decode the masks of prompts (N, 2) on each of the tiles, which were encoded together, to the CPU; fewer at a time when memory runs out."""
        while True:
            try:
                with self.clock("decode"), self.busy(), torch.inference_mode():
                    masks = self._decode(tiles, encoded, points)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self.batch.halve(self.name, error)
            else:
                self.batch.learn()
                return masks

    def _decode(
        self, tiles: Sequence[Tile], encoded: Sequence[EncodedTile], points: Sequence[NDArray[np.float32]]
    ) -> list[list[WindowMasks]]:
        if self.detector is not None:
            return [self._detect(self.detector, *of) for of in zip(tiles, encoded, points, strict=True)]
        embeddings, numbers = encoded[0].embeddings, [of.batch_index for of in encoded]
        if self.given is not None:
            given = [to_tile(self._given_in(self.given, tile)[0], tile, self.lattice) for tile in tiles]
            return [
                list(describe_outlines(self.model, embeddings, k, polygons, of, self.batch.prompts))
                for k, polygons, of in zip(numbers, given, points, strict=True)
            ]
        grid = self.config.grid if self.config.method == "amg" else None
        kept = self._batched_masks(len(tiles))
        found = decode_tiles(self.model, embeddings, numbers, points, kept, grid=grid)
        refinement = self.config.refinement
        if refinement.enabled:
            kept = self._batched_masks(1)
            found = [
                refine_masks(self.model, embeddings, tile.outer.width, masks, kept, refinement, k)
                for tile, k, masks in zip(tiles, numbers, found, strict=True)
            ]
        if self.phrases is not None:
            found = [self.phrases.keep(embeddings, k, masks) for k, masks in zip(numbers, found, strict=True)]
        return found

    def _example_prompts(self, tile: Tile, encoded: EncodedTile) -> NDArray[np.float32]:
        if self.config.method == "text" or self.bank is None:
            return np.empty((0, 2), np.float32)
        alone, config = _one_of(encoded.embeddings, encoded.batch_index), self.config
        return likely_places(
            alone,
            tile.outer.width,
            self.model.mpp,
            self.bank,
            config.cop.min_component_um2,
            config.detection.candidates,
        )

    def _detect(
        self, detector: Detector, tile: Tile, encoded: EncodedTile, points: NDArray[np.float32]
    ) -> list[WindowMasks]:
        """Masks of all instances that the detector finds, centred in the tile's core and the searched area."""
        x, y = tile.outer.x0, tile.outer.y0
        core = Box(tile.core.x0 - x, tile.core.y0 - y, tile.core.x1 - x, tile.core.y1 - y)
        examples = None
        if self.config.method == "exemplar" and self.bank is not None:
            kept = dataclasses.replace(self.config, masks=self._batched_masks(1))
            examples = find_examples(
                self.model, encoded.embeddings, encoded.batch_index, points, tile.outer, self.lattice, self.bank, kept
            )
        masks = detector.find(encoded.pixels, core, encoded.embeddings, encoded.batch_index, examples)
        wanted = [self.area.holds(self.lattice.to_level0(m.points_xy.numpy() + np.array([x, y], float))) for m in masks]
        return [m.take(torch.from_numpy(rows)) for m, rows in zip(masks, wanted, strict=True)]

    def _given_in(self, given: GivenOutlines, tile: Tile) -> tuple[NDArray[np.object_], NDArray[np.float32]]:
        """Given outlines that the tile owns, level-0 px, and the point in each, model px of the tile."""
        polygons, points = given.within(*(edge * self.lattice.scale for edge in tile.core))
        on_tile = points / self.lattice.scale - (tile.outer.x0, tile.outer.y0)
        return polygons, on_tile.astype(np.float32)

    def _as_given(self, given: GivenOutlines, tile: Tile, masks: Sequence[WindowMasks]) -> Cells:
        """Given outlines with the descriptors of their masks."""
        if not masks:  # none here, or the tile could not be read
            return Cells.empty(self.model.descriptor_size)
        polygons, points = given.within(*(edge * self.lattice.scale for edge in tile.core))
        descriptors = torch.cat([m.descriptors for m in masks]).numpy().astype(np.float16)
        return Cells(
            polygons=polygons, points_xy=points, scores=np.ones(len(polygons), np.float32), descriptors=descriptors
        )

    def _batched_masks(self, tiles: int) -> MaskConfig:
        """Settings of masks, with as many prompts of this many tiles at a time as memory allows."""
        prompts = self.batch.prompts * min(tiles, self.batch.tiles)
        return dataclasses.replace(self.config.masks, prompts_per_batch=prompts)

    def trace(self, tile: Tile, masks: Sequence[WindowMasks]) -> tuple[Cells, int]:
        """Trace masks to outlines, level-0 px; also returns how many masks touch the border of their window."""
        with self.clock("vectorise"):
            if self.given is not None:
                return self._as_given(self.given, tile, masks), 0
            traced = [trace(m, tile.outer, self.lattice, self.config.masks) for m in masks]
            cells = Cells.concatenate([cells for cells, _ in traced], self.model.descriptor_size)
            if self.detector is not None:
                cells = compete(cells, self.config.detection.same_cell)
            return cells, sum(touching for _, touching in traced)


def _one_of(embeddings: Embeddings, k: int) -> Embeddings:
    """One tile of a batch, for prompting."""
    maps = None if embeddings.maps is None else embeddings.maps[k : k + 1]
    return dataclasses.replace(
        embeddings, high=embeddings.high[k : k + 1], low=embeddings.low[k : k + 1], maps=maps, extra={}
    )
