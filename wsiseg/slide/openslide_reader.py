"""Slides through OpenSlide: Aperio, Hamamatsu, Leica, MIRAX, Philips, Ventana, Zeiss, DICOM and tiled TIFF."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Self

import numpy as np
import openslide

from wsiseg.errors import SlideError
from wsiseg.geometry import Box
from wsiseg.records import SlideInfo
from wsiseg.slide.direct_tiles import DirectTiles
from wsiseg.slide.faults import closed, unreadable
from wsiseg.slide.mpp import PixelSize, choose_mpp, drop_print_resolution, pixel_size
from wsiseg.slide.resample import read_padded, uneven_levels, whole_downsamples
from wsiseg.slide.tiff_pages import misread_by_openslide

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from numpy.typing import NDArray

CHUNK_PX = 1024  # level px; see _fetch

FAILURES = (openslide.OpenSlideError, OSError, ValueError)


class OpenSlideReader:
    """A `wsiseg.slide.SlideReader` over OpenSlide, whose handle may be shared by threads."""

    def __init__(self, path: str, mpp: float | None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._handle = _open(path)
        self._closed = False
        properties = dict(self._handle.properties)
        vendor = properties.get("openslide.vendor", "unknown")
        if vendor == "generic-tiff" and "<OME" in properties.get("tiff.ImageDescription", "")[:4000]:
            self._handle.close()
            raise SlideError("an OME-TIFF, of which OpenSlide reads neither pyramid nor scale")
        reason = misread_by_openslide(path, vendor)
        if reason:
            self._handle.close()
            raise SlideError(f"OpenSlide would misread {reason}")
        self._stated = tuple(self._handle.level_downsamples)
        sizes = tuple(self._handle.level_dimensions)
        background = properties.get("openslide.background-color", "FFFFFF")
        self._background = np.array([int(background[i : i + 2], 16) for i in (0, 2, 4)], np.uint16)
        found, ignored = _pixel_size(properties, vendor)
        objective = pixel_size(properties.get("openslide.objective-power"), None, "")
        chosen = choose_mpp(found, mpp, objective.x if objective else None)
        self.info = SlideInfo(
            path=path,
            reader="openslide",
            format=vendor,
            level_sizes=sizes,
            downsamples=whole_downsamples(sizes, self._stated),
            mpp=chosen.mpp,
            mpp_source=chosen.source,
            bounds=_bounds(properties),
            warnings=(*ignored, *chosen.warnings, *uneven_levels(sizes)),
            ignored_scale="; ".join(ignored),
            not_square=chosen.not_square,
        )
        self._direct = DirectTiles.open(
            path, vendor, sizes, self._stated, lambda level, box: self._rgb(self._handle, level, box)
        )

    def read(self, level: int, box: Box) -> NDArray[np.uint8]:
        """See `wsiseg.slide.SlideReader.read`."""
        if self._closed:
            raise closed(self.info)
        shared = self._handle
        try:
            return read_padded(box, self.info.level_sizes[level], lambda inside: self._fetch(shared, level, inside))
        except FAILURES:
            # After its first error an OpenSlide handle fails for ever and for every thread: replace it, and find out on a handle of
            # our own whether this box is damaged or another thread's was.
            self._replace(shared)
        try:
            with _open(self._path) as own:
                return read_padded(box, self.info.level_sizes[level], lambda inside: self._fetch(own, level, inside))
        except (*FAILURES, SlideError) as error:
            raise unreadable(self.info, level, box, error) from error

    def _fetch(self, handle: openslide.OpenSlide, level: int, box: Box) -> NDArray[np.uint8]:
        """Pixels of a box inside the level.

        OpenSlide is asked in level-0 px and interpolates when they fall between pixels of the level, as they do for downsamples such
        as 2.0005. There the level is read in fixed chunks, so that a pixel never depends on the box.
        """
        direct = self._direct.read(level, box) if self._direct else None
        if direct is not None:
            return direct
        if self._stated[level] == round(self._stated[level]):
            return self._rgb(handle, level, box)
        region = np.empty((box.height, box.width, 3), np.uint8)
        width, height = self.info.level_sizes[level]
        for y in range(box.y0 // CHUNK_PX * CHUNK_PX, box.y1, CHUNK_PX):
            for x in range(box.x0 // CHUNK_PX * CHUNK_PX, box.x1, CHUNK_PX):
                chunk = Box(x, y, min(x + CHUNK_PX, width), min(y + CHUNK_PX, height))
                both = Box(max(x, box.x0), max(y, box.y0), min(chunk.x1, box.x1), min(chunk.y1, box.y1))
                pixels = self._rgb(handle, level, chunk)
                region[both.y0 - box.y0 : both.y1 - box.y0, both.x0 - box.x0 : both.x1 - box.x0] = pixels[
                    both.y0 - y : both.y1 - y, both.x0 - x : both.x1 - x
                ]
        return region

    def _rgb(self, handle: openslide.OpenSlide, level: int, box: Box) -> NDArray[np.uint8]:
        corner = (round(box.x0 * self._stated[level]), round(box.y0 * self._stated[level]))
        rgba = np.asarray(handle.read_region(corner, level, (box.width, box.height)))
        alpha = rgba[..., 3:]
        if alpha.min() == 255:
            return np.ascontiguousarray(rgba[..., :3])
        blend = rgba[..., :3].astype(np.uint16) * alpha + self._background * (255 - alpha.astype(np.uint16))
        opaque: NDArray[np.uint8] = ((blend + 127) // 255).astype(np.uint8)
        return opaque

    def _replace(self, broken: openslide.OpenSlide) -> None:
        """Share a fresh handle. The broken one may still be in use elsewhere: it is closed when the last thread drops it."""
        with self._lock:
            if self._handle is broken and not self._closed:
                self._handle = _open(self._path)

    def close(self) -> None:
        """See `wsiseg.slide.SlideReader.close`."""
        with self._lock:
            self._closed = True
            self._handle.close()
            if self._direct:
                self._direct.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_openslide(path: str, mpp: float | None) -> OpenSlideReader:
    """Open ``path`` with OpenSlide; ``mpp`` overrides the file's."""
    return OpenSlideReader(path, mpp)


def _open(path: str) -> openslide.OpenSlide:
    try:
        handle = openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError as error:
        raise SlideError("not a format it knows") from error
    except FAILURES as error:
        raise SlideError(" ".join(str(error).replace(path, "the file").split())) from error
    return handle


def _pixel_size(properties: Mapping[str, str], vendor: str) -> tuple[PixelSize | None, tuple[str, ...]]:
    found = pixel_size(properties.get("openslide.mpp-x"), properties.get("openslide.mpp-y"), "openslide.mpp-x/-y")
    if found is None:
        return pixel_size(properties.get("aperio.MPP"), None, "aperio.MPP"), ()
    if vendor == "generic-tiff":  # OpenSlide takes it from the resolution tags
        return drop_print_resolution(PixelSize(found.x, found.y, "TIFF XResolution"))
    return found, ()


def _bounds(properties: Mapping[str, str]) -> tuple[int, int, int, int] | None:
    try:
        x, y, width, height = (int(properties[f"openslide.bounds-{side}"]) for side in ("x", "y", "width", "height"))
    except (KeyError, ValueError):
        return None
    return x, y, width, height
