"""Microns per pixel: where slides state it, and whether to trust it.

A wrong scale silently ruins a run, so every doubt becomes a warning, and `require_cellular` raises an error.
"""

from __future__ import annotations

import math
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree as ET

from wsiseg.config import CELLULAR_MPP
from wsiseg.errors import SlideError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from wsiseg.records import SlideInfo

NO_SOURCE = "none"
OVERRIDE = "--mpp"
PRINT_MPP = (
    10.0  # 2540 dpi: resolution tags this coarse (72, 96, 300, 600, 1200 dpi) are software defaults, not microscopes
)
ANISOTROPY_NOTE, ANISOTROPY_LIMIT = 0.01, 0.10
CONTRADICTION = 0.05  # relative difference between --mpp and the file
OBJECTIVE_TOLERANCE = 1.7  # scanners of one power differ: 20x is 0.5 (Aperio) to 0.44 (3DHISTECH), 40x 0.25 to 0.17

#: microns per unit of length, by the names that OME-XML and ImageJ give them (ASCII letters in lower case)
MICRONS = {
    **dict.fromkeys(("m", "meter", "meters", "metre", "metres"), 1e6),
    **dict.fromkeys(("dm", "decimeter", "decimetre"), 1e5),
    **dict.fromkeys(("cm", "centimeter", "centimeters", "centimetre", "centimetres"), 1e4),
    **dict.fromkeys(("mm", "millimeter", "millimeters", "millimetre", "millimetres"), 1e3),
    **dict.fromkeys(("\u00b5m", "\u03bcm", "um", "\u00b5", "\u03bc", "micron", "microns"), 1.0),
    **dict.fromkeys(("micrometer", "micrometers", "micrometre", "micrometres"), 1.0),
    **dict.fromkeys(("nm", "nanometer", "nanometers", "nanometre", "nanometres"), 1e-3),
    **dict.fromkeys(("\u00e5", "a", "angstrom", "angstroms", "\u00e5ngstr\u00f6m"), 1e-4),
    **dict.fromkeys(("pm", "picometer", "picometre"), 1e-6),
    **dict.fromkeys(("in", "inch", "inches"), 25400.0),
    **dict.fromkeys(("ft", "foot", "feet"), 304800.0),
}


@dataclass(frozen=True)
class PixelSize:
    """Microns per level-0 pixel as a file states it, and where it does."""

    x: float
    y: float
    source: str

    @property
    def mean(self) -> float:
        """Geometric mean: keeps areas."""
        return math.sqrt(self.x * self.y)

    @property
    def anisotropy(self) -> float:
        """0 for square pixels."""
        return max(self.x, self.y) / min(self.x, self.y) - 1


def pixel_size(x: object, y: object, source: str) -> PixelSize | None:
    """A `PixelSize` from two metadata values; ``None`` unless both (or the first, when ``y`` is None) are positive numbers."""
    numbers = []
    for value in (x, x if y is None else y):
        try:
            number = float(str(value).strip().replace(",", ".")) if isinstance(value, str) else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            return None
        if not (math.isfinite(number) and number > 0):
            return None
        numbers.append(number)
    return PixelSize(numbers[0], numbers[1], source)


def microns_per(unit: str) -> float | None:
    """Microns per unit of length; ``None`` when it is not one."""
    name = unit.replace("\\u00B5", "\u00b5").replace("\\u00C5", "\u00c5")  # ImageJ escapes what is not ASCII
    return MICRONS.get(unicodedata.normalize("NFC", name).strip().lower())


def from_ome_xml(text: str | None, size_px0: tuple[int, int]) -> PixelSize | None:
    """PhysicalSizeX/Y of the OME image whose SizeX, SizeY are ``size_px0``; ``None`` when there is none, or its unit is not a length."""
    if not text or "<OME" not in text:
        return None
    try:
        root = ET.fromstring(text.strip().strip("\0"))  # noqa: S314 - expat limits entity expansion, and no entity is fetched
    except (ET.ParseError, ValueError):
        return None
    for pixels in root.iterfind(".//{*}Pixels"):
        at = pixels.attrib
        if (at.get("SizeX"), at.get("SizeY")) != (str(size_px0[0]), str(size_px0[1])):
            continue
        unit_x = microns_per(at.get("PhysicalSizeXUnit", "\u00b5m"))
        unit_y = microns_per(at.get("PhysicalSizeYUnit", "\u00b5m"))
        size = pixel_size(at.get("PhysicalSizeX"), at.get("PhysicalSizeY"), "OME-XML PhysicalSizeX")
        if size and unit_x and unit_y:
            return PixelSize(size.x * unit_x, size.y * unit_y, size.source)
    return None


