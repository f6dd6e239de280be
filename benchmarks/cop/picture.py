"""An image on the product's path, in which nothing is computed twice: it is encoded once, and so is the surroundings of a click."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np
import torch

from wsiseg.geometry import Box, Lattice, round_up
from wsiseg.records import Cells
from wsiseg.runs.finish import stitch_and_type
from wsiseg.seeds.bank import build_bank
from wsiseg.segmentation.decoding import decode
from wsiseg.segmentation.polygons import trace
from wsiseg.segmentation.prompts import find_points
from wsiseg.segmentation.prompts.apg import apg_points
from wsiseg.slide import read_region
from wsiseg.slide.array_reader import ArrayReader

if TYPE_CHECKING:
    from wsiseg.config import RunConfig
    from wsiseg.records import Bank, Embeddings, Seeds, Typing

KEPT = 32  #: encodings that are remembered, about 20 MB each


class Remembering:
    """A model that does not encode the same pixels twice in a row."""

    def __init__(self, model: object) -> None:
        self._model, self._known = model, OrderedDict[bytes, "Embeddings"]()

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)

    def encode(self, images: torch.Tensor) -> Embeddings:
        key = hashlib.sha1(images.cpu().numpy().tobytes()).digest()
        if key not in self._known:
            self._known[key] = self._model.encode(images)
        self._known.move_to_end(key)
        if len(self._known) > KEPT:
            self._known.popitem(last=False)
        return self._known[key]


class Picture:
    """One image (H, W, 3): its embeddings, and the outlines of its automatic prompts."""

    def __init__(self, model: Remembering, image: np.ndarray, mpp: float, config: RunConfig) -> None:
        self.model, self.image, self.mpp = model, image, mpp
        self.reader, self.lattice = ArrayReader(image, mpp), Lattice(mpp, model.mpp)
        width, height = (round_up(n, model.stride_px) for n in self.lattice.model_size(self.reader.info.size_px0))
        self.box = Box(0, 0, width, height)
        pixels = torch.from_numpy(read_region(self.reader, self.box, self.lattice).copy()).permute(2, 0, 1)[None]
        with torch.inference_mode():
            self.embeddings = model.encode(pixels.to(model.device))
        maps = self.embeddings.maps[0].float().cpu().numpy()
        self.automatic = self.inside(apg_points(maps, width // maps.shape[-1], model.mpp, config.apg))
        self._traced = self.outlines(self.automatic, config)

    def inside(self, points: np.ndarray) -> np.ndarray:
        width, height = self.reader.info.size_px0
        return points[Box(0, 0, width, height).contains(self.lattice.to_level0(points))]

    def outlines(self, points: np.ndarray, config: RunConfig) -> Cells:
        """Decoded and traced, overlaps not settled."""
        batches = decode(self.model, self.embeddings, 0, points.astype(np.float32), config.masks)
        return Cells.concatenate(
            [trace(m, self.box, self.lattice, config.masks)[0] for m in batches], self.model.descriptor_size
        )

    def bank(self, seeds: Seeds, config: RunConfig) -> Bank:
        return build_bank(self.reader, self.model, seeds, self.lattice, config, chains=config.method == "cop")

    def points(self, bank: Bank | None, config: RunConfig) -> np.ndarray:
        """Prompts of the product, model px."""
        return self.inside(find_points(self.embeddings, self.box.width, self.model.mpp, config, bank))

    def cells(self, points: np.ndarray, bank: Bank | None, config: RunConfig) -> tuple[Cells, Typing]:
        """The product's cells and types of these prompts; outlines of automatic prompts are at hand already."""
        known = {tuple(p) for p in self.automatic.tolist()}
        if all(tuple(p) in known for p in points.tolist()):
            wanted = {tuple(p) for p in self.lattice.to_level0(points.astype(float)).tolist()}
            found = self._traced.take(np.array([tuple(p) in wanted for p in self._traced.points_xy.tolist()], bool))
        else:
            found = self.outlines(points, config)
        result = stitch_and_type(
            [found],
            info=self.reader.info,
            config=config,
            bank=bank,
            types=self.model.types,
            descriptor_size=self.model.descriptor_size,
        )
        return result.cells.take(slice(None)), result.typing
