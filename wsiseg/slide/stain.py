"""Stain of a slide: haematoxylin and eosin, or immunohistochemistry, whose nuclei are shown to the network as H&E has them.

In immunohistochemistry (IHC) an antibody is made visible by a brown chromogen (DAB), and nuclei are counterstained with haematoxylin. A network made
for H&E misses most nuclei under the brown. The optical densities of the two dyes add up, so that they can be told apart at each pixel [1]_; what is
then shown has the haematoxylin of the slide, and its brown as eosin.

Everything is per pixel: boxes of neighbouring tiles agree where they overlap.

References
----------
.. [1] A. Ruifrok, D. Johnston, Quantification of histochemical staining by color deconvolution, Anal. Quant. Cytol. Histol. 23(4), 2001.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

import numpy as np

from wsiseg.errors import SlideError
from wsiseg.geometry import Box, Lattice
from wsiseg.slide.resample import read_region, thumbnail
from wsiseg.slide.tissue import WHITE_POINT, glass_white, is_brightfield

if TYPE_CHECKING:
    from types import TracebackType

    from numpy.typing import NDArray

    from wsiseg.slide import SlideReader

# Optical densities of red, green and blue that a dye has in equal amounts everywhere: [1]_, and for eosin as well.
_HAEMATOXYLIN = np.array([0.650, 0.704, 0.286])
_EOSIN = np.array([0.072, 0.990, 0.105])
_DAB = np.array([0.268, 0.570, 0.776])
HAEMATOXYLIN_AND_EOSIN = np.array([_HAEMATOXYLIN, _EOSIN])
HAEMATOXYLIN_AND_DAB = np.array([_HAEMATOXYLIN, _DAB])
DYES = {"haematoxylin": _HAEMATOXYLIN, "eosin": _EOSIN, "dab": _DAB}

# What is shown (benchmarks/results/ihc_accuracy.md compares other forms and values).
VEIL = 0.05  #: haematoxylin below it is background: uneven light, and what the two dyes' vectors do not explain
DARKEST = 0.9  #: the shown haematoxylin saturates here ..
HALFWAY = 0.2  #: .. and this much of the slide's gives 63 % of it: counterstains differ in strength by 4x
COUNTERSTAIN = 0.05  #: eosin everywhere: the network knows no tissue without it
BROWN_AS_EOSIN = 0.4  #: the brown is shown as this much eosin ..
BROWN_AS_HAEMATOXYLIN = 0.3  #: .. and where it marks nuclei, as this much haematoxylin ..
COUNTERSTAIN_OF_NUCLEAR = 0.15  #: .. with this much eosin everywhere, as there is no brown to give any

# How it is recognised, on squares of tissue at 1 um per px.
WINDOWS, WINDOW_UM, WINDOW_MPP = 16, 256.0, 1.0  #: one in two is where the overview is brownest: a marker may be rare
TISSUE = 0.08  #: optical density; fainter is glass
BROWN = 0.2  #: DAB of a brown px
LEAST_BROWN = 0.05  #: share of the tissue that is brown, at least; fields of H&E have up to 13 %, with eosin around
MOST_PINK = 0.07  #: share of the tissue that is eosin, at most (synthetic markers have up to 4 %, H&E as brown as this at least 13 %) ..
PINK_PER_BROWN = 0.25  #: .. or this share of the brown, whose edges may look like it
SHEET_UM = 5.0  #: brown discs of this radius fit into cytoplasm, not into nuclei ..
SHEETS = 0.2  #: .. and may hold this share of the brown of a nuclear marker
NUCLEI_UM2 = (8.0, 120.0)  #: areas of brown nuclei ..
COMPACT = 0.3  #: .. in pieces of which at least this share of its brown lies
SOLID = 0.8  #: .. that fill this share of their convex hull: membranes are nets
FAINT_BROWN = 0.15  #: brown px of those pieces: their edges count


@dataclass(frozen=True)
class SlideStain:
    """The stain of a slide, and what the network is shown.

    Attributes
    ----------
    name
        ``he``; ``ihc`` for brown outside of nuclei, ``ihc-nuclear`` for a marker of nuclei.
    white
        Grey levels (3,) of the slide's glass.
    brown, pink
        Shares of the tissue that are brown, and eosin; ``None`` unless the stain was recognised.
    source
        ``given``; ``recognised``; or ``assumed``, where there is nothing to look at.
    """

    name: Literal["he", "ihc", "ihc-nuclear"] = "he"
    white: tuple[float, float, float] = (255.0, 255.0, 255.0)
    brown: float | None = None
    pink: float | None = None
    source: Literal["given", "recognised", "assumed"] = "assumed"

    def view(self, reader: SlideReader) -> SlideReader:
        """The slide as the network is to see it; H&E is seen as it is."""
        return reader if self.name == "he" else _StainedReader(reader, self)

    def __str__(self) -> str:
        names = {
            "he": "haematoxylin and eosin",
            "ihc": "immunohistochemistry",
            "ihc-nuclear": "immunohistochemistry of a nuclear marker",
        }
        shares = "" if self.brown is None else f": {self.brown:.0%} of the tissue is brown, {self.pink:.0%} pink"
        return f"{names[self.name]} ({self.source}{shares})"

    @property
    def warnings(self) -> tuple[str, ...]:
        """A warning when immunohistochemistry was recognised, with what to pass if it is not."""
        if self.name == "he" or self.brown is None:
            return ()
        where, otherwise = "outside of nuclei", "--stain ihc-nuclear if nuclei are brown"
        if self.name == "ihc-nuclear":
            where, otherwise = "in nuclei, which are segmented as well", "--stain ihc if nuclei are not brown"
        found = f"looks like immunohistochemistry: {self.brown:.0%} of the tissue is brown, mostly {where}"
        return (f"{found}; pass --stain he if it is H&E, {otherwise}",)


AS_HE = SlideStain()  #: the slide as it is


def find_stain(
    reader: SlideReader, setting: Literal["auto", "he", "ihc", "ihc-nuclear"], overview_mpp: float
) -> SlideStain:
    """Take the stain that was given, or recognise it.

    Parameters
    ----------
    reader
        The slide; its microns per pixel are known.
    setting
        ``auto``, or the stain.
    overview_mpp
        Microns per pixel of the overview on which places are chosen.

    Raises
    ------
    SlideError
        The stain was given, and the overview cannot be decoded, on which the colour of the glass is measured.
    """
    if setting == "he":
        return SlideStain(source="given")
    try:
        overview, scale = thumbnail(reader, overview_mpp)
    except SlideError:
        if setting == "auto":  # whoever needs the pixels will say so
            return SlideStain()
        raise
    if setting == "auto" and not is_brightfield(overview):
        return SlideStain()
    windows = []
    for box in choose_windows(overview, scale, reader.info.mpp):
        with contextlib.suppress(SlideError):  # a damaged tile costs itself only
            windows.append(read_window(reader, box))
    # Glass of gaps and lumina, which are narrower than a px of the overview, is all that a small image may have.
    whites = [glass_white(pixels.reshape(-1, 1, 3)) for pixels in (overview, *windows)]
    levels = np.rint(np.max(whites, axis=0)).tolist()
    glass = (levels[0], levels[1], levels[2])
    if setting != "auto":
        return SlideStain(setting, glass, source="given")
    if not windows:
        return SlideStain()
    name, brown, pink = recognise(windows)
    return SlideStain(name, glass, brown, pink, "recognised")


def recognise(windows: list[NDArray[np.uint8]]) -> tuple[Literal["he", "ihc", "ihc-nuclear"], float, float]:
    """Recognise the stain on pieces of tissue (H, W, 3) at ``WINDOW_MPP``: its name, and the shares of brown and pink."""
    everything = np.concatenate([w.reshape(-1, 3) for w in windows])
    white, glass = np.percentile(everything, WHITE_POINT, axis=0), glass_white(everything)
    tissue = brown = pink = 0
    for window in windows:
        density = optical_density(window, white)
        amount = np.linalg.norm(density, axis=2)
        tissue += int((amount > TISSUE).sum())
        is_brown = density[..., 2] > 1.1 * density[..., :2].max(axis=2)
        brown += int((is_brown & (amount > TISSUE) & (separate(density)[1] > BROWN)).sum())
        # A field full of tissue has no glass: its brightest px are pink, and against them nothing is.
        red, green, blue = np.moveaxis(optical_density(window, glass), 2, 0)
        pink += int(((green > 1.25 * red) & (blue < 0.8 * green) & (amount > TISSUE)).sum())
    brown_share, pink_share = brown / max(tissue, 1), pink / max(tissue, 1)
    if brown_share < LEAST_BROWN or pink_share > max(MOST_PINK, PINK_PER_BROWN * brown_share):
        return "he", brown_share, pink_share
    return "ihc-nuclear" if _is_nuclear(windows, white) else "ihc", brown_share, pink_share


def _is_nuclear(windows: list[NDArray[np.uint8]], white: NDArray[np.float64]) -> bool:
    """Tell whether the brown has the size and form of nuclei: compact, and nowhere a sheet."""
    from scipy import ndimage
    from skimage.measure import regionprops

    reach = round(SHEET_UM / WINDOW_MPP)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disc = x * x + y * y <= reach * reach
    brown = sheets = compact = 0.0
    for window in windows:
        faint = separate(optical_density(window, white))[1] > FAINT_BROWN
        padded = np.pad(faint, 2 * reach, mode="edge")
        brown += float(faint.sum())
        sheets += float(ndimage.binary_opening(padded, disc)[2 * reach : -2 * reach, 2 * reach : -2 * reach].sum())
        for piece in regionprops(ndimage.label(faint)[0]):
            if NUCLEI_UM2[0] <= piece.area * WINDOW_MPP**2 <= NUCLEI_UM2[1] and piece.solidity > SOLID:
                compact += piece.area
    return sheets <= SHEETS * brown and compact >= COMPACT * brown


def choose_windows(overview: NDArray[np.uint8], scale: float, mpp: float) -> list[Box]:
    """Choose squares of tissue: half of them evenly over the slide, half where it is brownest; boxes of px of ``WINDOW_MPP``."""
    density = optical_density(overview, np.percentile(overview.reshape(-1, 3), WHITE_POINT, axis=0))
    tissue = np.linalg.norm(density, axis=2) > TISSUE
    brownness = np.clip(density[..., 2] - density[..., 1], 0, None)
    px_um = scale * mpp
    side = max(round(WINDOW_UM / px_um), 1)
    step = max(WINDOW_MPP, mpp)
    squares = []
    for y in range(0, tissue.shape[0], side):
        for x in range(0, tissue.shape[1], side):
            here = (slice(y, y + side), slice(x, x + side))
            squares.append((float(tissue[here].mean()), float(brownness[here].mean()), x, y))
    fullest = max(share for share, *_ in squares)
    squares = [square for square in squares if square[0] >= max(0.5 * fullest, 1e-9)]
    even = (
        squares
        if len(squares) <= WINDOWS // 2
        else [squares[k * 2 * len(squares) // WINDOWS] for k in range(WINDOWS // 2)]
    )
    rest = sorted((s for s in squares if s not in even), key=lambda s: (-s[1], s[3], s[2]))[: WINDOWS // 2]
    edges = [[math.floor(n * px_um / step) for n in (x, y, x + side, y + side)] for _, _, x, y in (*even, *rest)]
    width, height = (math.ceil(n * px_um / step) for n in (overview.shape[1], overview.shape[0]))
    return [Box(x0, y0, min(x1, width), min(y1, height)) for x0, y0, x1, y1 in edges]


def read_window(reader: SlideReader, box: Box) -> NDArray[np.uint8]:
    """Pixels of a square that :func:`choose_windows` chose."""
    return read_region(reader, box, Lattice(reader.info.mpp, max(WINDOW_MPP, reader.info.mpp)))


def optical_density(pixels: NDArray[np.uint8], white: NDArray[np.float64]) -> NDArray[np.float32]:
    """Decadic optical density (H, W, 3) against the glass, never negative."""
    levels = np.maximum(np.arange(256), 1)
    tables = np.maximum(np.log10(np.maximum(white, 1)[:, None] / levels), 0).astype(np.float32)
    return np.stack([tables[k][pixels[..., k]] for k in range(3)], axis=-1)


def separate(
    density: NDArray[np.float32], dyes: NDArray[np.float64] = HAEMATOXYLIN_AND_DAB
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Amounts (H, W) of two dyes (2, 3), haematoxylin and DAB when absent, that explain the density best, neither negative."""
    first, second = (_unit(dye).astype(np.float32) for dye in dyes)
    both = float(first @ second)
    along_first, along_second = _along(density, first), _along(density, second)
    amount = (along_first - both * along_second) / (1 - both**2)
    other = (along_second - both * along_first) / (1 - both**2)
    only_first, only_second = other < 0, amount < 0
    amount = np.where(only_first, along_first, np.where(only_second, 0, amount))
    other = np.where(only_second, along_second, np.where(only_first, 0, other))
    return amount, other


