"""Plausibility of a run's cells: a wrong scale or a stain other than H&E ends in few, tiny or huge cells, never in an error.

The limits are from the labelled images of TNBC and NuInsSeG (some 700 fields of 0.01 to 0.02 mm2, 32 kinds of tissue, drawn by hand); the median
nucleus of a field has 9 to 96 um2 in 98 of 100 of them, and there are 95 to 28 000 nuclei per mm2 (benchmarks/results/scale_from_nuclei.md).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from wsiseg.config import DETECTING

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsiseg.runs.plan_file import RunPlan

NUCLEUS_UM2 = 28.0  #: median nucleus of all labelled fields: between TNBC's 21 and NuInsSeG's 33
MEDIAN_UM2 = (
    9.0,
    100.0,
)  #: median area of a run's nuclei: the 1st and 99th percentile of the labelled fields, rounded outwards
DENSITY_MM2 = (
    95.0,
    40_000.0,
)  #: cells per mm2 searched: the emptiest labelled field; a slide that is mostly fat may have fewer, and is told so ..
#: .. and half as much again as in the fullest
FEW = 50  #: cells below which the median area and a high density are not judged
SMALL_MM2 = 0.1  #: in less tissue than this, a few cells are a low density; a biopsy has ten times as much


def implausible(areas_px0: NDArray[np.float64], plan: RunPlan) -> tuple[str, ...]:
    """List warnings about the cells of a whole run.

    Parameters
    ----------
    areas_px0
        Areas of the cells (N,), level-0 px squared.
    plan
        Plan of the run.

    Returns
    -------
    tuple[str, ...]
        Warnings with the likely reasons; empty for plausible tissue.
    """
    mpp, searched = plan.info.mpp, plan.tissue_mm2
    scale = f"the scale is wrong ({mpp:.4g} microns per pixel, {plan.info.mpp_source})"
    if not plan.tiles:
        if plan.config.roi:
            return (
                f"nothing was searched: no tissue in the region of {plan.config.roi}; check the region, or pass --no-tissue",
            )
        reasons = "the slide is blank, pale or transparent, not brightfield, or its pieces are smaller than tissue.min_area_um2"
        return (
            f"no tissue was found: {reasons} ({plan.config.tissue.min_area_um2:g} um2); pass --no-tissue to search everywhere",
        )
    masks, described = plan.config.masks, plan.config.method in DETECTING
    if not len(areas_px0) and described:
        asked = ", ".join(repr(phrase) for of in plan.described for phrase in of.phrases) or "the examples"
        floor = f"detection.min_score {plan.config.detection.min_score:g}"
        reasons = f"the types are not there, they are called something else, or {floor} is too strict"
        return (f"no cell is meant by {asked} in {_mm2(searched)} searched: {reasons}",)
    if not len(areas_px0):
        thresholds = f"masks.min_score {masks.min_score:g}, masks.min_area_um2 {masks.min_area_um2:g}"
        reasons = (
            f"{scale}, the slide is blank, not H&E or transparent, or a threshold of masks is too strict ({thresholds})"
        )
        return (f"no cell was found in {_mm2(searched)} searched: {reasons}",)
    warnings = []
    median = float(np.median(areas_px0)) * mpp**2
    if len(areas_px0) >= FEW and not MEDIAN_UM2[0] <= median <= MEDIAN_UM2[1]:
        warnings.append(
            f"the median nuclear area is {median:.3g} um2, tissue has {MEDIAN_UM2[0]:g} to {MEDIAN_UM2[1]:g}: "
            f"is the scale of {mpp:.4g} microns per pixel wrong by about {_factor(median):.2g}x?"
        )
    density = len(areas_px0) / max(searched, 1e-9)
    if (
        density < DENSITY_MM2[0] and searched >= SMALL_MM2 and not described
    ):  # of the types that are asked for there may be few
        warnings.append(
            f"only {density:.2g} cells per mm2 in {_mm2(searched)} searched, tissue has {DENSITY_MM2[0]:g} to {DENSITY_MM2[1]:,.0f}: {scale}, "
            "most of it is blank, or the slide is not H&E"
        )
    if density > DENSITY_MM2[1] and len(areas_px0) >= FEW:
        warnings.append(
            f"{density:,.0f} cells per mm2 in {_mm2(searched)} searched, tissue has {DENSITY_MM2[0]:g} to {DENSITY_MM2[1]:,.0f}: {scale}, "
            "or texture is taken for nuclei"
        )
    return tuple(warnings)


def _factor(median_um2: float) -> float:
    """Factor by which the scale is off when the median nucleus has this area, in either direction."""
    ratio = math.sqrt(NUCLEUS_UM2 / median_um2)
    return max(ratio, 1 / ratio)


def _mm2(area: float) -> str:
    return f"{area:.3g} mm2"
