"""Planning of a run: slide, seeds, region, model and folder are checked before anything is written or long work starts."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import math
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsiseg.config import CopConfig, RunConfig, StitchingConfig, TypingConfig, check
from wsiseg.errors import ConfigError, RunError, SlideError, counted
from wsiseg.formats import load_writer
from wsiseg.formats.bank import read_bank
from wsiseg.formats.regions import read_regions
from wsiseg.formats.seeds import check_seeds, read_seeds, seeds_text
from wsiseg.geometry import Lattice
from wsiseg.models import find_weights, load_model, pick_device
from wsiseg.models.cards import file_hash
from wsiseg.runs.folder import check_folder, find_folder
from wsiseg.runs.manifest import FINISHED
from wsiseg.runs.plan_file import RunPlan, read_plan
from wsiseg.runtime.claims import Claims
from wsiseg.runtime.paths import readable, require_text, target
from wsiseg.seeds.bank import build_bank
from wsiseg.segmentation.nuclear_scale import estimate_scale, require_scale, scale_contradiction
from wsiseg.segmentation.worker import RunSpec, WorkerContext
from wsiseg.slide import open_slide, require_cellular, thumbnail
from wsiseg.slide.tiling import plan_blocks
from wsiseg.slide.tissue import SearchArea, find_tissue
from wsiseg.workers import check_scheduler

if TYPE_CHECKING:
    from wsiseg.models.contract import PromptableModel
    from wsiseg.records import Bank, Block, Seeds, SlideInfo
    from wsiseg.runs.folder import RunFolder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedRun:
    """A run that has passed every check.

    Attributes
    ----------
    plan
        Plan for stitching and writing, as `plan_file` stores it.
    blocks
        The units of work.
    context
        Slide and model as they were opened for the checks, for the first worker.
    """

    plan: RunPlan
    blocks: list[Block]
    context: WorkerContext

    def at(self, parts: Path) -> PreparedRun:
        """The run with the folder of parts that was claimed for it."""
        spec = dataclasses.replace(self.context.spec, parts=parts)
        return dataclasses.replace(self, context=dataclasses.replace(self.context, spec=spec, claims=Claims(parts)))


def plan_run(
    slide: str,
    config: RunConfig,
    out: Path,
    *,
    clicks: Seeds | None = None,
    name: str | None = None,
    overwrite: bool = False,
) -> PreparedRun | RunFolder:
    """Check a run and lay it out; writes nothing. The caller closes ``context.reader``.

    Parameters
    ----------
    slide
        Path or URL.
    config
        Settings; ``seeds`` and ``roi`` are paths.
    out, name
        Folder of all runs, and the name of this one's in it; that of the slide when absent.
    clicks
        Seeds that are in no file; in place of ``config.seeds``.
    overwrite
        Replace another run.

    Returns
    -------
    PreparedRun or RunFolder
        The folder when this very run is complete and its files are there.

    Raises
    ------
    WsisegError
        The first thing that is wrong, in one line.
    """
    check(config)
    check_scheduler(config.scheduler, config.cluster)
    card, weights = find_weights(config.model)
    for format_name in config.formats:
        load_writer(format_name)
    with readable(out, RunError):
        require_text((out / (name or "")).absolute(), RunError)
    if config.seeds is not None and config.bank is not None:
        raise ConfigError("--bank and --seeds: both define the types; pass only one of them")
    seeds = read_seeds(Path(config.seeds)) if config.seeds is not None else clicks
    bank = load_bank(Path(config.bank), weights) if config.bank is not None else None
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(
            open_slide(slide, mpp=config.mpp, force_mpp=config.force_mpp, reader=config.reader, require_mpp=False)
        )
        require_scale(reader)
        info = reader.info
        warnings = list(info.warnings)
        if seeds is not None:
            seeds, more = check_seeds(seeds, info)
            warnings += more
        roi = None
        if config.roi is not None:
            roi, more = read_regions(Path(config.roi), info)
            warnings += more
        resolved = resolve(
            config,
            card.name,
            maps=card.instance_decoder,
            clicked=seeds is not None or bank is not None,
            chains=bank is None or bool(bank.chains),
        )
        if resolved.method == "cop" and bank is not None and not bank.chains:
            raise ConfigError(
                f"--bank {config.bank}: has no prototypes for --method cop; leave --method out, or make it by a run with --method cop"
            )
        run_hash, parts_hash = _digests(slide, resolved, info, weights, _digest_of_clicks(config, clicks))
        folder = find_folder(out, slide_path(slide), name)
        check_folder(folder, run_hash, overwrite=overwrite, retype=_retype(folder, resolved, parts_hash))
        if config.bank is not None:
            refuse_own_bank(folder, Path(config.bank))
        if not overwrite and folder.is_complete(run_hash, config.formats):
            return folder

        model = load_model(config.model, config.device, resolved.precision)
        lattice = Lattice(info.mpp, model.mpp)
        tissue = None
        if config.tissue.enabled:
            tissue = find_tissue(*thumbnail(reader, config.tissue.overview_mpp), config.tissue, mpp=info.mpp)
            warnings += tissue.warnings
        area = SearchArea(tissue, roi)
        earlier = read_plan(folder.parts, run_hash)
        if earlier:  # one bank for all shards of a run, wherever they were made
            bank = earlier.bank
        elif seeds is not None:
            bank = build_bank(reader, model, seeds, lattice, resolved, chains=resolved.method == "cop")
            bank = dataclasses.replace(bank, cells=bank.cells.take(area.holds(bank.cells.points_xy)))
        blocks = _blocks(info, model, config, area)
        spec = RunSpec(slide, resolved, lattice, area, bank, folder.parts, parts_hash)
        plan = RunPlan(
            dataclasses.replace(info, path=slide_path(slide)),
            resolved,
            bank,
            {b.name: len(b.tiles) for b in blocks},
            run_hash,
            parts_hash,
            file_hash(weights),
            model.descriptor_size,
            area.size_um2(info) / 1e6,
            tuple(warnings),
            target(slide),
            "" if clicks is None else clicks.source,
        )
        prepared = PreparedRun(plan, blocks, WorkerContext(spec, reader, model, Claims(folder.parts)))
        stack.pop_all()
    return prepared


def _blocks(info: SlideInfo, model: PromptableModel, config: RunConfig, area: SearchArea) -> list[Block]:
    """Tiles of a run in blocks; for a run and for what is said of one."""
    return plan_blocks(
        info.size_px0,
        Lattice(info.mpp, model.mpp),
        config.tiling,
        stride_px=model.stride_px,
        reach_px=model.reach_px,
        input_px=model.input_px,
        wanted=area.wanted,
    )


def _digest_of_clicks(config: RunConfig, clicks: Seeds | None) -> str:
    """Of the file of clicks or the bank; clicks that are in no file have the digest of the seeds.json that would hold them."""
    if clicks is not None:
        return hashlib.sha256(seeds_text(clicks).encode()).hexdigest()
    return _content_hash(config.bank if config.seeds is None else config.seeds)


def _digests(slide: str, config: RunConfig, info: SlideInfo, weights: Path, clicks: str) -> tuple[str, str]:
    """Digests of everything that decides the result, and of what decides the parts; ``config`` is resolved."""
    facts: dict[str, object] = {
        "slide": _slide_key(slide),
        "levels": info.level_sizes,
        "reader": info.reader,
        "mpp": info.mpp,
        "weights": file_hash(weights),
        "roi": _content_hash(config.roi),
    }
    # Stages after the parts do not make them stale: types, overlaps, and under APG the seeds.
    segmenting = dataclasses.replace(config, typing=TypingConfig(), stitching=StitchingConfig())
    clicked = {"seeds": clicks} if config.method == "cop" else {}
    segmenting = segmenting if clicked else dataclasses.replace(segmenting, cop=CopConfig())
    return config.hash(**facts, seeds=clicks), segmenting.hash(**facts, **clicked)


def _retype(folder: RunFolder, config: RunConfig, parts_hash: str) -> str:
    """Command that retypes the folder, when it holds the same cells and only the clicks differ; else empty."""
    manifest = folder.read_manifest() or {}
    same = {"stitching": dataclasses.asdict(config.stitching), "typing": dataclasses.asdict(config.typing)}
    if manifest.get("parts_hash") != parts_hash or any(
        manifest["config"].get(key) != value for key, value in same.items()
    ):
        return ""
    if (
        manifest.get("status") not in FINISHED
        or config.method == "cop"
        or (config.seeds is None and config.bank is None)
    ):
        return ""
    clicks = ("--seeds", config.seeds) if config.seeds is not None else ("--bank", str(config.bank))
    return shlex.join(["wsiseg", "type", str(folder.path), *clicks])


def slide_path(slide: str) -> str:
    """The slide's name in manifests: absolute path, that of a symbolic link as it is; or URL.

    Raises
    ------
    SlideError
        A folder above it has a name that is not text.
    """
    path = slide if "://" in slide else os.path.abspath(slide)  # noqa: PTH100 - Path.absolute() leaves the ".." in it
    require_text(path, SlideError)
    return path


def refuse_own_bank(folder: RunFolder, bank: Path) -> None:
    """The bank of a run must not type that run: its own clicks would be lost.

    Raises
    ------
    ConfigError
        The bank lies in the folder.
    """
    if target(str(bank)) == target(str(folder.bank)):
        raise ConfigError(
            f"--bank {bank}: is the bank of {folder.path} itself, which would be lost; leave that run out, or pass another --out"
        )


def load_bank(path: Path, weights: Path) -> Bank:
    """The bank of another slide, for a model with these weights.

    Raises
    ------
    WsisegError
        The file is not a bank, or was made with other weights.
    """
    bank, note = read_bank(path)
    if note["weights"] != file_hash(weights):
        raise ConfigError(
            f"--bank {path}: was made with other weights than those of {weights.name}; pass --model with those, or make the bank again"
        )
    return bank


def resolve(config: RunConfig, model: str, *, maps: bool, clicked: bool, chains: bool = True) -> RunConfig:
    """Resolve ``auto`` in every setting that decides the result.

    ``--method auto`` is automatic prompts where the model has instance maps: with them they type better on typed data than Chain-of-Prompts as
    the way in (docs/methods.md has the table). Without maps the clicks lead to the cells; without clicks, or with a bank that no chain was run for,
    a grid does.

    Raises
    ------
    ConfigError
        The method needs what the model or the command does not have.
    """
    method, precision = config.method, config.precision
    if method == "auto":
        method = "apg" if maps else "cop" if clicked and chains else "amg"
    if method == "cop" and not clicked:
        raise ConfigError(
            f"--method cop: needs clicks; pass --seeds FILE or --bank FILE, or use --method {'apg' if maps else 'amg'}"
        )
    if method == "apg" and not maps:
        raise ConfigError(
            f"--method apg: {model} has no instance decoder; use --method cop with --seeds, or --method amg, or another model"
        )
    if precision == "auto":
        precision = "bf16" if pick_device(config.device).type == "cuda" else "fp32"
    return dataclasses.replace(config, method=method, precision=precision)


def _slide_key(slide: str) -> str:
    """Identity of a slide without reading all of it: size and digest of both ends."""
    if "://" in slide:
        return slide
    path, end = Path(slide), 1 << 20
    with readable(path, SlideError), path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        digest = hashlib.sha256(stream.read(end))
        stream.seek(max(size - end, 0))
        digest.update(stream.read(end))
    return f"{size}-{digest.hexdigest()}"


def _content_hash(path: str | None) -> str:
    if path is None:
        return ""
    with readable(Path(path), ConfigError):
        return file_hash(Path(path))


def describe(plan: RunPlan) -> dict[str, Any]:
    """Summary of a run's inputs for the manifest."""
    info, config = plan.info, plan.config
    return {
        "slide": {
            "path": info.path,
            "target": plan.target or info.path,
            "reader": info.reader,
            "format": info.format,
            "size_px0": list(info.size_px0),
            "mpp": info.mpp,
            "mpp_source": info.mpp_source,
            "bounds": list(info.bounds) if info.bounds else None,
            "searched_mm2": round(plan.tissue_mm2, 4),
        },
        "config": dataclasses.asdict(config),
        "seeds": config.seeds or config.bank or plan.seeds or None,
        "model": {"name": config.model, "sha256": plan.weights},
        "run_hash": plan.run_hash,
        "parts_hash": plan.parts_hash,
        "frame": "slide level-0 px, x right, y down, origin at the outer corner of pixel (0, 0)",
    }


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
        warnings = list(info.warnings)
        if estimate:
            found = estimate_scale(opened)
            facts["mpp by nuclei"] = "no estimate: too few nuclei" if found is None else str(found)
            if found is not None and not math.isnan(info.mpp):
                warnings += scale_contradiction(info.mpp, found)
        if info.mpp_source != "none":
            tissue = find_tissue(*thumbnail(opened, config.tissue.overview_mpp), config.tissue, mpp=info.mpp)
            model = load_model(config.model, "cpu")
            blocks = _blocks(info, model, config, SearchArea(tissue if config.tissue.enabled else None, None))
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
