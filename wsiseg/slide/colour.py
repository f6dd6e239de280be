"""Conversion of any pixel type and colour model to 8-bit RGB, the same for every box of a slide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from wsiseg.errors import SlideError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

Model = Literal["channels", "rgb", "palette", "cmyk", "ycbcr", "lab"]

DEPTHS = (8, 10, 12, 14, 16)  # bits that cameras and scanners deliver, whatever the width of the number
BAND_PX = 1 << 20  # pixels converted at once
NEARLY_ONE = 1.5  # floats up to this are on a scale of 1: interpolation overshoots
REC601 = (0.299, 0.587, 0.114)  # TIFF 6.0, section 21: YCbCrCoefficients when the tag is absent
FULL_RANGE = (0.0, 255.0, 128.0, 255.0, 128.0, 255.0)  # and ReferenceBlackWhite, as JFIF has it


@dataclass(frozen=True, kw_only=True)
class Colours:
    """Meaning of the samples of a pixel, as stated by a file.

    Attributes
    ----------
    model
        ``channels`` are shown as grey (one) or as red, green and blue (several).
    count
        Samples of colour; those after them are opacity or without a stated meaning. ``None``: all but the opacity.
    opacity_at
        Index of the sample that is opacity, if one is.
    premultiplied
        The colours were multiplied by the opacity when they were written (TIFF: associated alpha).
    inverted
        The largest value is black.
    bits
        Bits per sample, where the number type is wider than these.
    palette
        uint8 of shape (n, 3): RGB of each index.
    luma, reference
        Coefficients of YCbCr, and the code values of black and white of its three components on a scale of 255.
    """

    model: Model = "channels"
    count: int | None = None
    opacity_at: int | None = None
    premultiplied: bool = False
    inverted: bool = False
    bits: int | None = None
    palette: NDArray[np.uint8] | None = None
    luma: tuple[float, float, float] = REC601
    reference: tuple[float, ...] = FULL_RANGE


@dataclass(frozen=True, kw_only=True)
class ToRgb:
    """A conversion to RGB.

    Attributes
    ----------
    colours
        Meaning of the samples; its ``opacity_at`` is ``None`` when the opacity is ignored.
    count
        Samples of colour.
    low, high
        Values of colour that become 0 and 255.
    opaque
        Value of the opacity that is opaque.
    """

    colours: Colours
    count: int
    low: float = 0.0
    high: float = 255.0
    opaque: float = 255.0

    def __call__(self, pixels: NDArray[Any]) -> NDArray[np.uint8]:
        """Pixels of shape (h, w, samples), any number type -> RGB of shape (h, w, 3)."""
        height, width = pixels.shape[:2]
        rows = max(BAND_PX // max(width, 1), 1)
        if height <= rows:
            return self._convert(pixels)
        rgb = np.empty((height, width, 3), np.uint8)
        for top in range(
            0, height, rows
        ):  # a strip may hold the whole slide, and floats of it would take several times its memory
            rgb[top : top + rows] = self._convert(pixels[top : top + rows])
        return rgb

    def _convert(self, pixels: NDArray[Any]) -> NDArray[np.uint8]:
        colours = self.colours
        rgb = self._rgb(pixels[..., : self.count])
        if colours.opacity_at is None:
            return np.ascontiguousarray(rgb)
        opacity = _scaled(pixels[..., colours.opacity_at, None], 0.0, self.opaque).astype(np.uint16)
        shown = rgb if colours.premultiplied else (rgb * opacity + 127) // 255
        blended: NDArray[np.uint8] = np.minimum(shown + (255 - opacity), 255).astype(np.uint8)
        return blended

    def _rgb(self, pixels: NDArray[Any]) -> NDArray[np.uint8]:
        colours = self.colours
        if colours.palette is not None:
            index = pixels[..., 0].astype(np.uint8) if pixels.dtype.kind == "b" else pixels[..., 0]
            rgb: NDArray[np.uint8] = colours.palette[np.minimum(index, len(colours.palette) - 1)]
            return rgb
        scaled = _scaled(pixels, self.low, self.high)
        if colours.inverted:
            scaled = 255 - scaled
        convert = _MODELS.get(colours.model)
        return _channels_as_rgb(scaled) if convert is None else convert(scaled, colours)


def plan_rgb(sample: NDArray[Any], colours: Colours | None = None) -> tuple[ToRgb, tuple[str, ...]]:
    """Decide how a slide becomes RGB.

    Parameters
    ----------
    sample
        The slide or a representative part of it, of shape (h, w, samples).
    colours
        Meaning of its samples.

    Returns
    -------
    tuple[ToRgb, tuple[str, ...]]
        8-bit values are kept. Unsigned integers are divided by the full scale of the smallest usual bit depth (8, 10, 12, 14, 16) that holds
        their largest value. Signed integers and floats without negative values keep 0 as black: up to 1 (floats) or 255 they are taken as
        they are, else their largest value becomes white. Numbers with negative values are stretched from their minimum to their maximum.
        An opacity that is 0 everywhere is ignored. One message about each departure from 8-bit RGB.

    Raises
    ------
    SlideError
        A colour model in numbers that have no scale for it.
    """
    colours = colours or Colours()
    samples = sample.shape[2]
    count = samples - (colours.opacity_at is not None) if colours.count is None else min(colours.count, samples)
    if colours.model not in ("channels", "rgb") and sample.dtype.kind not in (
        "ub" if colours.model == "palette" else "u"
    ):
        raise SlideError(
            f"its colours are {NAMES[colours.model]} in {sample.dtype} values; unsigned integers are supported"
        )
    if colours.model == "lab" and sample.dtype != np.uint8:
        raise SlideError(f"its colours are {NAMES[colours.model]} in {sample.dtype} values; 8 bits are supported")
    notes = []
    low, high = 0.0, 255.0
    if colours.palette is None:
        low, high, remark = _scale(sample[..., :count], colours.bits)
        notes += [remark] if remark else []
    opaque, faults = _opacity_scale(sample, colours)
    notes += faults
    if opaque is None:
        colours = Colours(**{**vars(colours), "opacity_at": None})
    if colours.model not in {"rgb", "channels"}:
        notes.append(f"{NAMES[colours.model]} colours were converted to RGB")
    elif count == 1:
        notes.append("greyscale, shown as grey RGB; models trained on H&E expect colour")
    elif count != 3:
        notes.append(
            f"{count} channels; the first {min(count, 3)} are shown as red, green{', blue' if count > 2 else ''}"
        )
    unknown = samples - count - (colours.opacity_at is not None)
    if unknown > 0 and not faults:
        notes.append(f"{unknown} more sample{'s' * (unknown > 1)} per pixel without a stated meaning: left out")
    return ToRgb(colours=colours, count=count, low=low, high=high, opaque=opaque or 255.0), tuple(notes)


NAMES = {"palette": "palette", "cmyk": "CMYK", "ycbcr": "YCbCr", "lab": "L*a*b*", "rgb": "RGB", "channels": "grey"}


def _scale(values: NDArray[Any], bits: int | None) -> tuple[float, float, str]:
    """Values that map to 0 and 255, and a warning where they are not 0 and 255."""
    kind = values.dtype
    if kind.kind == "b":
        return 0.0, 1.0, "a binary image, shown as black and white"
    if bits is not None:
        return 0.0, 2.0**bits - 1, f"{bits}-bit values were scaled to 8"
    if kind == np.uint8:
        return 0.0, 255.0, ""
    finite = values[np.isfinite(values)] if kind.kind == "f" else values.ravel()
    bottom, top = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if kind.kind == "u" and top < 2 ** DEPTHS[-1]:
        bits = next(depth for depth in DEPTHS if top < 2**depth)
        return 0.0, 2.0**bits - 1, f"{8 * kind.itemsize}-bit values up to {top:.0f} were scaled from {bits} bits to 8"
    if bottom < 0:
        high = top if top > bottom else bottom + 1
        return bottom, high, f"{kind} values from {bottom:g} to {high:g} were stretched to 8 bits"
    high = 1.0 if kind.kind == "f" and top <= NEARLY_ONE else 255.0 if top <= 255 else top
    return 0.0, high, f"{kind} values up to {top:g} were scaled to 8 bits, {high:g} becoming 255"


def _opacity_scale(sample: NDArray[Any], colours: Colours) -> tuple[float | None, list[str]]:
    """Value of full opacity, ``None`` when there is none to be used; and a warning about it."""
    if colours.opacity_at is None:
        return None, []
    opacity = sample[..., colours.opacity_at]
    if not opacity.any():
        return None, ["its opacity is 0 everywhere, as some exporters write it, and was ignored"]
    _, opaque, _ = _scale(opacity, colours.bits)
    return opaque, ["an opacity channel was blended over white"] if (opacity < opaque).any() else []


def _scaled(pixels: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    if pixels.dtype == np.uint8 and (low, high) == (0, 255):
        return pixels
    scaled = (np.nan_to_num(pixels.astype(np.float32)) - np.float32(low)) * np.float32(255 / (high - low))
    return _to_bytes(scaled)


def _to_bytes(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    rounded: NDArray[np.uint8] = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return rounded


def _channels_as_rgb(channels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """One channel as grey, two as red and green, more as red, green and blue."""
    if channels.shape[2] == 1:
        return np.repeat(channels, 3, axis=2)
    if channels.shape[2] == 2:
        return np.concatenate([channels, np.zeros_like(channels[..., :1])], axis=2)
    return channels[..., :3]


def _from_cmyk(pixels: NDArray[np.uint8], _: Colours) -> NDArray[np.uint8]:
    """Convert CMYK as ink on white paper, without a profile."""
    ink, black = pixels[..., :3].astype(np.uint16), pixels[..., 3:4].astype(np.uint16)
    rgb: NDArray[np.uint8] = (((255 - ink) * (255 - black) + 127) // 255).astype(np.uint8)
    return rgb


def _from_ycbcr(pixels: NDArray[np.uint8], colours: Colours) -> NDArray[np.uint8]:
    """Convert YCbCr as in TIFF 6.0, section 21."""
    red, green, blue = colours.luma
    black_y, white_y, black_b, white_b, black_r, white_r = colours.reference
    y, cb, cr = np.moveaxis(pixels[..., :3].astype(np.float32), 2, 0)
    y = (y - black_y) * (255 / (white_y - black_y))
    cb = (cb - black_b) * (127 / (white_b - black_b))
    cr = (cr - black_r) * (127 / (white_r - black_r))
    r = y + (2 - 2 * red) * cr
    b = y + (2 - 2 * blue) * cb
    g = (y - red * r - blue * b) / green
    return _to_bytes(np.stack([r, g, b], axis=2))


def _from_lab(pixels: NDArray[np.uint8], _: Colours) -> NDArray[np.uint8]:
    """Convert CIE L*a*b* as in TIFF (a* and b* as signed bytes), through Pillow's colour management."""
    from PIL import Image

    height, width = pixels.shape[:2]
    image = Image.frombytes("LAB", (width, height), np.ascontiguousarray(pixels[..., :3]).tobytes(), "raw", "LAB", 0, 1)
    return np.asarray(image.convert("RGB"))


_MODELS: dict[Model, Callable[[NDArray[np.uint8], Colours], NDArray[np.uint8]]] = {
    "cmyk": _from_cmyk,
    "ycbcr": _from_ycbcr,
    "lab": _from_lab,
}
