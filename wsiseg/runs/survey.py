"""What `wsiseg info` says about a slide: metadata, the scale that its nuclei suggest, tissue, and the tiles of a run."""

from __future__ import annotations

import math
from typing import Any

from wsiseg.config import RunConfig
from wsiseg.errors import SlideError, counted
from wsiseg.models import load_model
from wsiseg.segmentation.nuclear_scale import estimate_scale, scale_contradiction
from wsiseg.slide import open_slide, require_cellular, thumbnail
from wsiseg.slide.stain import SlideStain, find_stain
from wsiseg.slide.tiling import plan_for_model
from wsiseg.slide.tissue import SearchArea, find_tissue


def survey(
    slide: str,
    *,
    mpp: float | None = None,
    force_mpp: bool = False,
    reader: str = "auto",
    estimate: bool = True,
    config: RunConfig | None = None,
) -> dict[str, Any]:
    """Collect what `wsiseg info` prints: metadata, the scale that the nuclei suggest, tissue, and the tiles of a default run.

    Parameters
    ----------
    slide, mpp, force_mpp, reader
        As for :func:`~wsiseg.slide.open_slide`.
    estimate
        Estimate the scale from nuclei, which takes some seconds.
    config
        Defaults when absent.

    Raises
    ------
    SlideError
        The slide cannot be opened. A slide without microns per pixel is described all the same.
    """
    config = config or RunConfig()
    with open_slide(slide, mpp=mpp, force_mpp=force_mpp, reader=reader, require_mpp=False) as opened:
        info = opened.info
        sizes = [
            f"{w} x {h} px, downsample {d:g}" for (w, h), d in zip(info.level_sizes, info.downsamples, strict=True)
        ]
        facts: dict[str, Any] = {
            "slide": slide,
            "format": f"{info.format} (read by {info.reader})",
            "size": f"{info.size_px0[0]} x {info.size_px0[1]} px",
            "levels": sizes,
            "mpp": f"{info.mpp:g} um ({info.mpp_source})"
            if info.mpp_source != "none"
            else "none in the file; runs need --mpp",
            "bounds": None if info.bounds is None else "x {} y {} width {} height {} px".format(*info.bounds),
        }
        warnings, stain = list(info.warnings), SlideStain()
        if not math.isnan(info.mpp):
            stain = find_stain(opened, config.stain, config.tissue.overview_mpp)
            facts["stain"] = str(stain)
            warnings += stain.warnings
        if estimate:
            found = estimate_scale(stain.view(opened))
            facts["mpp by nuclei"] = "no estimate: too few nuclei" if found is None else str(found)
            if found is not None and not math.isnan(info.mpp):
                warnings += scale_contradiction(info.mpp, found)
        if info.mpp_source != "none":
            tissue = find_tissue(*thumbnail(opened, config.tissue.overview_mpp), config.tissue, mpp=info.mpp)
            model = load_model(config.model, "cpu")
            area = SearchArea(tissue if config.tissue.enabled else None, None)
            blocks = plan_for_model(info, model, config.tiling, area.wanted)
            core_px = blocks[0].tiles[0].core.width if blocks else 0
            warnings += tissue.warnings
            facts["tissue"] = f"{tissue.area_um2(info.mpp) / 1e6:.2f} mm2, margin included"
            facts["tiles"] = (
                f"{sum(len(b.tiles) for b in blocks)} of {core_px * model.mpp:g} um, in {counted(len(blocks), 'block')}"
            )
            try:
                require_cellular(info)
            except SlideError as error:
                said = str(error)
                warnings = [w for w in warnings if w.partition(" for cells")[0] not in said] + [said]
    return facts | {"warnings": warnings}
