"""Pixels of any TIFF, tile by tile, and their conversion to RGB.

A level is one page; or one page per channel, where channels are pages of their own; or one page with a plane per sample (planar
configuration 2). Of a stack (z, time) the first plane is used, with a warning. The orientation tag is never applied: OpenSlide, QuPath and
other tools place objects on the pixels as they are stored.

Specification: TIFF 6.0, https://www.itu.int/itudoc/itu-t/com16/tiff-fx/docs/tiff6.pdf
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import tifffile

from wsiseg.errors import SlideError
from wsiseg.geometry import Box
from wsiseg.slide.colour import FULL_RANGE, REC601, Colours, ToRgb, plan_rgb
from wsiseg.slide.resample import FOREIGN_ERRORS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from numpy.typing import NDArray

ADVICE = "convert it to a tiled pyramid, for example: vips tiffsave IN OUT.tif --tile --pyramid --compression jpeg"
CACHE_BYTES = 128e6  # decoded tiles kept: neighbouring boxes share the tiles on their border
MAX_CHUNK_BYTES = 512e6  # decoded size of the largest strip or tile that is read for one box
OPACITY_BYTES = 1e9  # decoded at most to find out whether any opacity was set
SAMPLE_CHUNKS, SAMPLE_BYTES = (
    64,
    256e6,
)  # at most these of a level decide the scaling of deep pixels and the use of opacity
LOOKED_AT = (
    64  # directories of a generic TIFF that are examined before OpenSlide may read it; a stack shows in the first few
)
WHITE = 255

JPEG = (6, 7)
JPEG_2000 = (33003, 33004, 33005, 34712)
TO_RGB = (*JPEG, 50001, 50002, 52546)  # JPEG, WebP, JPEG XL: their decoders make RGB of YCbCr
GREY, INVERTED_GREY, RGB, PALETTE, SEPARATED, YCBCR, LAB = 1, 0, 2, 3, 5, 6, 8  # PhotometricInterpretation
PHOTOMETRIC, ORIENTATION, INK_SET, YCBCR_COEFFICIENTS, REFERENCE_BLACK_WHITE = 262, 274, 332, 529, 532
PREMULTIPLIED, STRAIGHT = 1, 2  # ExtraSamples: associated and unassociated alpha; 0 has no stated meaning


class TiffPixels:
    """The pixels of one series of a TIFF as RGB. May be read by several threads at once.

    Parameters
    ----------
    tiff
        An open file.
    series
        One of its series; its levels are the levels of the slide.
    cache_bytes
        Decoded tiles that are kept.

    Attributes
    ----------
    level_sizes
        (width, height) of each level.
    notes
        Messages about what is left out, converted or damaged.

    Raises
    ------
    SlideError
        Its pixels are stored in a way that is not supported, by name.
    """

    def __init__(
        self, tiff: tifffile.TiffFile, series: tifffile.TiffPageSeries, *, cache_bytes: float = CACHE_BYTES
    ) -> None:
        self._file = tiff.filehandle
        self._cache_bytes = cache_bytes
        self._file.set_lock(True)
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[int, int], NDArray[np.uint8]] = OrderedDict()
        self._cached_bytes = 0
        self._levels, left_out = _levels_of(series)
        self.level_sizes = tuple((level.width, level.height) for level in self._levels)
        page = self._levels[0].page
        first, remarks = plan_rgb(self._sample(page), _colours_of(page, len(self._levels[0].pages)))
        self._to_rgb = [first, *(_like(first, page, level) for level in self._levels[1:])]
        larger = _larger_picture(tiff, self.level_sizes[0])
        self.notes = (*self._cut_short(), *left_out, *larger, *_orientation_note(self._levels), *remarks)

    def read(self, level: int, box: Box) -> NDArray[np.uint8]:
        """RGB of a box inside the level; white where tiles are marked as absent (offset or length 0)."""
        chosen = self._levels[level]
        region = np.full((box.height, box.width, 3), WHITE, np.uint8)
        for row in range(box.y0 // chosen.high, -(-box.y1 // chosen.high)):
            for column in range(box.x0 // chosen.wide, -(-box.x1 // chosen.wide)):
                rgb = self._chunk(level, row * chosen.columns + column)
                if rgb is None:
                    continue
                x, y = column * chosen.wide, row * chosen.high
                both = Box(max(x, box.x0), max(y, box.y0), min(x + chosen.wide, box.x1), min(y + chosen.high, box.y1))
                target = region[both.y0 - box.y0 : both.y1 - box.y0, both.x0 - box.x0 : both.x1 - box.x0]
                target[:] = rgb[both.y0 - y : both.y1 - y, both.x0 - x : both.x1 - x]
        return region

    def _chunk(self, level: int, index: int) -> NDArray[np.uint8] | None:
        """RGB of a tile or strip, cached; ``None`` when it is absent."""
        with self._lock:
            if (level, index) in self._cache:
                self._cache.move_to_end((level, index))
                return self._cache[level, index]
        raw = self._decode(self._levels[level], index)
        if raw is None:
            return None
        rgb = self._to_rgb[level](raw)
        with self._lock:
            if (level, index) not in self._cache:
                self._cache[level, index] = rgb
                self._cached_bytes += rgb.nbytes
            while self._cached_bytes > self._cache_bytes and len(self._cache) > 1:
                self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return rgb

    def _decode(self, level: _Level, index: int) -> NDArray[Any] | None:
        """Samples of a tile or strip as stored, (h, w, samples); ``None`` when any plane of it is absent."""
        planes = []
        for number, page in enumerate(level.pages):
            for plane in range(level.planes):
                at = plane * level.columns * level.rows + index
                encoded = self._encoded(level, number, at)
                if encoded is None:
                    return None
                tile, _, shape = level.page.decode(
                    encoded, at, jpegtables=page.jpegtables, jpegheader=level.page.jpegheader
                )
                # decoders of fax compression return bytes for bits
                planes.append(tile[0, : shape[1], : shape[2]].astype(level.page.dtype, copy=False))
        return np.ascontiguousarray(planes[0]) if len(planes) == 1 else np.concatenate(planes, axis=2)

    def _encoded(self, level: _Level, number: int, at: int) -> bytes | None:
        offset, length = int(level.offsets[number][at]), int(level.lengths[number][at])
        if offset == 0 or length == 0:
            return None
        with self._file.lock:
            self._file.seek(offset)
            encoded = self._file.read(length)
        if len(encoded) < length:
            raise ValueError(f"the file ends inside tile {at}: {len(encoded)} of {length} bytes")
        if level.page.compression in JPEG and level.page.jpegheader is None and b"\xff\xd9" not in encoded[-64:]:
            raise ValueError(f"JPEG tile {at} has no end")  # the decoder would fill the rest with grey
        return encoded

    def _sample(self, page: Any) -> NDArray[Any]:  # noqa: ANN401
        """Smallest and largest value of each sample, tile by tile: (2 * tiles, 1, samples), for a decision about the whole slide.

        The padding of tiles beyond the image is left out. The mean of few bright spots is dark: for the depth of the pixels the finest level
        counts, too.
        """
        coarsest = self._levels[-1]
        samples = coarsest.samples
        if page.dtype == np.uint8 and not page.extrasamples:
            return np.zeros((1, 1, samples), np.uint8)
        levels = [coarsest] if page.dtype == np.uint8 or len(self._levels) == 1 else [coarsest, self._levels[0]]
        found = [extremes for level in levels for extremes in self._extremes(level, _spread(level))]
        extras = (
            len(page.extrasamples) if {PREMULTIPLIED, STRAIGHT} & {int(extra) for extra in page.extrasamples} else 0
        )
        if extras and not any(extremes[..., -extras:].any() for extremes in found):
            found += self._first_opaque(coarsest, extras)
        return np.concatenate(found) if found else np.zeros((1, 1, samples), page.dtype)

    def _extremes(self, level: _Level, indices: Iterable[int]) -> Iterator[NDArray[Any]]:
        """(2, 1, samples) of each tile that can be read."""
        for index, raw in self._readable(level, indices):
            y, x = index // level.columns * level.high, index % level.columns * level.wide
            inside = raw[: level.height - y, : level.width - x]
            if inside.dtype.kind == "f":
                finite = np.isfinite(inside)
                if not finite.any():
                    continue
                inside = np.where(finite, inside, inside[finite].min())
            yield np.stack([inside.min((0, 1)), inside.max((0, 1))])[:, None]

    def _first_opaque(self, level: _Level, extras: int) -> list[NDArray[Any]]:
        """The first tile of a level whose extra samples are not 0 everywhere; none within the first gigabyte means that they are left unset."""
        most = int(OPACITY_BYTES / (level.wide * level.high * level.samples * level.page.dtype.itemsize)) + 1
        for extremes in self._extremes(level, range(min(level.columns * level.rows, most))):
            if extremes[..., -extras:].any():
                return [extremes]
        return []

    def _readable(self, level: _Level, indices: Iterable[int]) -> Iterator[tuple[int, NDArray[Any]]]:
        for index in indices:
            try:
                raw = self._decode(level, index)
            except FOREIGN_ERRORS:  # damage is said where it is read
                continue
            if raw is not None:
                yield index, raw

    def _cut_short(self) -> tuple[str, ...]:
        """Warning when tiles lie beyond the end of the file."""
        missing = sum(
            int((offsets + lengths > self._file.size).sum())
            for level in self._levels
            for offsets, lengths in zip(level.offsets, level.lengths, strict=True)
        )
        return (f"the file is truncated: {missing} tiles or strips lie beyond its end",) if missing else ()


@dataclass(frozen=True, kw_only=True)
class _Level:
    """``page`` says how its tiles or strips are stored, ``pages`` where, one per channel; ``planes``: per page, 1 when samples are interleaved."""

    page: Any
    pages: tuple[Any, ...]
    planes: int
    offsets: tuple[NDArray[np.int64], ...]
    lengths: tuple[NDArray[np.int64], ...]
    width: int
    height: int
    wide: int
    high: int

    @property
    def samples(self) -> int:
        """Samples of a pixel, whichever pages and planes they are in."""
        apart = self.planes * len(self.pages)
        return apart if apart > 1 else int(self.page.samplesperpixel)

    @property
    def columns(self) -> int:
        """Tiles side by side."""
        return -(-self.width // self.wide)

    @property
    def rows(self) -> int:
        """Tiles, or strips, one above the other."""
        return -(-self.height // self.high)


def _spread(level: _Level) -> list[int]:
    """Indices of tiles spread evenly over a level."""
    count = level.columns * level.rows
    affordable = max(int(SAMPLE_BYTES / (level.wide * level.high * level.samples * level.page.dtype.itemsize)), 1)
    return sorted({round(at) for at in np.linspace(0, count - 1, min(count, SAMPLE_CHUNKS, affordable))})


def _levels_of(series: tifffile.TiffPageSeries) -> tuple[list[_Level], tuple[str, ...]]:
    levels: list[_Level] = []
    notes: tuple[str, ...] = ()
    for number, level in enumerate(series.levels):
        pages, left_out = _first_plane(level)
        levels.append(_level(level.keyframe, pages))
        notes = notes if number else left_out
    return levels, notes


def _first_plane(level: tifffile.TiffPageSeries) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    """The pages of the first plane of a level, one or one per channel, with a message about the planes left out."""
    inner = str(level.keyframe.axes)
    axes, shape = str(level.axes), level.shape
    if inner not in ("YX", "YXS", "SYX") or not axes.endswith(inner):
        raise SlideError(f"its axes are {axes} ({inner} in one page), which is not supported: {ADVICE}")
    outer, counts = axes[: -len(inner)], shape[: len(shape) - len(inner)]
    left_out = [
        f"{axis} 1 of {count}" for axis, count in zip(outer, counts, strict=True) if axis not in "CS" and count > 1
    ]
    channels = [count if axis in "CS" and inner == "YX" else 1 for axis, count in zip(outer, counts, strict=True)]
    if any(axis in "CS" and inner != "YX" and count > 1 for axis, count in zip(outer, counts, strict=True)):
        left_out += [
            f"{axis} 1 of {count}" for axis, count in zip(outer, counts, strict=True) if axis in "CS" and count > 1
        ]
    index = [np.arange(count) for count in channels]
    picked = np.ravel_multi_index(np.meshgrid(*index, indexing="ij"), counts).ravel().tolist() if outer else [0]
    pages = [level.pages[at] if at < len(level.pages) else None for at in picked]
    if any(page is None for page in pages):
        raise SlideError(
            f"its channels ({axes}, {' x '.join(map(str, shape))}) are not stored as pages, which is not supported: {ADVICE}"
        )
    notes = (f"a stack, of which only the first plane is used ({', '.join(left_out)})",) if left_out else ()
    return tuple(pages), notes


def _level(page: Any, pages: tuple[Any, ...]) -> _Level:  # noqa: ANN401
    if isinstance(page.bitspersample, tuple):
        raise SlideError(f"its samples have different depths ({page.bitspersample} bits), which is not supported")
    if page.imagedepth != 1:
        raise SlideError(f"its tiles are {page.imagedepth} planes deep, which is not supported: {ADVICE}")
    if page.is_tiled:
        high, wide = int(page.tilelength), int(page.tilewidth)
    else:
        high, wide = min(int(page.rowsperstrip), int(page.imagelength)), int(page.imagewidth)
    planes = int(page.samplesperpixel) if page.planarconfig == 2 and page.samplesperpixel > 1 else 1
    if page.dtype is None or page.dtype.kind not in "buif":
        raise SlideError(
            f"its numbers, {page.bitspersample} bits of sample format {page.sampleformat}, are not supported"
        )
    _require_decoder(page)
    size = high * wide * int(page.samplesperpixel) * int(np.dtype(page.dtype).itemsize)
    if size > MAX_CHUNK_BYTES:
        raise SlideError(f"one tile or strip of it holds {size / 1e6:.0f} MB of pixels: {ADVICE}")
    level = _Level(
        page=page,
        pages=pages,
        planes=planes,
        wide=wide,
        high=high,
        width=int(page.imagewidth),
        height=int(page.imagelength),
        offsets=tuple(np.asarray(p.dataoffsets, np.int64) for p in pages),
        lengths=tuple(np.asarray(p.databytecounts, np.int64) for p in pages),
    )
    wanted = level.columns * level.rows * planes
    listed = min(min(len(offsets), len(lengths)) for offsets, lengths in zip(level.offsets, level.lengths, strict=True))
    if listed < wanted:
        raise SlideError(f"it lists {listed} of {wanted} tiles or strips; the file is damaged: copy it again")
    return level


def _require_decoder(page: Any) -> None:  # noqa: ANN401
    """Build the decoder of a page, here rather than in several threads, and ask whether it only raises.

    tifffile answers with a function of this name when it cannot decode a page; nothing else tells "not supported" from "damaged".
    """
    decode: Callable[..., Any] = page.decode
    if not decode.__name__.startswith("decode_raise"):
        return
    try:
        decode(b"", 0)
    except (ValueError, NotImplementedError) as error:
        compression = getattr(page.compression, "name", page.compression)
        raise SlideError(
            f"its pixels ({compression} compression) are stored in a way that is not supported: {error}"
        ) from error


def _colours_of(page: Any, channels: int) -> Colours:  # noqa: ANN401
    """Meaning of the samples of a page; ``channels``: pages that make up a pixel."""
    kind, extras = int(page.photometric), [int(extra) for extra in page.extrasamples]
    name = getattr(page.photometric, "name", str(kind))
    samples = int(page.samplesperpixel)
    if PHOTOMETRIC not in page.tags:  # a tag that must be there; tifffile takes 0, which is inverted grey
        kind = RGB if samples - len(extras) >= 3 else GREY
    opacity = next(
        (samples - len(extras) + n for n, extra in enumerate(extras) if extra in (PREMULTIPLIED, STRAIGHT)), None
    )
    premultiplied = opacity is not None and extras[opacity - samples + len(extras)] == PREMULTIPLIED
    bits = int(page.bitspersample)
    shallow = bits if page.dtype.kind == "u" and bits not in (8, 16, 32, 64) else None
    if kind in (GREY, INVERTED_GREY):
        # Several channels are stored as grey with extra samples; two samples of one page are grey and something else.
        lone = channels == 1 and (samples == 2 or opacity not in (None, samples - 1))
        count = 1 if lone else None
        return Colours(
            count=count, opacity_at=opacity, premultiplied=premultiplied, inverted=kind == INVERTED_GREY, bits=shallow
        )
    if kind == RGB or (kind == YCBCR and page.compression in TO_RGB and page.planarconfig == 1):
        count = samples - len(extras) if extras else None
        return Colours(model="rgb", count=count, opacity_at=opacity, premultiplied=premultiplied, bits=shallow)
    if kind == PALETTE and page.colormap is not None:
        table = np.asarray(page.colormap, np.uint16).T
        if table.max(initial=0) > 255:  # some writers leave it at 8 bits
            table = table // np.uint16(256)
        return Colours(
            model="palette", count=1, opacity_at=opacity, premultiplied=premultiplied, palette=table.astype(np.uint8)
        )
    if kind == SEPARATED and samples - len(extras) == 4 and page.tags.valueof(INK_SET, 1) == 1:
        return Colours(model="cmyk", count=4, opacity_at=opacity, premultiplied=premultiplied, bits=shallow)
    if kind == YCBCR and page.compression not in JPEG_2000 and samples - len(extras) == 3:
        luma = _rationals(page.tags.valueof(YCBCR_COEFFICIENTS), REC601)
        reference = _rationals(page.tags.valueof(REFERENCE_BLACK_WHITE), FULL_RANGE)
        scale = 255 / (2.0**bits - 1)
        if bits > 8 and max(reference) > 255:
            reference = tuple(value * scale for value in reference)
        return Colours(
            model="ycbcr",
            count=3,
            opacity_at=opacity,
            premultiplied=premultiplied,
            bits=shallow,
            luma=cast("tuple[float, float, float]", luma),
            reference=reference,
        )
    if kind == LAB and samples - len(extras) == 3:
        return Colours(model="lab", count=3, opacity_at=opacity, premultiplied=premultiplied, bits=shallow)
    compression = getattr(page.compression, "name", page.compression)
    raise SlideError(
        f"its colours are stored as {name} ({samples} samples, {compression} compression), which is not supported"
    )


def _rationals(value: Any, default: tuple[float, ...]) -> tuple[float, ...]:  # noqa: ANN401
    """Numerators and denominators as numbers; ``default`` when the tag is absent or not a number of each."""
    try:
        numbers = np.asarray(value, float).reshape(len(default), 2)
        numbers = numbers[:, 0] / numbers[:, 1]
    except (TypeError, ValueError):
        return default
    found = tuple(numbers.tolist())
    sound = all(math.isfinite(number) for number in found)
    if len(default) == 3:
        return found if sound and found[1] > 0 else default
    return found if sound and all(found[n + 1] > found[n] for n in (0, 2, 4)) else default


def _like(first: ToRgb, page: Any, level: _Level) -> ToRgb:  # noqa: ANN401
    """The conversion of another level: colours as that level states them, the scale of the first."""
    other = level.page
    if other.dtype != page.dtype or level.samples < first.count:
        found = f"{level.samples} samples of {other.dtype} in a level below {page.samplesperpixel} of {page.dtype}"
        raise SlideError(f"its levels differ, {found}, which is not supported: {ADVICE}")
    colours = _colours_of(other, len(level.pages))
    if first.colours.opacity_at is None or (colours.opacity_at or 0) >= level.samples:
        colours = dataclasses.replace(colours, opacity_at=None)
    return dataclasses.replace(first, colours=colours)


def _larger_picture(tiff: tifffile.TiffFile, size: tuple[int, int]) -> tuple[str, ...]:
    """A sentence when the file holds a picture with more pixels than the one that is read."""
    sizes = [(int(series.keyframe.imagewidth), int(series.keyframe.imagelength)) for series in tiff.series]
    width, height = max(sizes, key=lambda wh: wh[0] * wh[1], default=size)
    if width * height <= size[0] * size[1]:
        return ()
    return (
        f"the first picture of the file, {size[0]} x {size[1]} px, is read; a larger one, {width} x {height} px, is not",
    )


def _orientation_note(levels: list[_Level]) -> tuple[str, ...]:
    tags = [level.page.tags.valueof(ORIENTATION, 1) for level in levels]
    orientation = next((tag for tag in tags if tag not in (0, 1)), 1)
    if orientation == 1:
        return ()
    return (
        f"its orientation tag ({orientation}) is ignored: pixels are used as they are stored, and coordinates refer to these",
    )


def misread_by_openslide(path: str, vendor: str) -> str | None:
    """Reason why OpenSlide would return wrong pixels of a TIFF that it opens; ``None`` when it would not, or the file is not a TIFF.

    OpenSlide decodes generic TIFFs with libtiff's RGBA interface: that divides deep samples by 257 whatever they hold, shows signed ones and
    floats wrong or not at all, ignores the difference between opacity and other extra samples, mirrors each tile by the orientation tag in
    its own place, and takes the planes of a stack for levels. Files of scanners are checked for depth, planes and orientation only.
    """
    plain = vendor == "generic-tiff"
    try:
        with tifffile.TiffFile(path) as tiff:
            pages: list[Any] = list(itertools.islice(tiff.pages, LOOKED_AT if plain else 1))
            reasons = [_misread(page, plain=plain) for page in pages]
            if plain:
                reasons += [
                    "ImageJ's metadata, of which OpenSlide does not read the scale" if tiff.is_imagej else None,
                    _misordered([page.shape[:2] for page in pages if page.is_tiled]),
                ]
            return next((reason for reason in reasons if reason), None)
    except FOREIGN_ERRORS:
        return None


def _misordered(sizes: list[tuple[int, ...]]) -> str | None:
    """Why the tiled pages of a generic TIFF are not the levels that OpenSlide takes them for, by their sizes (height, width)."""
    if len(set(sizes)) < len(sizes):
        return "several planes of one size, which it takes for levels"
    return "a first picture that is not the largest" if sizes and max(sizes) > sizes[0] else None


def _misread(page: Any, *, plain: bool) -> str | None:  # noqa: ANN401
    reasons = [
        (page.bitspersample != 8 or page.sampleformat != 1, f"{page.bitspersample}-bit samples of type {page.dtype}"),
        (page.planarconfig == 2 and page.samplesperpixel > 1, "colour planes stored apart"),
        (page.tags.valueof(ORIENTATION, 1) not in (0, 1), f"the orientation tag ({page.tags.valueof(ORIENTATION)})"),
        (bool(page.extrasamples), "extra samples, opacity or not"),
    ]
    if plain and page.is_tiled:
        in_jpeg = page.photometric == YCBCR and page.compression in JPEG
        colours = getattr(page.photometric, "name", page.photometric)
        reasons += [
            (page.samplesperpixel > 3, "more than three samples per pixel"),
            (page.photometric != RGB and not in_jpeg, f"colours stored as {colours}"),
        ]
    return next((reason for holds, reason in reasons if holds), None)
