"""Tissue detection on an overview of the slide.

A missed piece of tissue is lost cells, a false one costs a few tiles: thresholds are low, edges get a margin. Nothing found is a valid
answer: a blank slide has an empty mask.

Brightfield: colour and absorption against the glass, Otsu's threshold held between two bounds [1]_; an image of less than a square
millimetre that holds any tissue is searched whole.
Dark background (fluorescence): brightness above the background.

References
----------
.. [1] N. Otsu, A threshold selection method from gray-level histograms, IEEE Trans. SMC 9(1), 1979, doi:10.1109/TSMC.1979.4310076.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import shapely

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsiseg.config import TissueConfig
    from wsiseg.records import SlideInfo

DARK_MEDIAN = (
    60  # grey level of the overview's median below which the background is dark: glass is above 180, dense H&E above 90
)
DARK_GLASS_SHARE, GLASS = (
    0.05,
    180,
)  # more than this share of bright px means glass: a brightfield slide padded with black
WHITE_POINT = 99.5  # percentile of each channel that is glass
WHITE_RANGE = (190, 255)  # and where glass can lie: a crop full of tissue has none
WHITE_TINT = 15  # grey levels between the channels of glass; more is tissue taken for glass
GREY_WEIGHT = (
    0.5  # of mean absorption against colour: dirt and uneven light have no colour, uneven light is up to 10 % (0.046)
)
STAIN_FLOOR = 0.03  # JPEG noise and uneven light reach 0.025 on blank glass; walls of fat cells, 8 um px, 0.03 to 0.06
STAIN_CEILING = 0.05  # pale stroma begins at 0.08; Otsu between dense tumour and stroma would lie above it
PADDING = 12  # brightest channel of px that were never scanned; ink and pigment are lighter at 8 um per px
GLOW_BACKGROUND = 5  # percentile of brightness that is background when the background is dark
GLOW_FLOOR, GLOW_PART = (
    4,
    0.25,
)  # grey levels above it, and part of the way to Otsu's threshold: stroma with few nuclei is dim
SMALL_IMAGE_UM2 = 1e6  # a field of view has its subject everywhere; leaving parts of it out saves a few tiles at most


@dataclass(frozen=True, kw_only=True)
class TissueMask:
    """Mask of the tissue of a slide.

    Attributes
    ----------
    mask
        bool of shape (h, w); its corner is the slide's.
    scale
        Level-0 px per mask px.
    brightfield
        ``False`` when the background is dark, as in fluorescence.
    warnings
        Warnings about anything doubtful.
    """

    mask: NDArray[np.bool_]
    scale: float
    brightfield: bool
    warnings: tuple[str, ...]

    def covers(self, x0: float, y0: float, x1: float, y1: float) -> bool:
        """Tell whether any tissue lies in a box of level-0 px; ``False`` beyond the mask."""
        height, width = self.mask.shape
        left, top = max(math.floor(x0 / self.scale), 0), max(math.floor(y0 / self.scale), 0)
        right, bottom = min(math.ceil(x1 / self.scale), width), min(math.ceil(y1 / self.scale), height)
        return right > left and bottom > top and bool(self.mask[top:bottom, left:right].any())

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle packed: 10 MB of a large slide become some 10 kB."""
        return _unpack, (
            zlib.compress(np.packbits(self.mask).tobytes()),
            self.mask.shape,
            self.scale,
            self.brightfield,
            self.warnings,
        )

    def area_um2(self, mpp: float) -> float:
        """Area of the mask, its margin included; ``mpp`` is microns per level-0 px."""
        return float(np.count_nonzero(self.mask)) * (self.scale * mpp) ** 2


def _unpack(
    packed: bytes, shape: tuple[int, int], scale: float, brightfield: bool, warnings: tuple[str, ...]
) -> TissueMask:
    bits = np.frombuffer(zlib.decompress(packed), np.uint8)
    return TissueMask(
        mask=np.unpackbits(bits, count=shape[0] * shape[1]).reshape(shape).astype(bool),
        scale=scale,
        brightfield=brightfield,
        warnings=warnings,
    )


def find_tissue(
    thumbnail: NDArray[np.uint8], scale: float, config: TissueConfig, *, mpp: float | None = None
) -> TissueMask:
    """Find the tissue of a slide.

    Parameters
    ----------
    thumbnail
        RGB of shape (h, w, 3), the whole slide at about ``config.overview_mpp``; not modified.
    scale
        Level-0 px per thumbnail px.
    config
        Sizes, in microns.
    mpp
        Microns per level-0 px; by default such that a thumbnail px is ``config.overview_mpp``, which it is not for a slide that is
        coarser than the overview, or very large.

    Returns
    -------
    TissueMask
        Pieces of at least ``config.min_area_um2`` with ``config.margin_um`` around them and small holes filled. Empty when there
        is no tissue.
    """
    from scipy import ndimage

    pixel_um = config.overview_mpp if mpp is None else mpp * scale
    brightfield, warnings = _background(thumbnail)
    smooth = ndimage.gaussian_filter(thumbnail.astype(np.float32), (1.0, 1.0, 0.0))  # px; noise is not tissue
    signal = _stain(smooth, glass_white(smooth)) if brightfield else smooth.max(axis=2)
    found = signal > (_stain_threshold(signal) if brightfield else _glow_threshold(signal))
    if brightfield:
        found &= ~_padding(thumbnail)
    small = found.size * pixel_um**2 < SMALL_IMAGE_UM2
    mask = np.full_like(found, found.any()) if small else _clean_mask(found, config, pixel_um)
    return TissueMask(mask=mask, scale=scale, brightfield=brightfield, warnings=warnings)