def _along(density: NDArray[np.float32], dye: NDArray[np.float32]) -> NDArray[np.float32]:
    """Product of densities (H, W, 3) and a dye (3,) -> (H, W); not by BLAS, whose last bits may depend on threads and on the place of a pixel."""
    product: NDArray[np.float32] = density[..., 0] * dye[0] + density[..., 1] * dye[1] + density[..., 2] * dye[2]
    return product


def render(pixels: NDArray[np.uint8], stain: SlideStain) -> NDArray[np.uint8]:
    """Show immunohistochemistry (H, W, 3) as H&E of the same nuclei."""
    haematoxylin, dab = separate(optical_density(pixels, np.array(stain.white)))
    eosin = COUNTERSTAIN + BROWN_AS_EOSIN * dab
    if stain.name == "ihc-nuclear":
        haematoxylin = haematoxylin + BROWN_AS_HAEMATOXYLIN * dab
        eosin = np.full_like(dab, COUNTERSTAIN_OF_NUCLEAR)
    return compose(saturated(haematoxylin), eosin)


def saturated(haematoxylin: NDArray[np.floating]) -> NDArray[np.floating]:
    """Amounts of haematoxylin (H, W) as they are shown: without the veil, and alike for faint and strong counterstains."""
    shown: NDArray[np.floating] = DARKEST * (1 - np.exp(-np.maximum(haematoxylin - VEIL, 0) / HALFWAY))
    return shown


