"""The slide as tiles for deep zoom, made when they are asked for by wsiseg's own readers, and kept as JPEG up to a number of bytes."""

from __future__ import annotations

import io
import math
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from wsiseg.errors import SlideError
from wsiseg.geometry import Box, Lattice
from wsiseg.slide import read_region
from wsiseg.slide.resample import best_level

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from numpy.typing import NDArray

    from wsiseg.slide import SlideReader

TILE = 512  #: px of a side; a screen has about eight
QUALITY = 85
CACHE_BYTES = 128 << 20  #: about 2000 tiles
STRIDE = (
    8  #: level px per px of a tile beyond which a tile would read more than 16 megapixels; then the overview is shown
)
OVERVIEW_PX = 4096  #: longest side of the overview, read once where the slide has no small level


class ByteCache:
    """Results by key, the oldest dropped when all are more than ``limit`` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self._held: OrderedDict[Hashable, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], bytes]) -> bytes:
        """What is held under ``key``; made, and kept, when nothing is. Two threads may make the same; both get the same bytes."""
        with self._lock:
            if (found := self._held.get(key)) is not None:
                self._held.move_to_end(key)
                return found
        made = make()
        with self._lock:
            if key not in self._held and len(made) <= self.limit:
                self._held[key] = made
                self.size += len(made)
                while self.size > self.limit:
                    self.size -= len(self._held.popitem(last=False)[1])
        return made

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._held.clear()
            self.size = 0


class SlideTiles:
    """Tiles of one open slide. A tile of zoom z has ``TILE`` squared px, each of 2**z x 2**z level-0 px, less at the far edges.

    Attributes
    ----------
    zooms
        Number of zooms; at the last one the slide is a single tile.
    version
        Grows when tiles that were shown grey can be shown as they are.
    """

    def __init__(self, reader: SlideReader, *, cache_bytes: int = CACHE_BYTES) -> None:
        self.reader, self.cache, self.version = reader, ByteCache(cache_bytes), 0
        self.zooms = max(math.ceil(math.log2(max(*reader.info.size_px0, TILE) / TILE)), 0) + 1
        self._overview: tuple[NDArray[np.uint8], float] | None = None
        self._begun = threading.Lock()

    def tile(self, zoom: int, column: int, row: int) -> bytes | None:
        """A tile as JPEG; ``None`` while the overview that it is cut from is being read.

        Raises
        ------
        LookupError
            There is no such tile.
        SlideError
            The pixels cannot be decoded.
        """
        width, height = self.reader.info.size_px0
        if not 0 <= zoom < self.zooms:
            raise LookupError(f"zoom {zoom}")
        scale = 2**zoom
        right, bottom = math.ceil(width / scale), math.ceil(height / scale)
        box = Box(column * TILE, row * TILE, min((column + 1) * TILE, right), min((row + 1) * TILE, bottom))
        if column < 0 or row < 0 or box.width <= 0 or box.height <= 0:
            raise LookupError(f"tile {column}, {row}")
        if self._is_far(scale) and self._overview is None:
            if self._begun.acquire(blocking=False):
                threading.Thread(target=self._read_overview, name="wsiseg-overview", daemon=True).start()
            return None
        return self.cache.get((zoom, column, row), lambda: jpeg(self._pixels(box, scale)))

    def crop(self, x: float, y: float, side_px0: float, size: int) -> bytes:
        """A square around a place, ``size`` px wide, as JPEG; white beyond the slide."""
        lattice = Lattice(1.0, side_px0 / size)
        left, top = (round((at - side_px0 / 2) / lattice.scale) for at in (x, y))
        return jpeg(read_region(self.reader, Box(left, top, left + size, top + size), lattice))

    def _is_far(self, scale: int) -> bool:
        """Whether even the coarsest level is much finer than this."""
        downsamples = self.reader.info.downsamples
        step = scale / downsamples[best_level(downsamples, scale)]
        return step > STRIDE and max(self.reader.info.size_px0) > OVERVIEW_PX

    def _pixels(self, box: Box, scale: int) -> NDArray[np.uint8]:
        if not self._is_far(scale) or self._overview is None:
            return self._read(box, scale)
        overview, own = self._overview
        edges = tuple(edge * scale / own for edge in box)
        high, wide = overview.shape[:2]
        window = (edges[0], edges[1], min(edges[2], wide), min(edges[3], high))
        part = Image.fromarray(overview).resize((box.width, box.height), Image.Resampling.BILINEAR, box=window)
        return np.asarray(part)

    def _read(self, box: Box, scale: int) -> NDArray[np.uint8]:
        """Read a tile: by averaging whole px of a level where they fit, which asks for no px beyond the tile; else as the models see it."""
        info = self.reader.info
        level = best_level(info.downsamples, scale)
        step = scale / info.downsamples[level]
        if step != int(step):
            return read_region(self.reader, box, Lattice(1.0, float(scale)))
        k = int(step)
        width, height = info.level_sizes[level]
        source = Box(box.x0 * k, box.y0 * k, min(box.x1 * k, width), min(box.y1 * k, height))
        pixels = self.reader.read(level, source)
        if k == 1:
            return pixels
        return np.asarray(Image.fromarray(pixels).reduce(k))  # its last row and column average what is there

    def _read_overview(self) -> None:
        """Read the whole slide once, coarsely: a slide of one level only."""
        width, height = self.reader.info.size_px0
        own = max(width, height) / OVERVIEW_PX
        box = Box(0, 0, math.ceil(width / own), math.ceil(height / own))
        try:
            self._overview = read_region(self.reader, box, Lattice(1.0, own)), own
        except SlideError:  # the tiles that are shown say which part is damaged
            self._overview = np.full((box.height, box.width, 3), 230, np.uint8), own
        self.version += 1


def jpeg(pixels: NDArray[np.uint8]) -> bytes:
    """Pixels (H, W, 3) as JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


GREY_TILE = jpeg(np.full((TILE, TILE, 3), 230, np.uint8))  #: in place of a tile that is not known yet