def _background(thumbnail: NDArray[np.uint8]) -> tuple[bool, tuple[str, ...]]:
    darkest = thumbnail.min(axis=2)
    median = float(np.median(thumbnail.mean(axis=2)))
    if median >= DARK_MEDIAN or (darkest > GLASS).mean() > DARK_GLASS_SHARE:
        return True, ()
    return False, (
        f"does not look like brightfield H&E: the background is dark (median grey level {median:.0f} of 255)",
    )


def is_brightfield(thumbnail: NDArray[np.uint8]) -> bool:
    """Tell whether an overview (h, w, 3) has a bright background."""
    return _background(thumbnail)[0]


def glass_white(thumbnail: NDArray[np.uint8] | NDArray[np.float32]) -> NDArray[np.float64]:
    """The colour (3,) of empty glass on an overview (h, w, 3), or the closest that glass can have."""
    glass = np.clip(np.percentile(thumbnail.reshape(-1, 3), WHITE_POINT, axis=0), *WHITE_RANGE)
    white: NDArray[np.float64] = np.maximum(glass, glass.max() - WHITE_TINT)
    return white


def is_glass(pixels: NDArray[np.uint8], white: NDArray[np.float64]) -> bool:
    """Tell whether the pixels (h, w, 3) are empty glass, which has the colour ``white``."""
    from scipy import ndimage

    return float(_stain(ndimage.gaussian_filter(pixels.astype(np.float32), (1.0, 1.0, 0.0)), white).max()) < STAIN_FLOOR


def _stain(smooth: NDArray[np.float32], glass: NDArray[np.float64]) -> NDArray[np.float32]:
    """Colour plus some of the absorption: the spread between channels of the optical density, and half of its mean -> (h, w)."""
    density = np.log10(glass / np.clip(smooth, 1, glass)).astype(np.float32)
    signal: NDArray[np.float32] = GREY_WEIGHT * density.mean(axis=2) + density.max(axis=2) - density.min(axis=2)
    return signal


def _stain_threshold(signal: NDArray[np.float32]) -> float:
    return float(np.clip(_otsu(signal), STAIN_FLOOR, STAIN_CEILING))


def _glow_threshold(signal: NDArray[np.float32]) -> float:
    """Return a part of the way from the background to Otsu's threshold, which lies between bright and dim tissue."""
    background = float(np.percentile(signal, GLOW_BACKGROUND))
    return background + max(GLOW_FLOOR, GLOW_PART * (_otsu(signal) - background))


def _otsu(signal: NDArray[np.float32]) -> float:
    from skimage import filters

    threshold_otsu: Any = filters.threshold_otsu
    return float(threshold_otsu(signal)) if signal.min() < signal.max() else math.inf


def _padding(thumbnail: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Black px that hang together with the border: never scanned."""
    from scipy import ndimage

    labels, _ = ndimage.label(thumbnail.max(axis=2) <= PADDING)
    border = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    padding = np.isin(labels, border[border > 0])
    return cast("NDArray[np.bool_]", ndimage.binary_dilation(padding, iterations=3))  # its blurred edge


def _clean_mask(found: NDArray[np.bool_], config: TissueConfig, pixel_um: float) -> NDArray[np.bool_]:
    """Add the margin, drop specks, fill holes.

    Pieces are joined by their margins before they are weighed, so that the threads of fat tissue stand together; weighed is what
    was found, without margin.
    """
    from scipy import ndimage

    if not found.any():
        return found
    margin = config.margin_um / pixel_um
    mask = ndimage.distance_transform_edt(~found) <= margin
    labels, count = ndimage.label(mask)
    weights = np.bincount(labels[found], minlength=count + 1) * pixel_um**2
    mask &= (weights >= config.min_area_um2)[labels]
    holes, count = ndimage.label(~mask)
    small = np.bincount(holes.ravel(), minlength=count + 1) * pixel_um**2 <= config.max_hole_um2
    border = np.unique(np.concatenate([holes[0], holes[-1], holes[:, 0], holes[:, -1]]))
    small[border] = False  # open to the outside
    small[0] = False
    return cast("NDArray[np.bool_]", mask | small[holes])


@dataclass(frozen=True)
class SearchArea:
    """Area to search for cells: tissue (``None``: everywhere), cut by a region of interest (``None``: no cut), level-0 px."""

    tissue: TissueMask | None
    region: shapely.Geometry | None

    def wanted(self, x0: float, y0: float, x1: float, y1: float) -> bool:
        """Tell whether a box may hold cells."""
        if self.region is not None and not self.region.intersects(shapely.box(x0, y0, x1, y1)):
            return False
        return self.tissue is None or self.tissue.covers(x0, y0, x1, y1)

    def size_um2(self, info: SlideInfo) -> float:
        """Area that is searched; of a region that cuts tissue, the smaller of the two."""
        width, height = info.size_px0
        whole = width * height * info.mpp**2
        tissue = whole if self.tissue is None else self.tissue.area_um2(info.mpp)
        region = whole if self.region is None else shapely.area(self.region) * info.mpp**2
        return float(min(whole, tissue, region))

    def holds(self, points_xy: NDArray[np.floating]) -> NDArray[np.bool_]:
        """Test which points (N, 2) lie inside -> bool (N,). Cells are kept by this, not by tile, so that the tiling does not show."""
        inside = np.ones(len(points_xy), bool)
        if self.tissue is not None:
            height, width = self.tissue.mask.shape
            column, row = np.floor(points_xy / self.tissue.scale).astype(int).T
            inside = (column >= 0) & (row >= 0) & (column < width) & (row < height)
            inside[inside] = self.tissue.mask[row[inside], column[inside]]
        if self.region is not None:
            inside &= shapely.contains_xy(self.region, points_xy)
        return inside
