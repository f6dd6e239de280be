"""Slides through TiffSlide: TIFF-like files that OpenSlide does not know, and remote paths of fsspec.

TiffSlide finds the levels and reads the metadata. Tiles of ordinary pyramids are decoded here, one by one: its zarr path fills tiles
that the file marks as absent with black, and pads JPEG tiles that end early with grey, both in silence.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import tifffile
from fsspec.core import OpenFile
from fsspec.implementations.local import LocalFileSystem
from tiffslide import TiffSlide

from wsiseg.errors import SlideError
from wsiseg.geometry import Box
from wsiseg.records import SlideInfo
from wsiseg.slide.image_reader import ADVICE, plan_rgb
from wsiseg.slide.mpp import PixelSize, believe_resolution, from_ome_xml, from_tiff_tags, pixel_size, settle
from wsiseg.slide.resample import FOREIGN_ERRORS, read_padded, uneven_levels, unreadable, whole_downsamples

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

CACHE_BYTES = 128e6  # decoded tiles kept: neighbouring boxes share the tiles on their border
MAX_STRIP_BYTES = 512e6  # decoded size of the largest strip or tile that is read for one box
SAMPLE_PX = 4096  # side of the part of the coarsest level that decides the scaling of 16-bit slides
PHOTOMETRIC = (1, 2, 6)  # grey, RGB, YCbCr (of which the decoder makes RGB); others go to the image reader
JPEG = (6, 7)


class TiffSlideReader:
    """A `wsiseg.slide.SlideReader` over TiffSlide and tifffile."""

    def __init__(self, path: str, mpp: float | None) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # TiffSlide warns of vendors whose metadata it reads in part
                self._slide = _LevelSlide(_source(path))
                try:
                    self.info = self._describe(mpp)
                except BaseException:
                    self._slide.close()
                    raise
        except SlideError:
            raise
        except FileNotFoundError as error:
            raise SlideError("nothing there") from error
        except tifffile.TiffFileError as error:
            raise SlideError("not a TIFF" if "not a TIFF" in str(error) else " ".join(str(error).split())[:120]) from error
        except (*FOREIGN_ERRORS, ImportError) as error:
            raise SlideError(" ".join(f"{type(error).__name__}: {error}".split())[:160]) from error

    def _describe(self, mpp: float | None) -> SlideInfo:
        slide, properties = self._slide, self._slide.properties
        series = slide.ts_tifffile.series[int(properties["tiffslide.series-index"])]
        page: Any = series.keyframe
        vendor = properties.get("tiffslide.vendor")
        self._closed = False
        self._plain = not properties.get("tiffslide.series-composition") and all(_is_plain(level) for level in series.levels)
        self._tiles = _TileDecoder(slide.ts_tifffile, series) if self._plain else None
        if page.photometric not in PHOTOMETRIC or (page.photometric == 6 and page.compression == 1):
            raise SlideError(f"its colours are stored as {page.photometric.name}")
        if self._tiles is None and _chunk_bytes(page) > MAX_STRIP_BYTES:
            raise SlideError(f"one tile or strip of it holds {_chunk_bytes(page) / 1e6:.0f} MB of pixels: {ADVICE}")
        sizes = tuple((int(width), int(height)) for width, height in slide.level_dimensions)
        found, doubts = _pixel_size(slide, sizes[0], page)
        objective = pixel_size(properties.get("tiffslide.objective-power"), None, "")
        value, source, notes = settle(found, mpp, objective.x if objective else None)
        remarks = self._plan_rgb(sizes, page)
        damage = self._tiles.cut_short() if self._tiles else ()
        return SlideInfo(
            path=self._path,
            reader="tiffslide",
            format=str(vendor or ("ome-tiff" if slide.ts_tifffile.is_ome else "tiff")),
            level_sizes=sizes,
            downsamples=whole_downsamples(sizes),
            mpp=value,
            mpp_source=source,
            warnings=(*damage, *doubts, *notes, *remarks, *uneven_levels(sizes)),
        )

    def _plan_rgb(self, sizes: tuple[tuple[int, int], ...], page: tifffile.TiffPage) -> tuple[str, ...]:
        """Settle the conversion to RGB; reads pixels only where the number type leaves the scaling open."""
        level, (width, height) = len(sizes) - 1, sizes[-1]
        size = SAMPLE_PX if page.dtype != np.uint8 else 1
        left, top = max(width - size, 0) // 2, max(height - size, 0) // 2
        if page.dtype == np.uint8 and self._tiles:
            sample: NDArray[Any] = np.zeros((1, 1, page.samplesperpixel), np.uint8)
        else:
            sample = self._raw(level, Box(left, top, min(left + size, width), min(top + size, height)))
        alpha = bool(page.extrasamples) and page.samplesperpixel in (2, 4)
        self._convert, remarks = plan_rgb(sample, alpha=alpha)
        return remarks

    def read(self, level: int, box: Box) -> NDArray[np.uint8]:
        """See `wsiseg.slide.SlideReader.read`."""
        try:
            if self._closed:
                raise ValueError("the slide is closed")
            return read_padded(box, self.info.level_sizes[level], lambda inside: self._convert(self._raw(level, inside)))
        except FOREIGN_ERRORS as error:
            raise unreadable(self._path, level, box, error) from error

    def _raw(self, level: int, box: Box) -> NDArray[Any]:
        """Pixels of a box inside the level, (h, w, channels), as stored."""
        if self._tiles:
            return self._tiles.read(level, box)
        with self._lock:  # TiffSlide's zarr stores are shared
            return np.asarray(self._slide.read_region((box.x0, box.y0), level, (box.width, box.height), as_array=True))

    def close(self) -> None:
        """See `wsiseg.slide.SlideReader.close`."""
        with self._lock:
            self._closed = True
            self._slide.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def open_tiffslide(path: str, mpp: float | None) -> TiffSlideReader:
    """Open ``path`` with TiffSlide; ``mpp`` overrides the file's."""
    return TiffSlideReader(path, mpp)


