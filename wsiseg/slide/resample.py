"""Resampling of pyramid levels to model pixels, on one exact grid.

Pixel i of a level with downsample d covers level-0 [i*d, (i+1)*d); model px i covers [i*scale, (i+1)*scale). The value of a model px
depends on the slide only, not on the box it was read in: boxes of neighbouring tiles agree where they overlap, but for the rounding of
Pillow's 32-bit window (about one value in a thousand differs by one grey level).
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING

import numpy as np

from wsiseg.errors import SlideError
from wsiseg.geometry import Box, Lattice

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from wsiseg.slide import SlideReader

WHITE = 255  # glass without tissue
LEVEL_TOLERANCE = 1.01  # a level up to 1 % coarser than asked still counts as fine enough
UNTOUCHED_PX = 0.02  # level px that skipping the resampling may shift the far corner of the slide
MAX_SOURCE_PX = 16e6  # level px read at once (48 MB); larger reads go in pieces
MAX_THUMBNAIL_PX = 64e6  # thumbnail px (192 MB)

FOREIGN_ERRORS = (
    *(
        OSError,
        RuntimeError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        AssertionError,
        ArithmeticError,
        SyntaxError,
    ),
    *(EOFError, MemoryError, struct.error),
)  #: what decoders of other libraries raise on damaged files, by observation; readers turn them into SlideError


def read_region(reader: SlideReader, box: Box, lattice: Lattice) -> NDArray[np.uint8]:
    """Read a box of the slide at the model's resolution.

    Parameters
    ----------
    reader
        An open slide.
    box
        In model px; may reach beyond the slide.
    lattice
        Between the model's and the slide's pixels.

    Returns
    -------
    NDArray[np.uint8]
        RGB of shape (box.height, box.width, 3); white outside the slide. Antialiased (triangle filter) when the level is finer than
        the model, bilinear when coarser, the level's own pixels when they are the same.

    Raises
    ------
    SlideError
        The pixels cannot be decoded.
    """
    from PIL import Image

    if box.width <= 0 or box.height <= 0:
        return np.full((max(box.height, 0), max(box.width, 0), 3), WHITE, np.uint8)
    level = best_level(reader.info.downsamples, lattice.scale)
    step = lattice.scale / reader.info.downsamples[level]  # level px per model px
    if abs(step - 1) * max(reader.info.level_sizes[level]) < UNTOUCHED_PX:
        return reader.read(level, box)
    margin = math.ceil(max(step, 1.0)) + 1  # reach of the filter
    x0, y0, x1, y1 = (edge * step for edge in box)
    source = Box(math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1)).grow(margin)
    if source.width * source.height > MAX_SOURCE_PX and max(box.width, box.height) > 1:
        return _read_halves(reader, box, lattice)
    window = (x0 - source.x0, y0 - source.y0, x1 - source.x0, y1 - source.y0)
    pixels = Image.fromarray(_read_replicated(reader, level, source))
    region = np.array(pixels.resize((box.width, box.height), Image.Resampling.BILINEAR, box=window))
    columns, rows = lattice.model_size(reader.info.size_px0)
    region[: max(-box.y0, 0)] = region[max(rows - box.y0, 0) :] = WHITE
    region[:, : max(-box.x0, 0)] = region[:, max(columns - box.x0, 0) :] = WHITE
    return region


def _read_replicated(reader: SlideReader, level: int, box: Box) -> NDArray[np.uint8]:
    """Read a box, the slide's outermost px repeated beyond it: white there would bleed through the filter into the slide."""
    width, height = reader.info.level_sizes[level]
    inside = Box(max(box.x0, 0), max(box.y0, 0), min(box.x1, width), min(box.y1, height))
    if inside == box or inside.width <= 0 or inside.height <= 0:
        return reader.read(level, box)
    beyond = ((inside.y0 - box.y0, box.y1 - inside.y1), (inside.x0 - box.x0, box.x1 - inside.x1), (0, 0))
    return np.pad(reader.read(level, inside), beyond, mode="edge")


def _read_halves(reader: SlideReader, box: Box, lattice: Lattice) -> NDArray[np.uint8]:
    region = np.empty((box.height, box.width, 3), np.uint8)
    if box.width >= box.height:
        half = box.width // 2
        region[:, :half] = read_region(reader, box._replace(x1=box.x0 + half), lattice)
        region[:, half:] = read_region(reader, box._replace(x0=box.x0 + half), lattice)
    else:
        half = box.height // 2
        region[:half] = read_region(reader, box._replace(y1=box.y0 + half), lattice)
        region[half:] = read_region(reader, box._replace(y0=box.y0 + half), lattice)
    return region


