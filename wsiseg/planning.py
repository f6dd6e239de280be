"""Everything that can be wrong is found here, before anything is written or any long work starts: slide, seeds, region, model, folder."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsiseg.config import RunConfig
from wsiseg.errors import ConfigError, SlideError
from wsiseg.formats import load_writer
from wsiseg.formats.regions import read_regions
from wsiseg.formats.seeds import check_seeds, read_seeds
from wsiseg.geometry import Lattice
from wsiseg.models import file_hash, find_weights, load_model
from wsiseg.runs import RunFolder, find_folder
from wsiseg.seeding import build_bank
from wsiseg.slide import open_slide, require_cellular, thumbnail
from wsiseg.slide.array_reader import ArrayReader
from wsiseg.tiles import plan_blocks
from wsiseg.tissue import SearchArea, find_tissue

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from wsiseg.config import Method
    from wsiseg.models.contract import PromptableModel
    from wsiseg.records import Bank, Block, Seeds, SlideInfo
    from wsiseg.slide import SlideReader

NATIVE_MPP = 0.25  #: scale of the default model; `survey` counts tiles without loading it

# `auto`: the way in that types better on typed data, by model; see docs/methods.md for the table.
BEST_METHOD: dict[str, Method] = {"nuclei-compact": "apg"}


@dataclass(frozen=True)
class Job:
    """What every worker is told: small and picklable. ``config.method`` is resolved (not ``auto``)."""

    slide: str
    config: RunConfig
    lattice: Lattice
    area: SearchArea
    bank: Bank | None
    parts: Path
    parts_hash: str


@dataclass(frozen=True)
class Tools:
    """What every worker process opens once."""

    job: Job
    reader: SlideReader
    model: PromptableModel


@dataclass(frozen=True)
class Plan:
    """A run that has passed every check. ``run_hash`` covers everything that decides the result, ``job.parts_hash`` what decides the parts."""

    job: Job
    tools: Tools
    info: SlideInfo
    blocks: list[Block]
    folder: RunFolder
    run_hash: str
    warnings: list[str]

    @property
    def tile_count(self) -> int:
        """Tiles of all blocks."""
        return sum(len(b.tiles) for b in self.blocks)


def open_tools(job: Job) -> Tools:
    """A worker's own slide and model."""
    config = job.config
    reader = open_slide(job.slide, mpp=config.mpp, reader=config.reader)
    return Tools(job, reader, load_model(config.model, config.device, config.precision))


def plan_run(slide: str, config: RunConfig, out: Path) -> Plan:
    """Check a run and lay it out; writes nothing.

    Parameters
    ----------
    slide
        Path or URL.
    config
        What to do; ``seeds`` and ``roi`` are paths.
    out
        Folder of all runs.

    Raises
    ------
    WsisegError
        The first thing that is wrong, in one line.
    """
    _, weights = find_weights(config.model)
    for name in config.formats:
        load_writer(name)
    seeds = read_seeds(Path(config.seeds)) if config.seeds else None
    method = _choose_method(config, seeds)
    reader = open_slide(slide, mpp=config.mpp, reader=config.reader)
    info = reader.info
    require_cellular(info)
    warnings = list(info.warnings)
    if seeds:
        seeds, more = check_seeds(seeds, info)
        warnings += more
    roi = read_regions(Path(config.roi), info) if config.roi else None
    model = load_model(config.model, config.device, config.precision)
    lattice = Lattice(info.mpp, model.mpp)
    tissue = None
    if config.tissue.enabled:
        tissue = find_tissue(*thumbnail(reader, config.tissue.overview_mpp), config.tissue, mpp=info.mpp)
        warnings += tissue.warnings
    area = SearchArea(tissue, roi)
    bank = build_bank(reader, model, seeds, lattice, config) if seeds else None

    resolved = dataclasses.replace(config, method=method)
    facts = {"slide": _slide_key(slide), "weights": file_hash(weights), "roi": _text_hash(config.roi)}
    seeds_hash = _text_hash(config.seeds)
    # Types and overlaps are settled after the parts: another threshold there does not make them stale. Nor do other seeds under APG.
    segmenting = dataclasses.replace(resolved, typing=type(config.typing)(), stitching=type(config.stitching)())
    parts_hash = segmenting.hash(**facts, seeds=seeds_hash if method == "cop" else "")
    folder = find_folder(out, slide if "://" in slide else str(Path(slide).resolve()))
    blocks = plan_blocks(info.size_px0, lattice, config.tiling, stride_px=model.stride_px, reach_px=model.reach_px, wanted=area.wanted)
    job = Job(slide, resolved, lattice, area, bank, folder.parts, parts_hash)
    return Plan(job, Tools(job, reader, model), info, blocks, folder, resolved.hash(**facts, seeds=seeds_hash), warnings)


