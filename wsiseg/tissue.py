"""Where the tissue is, from an overview of the slide.

A missed piece of tissue is lost cells, a false one costs a few tiles: thresholds are low, edges get a margin. Nothing found is a valid
answer: a blank slide has an empty mask.

Brightfield: absorption of the glass-corrected overview plus its colourfulness, Otsu's threshold held between two bounds [1]_.
Dark background (fluorescence): brightness above the background.

References
----------
.. [1] N. Otsu, A threshold selection method from gray-level histograms, IEEE Trans. SMC 9(1), 1979, doi:10.1109/TSMC.1979.4310076.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import shapely

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsiseg.config import TissueConfig

DARK_MEDIAN = 60  # grey level of the overview's median below which the background is dark: glass is above 180, dense H&E above 90
DARK_GLASS_SHARE, GLASS = 0.05, 180  # more than this share of bright px means glass: a brightfield slide padded with black
WHITE_POINT = 99.5  # percentile of each channel that is glass
WHITE_RANGE = (190, 255)  # and where glass can lie: a crop full of tissue has none
STAIN_FLOOR = 0.055  # JPEG noise and uneven light reach 0.04 on blank glass
STAIN_CEILING = 0.08  # pale stroma begins at 0.1, fat a little below; Otsu between dense tumour and stroma would lie above it
PADDING = 12  # brightest channel of px that were never scanned; ink and pigment are lighter at 8 um per px
GLOW_BACKGROUND = 5  # percentile of brightness that is background when the background is dark
GLOW_FLOOR, GLOW_PART = 4, 0.25  # grey levels above it, and part of the way to Otsu's threshold: stroma with few nuclei is dim
SMALLEST_SHARE = 0.01  # of a small image, below which a piece may be dropped: a 50 px crop is all smaller than dust


@dataclass(frozen=True)
class TissueMask:
    """Which parts of a slide hold tissue.

    Attributes
    ----------
    mask
        bool of shape (h, w); its corner is the slide's.
    scale
        Level-0 px per mask px.
    brightfield
        ``False`` when the background is dark, as in fluorescence.
    warnings
        Sentences about anything doubtful.
    """

    mask: NDArray[np.bool_]
    scale: float
    brightfield: bool
    warnings: tuple[str, ...]

    def covers(self, x0: float, y0: float, x1: float, y1: float) -> bool:
        """Whether any tissue lies in a box of level-0 px; ``False`` beyond the mask."""
        height, width = self.mask.shape
        left, top = max(math.floor(x0 / self.scale), 0), max(math.floor(y0 / self.scale), 0)
        right, bottom = min(math.ceil(x1 / self.scale), width), min(math.ceil(y1 / self.scale), height)
        return right > left and bottom > top and bool(self.mask[top:bottom, left:right].any())

    def area_um2(self, mpp: float) -> float:
        """Area of the mask, its margin included; ``mpp`` is microns per level-0 px."""
        return float(np.count_nonzero(self.mask)) * (self.scale * mpp) ** 2


def find_tissue(thumbnail: NDArray[np.uint8], scale: float, config: TissueConfig, *, mpp: float | None = None) -> TissueMask:
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
        Microns per thumbnail px, where it is not ``config.overview_mpp`` (a slide coarser than the overview, or very large).

    Returns
    -------
    TissueMask
        Pieces of at least ``config.min_area_um2`` with ``config.margin_um`` around them and small holes filled. Empty when there
        is no tissue.
    """
    from scipy import ndimage

    mpp = config.overview_mpp if mpp is None else mpp
    brightfield, warnings = _background(thumbnail)
    signal = _stain(thumbnail) if brightfield else _glow(thumbnail)
    signal = ndimage.gaussian_filter(signal, 1.0)  # px; noise is not tissue
    found = signal > (_stain_threshold(signal) if brightfield else _glow_threshold(signal))
    if brightfield:
        found &= ~_padding(thumbnail)
    mask = _tidy(found, config, mpp)
    return TissueMask(mask, scale, brightfield, warnings)


def _background(thumbnail: NDArray[np.uint8]) -> tuple[bool, tuple[str, ...]]:
    darkest = thumbnail.min(axis=2)
    median = float(np.median(thumbnail.mean(axis=2)))
    if median >= DARK_MEDIAN or (darkest > GLASS).mean() > DARK_GLASS_SHARE:
        return True, ()
    return False, (f"does not look like brightfield H&E: the background is dark (median grey level {median:.0f} of 255)",)