def thumbnail(reader: SlideReader, mpp: float) -> tuple[NDArray[np.uint8], float]:
    """Read an overview of the whole slide, in pieces of bounded size.

    Parameters
    ----------
    reader
        An open slide of known mpp.
    mpp
        Microns per thumbnail px wanted. The result is coarser where it would exceed 64 megapixels, and never finer than level 0.

    Returns
    -------
    tuple[NDArray[np.uint8], float]
        RGB of shape (h, w, 3), its corner at the slide's; and level-0 px per thumbnail px.

    Raises
    ------
    SlideError
        The slide's mpp is unknown, or its pixels cannot be decoded.
    """
    info = reader.info
    if math.isnan(info.mpp):
        raise SlideError(f"{info.path}: no microns per pixel in the file; pass --mpp (for example --mpp 0.25)")
    width, height = info.size_px0
    scale = max(mpp / info.mpp, 1.0, math.sqrt(width * height / MAX_THUMBNAIL_PX))
    lattice = Lattice(info.mpp, info.mpp * scale)
    columns, rows = lattice.model_size((width, height))
    return read_region(reader, Box(0, 0, columns, rows), lattice), lattice.scale


def best_level(downsamples: tuple[float, ...], scale: float) -> int:
    """The coarsest level that is not coarser than ``scale`` level-0 px per px (within 1 %), else level 0; ties go to the first."""
    fine = [
        (-downsample, level) for level, downsample in enumerate(downsamples) if downsample <= scale * LEVEL_TOLERANCE
    ]
    return min(fine)[1] if fine else 0


def whole_downsamples(
    level_sizes: tuple[tuple[int, int], ...], stated: tuple[float, ...] | None = None
) -> tuple[float, ...]:
    """Level-0 px per px of each level.

    Dividing the sizes of levels gives 2.0005 where a scanner halved 4443 px and dropped the odd one: half a pixel of drift over a
    level, 25 px over a large slide. A whole number (a power of two first) that explains both sizes to within one px is the truth.

    Parameters
    ----------
    level_sizes
        (width, height) of each level, level 0 first.
    stated
        Downsamples stated by the reading library, kept where no whole number fits.
    """
    width0, height0 = level_sizes[0]
    factors = []
    for level, (width, height) in enumerate(level_sizes):
        ratio = stated[level] if stated else math.sqrt((width0 / width) * (height0 / height))
        whole = [2.0 ** round(math.log2(ratio)), float(max(round(ratio), 1))]
        fits = [
            k
            for k in whole
            if abs(width0 / k - width) <= 1 and abs(height0 / k - height) <= 1 and abs(k / ratio - 1) < 0.1
        ]
        factors.append(fits[0] if fits else ratio)
    return tuple(factors)


def uneven_levels(level_sizes: tuple[tuple[int, int], ...]) -> tuple[str, ...]:
    """Warn of each level that is not a uniform reduction of level 0 (by more than 2 % and more than 2 px)."""
    width0, height0 = level_sizes[0]
    notes = []
    for level, (width, height) in enumerate(level_sizes):
        x, y = width0 / width, height0 / height
        if abs(x / y - 1) > 0.02 and abs(width - width0 / y) > 2 and abs(height - height0 / x) > 2:
            notes.append(
                f"level {level} ({width} x {height} px) is not a uniform reduction of level 0 ({width0} x {height0} px)"
            )
    return tuple(notes)


def read_padded(box: Box, size: tuple[int, int], fetch: Callable[[Box], NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Fetch what of ``box`` lies within a level of ``size`` (width, height) and surround it with white -> (box.height, box.width, 3)."""
    inside = Box(max(box.x0, 0), max(box.y0, 0), min(box.x1, size[0]), min(box.y1, size[1]))
    if inside == box and box.width > 0 and box.height > 0:
        return fetch(box)
    region = np.full((max(box.height, 0), max(box.width, 0), 3), WHITE, np.uint8)
    if inside.width > 0 and inside.height > 0:
        region[inside.y0 - box.y0 : inside.y1 - box.y0, inside.x0 - box.x0 : inside.x1 - box.x0] = fetch(inside)
    return region
