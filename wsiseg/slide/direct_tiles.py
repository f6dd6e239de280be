"""The JPEG and JPEG 2000 tiles of a TIFF that OpenSlide has opened, decoded without it: the same bytes in a fifth of the time or less.

OpenSlide draws every tile onto a canvas, of four channels with opacity, from which a PIL image and then RGB are made; decoding is the smaller part
of that. Where a file is nothing but a grid of complete tiles, the decoded tiles are the pixels. Levels are compared with OpenSlide when a file is
opened; one that differs is left to it, as is every tile that cannot be decoded here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np
import tifffile

from wsiseg.errors import SlideError
from wsiseg.geometry import Box
from wsiseg.slide.resample import FOREIGN_ERRORS
from wsiseg.slide.tiff_pages import JPEG, JPEG_2000, TiffPixels

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

VENDORS = ("aperio", "generic-tiff")  #: formats without anything between their tiles: no overlap, no gap, no offset
CACHE_BYTES = 64e6  #: decoded tiles kept: the halos of a row of eight tiles of 1024 px are 26 MB
_CHECKED_PX = 64  #: side of the squares that are compared; each costs the decoding of one to four tiles


class DirectTiles:
    """Levels of a slide that can be read tile by tile. May be read by several threads at once.

    Parameters
    ----------
    tiff
        The open file; closed with this.
    pixels
        The series of the levels.
    levels
        Level of the series by level of the slide.
    """

    def __init__(self, tiff: tifffile.TiffFile, pixels: TiffPixels, levels: dict[int, int]) -> None:
        self._tiff, self._pixels, self._levels = tiff, pixels, levels

    @classmethod
    def open(
        cls,
        path: str,
        vendor: str,
        sizes: Sequence[tuple[int, int]],
        downsamples: Sequence[float],
        fetch: Callable[[int, Box], NDArray[np.uint8]],
    ) -> Self | None:
        """Find the levels of which every tile is the slide's pixels.

        Parameters
        ----------
        path, vendor
            The file, and OpenSlide's name of its format.
        sizes, downsamples
            (width, height) and downsample of each level, as OpenSlide has them; between whole numbers it interpolates.
        fetch
            OpenSlide's pixels (H, W, 3) of a box inside a level.

        Returns
        -------
        DirectTiles or None
            ``None``: no level can be read so.
        """
        if vendor not in VENDORS:
            return None
        try:
            tiff = tifffile.TiffFile(path)
        except FOREIGN_ERRORS:
            return None
        try:
            found = cls._of(tiff, sizes, downsamples, fetch)
        except (*FOREIGN_ERRORS, SlideError):
            found = None
        if found is None:
            tiff.close()
        return found

    @classmethod
    def _of(
        cls,
        tiff: tifffile.TiffFile,
        sizes: Sequence[tuple[int, int]],
        downsamples: Sequence[float],
        fetch: Callable[[int, Box], NDArray[np.uint8]],
    ) -> Self | None:
        series = next((s for s in tiff.series if _size(s.levels[0].keyframe) == sizes[0]), None)
        if series is None or not all(_is_plain(level.keyframe) for level in series.levels):
            return None
        pixels = TiffPixels(tiff, series, cache_bytes=CACHE_BYTES)
        own = {_size(level.keyframe): k for k, level in enumerate(series.levels)}
        levels = {}
        for k, (size, downsample) in enumerate(zip(sizes, downsamples, strict=True)):
            if downsample == round(downsample) and size in own:
                boxes = _places(size)
                if all(np.array_equal(pixels.read(own[size], box), fetch(k, box)) for box in boxes):
                    levels[k] = own[size]
        return cls(tiff, pixels, levels) if levels else None

    def read(self, level: int, box: Box) -> NDArray[np.uint8] | None:
        """Pixels (H, W, 3) of a box inside a level; ``None``: to be read with OpenSlide."""
        if level not in self._levels:
            return None
        try:
            return self._pixels.read(self._levels[level], box)
        except FOREIGN_ERRORS:
            return None

    def close(self) -> None:
        """Close the file."""
        self._tiff.close()


def _size(page: Any) -> tuple[int, int]:  # noqa: ANN401
    return int(page.imagewidth), int(page.imagelength)


def _is_plain(page: Any) -> bool:  # noqa: ANN401
    """Whether the tiles of a page are all there, and three channels of eight bits."""
    return bool(
        page.is_tiled
        and page.compression in (*JPEG, *JPEG_2000)
        and page.dtype == np.uint8
        and page.samplesperpixel == 3
        and page.planarconfig == 1
        and min(page.databytecounts, default=0) > 0
        and min(page.dataoffsets, default=0) > 0
    )


def _places(size: tuple[int, int]) -> list[Box]:
    """Squares in the middle and at the far corner of a level, where tiles reach beyond it."""
    width, height = size
    wide, high = min(_CHECKED_PX, width), min(_CHECKED_PX, height)
    corners = {((width - wide) // 2, (height - high) // 2), (width - wide, height - high)}
    return [Box(x, y, x + wide, y + high) for x, y in sorted(corners)]