def image_tools(
    image: NDArray[np.uint8], config: RunConfig, seeds: Seeds | None = None, model: PromptableModel | None = None
) -> tuple[Tools, SlideInfo]:
    """The tools for one image in memory (H, W, 3) at ``config.mpp``."""
    if config.mpp is None:
        raise ConfigError("image: microns per pixel are not known; set mpp (for example mpp=0.25)")
    reader = ArrayReader(image, config.mpp)
    if seeds:
        seeds, _ = check_seeds(seeds, reader.info)
    model = model or load_model(config.model, config.device, config.precision)
    lattice = Lattice(config.mpp, model.mpp)
    bank = build_bank(reader, model, seeds, lattice, config) if seeds else None
    resolved = dataclasses.replace(config, method=_choose_method(config, seeds))
    job = Job("image", resolved, lattice, SearchArea(None, None), bank, Path(), "")
    return Tools(job, reader, model), reader.info


def _choose_method(config: RunConfig, seeds: Seeds | None) -> Method:
    if config.method == "cop" and seeds is None:
        raise ConfigError("--method cop: needs clicks; pass --seeds FILE, or use --method apg")
    if config.method != "auto":
        return config.method
    return BEST_METHOD.get(config.model, "apg") if seeds else "apg"


def _slide_key(slide: str) -> str:
    """Identity of a slide without reading all of it: size and digest of both ends."""
    path = Path(slide)
    if not path.is_file():
        return slide
    size, end = path.stat().st_size, 1 << 20
    with path.open("rb") as stream:
        digest = hashlib.sha256(stream.read(end))
        stream.seek(max(size - end, 0))
        digest.update(stream.read(end))
    return f"{size}-{digest.hexdigest()}"


def _text_hash(path: str | None) -> str:
    return file_hash(Path(path)) if path else ""


def describe(plan: Plan) -> dict[str, Any]:
    """The manifest's account of what goes in."""
    info, config = plan.info, plan.job.config
    return {
        "slide": {
            "path": plan.job.slide if "://" in plan.job.slide else str(Path(plan.job.slide).resolve()),
            "reader": info.reader,
            "format": info.format,
            "size_px0": list(info.size_px0),
            "mpp": info.mpp,
            "mpp_source": info.mpp_source,
            "bounds": list(info.bounds) if info.bounds else None,
        },
        "config": dataclasses.asdict(config),
        "seeds": config.seeds,
        "model": {"name": config.model, "sha256": file_hash(find_weights(config.model)[1]), "device": str(plan.tools.model.device)},
        "folder": str(plan.folder.path),
        "run_hash": plan.run_hash,
        "parts_hash": plan.job.parts_hash,
        "frame": "slide level-0 px, x right, y down, origin at the outer corner of pixel (0, 0)",
    }


def survey(slide: str, *, mpp: float | None = None, reader: str = "auto", config: RunConfig | None = None) -> dict[str, Any]:
    """What `wsiseg info` prints: facts of a slide, its tissue and the tiles of a default run.

    Raises
    ------
    SlideError
        The slide cannot be opened. A slide without microns per pixel is described all the same.
    """
    config = config or RunConfig()
    with open_slide(slide, mpp=mpp, reader=reader, require_mpp=False) as opened:
        info = opened.info
        sizes = [f"{w} x {h} px, downsample {d:g}" for (w, h), d in zip(info.level_sizes, info.downsamples, strict=True)]
        facts: dict[str, Any] = {
            "slide": slide,
            "format": f"{info.format} (read by {info.reader})",
            "size": f"{info.size_px0[0]} x {info.size_px0[1]} px",
            "levels": sizes,
            "mpp": f"{info.mpp:g} um ({info.mpp_source})" if info.mpp_source != "none" else "none in the file; runs need --mpp",
            "bounds": None if info.bounds is None else "x {} y {} width {} height {} px".format(*info.bounds),
        }
        warnings = list(info.warnings)
        if info.mpp_source != "none":
            tissue = find_tissue(*thumbnail(opened, config.tissue.overview_mpp), config.tissue, mpp=info.mpp)
            blocks = plan_blocks(
                info.size_px0, Lattice(info.mpp, NATIVE_MPP), config.tiling, stride_px=1, reach_px=0, wanted=SearchArea(tissue, None).wanted
            )
            warnings += tissue.warnings
            facts["tissue"] = f"{tissue.area_um2(info.mpp) / 1e6:.2f} mm2, margin included"
            facts["tiles"] = f"{sum(len(b.tiles) for b in blocks)} of {config.tiling.tile_um:g} um, in {len(blocks)} blocks"
            try:
                require_cellular(info)
            except SlideError as error:
                warnings.append(str(error))
    return facts | {"warnings": warnings}