def compose(haematoxylin: NDArray[np.floating], eosin: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Colour (H, W, 3) of amounts (H, W) of the two dyes on white."""
    seen = np.empty((*haematoxylin.shape, 3), np.uint8)
    for k, (blue, pink) in enumerate(zip(*map(_unit, HAEMATOXYLIN_AND_EOSIN), strict=True)):
        seen[..., k] = np.rint(255 * np.exp(-math.log(10) * (blue * haematoxylin + pink * eosin)))
    return seen


def as_scanned(reader: SlideReader) -> SlideReader:
    """The slide without any view of it: glass is what it is for everybody."""
    return reader.slide if isinstance(reader, _StainedReader) else reader


def _unit(dye: NDArray[np.float64]) -> NDArray[np.float64]:
    return dye / np.linalg.norm(dye)


def unrendered(reader: SlideReader) -> SlideReader:
    """The slide as it is, of a reader of :meth:`SlideStain.view`."""
    return reader.slide if isinstance(reader, _StainedReader) else reader


class _StainedReader:
    """A slide whose pixels are rendered as they are read."""

    def __init__(self, reader: SlideReader, stain: SlideStain) -> None:
        self.info, self.slide, self._stain = reader.info, reader, stain

    def read(self, level: int, box: Box) -> NDArray[np.uint8]:
        """Pixels of a box, rendered."""
        return render(self.slide.read(level, box), self._stain)

    def close(self) -> None:
        """Release the file."""
        self.slide.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
