"""Plain images (PNG, JPEG, TIFF, OME-TIFF) held in memory, and the way of any pixel type to RGB."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np

from wsiseg.errors import SlideError
from wsiseg.records import SlideInfo
from wsiseg.slide.mpp import PixelSize, from_ome_xml, from_tiff_tags, settle
from wsiseg.slide.resample import FOREIGN_ERRORS, read_padded, unreadable

if TYPE_CHECKING:
    from types import TracebackType

    import tifffile
    from numpy.typing import NDArray

    from wsiseg.geometry import Box

MAX_IMAGE_PX = 178_000_000  # Pillow's own limit; 0.5 GB as RGB
ADVICE = "convert it to a tiled pyramid, for example: vips tiffsave IN OUT.tif --tile --pyramid --compression jpeg"
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


@dataclass(frozen=True)
class ToRgb:
    """A conversion to RGB that is the same for every box of a slide.

    Attributes
    ----------
    low, high
        Values that become 0 and 255.
    alpha
        Whether the last channel is opacity, to be blended over white.
    inverted
        Whether the largest value is black.
    """

    low: float
    high: float
    alpha: bool = False
    inverted: bool = False

    def __call__(self, pixels: NDArray[Any]) -> NDArray[np.uint8]:
        """Pixels of shape (h, w, channels), any number type -> RGB of shape (h, w, 3)."""
        if pixels.dtype != np.uint8 or (self.low, self.high) != (0, 255):
            scaled = (np.nan_to_num(pixels.astype(np.float32)) - self.low) * (255 / (self.high - self.low))
            pixels = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
        if self.alpha:
            opacity = pixels[..., -1:].astype(np.uint16)
            pixels = ((pixels[..., :-1] * opacity + 255 * (255 - opacity) + 127) // 255).astype(np.uint8)
        if self.inverted:
            pixels = 255 - pixels
        channels = pixels.shape[2]
        if channels == 1:
            return np.repeat(pixels, 3, axis=2)
        if channels == 2:
            return np.concatenate([pixels, np.zeros_like(pixels[..., :1])], axis=2)
        return np.ascontiguousarray(pixels[..., :3])


def plan_rgb(sample: NDArray[Any], *, alpha: bool = False, inverted: bool = False) -> tuple[ToRgb, tuple[str, ...]]:
    """Decide how a slide becomes RGB.

    Parameters
    ----------
    sample
        The slide or its coarsest level, of shape (h, w, channels).
    alpha, inverted
        See `ToRgb`.

    Returns
    -------
    tuple[ToRgb, tuple[str, ...]]
        8-bit values are kept. Unsigned integers are divided by the full scale of the smallest usual bit depth (8, 10, 12, 14, 16)
        that holds their largest value; other numbers are stretched from their minimum to their maximum. One sentence about each
        departure from 8-bit RGB.
    """
    notes = []
    low, high = 0.0, 255.0
    if sample.dtype == bool:
        high = 1.0
        notes.append("a binary image, shown as black and white")
    elif sample.dtype == np.uint16:
        top = int(sample.max(initial=0))
        bits = next(bits for bits in (8, 10, 12, 14, 16) if top < 2**bits)
        high = 2.0**bits - 1
        notes.append(f"16-bit values up to {top} were scaled from {bits} bits to 8")
    elif sample.dtype != np.uint8:
        finite = sample[np.isfinite(sample)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
        high = high if high > low else low + 1
        notes.append(f"{sample.dtype} values from {low:g} to {high:g} were stretched to 8 bits")
    colours = sample.shape[2] - alpha
    if alpha:
        notes.append("an opacity channel was blended over white")
    if colours == 1:
        notes.append("greyscale, shown as grey RGB; models trained on H&E expect colour")
    elif colours != 3:
        notes.append(f"{colours} channels; the first {min(colours, 3)} are shown as red, green{', blue' if colours > 2 else ''}")
    return ToRgb(low, high, alpha, inverted), tuple(notes)


class ImageReader:
    """A `wsiseg.slide.SlideReader` over an image in memory."""

    def __init__(self, path: str, mpp: float | None) -> None:
        with Path(path).open("rb") as file:
            magic = file.read(4)
        loaded = _load_tiff(path) if magic in TIFF_MAGIC else _load_pillow(path)
        self._pixels: NDArray[np.uint8] | None = loaded.pixels
        value, source, notes = settle(loaded.found, mpp, None)
        height, width = loaded.pixels.shape[:2]
        self.info = SlideInfo(
            path=path,
            reader="image",
            format=loaded.format,
            level_sizes=((width, height),),
            downsamples=(1.0,),
            mpp=value,
            mpp_source=source,
            warnings=(*loaded.notes, *notes),
        )

    def read(self, level: int, box: Box) -> NDArray[np.uint8]:
        """See `wsiseg.slide.SlideReader.read`."""
        pixels = self._pixels
        if pixels is None:
            raise unreadable(self.info.path, level, box, ValueError("the slide is closed"))
        return read_padded(box, self.info.level_sizes[level], lambda b: pixels[b.y0 : b.y1, b.x0 : b.x1].copy())

    def close(self) -> None:
        """See `wsiseg.slide.SlideReader.close`."""
        self._pixels = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def open_image(path: str, mpp: float | None) -> ImageReader:
    """Load ``path`` whole; ``mpp`` overrides the file's.

    Raises
    ------
    SlideError
        Not an image, damaged, or more than `MAX_IMAGE_PX`.
    """
    if "://" in path:
        raise SlideError("plain images are read from local files only")
    return ImageReader(path, mpp)


@dataclass(frozen=True)
class _Loaded:
    pixels: NDArray[np.uint8]
    format: str
    found: PixelSize | None
    notes: tuple[str, ...]


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_IMAGE_PX:
        raise SlideError(f"{width} x {height} px is too large for a plain image (at most {MAX_IMAGE_PX / 1e6:.0f} megapixels): {ADVICE}")


def _load_pillow(path: str) -> _Loaded:
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
                pixels, alpha = np.asarray(image), image.mode == "RGBA"
    except Image.DecompressionBombError as error:
        raise SlideError(f"too large for a plain image (at most {MAX_IMAGE_PX / 1e6:.0f} megapixels): {ADVICE}") from error
    except UnidentifiedImageError as error:
        raise SlideError("not an image it knows") from error
    except SlideError:
        raise
    except FOREIGN_ERRORS as error:
        raise SlideError(f"damaged or cut short ({' '.join(str(error).split())[:120]})") from error
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if alpha and pixels[..., 3].min(initial=255) == 255:
        pixels, alpha = pixels[..., :3], False
    if pixels.dtype == np.int32 and pixels.min(initial=0) >= 0 and pixels.max(initial=0) < 2**16:
        pixels = pixels.astype(np.uint16)  # how older versions of Pillow hold 16-bit PNG
    convert, notes = plan_rgb(pixels, alpha=alpha)
    return _Loaded(convert(pixels), kind, None, notes)  # the dpi of PNG and JPEG are print resolutions: never an mpp


def _load_tiff(path: str) -> _Loaded:
    import tifffile

    try:
        with tifffile.TiffFile(path) as tiff:
            series = tiff.series[0]
            page = series.keyframe
            _check_size(page.imagewidth, page.imagelength)
            if page.photometric in _PILLOW_PHOTOMETRIC:
                return _load_pillow(path)
            pixels, notes = _first_plane(series)
            alpha = series.axes.endswith("S") and bool(page.extrasamples) and pixels.shape[2] in (2, 4)
            inverted = page.photometric == tifffile.PHOTOMETRIC.MINISWHITE
            found, doubts = from_tiff_tags({tag.name: tag.value for tag in page.tags}, tiff.imagej_metadata)
            found = from_ome_xml(tiff.ome_metadata, (page.imagewidth, page.imagelength)) or found
            kind = "ome-tiff" if tiff.is_ome else "tiff"
    except SlideError:
        raise
    except FOREIGN_ERRORS as error:
        raise SlideError(f"damaged, cut short, or of an unknown kind ({' '.join(str(error).split())[:120]})") from error
    convert, remarks = plan_rgb(pixels, alpha=alpha, inverted=inverted)
    return _Loaded(convert(pixels), kind, found, (*notes, *remarks, *(() if found else doubts)))


_PILLOW_PHOTOMETRIC = (3, 5, 8)  # palette, CMYK, L*a*b*: Pillow converts them


def _first_plane(series: tifffile.TiffPageSeries) -> tuple[NDArray[Any], tuple[str, ...]]:
    """The first plane of a series as (h, w, channels), with a sentence about what is left out."""
    axes = series.axes
    notes: tuple[str, ...] = ()
    if "Y" not in axes or "X" not in axes:
        raise SlideError(f"its axes are {axes}, without Y and X")
    channel = next((axis for axis in "SC" if axis in axes), None)
    index = tuple(slice(None) if axis in ("Y", "X", channel) else 0 for axis in axes)
    left_out = [f"{axis} of {length}" for axis, length, at in zip(axes, series.shape, index, strict=True) if at == 0 and length > 1]
    if left_out:
        notes = (f"only the first plane is used ({', '.join(left_out)})",)
    plane = series.asarray()[index]
    kept = [axis for axis, at in zip(axes, index, strict=True) if at != 0]
    if channel is None:
        return (plane if kept == ["Y", "X"] else plane.T)[..., None], notes
    return np.moveaxis(plane, [kept.index(axis) for axis in ("Y", "X", channel)], [0, 1, 2]), notes