def from_tiff_tags(
    tags: Mapping[str, Any], imagej: Mapping[str, Any] | None = None
) -> tuple[PixelSize | None, tuple[str, ...]]:
    """The size in a TIFF's resolution tags.

    Parameters
    ----------
    tags
        Values by tag name; ``XResolution``, ``YResolution`` as (numerator, denominator), ``ResolutionUnit`` as its number.
    imagej
        ImageJ's metadata, whose ``unit`` replaces ``ResolutionUnit``.

    Returns
    -------
    tuple[PixelSize | None, tuple[str, ...]]
        The size, unless the tags are absent, without unit, or a print resolution; and a warning in the last case.
    """
    try:
        per_unit = [tags[name][0] / tags[name][1] for name in ("XResolution", "YResolution")]
    except (KeyError, TypeError, IndexError, ZeroDivisionError):
        return None, ()
    if min(per_unit) <= 0:
        return None, ()
    unit = {2: 25400.0, 3: 10000.0, 4: 1000.0, 5: 1.0}.get(int(tags.get("ResolutionUnit", 2)))
    source = "TIFF XResolution"
    if imagej and "unit" in imagej:
        unit = microns_per(str(imagej["unit"]))
        source = "ImageJ resolution"
    if unit is None:
        return None, ()
    return drop_print_resolution(PixelSize(unit / per_unit[0], unit / per_unit[1], source))


def drop_print_resolution(size: PixelSize) -> tuple[PixelSize | None, tuple[str, ...]]:
    """Drop a size from resolution tags that is a print resolution, with a warning that says so."""
    if size.mean < PRINT_MPP:
        return size, ()
    return None, (f"its resolution tag, {25400 / size.mean:.0f} dpi, is a print resolution and was ignored",)


class ChosenMpp(NamedTuple):
    """Microns per level-0 pixel to use, and what is doubtful about them; as in :class:`~wsiseg.records.SlideInfo`."""

    mpp: float
    source: str
    warnings: tuple[str, ...] = ()
    not_square: str = ""


def choose_mpp(found: PixelSize | None, override: float | None, objective: float | None) -> ChosenMpp:
    """Choose the microns per pixel to use.

    Parameters
    ----------
    found
        Size stated by the file.
    override
        ``--mpp``; wins over the file.
    objective
        Power of the objective in the file, to check against.

    Returns
    -------
    ChosenMpp
        mpp (NaN when unknown), its source, and a warning about each doubt.

    Examples
    --------
    >>> choose_mpp(PixelSize(0.25, 0.25, "openslide.mpp-x/-y"), None, 40).mpp
    0.25
    >>> choose_mpp(PixelSize(0.25, 0.3, "openslide.mpp-x/-y"), None, 40).not_square
    'pixels are far from square: 0.25 x 0.3 microns (openslide.mpp-x/-y)'
    """
    notes, not_square = [], ""
    if override is not None:
        mpp, source = override, OVERRIDE
        if found and abs(override / found.mean - 1) > CONTRADICTION:
            notes.append(f"--mpp {override:g} replaces {found.mean:.4g} microns per pixel of the file ({found.source})")
    elif found is not None:
        mpp, source = found.mean, found.source
    else:
        return ChosenMpp(math.nan, NO_SOURCE)
    low, high = CELLULAR_MPP
    if not low <= mpp <= high:
        notes.append(
            f"{mpp:.4g} microns per pixel ({source}) is too {'fine' if mpp < low else 'coarse'} for cells ({low} to {high})"
        )
    if found and found.anisotropy > ANISOTROPY_NOTE:
        sides = f"{found.x:.4g} x {found.y:.4g} microns ({found.source})"
        if found.anisotropy > ANISOTROPY_LIMIT and override is None:
            not_square = f"pixels are far from square: {sides}"
            notes.append(not_square)
        else:
            notes.append(f"pixels are not square: {sides}; {mpp:.4g} is used for both sides")
    if objective and not 1 / OBJECTIVE_TOLERANCE < mpp * objective / 10 < OBJECTIVE_TOLERANCE:
        notes.append(
            f"{mpp:.4g} microns per pixel ({source}) contradicts the {objective:g}x objective (about {10 / objective:.3g})"
        )
    return ChosenMpp(mpp, source, tuple(notes), not_square)


def require_cellular(info: SlideInfo) -> None:
    """Refuse a slide on whose scale no cell can be found; called before a run.

    Parameters
    ----------
    info
        Metadata of an open slide. A scale given by ``--mpp`` is trusted: it only warns.

    Raises
    ------
    SlideError
        No microns per pixel, or implausible ones, or pixels far from square, as the file states them.
    """
    if math.isnan(info.mpp):
        raise SlideError(f"{info.path}: no microns per pixel in the file; pass --mpp (for example --mpp 0.25)")
    if info.mpp_source == OVERRIDE:
        return
    low, high = CELLULAR_MPP
    if not low <= info.mpp <= high:
        raise SlideError(
            f"{info.path}: {info.mpp:.4g} microns per pixel ({info.mpp_source}) is too {'fine' if info.mpp < low else 'coarse'} for cells; "
            f"allowed is {low} to {high}: give the full-resolution slide, or pass --mpp if the file is wrong"
        )
    if info.not_square:
        raise SlideError(
            f"{info.path}: {info.not_square}; save the slide with square pixels, or pass --mpp to treat them as square"
        )