def _stain(thumbnail: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Mean optical density plus the spread between channels: stains have both, dirt and shadows only the first -> (h, w)."""
    glass = np.clip(np.percentile(thumbnail.reshape(-1, 3), WHITE_POINT, axis=0), *WHITE_RANGE)
    density = np.log10(glass / np.clip(thumbnail, 1, glass)).astype(np.float32)
    return cast("NDArray[np.float32]", density.mean(axis=2) + density.max(axis=2) - density.min(axis=2))


def _stain_threshold(signal: NDArray[np.float32]) -> float:
    return float(np.clip(_otsu(signal), STAIN_FLOOR, STAIN_CEILING))


def _glow(thumbnail: NDArray[np.uint8]) -> NDArray[np.float32]:
    return thumbnail.max(axis=2).astype(np.float32)


def _glow_threshold(signal: NDArray[np.float32]) -> float:
    """A part of the way from the background to Otsu's threshold, which lies between bright and dim tissue."""
    background = float(np.percentile(signal, GLOW_BACKGROUND))
    return background + max(GLOW_FLOOR, GLOW_PART * (_otsu(signal) - background))


def _otsu(signal: NDArray[np.float32]) -> float:
    from skimage.filters import threshold_otsu

    return float(threshold_otsu(signal)) if signal.min() < signal.max() else math.inf


def _padding(thumbnail: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Black px that hang together with the border: never scanned."""
    from scipy import ndimage

    labels, _ = ndimage.label(thumbnail.max(axis=2) <= PADDING)
    border = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    padding = np.isin(labels, border[border > 0])
    return cast("NDArray[np.bool_]", ndimage.binary_dilation(padding, iterations=3))  # its blurred edge


def _tidy(found: NDArray[np.bool_], config: TissueConfig, mpp: float) -> NDArray[np.bool_]:
    """Add the margin, drop specks, fill holes.

    Pieces are joined by their margins before they are weighed, so that the threads of fat tissue stand together; weighed is what
    was found, without margin.
    """
    from scipy import ndimage

    if not found.any():
        return found
    margin = config.margin_um / mpp
    mask = ndimage.distance_transform_edt(~found) <= margin
    labels, count = ndimage.label(mask)
    weights = np.bincount(labels[found], minlength=count + 1) * mpp**2
    smallest = min(config.min_area_um2, SMALLEST_SHARE * found.size * mpp**2)
    mask &= (weights >= smallest)[labels]
    holes, count = ndimage.label(~mask)
    small = np.bincount(holes.ravel(), minlength=count + 1) * mpp**2 <= config.max_hole_um2
    border = np.unique(np.concatenate([holes[0], holes[-1], holes[:, 0], holes[:, -1]]))
    small[border] = False  # open to the outside
    small[0] = False
    return cast("NDArray[np.bool_]", mask | small[holes])


@dataclass(frozen=True)
class SearchArea:
    """Where cells are looked for: tissue (``None``: everywhere), cut by a region of interest (``None``: no cut), level-0 px."""

    tissue: TissueMask | None
    region: shapely.Geometry | None

    def wanted(self, x0: float, y0: float, x1: float, y1: float) -> bool:
        """Whether a box may hold cells."""
        if self.region is not None and not self.region.intersects(shapely.box(x0, y0, x1, y1)):
            return False
        return self.tissue is None or self.tissue.covers(x0, y0, x1, y1)

    def holds(self, points_xy: NDArray[np.floating]) -> NDArray[np.bool_]:
        """Which of the points (N, 2) lie inside -> bool (N,). Cells are kept by this, not by tile, so that the tiling does not show."""
        inside = np.ones(len(points_xy), bool)
        if self.tissue is not None:
            height, width = self.tissue.mask.shape
            column, row = np.floor(points_xy / self.tissue.scale).astype(int).T
            inside = (column >= 0) & (row >= 0) & (column < width) & (row < height)
            inside[inside] = self.tissue.mask[row[inside], column[inside]]
        if self.region is not None:
            inside &= shapely.contains_xy(self.region, points_xy)
        return inside