def _source(path: str) -> str | OpenFile:
    """What TiffSlide is given: it takes ``::`` in the name of a local file for a chain of file systems."""
    return OpenFile(LocalFileSystem(), path) if "::" in path and "://" not in path else path


class _LevelSlide(TiffSlide):
    """A TiffSlide whose ``read_region`` takes locations in px of the level."""

    def _read_region_loc_transform(self, location: tuple[int, int], level: int) -> tuple[int, int]:  # noqa: ARG002
        return location


class _TileDecoder:
    """Decoded tiles (or strips) of a pyramid whose levels are single pages of interleaved samples. Safe to share between threads."""

    def __init__(self, tiff: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> None:
        self._pages: list[Any] = [level.keyframe for level in series.levels]
        self._file = tiff.filehandle
        self._file.set_lock(True)
        self._cache: OrderedDict[tuple[int, int], NDArray[Any]] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()
        for page in self._pages:
            if _chunk_bytes(page) > MAX_STRIP_BYTES:
                raise SlideError(f"one tile or strip of it holds {_chunk_bytes(page) / 1e6:.0f} MB of pixels: {ADVICE}")
            _ = page.decode  # builds and caches the decoder, here rather than in several threads

    def read(self, level: int, box: Box) -> NDArray[Any]:
        """Pixels of a box inside the level; white where tiles are marked as absent (offset or length 0)."""
        page = self._pages[level]
        high, wide = _chunk_shape(page)
        columns = -(-page.imagewidth // wide)
        region = np.empty((box.height, box.width, page.samplesperpixel), page.dtype)
        for row in range(box.y0 // high, -(-box.y1 // high)):
            for column in range(box.x0 // wide, -(-box.x1 // wide)):
                x, y = column * wide, row * high
                both = Box(max(x, box.x0), max(y, box.y0), min(x + wide, box.x1), min(y + high, box.y1))
                target = region[both.y0 - box.y0 : both.y1 - box.y0, both.x0 - box.x0 : both.x1 - box.x0]
                tile = self._tile(level, row * columns + column)
                if tile is None:
                    target[:] = np.iinfo(page.dtype).max if page.dtype.kind in "ui" else 1
                else:
                    target[:] = tile[both.y0 - y : both.y1 - y, both.x0 - x : both.x1 - x]
        return region

    def _tile(self, level: int, index: int) -> NDArray[Any] | None:
        with self._lock:
            if (level, index) in self._cache:
                self._cache.move_to_end((level, index))
                return self._cache[level, index]
        page = self._pages[level]
        offset, length = int(page.dataoffsets[index]), int(page.databytecounts[index])
        if offset == 0 or length == 0:
            return None
        with self._file.lock:
            self._file.seek(offset)
            encoded = self._file.read(length)
        if len(encoded) < length:
            raise ValueError(f"the file ends within tile {index}: {len(encoded)} of {length} bytes")
        if page.compression in JPEG and page.jpegheader is None and b"\xff\xd9" not in encoded[-64:]:
            raise ValueError(f"JPEG tile {index} has no end")  # the decoder would fill the rest with grey
        tile, _, shape = page.decode(encoded, index, jpegtables=page.jpegtables, jpegheader=page.jpegheader)
        tile = np.ascontiguousarray(tile[0, : shape[1], : shape[2]])
        with self._lock:
            if (level, index) not in self._cache:
                self._cache[level, index] = tile
                self._cached_bytes += tile.nbytes
            while self._cached_bytes > CACHE_BYTES and len(self._cache) > 1:
                self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return tile

    def cut_short(self) -> tuple[str, ...]:
        """A sentence when tiles lie beyond the end of the file."""
        missing = 0
        for page in self._pages:
            ends = np.asarray(page.dataoffsets, np.int64) + np.asarray(page.databytecounts, np.int64)
            missing += int((ends > self._file.size).sum())
        return (f"the file is cut short: {missing} tiles or strips lie beyond its end",) if missing else ()


def _is_plain(level: tifffile.TiffPageSeries) -> bool:
    """Whether a level is one page of interleaved samples, which `_TileDecoder` reads."""
    page: Any = level.keyframe
    one_page = len(level.pages) == 1 and level.axes in ("YX", "YXS")
    return one_page and page.planarconfig == 1 and page.imagedepth == 1 and len(page.dataoffsets) > 0


def _chunk_shape(page: tifffile.TiffPage) -> tuple[int, int]:
    """(height, width) of a tile or strip."""
    if page.is_tiled:
        return int(page.tilelength), int(page.tilewidth)
    return min(int(page.rowsperstrip), int(page.imagelength)), int(page.imagewidth)


def _chunk_bytes(page: tifffile.TiffPage) -> int:
    high, wide = _chunk_shape(page)
    return high * wide * int(page.samplesperpixel) * int(np.dtype(page.dtype).itemsize)


def _pixel_size(slide: TiffSlide, size_px0: tuple[int, int], page: tifffile.TiffPage) -> tuple[PixelSize | None, tuple[str, ...]]:
    tiff, properties = slide.ts_tifffile, slide.properties
    ome = from_ome_xml(tiff.ome_metadata, size_px0)
    if ome:
        return ome, ()
    if tiff.is_imagej:
        return from_tiff_tags({tag.name: tag.value for tag in page.tags}, tiff.imagej_metadata)
    return _stated_size(properties)


def _stated_size(properties: Mapping[str, Any]) -> tuple[PixelSize | None, tuple[str, ...]]:
    found = pixel_size(properties.get("tiffslide.mpp-x"), properties.get("tiffslide.mpp-y"), "tiffslide.mpp-x/-y")
    if found is None:
        return None, ()
    if "tiff.XResolution" in properties and not properties.get("philips.PixelSpacing"):
        return believe_resolution(PixelSize(found.x, found.y, "TIFF XResolution"))
    return found, ()
