"""What `wsiseg info` says about a slide: metadata, the scale that its nuclei suggest, tissue, and the tiles of a run."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from wsiseg.config import RunConfig
from wsiseg.errors import SlideError, counted
from wsiseg.models import load_model
from wsiseg.segmentation.nuclear_scale import ScaleEstimate, estimate_scale, scale_contradiction
from wsiseg.slide import open_slide, require_cellular, thumbnail
from wsiseg.slide.stain import SlideStain, find_stain
from wsiseg.slide.tiling import plan_for_model
from wsiseg.slide.tissue import SearchArea, find_tissue


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What is known of a slide before a run.

    Attributes
    ----------
    slide, format, reader
        Path, file format, and the library that reads it.
    size_px
        Width and height of level 0.
    levels
        Of each level: width and height in px, and downsample.
    mpp, mpp_source
        Microns per level-0 px, ``None`` when the file has none, and where they come from.
    bounds_px
        x, y, width and height of the scanned part, level-0 px; ``None``: all of it.
    stain
        The stain; ``None`` without a scale.
    estimated, mpp_by_nuclei
        Whether the scale was estimated from nuclei, and the estimate; ``None``: too few nuclei.
    tissue_mm2
        Area that a run searches, its margin included; ``None`` without a scale, and so the next three.
    tiles, tile_um, blocks
        Tiles of a run with default settings, the side of their cores, and blocks.
    warnings
        What a run would warn of.
    """

    slide: str
    format: str
    reader: str
    size_px: tuple[int, int]
    levels: tuple[tuple[int, int, float], ...]
    mpp: float | None
    mpp_source: str
    bounds_px: tuple[int, int, int, int] | None
    stain: SlideStain | None = None
    estimated: bool = False
    mpp_by_nuclei: ScaleEstimate | None = None
    tissue_mm2: float | None = None
    tiles: int | None = None
    tile_um: float | None = None
    blocks: int | None = None
    warnings: tuple[str, ...] = ()

    def lines(self) -> dict[str, list[str]]:
        """The facts as text for people, by name."""
        out: dict[str, list[str]] = {
            "slide": [self.slide],
            "format": [f"{self.format} (read by {self.reader})"],
            "size": [f"{self.size_px[0]} x {self.size_px[1]} px"],
            "levels": [f"{w} x {h} px, downsample {d:g}" for w, h, d in self.levels],
            "mpp": [
                "none in the file; runs need --mpp" if self.mpp is None else f"{self.mpp:g} um ({self.mpp_source})"
            ],
            "bounds": ["none" if self.bounds_px is None else "x {} y {} width {} height {} px".format(*self.bounds_px)],
        }
        if self.stain is not None:
            out["stain"] = [str(self.stain)]
        if self.estimated:
            found = self.mpp_by_nuclei
            out["mpp by nuclei"] = ["no estimate: too few nuclei" if found is None else str(found)]
        if self.blocks is not None:
            out["tissue"] = [f"{self.tissue_mm2:.2f} mm2, margin included"]
            out["tiles"] = [f"{self.tiles} of {self.tile_um:g} um, in {counted(self.blocks, 'block')}"]
        return out | {"warnings": list(self.warnings) or ["none"]}

    def document(self) -> dict[str, Any]:
        """The facts as numbers for programs, ready for JSON."""
        facts = dataclasses.asdict(self)
        facts["levels"] = [{"width_px": w, "height_px": h, "downsample": d} for w, h, d in self.levels]
        if self.stain is not None:
            facts["stain"] = {k: facts["stain"][k] for k in ("name", "source", "brown", "pink")}
        return facts


def survey(
    slide: str,
    *,
    mpp: float | None = None,
    force_mpp: bool = False,
    reader: str = "auto",
    estimate: bool = True,
    config: RunConfig | None = None,
) -> Survey:
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
        known = not math.isnan(info.mpp)
        facts = Survey(
            slide=slide,
            format=info.format,
            reader=info.reader,
            size_px=info.size_px0,
            levels=tuple((*size, d) for size, d in zip(info.level_sizes, info.downsamples, strict=True)),
            mpp=info.mpp if known else None,
            mpp_source=info.mpp_source,
            bounds_px=info.bounds,
            estimated=estimate,
        )
        warnings, stain = list(info.warnings), SlideStain()
        if known:
            stain = find_stain(opened, config.stain, config.tissue.overview_mpp)
            facts = dataclasses.replace(facts, stain=stain)
            warnings += stain.warnings
        if estimate:
            found = estimate_scale(stain.view(opened))
            facts = dataclasses.replace(facts, mpp_by_nuclei=found)
            if found is not None and known:
                warnings += scale_contradiction(info.mpp, found)
        if known:
            tissue = find_tissue(*thumbnail(opened, config.tissue.overview_mpp), config.tissue, mpp=info.mpp)
            model = load_model(config.model, "cpu")
            area = SearchArea(tissue if config.tissue.enabled else None, None)
            blocks = plan_for_model(info, model, config.tiling, area.wanted)
            core_px = blocks[0].tiles[0].core.width if blocks else 0
            warnings += tissue.warnings
            facts = dataclasses.replace(
                facts,
                tissue_mm2=tissue.area_um2(info.mpp) / 1e6,
                tiles=sum(len(b.tiles) for b in blocks),
                tile_um=core_px * model.mpp,
                blocks=len(blocks),
            )
            try:
                require_cellular(info)
            except SlideError as error:
                said = str(error)
                warnings = [w for w in warnings if w.partition(" for cells")[0] not in said] + [said]
    return dataclasses.replace(facts, warnings=tuple(warnings))
