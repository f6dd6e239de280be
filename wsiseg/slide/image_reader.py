"""Plain images (PNG, JPEG and the like) held in memory, and TIFFs by their pages: planes, stacks and levels that TiffSlide does not know."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self, cast

import numpy as np

from wsiseg.errors import SlideError
from wsiseg.records import SlideInfo
from wsiseg.slide import TIFF_MAGIC
from wsiseg.slide.colour import Colours, plan_rgb
from wsiseg.slide.faults import closed, unreadable
from wsiseg.slide.mpp import choose_mpp, from_ome_xml, from_tiff_tags
from wsiseg.slide.resample import FOREIGN_ERRORS, read_padded, uneven_levels, whole_downsamples
from wsiseg.slide.tiff_pages import ADVICE, ORIENTATION, TiffPixels

if TYPE_CHECKING:
    from types import TracebackType

    from numpy.typing import NDArray

    from wsiseg.geometry import Box

MAX_IMAGE_PX = 178_000_000  # Pillow's own limit; 0.5 GB as RGB


class TiffReader:
    """A `wsiseg.slide.SlideReader` over the first series of a TIFF, tile by tile."""

    def __init__(self, path: str, mpp: float | None) -> None:
        import tifffile

        try:
            self._tiff = tifffile.TiffFile(path)
            try:
                self.info = self._describe(path, mpp)
            except BaseException:
                self._tiff.close()
                raise
        except SlideError:
            raise
        except FOREIGN_ERRORS as error:
            raise SlideError(
                f"damaged, truncated, or of an unknown kind ({' '.join(str(error).split())[:120]})"
            ) from error
        self._closed = False

    def _describe(self, path: str, mpp: float | None) -> SlideInfo:
        tiff = self._tiff
        series = tiff.series[0]
        self._pixels = TiffPixels(tiff, series)
        sizes = self._pixels.level_sizes
        tags = {tag.name: tag.value for tag in series.keyframe.tags}
        found, ignored = from_tiff_tags(tags, tiff.imagej_metadata)
        found = from_ome_xml(tiff.ome_metadata, sizes[0]) or found
        chosen = choose_mpp(found, mpp, None)
        ignored = () if found else ignored
        return SlideInfo(
            path=path,
            reader="image",
            format="ome-tiff" if tiff.is_ome else "tiff",
            level_sizes=sizes,
            downsamples=whole_downsamples(sizes),
            mpp=chosen.mpp,
            mpp_source=chosen.source,
            warnings=(*ignored, *chosen.warnings, *self._pixels.notes, *uneven_levels(sizes)),
            ignored_scale="; ".join(ignored),
            not_square=chosen.not_square,
        )

    def read(self, level: int, box: Box) -> NDArray[np.uint8]:
        """See `wsiseg.slide.SlideReader.read`."""
        if self._closed:
            raise closed(self.info)
        try:
            return read_padded(box, self.info.level_sizes[level], lambda inside: self._pixels.read(level, inside))
        except FOREIGN_ERRORS as error:
            raise unreadable(self.info, level, box, error) from error

    def close(self) -> None:
        """See `wsiseg.slide.SlideReader.close`."""
        self._closed = True
        self._tiff.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ImageReader:
    """A `wsiseg.slide.SlideReader` over an image in memory."""

    def __init__(self, path: str, mpp: float | None) -> None:
        loaded = _load(path)
        self._pixels: NDArray[np.uint8] | None = loaded.pixels
        chosen = choose_mpp(None, mpp, None)  # the dpi of PNG and JPEG are print resolutions: never an mpp
        height, width = loaded.pixels.shape[:2]
        self.info = SlideInfo(
            path=path,
            reader="image",
            format=loaded.format,
            level_sizes=((width, height),),
            downsamples=(1.0,),
            mpp=chosen.mpp,
            mpp_source=chosen.source,
            warnings=(*loaded.notes, *chosen.warnings),
        )

    def read(self, level: int, box: Box) -> NDArray[np.uint8]:
        """See `wsiseg.slide.SlideReader.read`."""
        pixels = self._pixels
        if pixels is None:
            raise closed(self.info)
        return read_padded(box, self.info.level_sizes[level], lambda b: pixels[b.y0 : b.y1, b.x0 : b.x1].copy())

    def close(self) -> None:
        """See `wsiseg.slide.SlideReader.close`."""
        self._pixels = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_image(path: str, mpp: float | None) -> ImageReader | TiffReader:
    """Open a plain image or a TIFF; ``mpp`` overrides the file's."""
    if "://" in path:
        raise SlideError("reads local files only")
    with Path(path).open("rb") as file:
        magic = file.read(4)
    return TiffReader(path, mpp) if magic in TIFF_MAGIC else ImageReader(path, mpp)


@dataclass(frozen=True)
class _Loaded:
    pixels: NDArray[np.uint8]
    format: str
    notes: tuple[str, ...]


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_IMAGE_PX:
        raise SlideError(
            f"{width} x {height} px is too large for a plain image (at most {MAX_IMAGE_PX / 1e6:.0f} megapixels): {ADVICE}"
        )


def _is_deep_png(path: str) -> bool:
    """Whether a PNG has 16 bits per sample and several samples, of which Pillow keeps the upper 8 bits only."""
    with Path(path).open("rb") as file:
        head = file.read(26)
    return head[24:25] == b"\x10" and head[25:26] in (b"\x02", b"\x04", b"\x06")


def _load(path: str) -> _Loaded:
    import imagecodecs
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # _check_size is the guard
            with Image.open(path) as file:
                _check_size(*file.size)
                kind, image = (file.format or "image").lower(), cast("Image.Image", file)
                if file.mode in ("P", "PA", "LA", "La", "RGBa") or "transparency" in file.info:
                    image = file.convert("RGBA")
                elif file.mode not in ("1", "L", "RGB", "RGBA") and not file.mode.startswith(("I", "F")):
                    image = file.convert("RGB")
                orientation = int(file.getexif().get(ORIENTATION, 1))
                deep = kind == "png" and _is_deep_png(path)
                pixels = imagecodecs.png_decode(Path(path).read_bytes()) if deep else np.asarray(image)
                alpha = image.mode == "RGBA" if not deep else pixels.ndim == 3 and pixels.shape[2] in (2, 4)
    except Image.DecompressionBombError as error:
        raise SlideError(
            f"too large for a plain image (at most {MAX_IMAGE_PX / 1e6:.0f} megapixels): {ADVICE}"
        ) from error
    except UnidentifiedImageError as error:
        raise SlideError("not an image it knows") from error
    except SlideError:
        raise
    except FOREIGN_ERRORS as error:
        raise SlideError(f"damaged or truncated ({' '.join(str(error).split())[:120]})") from error
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.dtype == np.int32 and pixels.min(initial=0) >= 0 and pixels.max(initial=0) < 2**16:
        pixels = pixels.astype(np.uint16)  # how older versions of Pillow hold 16-bit PNG
    convert, notes = plan_rgb(pixels, Colours(opacity_at=pixels.shape[2] - 1 if alpha else None))
    if orientation not in (0, 1):
        notes += (f"its orientation tag ({orientation}) is ignored: pixels are used as they are stored",)
    return _Loaded(convert(pixels), kind, notes)
