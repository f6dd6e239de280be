"""Slides through TiffSlide: TIFF-like files that OpenSlide does not know, and remote paths of fsspec.

TiffSlide finds the levels and reads the metadata. The pixels come from `wsiseg.slide.tiff_pages`: TiffSlide's zarr path fills tiles that the
file marks as absent with black, pads JPEG tiles that end early with grey, and takes the samples of any colour model for RGB, all silently.
"""

from __future__ import annotations

import logging
import threading
import warnings
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import tifffile
from fsspec.core import OpenFile
from fsspec.implementations.local import LocalFileSystem
from tiffslide import TiffSlide

from wsiseg.errors import SlideError
from wsiseg.records import SlideInfo
from wsiseg.slide.faults import closed, unreadable
from wsiseg.slide.mpp import PixelSize, choose_mpp, drop_print_resolution, from_ome_xml, from_tiff_tags, pixel_size
from wsiseg.slide.resample import FOREIGN_ERRORS, read_padded, uneven_levels, whole_downsamples
from wsiseg.slide.tiff_pages import TiffPixels

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from numpy.typing import NDArray

    from wsiseg.geometry import Box

logger = logging.getLogger(__name__)


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
            raise SlideError(
                "not a TIFF" if "not a TIFF" in str(error) else " ".join(str(error).split())[:120]
            ) from error
        except (*FOREIGN_ERRORS, ImportError) as error:
            raise SlideError(" ".join(f"{type(error).__name__}: {error}".split())[:160]) from error

    def _describe(self, mpp: float | None) -> SlideInfo:
        slide, properties = self._slide, self._slide.properties
        series = slide.ts_tifffile.series[int(properties["tiffslide.series-index"])]
        page: Any = series.keyframe
        vendor = properties.get("tiffslide.vendor")
        self._closed = False
        self._pixels = None
        if not properties.get("tiffslide.series-composition"):
            self._pixels = TiffPixels(slide.ts_tifffile, series)
        elif page.dtype != np.uint8 or page.samplesperpixel != 3:
            raise SlideError(
                f"its parts hold {page.samplesperpixel} samples of {page.dtype} per pixel, which is not supported"
            )
        sizes = tuple((int(width), int(height)) for width, height in slide.level_dimensions)
        found, ignored = _pixel_size(slide, sizes[0], page)
        objective = pixel_size(properties.get("tiffslide.objective-power"), None, "")
        chosen = choose_mpp(found, mpp, objective.x if objective else None)
        remarks = self._pixels.notes if self._pixels else ()
        return SlideInfo(
            path=self._path,
            reader="tiffslide",
            format=str(vendor or ("ome-tiff" if slide.ts_tifffile.is_ome else "tiff")),
            level_sizes=sizes,
            downsamples=whole_downsamples(sizes),
            mpp=chosen.mpp,
            mpp_source=chosen.source,
            warnings=(*ignored, *chosen.warnings, *remarks, *uneven_levels(sizes)),
            ignored_scale="; ".join(ignored),
            not_square=chosen.not_square,
        )

    def read(self, level: int, box: Box) -> NDArray[np.uint8]:
        """See `wsiseg.slide.SlideReader.read`."""
        if self._closed:
            raise closed(self.info)
        try:
            return read_padded(box, self.info.level_sizes[level], lambda inside: self._rgb(level, inside))
        except FOREIGN_ERRORS as error:
            raise unreadable(self.info, level, box, error) from error

    def _rgb(self, level: int, box: Box) -> NDArray[np.uint8]:
        if self._pixels:
            return self._pixels.read(level, box)
        with self._lock:  # TiffSlide's zarr stores are shared
            rgb: NDArray[np.uint8] = np.asarray(
                self._slide.read_region((box.x0, box.y0), level, (box.width, box.height), as_array=True)
            )
            return rgb

    def close(self) -> None:
        """See `wsiseg.slide.SlideReader.close`."""
        with self._lock:
            self._closed = True
            self._slide.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_tiffslide(path: str, mpp: float | None) -> TiffSlideReader:
    """Open ``path`` with TiffSlide; ``mpp`` overrides the file's."""
    return TiffSlideReader(path, mpp)


def _source(path: str) -> str | OpenFile:
    """Source for TiffSlide, which mistakes ``::`` in the name of a local file for a chain of file systems."""
    return OpenFile(LocalFileSystem(), path) if "::" in path and "://" not in path else path


class _LevelSlide(TiffSlide):
    """A TiffSlide whose ``read_region`` takes locations in px of the level."""

    def _read_region_loc_transform(self, location: tuple[int, int], level: int) -> tuple[int, int]:  # noqa: ARG002
        return location


def _pixel_size(
    slide: TiffSlide, size_px0: tuple[int, int], page: tifffile.TiffPage
) -> tuple[PixelSize | None, tuple[str, ...]]:
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
        return drop_print_resolution(PixelSize(found.x, found.y, "TIFF XResolution"))
    return found, ()
