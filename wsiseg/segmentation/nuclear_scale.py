"""Estimate of microns per pixel from the nuclei.

A few windows of tissue are shown to the packaged network at a ladder of assumed scales. Near the right one it finds nuclei, and their median
diameter says by how much the assumption is off: the diameter that it sees grows with the assumed scale, that of nuclei is known.
Tissues differ (a lymph node's nuclei are smaller than a liver's), so the estimate is good to about a third,
and fields of large tumour nuclei can be off by two (benchmarks/results/scale_from_nuclei.md): it tells 20x from 40x, not 0.25 from 0.22.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from wsiseg.config import MaskConfig, RunConfig
from wsiseg.errors import SlideError
from wsiseg.geometry import Box, Lattice
from wsiseg.models import load_model
from wsiseg.segmentation.decoding import decode
from wsiseg.segmentation.prompts.apg import apg_points
from wsiseg.slide import read_region, require_cellular
from wsiseg.slide.array_reader import ArrayReader
from wsiseg.slide.tissue import glass_white, is_brightfield

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from wsiseg.models.contract import PromptableModel
    from wsiseg.slide import SlideReader

MODEL = "nuclei-compact"
LADDER = tuple(0.125 * 2 ** (k / 2) for k in range(9))  #: assumed microns per px, 0.125 to 2
WINDOW_PX = 320  #: model px: at the right scale 80 um, which hold 20 to 100 nuclei
WINDOWS = 4  #: a second each on one core
DIAMETER_UM = 5.8  #: of the median nucleus that the network outlines, as a disc: at it, TNBC is estimated as much too coarse as BRCA-M2C too fine
NUCLEUS_UM2 = math.pi / 4 * DIAMETER_UM**2
CHANCE = 0.25  #: score of outlines that are found in texture at any scale; what is above it counts
TRUSTED = (
    0.2  #: how far, as a natural logarithm, the size seen on a rung may be from that before the rung counts for little
)
MARGIN = 1.2  #: nearer to the ends of the ladder than this there is no estimate
LEAST_WEIGHT = 10.0  #: of all rungs, about that of 30 nuclei, below which the median is unreliable
SPREAD = (0.8, 1.6)  #: nine of ten labelled samples have their true scale within these factors of the estimate
CONTRADICTION = (
    1.7  #: how far a stated scale may be from the estimate before it is doubted: 20x and 40x are a factor of 2
)

OVERVIEW_PX = 1_000_000  #: of the overview on which the windows are chosen: levels that small are read in no time
CELL_PX0 = 256  #: level-0 px; places are squares of at least this side, and at most 64 x 64 of them
LEAST, DARKEST = (
    0.01,
    1.0,
)  #: optical density of red, which haematoxylin absorbs and eosin does not: mean of a square with some nuclei; ink
RICH = 0.3  #: squares with this share of the richest one's are candidates: the very richest may be a lymph follicle, or ink


@dataclass(frozen=True)
class Rung:
    """Nuclei that the network found at one assumed scale, in all windows.

    Attributes
    ----------
    mpp
        Assumed microns per level-0 px.
    areas_um2, scores
        (N,): of the outlines, as if the assumption were right.
    """

    mpp: float
    areas_um2: NDArray[np.float64]
    scores: NDArray[np.float64]


@dataclass(frozen=True)
class ScaleEstimate:
    """Microns per level-0 px that the nuclei suggest; nine of ten times the truth lies between ``low`` and ``high``."""

    mpp: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"about {self.mpp:.2g} ({power(self.mpp)}; between {self.low:.2g} and {self.high:.2g})"


def power(mpp: float) -> str:
    """The objective that has about this scale: ``20x``."""
    return f"{min((5, 10, 20, 40, 80), key=lambda x: abs(math.log(x * mpp / 10)))}x"


def estimate_scale(reader: SlideReader) -> ScaleEstimate | None:
    """Estimate microns per pixel from the nuclei of a few windows.

    Parameters
    ----------
    reader
        An open slide; its own microns per pixel are ignored.

    Returns
    -------
    ScaleEstimate or None
        ``None``: too few nuclei were found, as on a blank slide, or the background is dark, as in fluorescence.

    Raises
    ------
    SlideError
        The pixels cannot be decoded.
    """
    centres = find_places(reader)
    if not centres:
        return None
    model, reach = load_model(MODEL, "cpu"), math.ceil(WINDOW_PX * 0.25 / LADDER[0] / 2) + 2
    around = [Box(x - reach, y - reach, x + reach, y + reach) for x, y in centres]
    return choose_scale(measure_rungs([reader.read(0, box) for box in around], model))


def measure_rungs(windows: Sequence[NDArray[np.uint8]], model: PromptableModel) -> list[Rung]:
    """Show windows (H, W, 3) of level-0 px to the network at each rung of the ladder; what is far from their centres only at the fine ones."""
    return [_look(windows, mpp, model) for mpp in LADDER]


@torch.inference_mode()
def _look(windows: Sequence[NDArray[np.uint8]], mpp: float, model: PromptableModel) -> Rung:
    config, areas, scores = RunConfig(), [np.empty(0)], [np.empty(0)]
    lattice = Lattice(mpp, model.mpp)
    for window in windows:
        x, y = (
            int((n / 2 * mpp / model.mpp - WINDOW_PX / 2) // model.stride_px) * model.stride_px
            for n in (window.shape[1], window.shape[0])
        )
        pixels = read_region(ArrayReader(window, mpp), Box(x, y, x + WINDOW_PX, y + WINDOW_PX), lattice)
        embeddings = model.encode(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].to(model.device))
        if embeddings.maps is None:
            continue
        points = apg_points(
            embeddings.maps[0].float().cpu().numpy(), WINDOW_PX // embeddings.maps.shape[-1], model.mpp, config.apg
        )
        for masks in decode(model, embeddings, 0, points, MaskConfig()):
            areas.append((masks.logits > 0).sum((1, 2)).numpy() * (masks.mask_stride_px * model.mpp) ** 2)
            scores.append((masks.predicted_iou * masks.stability).numpy())
    return Rung(mpp, np.concatenate(areas), np.concatenate(scores))


def choose_scale(rungs: Sequence[Rung]) -> ScaleEstimate | None:
    """Choose the scale from the nuclei found on the ladder; ``None`` when they are too few, or beyond it.

    Each rung has its own estimate, the assumed scale times usual over seen diameter. They are averaged (median), weighted by how much was found
    there (times the median area, since a window holds fewer nuclei the coarser it is taken to be), and by how close to the usual its size is: far
    from the right scale, outlines are parts of nuclei or texture.
    """
    logs, weights = [], []
    for rung in rungs:
        if len(rung.areas_um2):
            median = float(np.median(rung.areas_um2))
            off = math.log(DIAMETER_UM / math.sqrt(4 * median / math.pi))
            found = float(np.clip(rung.scores - CHANCE, 0, None).sum()) * median / NUCLEUS_UM2
            logs.append(math.log(rung.mpp) + off)
            weights.append(found * math.exp(-0.5 * (off / TRUSTED) ** 2))
    if sum(weights) < LEAST_WEIGHT:
        return None
    order = np.argsort(logs)
    shares = np.cumsum(np.array(weights)[order])
    mpp = math.exp(np.interp(shares[-1] / 2, shares - np.array(weights)[order] / 2, np.array(logs)[order]))
    if not LADDER[0] * MARGIN <= mpp <= LADDER[-1] / MARGIN:  # at the ends one cannot see what lies beyond
        return None
    return ScaleEstimate(mpp, mpp * SPREAD[0], mpp * SPREAD[1])


def find_places(reader: SlideReader) -> list[tuple[int, int]]:
    """Centres (x, y), level-0 px, of up to `WINDOWS` squares that are rich in haematoxylin, richest first; none on a dark background."""
    width, height = reader.info.size_px0
    lattice = Lattice(1.0, max(1.0, math.sqrt(width * height / OVERVIEW_PX)))
    columns, rows = lattice.model_size((width, height))
    overview = read_region(reader, Box(0, 0, columns, rows), lattice)
    if not is_brightfield(overview):
        return []
    red = np.clip(np.log10(glass_white(overview)[0] / np.maximum(overview[..., 0].astype(np.float32), 1)), 0, DARKEST)
    side = max(round(CELL_PX0 / lattice.scale), math.ceil(max(columns, rows) / 64), 1)
    found = []
    for y in range(0, rows, side):
        for x in range(0, columns, side):
            part = red[y : y + side, x : x + side]
            found.append((float(part.sum()) / side**2, x + part.shape[1] / 2, y + part.shape[0] / 2))
    found.sort(key=lambda square: -square[0])
    rich = [square for square in found if square[0] >= max(LEAST, RICH * found[0][0])]
    chosen = rich if len(rich) <= WINDOWS else [rich[len(rich) * k // WINDOWS] for k in range(WINDOWS)]
    return [(round(x * lattice.scale), round(y * lattice.scale)) for _, x, y in chosen]


def require_scale(reader: SlideReader) -> None:
    """Refuse a slide on whose scale no cell can be found, with the scale that its nuclei suggest when the file states none.

    Raises
    ------
    SlideError
        As :func:`wsiseg.slide.require_cellular`.
    """
    info = reader.info
    if not math.isnan(info.mpp):
        require_cellular(info)
        return
    ignored = f" ({info.ignored_scale})" if info.ignored_scale else ""
    missing = f"{info.path}: no microns per pixel in the file{ignored}"
    found = estimate_scale(reader)
    if found is None:
        raise SlideError(
            f"{missing}, and too few nuclei to estimate it; pass --mpp (by the objective of the scan: 40x is about 0.25, 20x about 0.5)"
        )
    raise SlideError(
        f"{missing}; its nuclei suggest {found}; pass --mpp {found.mpp:.2g} if that is right, or the scale of the scan's objective"
    )


def scale_contradiction(mpp: float, estimate: ScaleEstimate) -> tuple[str, ...]:
    """Warning when the stated scale contradicts the nuclei; else empty."""
    factor = max(mpp / estimate.mpp, estimate.mpp / mpp)
    if factor < CONTRADICTION:
        return ()
    return (
        f"{mpp:.4g} microns per pixel contradicts the nuclei, which suggest {estimate}: is the scale wrong by about {factor:.2g}x?",
    )
