"""The whole program on one page: tiles -> embeddings -> prompts -> masks -> polygons -> stitched cells -> typed cells -> files.

``blocks.py`` has the first half, from pixels to part files; this module has the order of things, and the second half.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsiseg import __version__
from wsiseg.celltypes.assignment import assign_types, set_click_labels, typing_summary
from wsiseg.errors import InterruptedRunError, RunError
from wsiseg.formats import FILE_NAMES, load_writer
from wsiseg.formats.bank import write_bank
from wsiseg.records import Cells, Provenance, Typing, TypingNotes
from wsiseg.runs import folder as runs
from wsiseg.runs.manifest import Status
from wsiseg.runs.plan import describe, plan_run, slide_path
from wsiseg.runs.plan_file import read_plan, write_plan
from wsiseg.runs.plausibility import implausible
from wsiseg.runs.statistics import RunStatistics, interrupt_shard
from wsiseg.runtime.atomic import partial_name
from wsiseg.runtime.profiling import trim_memory
from wsiseg.seeds.bank import match_bank, missed_cells
from wsiseg.segmentation.blocks import finished_block, segment_blocks
from wsiseg.segmentation.worker import open_worker_context
from wsiseg.stitching.outline_store import CACHE_BYTES
from wsiseg.stitching.stitch import stitch
from wsiseg.workers import map_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from wsiseg.config import RunConfig
    from wsiseg.records import Bank, Block, Seeds, TypeSpace
    from wsiseg.runs.folder import RunFolder
    from wsiseg.runs.plan import PreparedRun
    from wsiseg.runs.plan_file import RunPlan
    from wsiseg.runtime.claims import Claims
    from wsiseg.runtime.profiling import Clock
    from wsiseg.runtime.shards import Shard
    from wsiseg.segmentation.blocks import BlockReport
    from wsiseg.stitching.stitch import StitchCounts
    from wsiseg.stitching.stitched_cells import StitchedCells

logger = logging.getLogger(__name__)

_POLL_S = 1.0  #: between looks at what other processes on the same folder do
_IDLE_ROUNDS = 5  #: through blocks that others had claimed, without one being finished
_END = "end"  #: the claim on stitching and writing


def segment_slide(
    slide: str | Path,
    config: RunConfig,
    out: str | Path,
    *,
    seeds: Seeds | None = None,
    name: str | None = None,
    overwrite: bool = False,
    shard: Shard | None = None,
    on_progress: Callable[[int, int, int], None] | None = None,
    on_warning: Callable[[str], None] = lambda _: None,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Segment and type one slide.

    Parameters
    ----------
    slide
        Path or URL of the slide.
    config
        What to do.
    out, name
        Folder of all runs; the slide's own folder, called ``name`` or as the slide, is made below it.
    seeds
        Clicks that are in no file; in place of ``config.seeds``.
    overwrite
        Replace a run that has another configuration; write the files of a complete one again.
    shard
        Work on this shard's blocks only, and leave the rest to :func:`merge_run`.
    on_progress
        Called with tiles done, tiles in all, outlines so far.
    on_warning
        Called with each sentence about what is doubtful before the work begins. The manifest has them as well, with those of the result.
    stopped
        When it turns true, the current block is finished and no other is started.

    Returns
    -------
    dict
        The manifest, as written. Its ``status`` is ``incomplete`` when tiles could not be read; the same call again tries just those blocks. Of a
        shard: what it did, with ``status`` ``shard``. ``already`` is true when there was nothing to do.

    Raises
    ------
    InterruptedRunError
        ``stopped`` turned true before the end. Finished parts are kept.
    WsisegError
        Wrong input; nothing has been written then.
    """
    if not str(out).strip():
        raise RunError("the folder of all runs is empty; give a path")
    statistics = RunStatistics(str(slide))
    with statistics.clock("plan"):
        prepared = plan_run(str(slide), config, Path(out), clicks=seeds, name=name, overwrite=overwrite)
    if isinstance(prepared, runs.RunFolder):
        return (prepared.read_manifest() or {}) | {"already": True, "folder": str(prepared.path)}
    for warning in prepared.plan.warnings:
        on_warning(warning)
    with prepared.context.reader:
        initial_manifest = describe(prepared.plan) | {
            "wsiseg": __version__,
            "versions": runs.versions(),
            "status": Status.RUNNING,
        }
        folder = runs.claim_folder(Path(out), slide_path(str(slide)), initial_manifest, name=name, overwrite=overwrite)
        prepared = prepared.at(folder.parts)
        runs.drop_stale_files(folder, set(prepared.plan.tiles))
        if read_plan(folder.parts, prepared.plan.run_hash) is None:
            write_plan(folder.parts, prepared.plan)
        with prepared.context.claims as claims, _settled(folder, prepared.plan, claims, shard):
            statistics.begin(prepared.context.model.device, folder, prepared.plan, shard)
            _segment(
                prepared,
                shard.of(prepared.blocks) if shard else prepared.blocks,
                claims,
                statistics,
                on_progress,
                stopped,
            )
            if shard:
                return statistics.end_shard(folder, shard)
            with _exclusive(claims, stopped, statistics):
                if not overwrite and folder.is_complete(
                    prepared.plan.run_hash, config.formats
                ):  # another process finished first
                    return (folder.read_manifest() or {}) | {"already": True, "folder": str(folder.path)}
                return finish(folder, prepared.plan, statistics, prepared.context.model.types, stopped)


def merge_run(
    run: Path,
    *,
    allow_missing: bool = False,
    formats: tuple[str, ...] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Join the parts that shards have made: stitch, type, write. Needs neither slide nor GPU; doing it again changes nothing.

    Parameters
    ----------
    run
        Folder of one slide's run.
    allow_missing
        Write what is there; the manifest's ``status`` is ``incomplete`` then.
    formats
        Files to write; those of the shards when absent.
    stopped
        As for :func:`segment_slide`.

    Returns
    -------
    dict
        The manifest, as written.

    Raises
    ------
    RunError
        Parts are missing, or this is not the folder of a run.
    """
    from wsiseg.models import find_weights, load_types
    from wsiseg.models.cards import file_hash
    from wsiseg.runtime.claims import Claims

    folder = runs.RunFolder(run)
    plan = read_plan(folder.parts)
    if plan is None:
        raise RunError(
            f"{run}: no parts/plan.json of wsiseg in it; pass the folder of one slide's run, for example wsiseg-out/slide"
        )
    manifest = folder.read_manifest() or {}
    if manifest.get("retyped") or manifest.get("status") == Status.RETYPING:
        raise RunError(f"{run}: was re-typed with `wsiseg type`, which a merge would undo; use that for other clicks")
    if manifest.get("run_hash", plan.run_hash) != plan.run_hash:
        raise RunError(
            f"{run}: another run was begun over the shards; run it to its end, or the shards again with --overwrite"
        )
    if plan.bank is not None and file_hash(find_weights(plan.config.model)[1]) != plan.weights:
        raise RunError(
            f"{run}: was made with other weights than {plan.config.model} has here; merge it with the wsiseg that ran the shards"
        )
    if formats:
        plan = dataclasses.replace(plan, config=dataclasses.replace(plan.config, formats=formats))
    for format_name in plan.config.formats:
        load_writer(format_name)
    statistics = RunStatistics(plan.info.path)
    with Claims(folder.parts) as claims, _settled(folder, plan, claims):
        missing = statistics.collect(folder, plan)
        if missing and not allow_missing:
            raise RunError(
                f"{run}: {statistics.describe_missing(folder, missing, plan, claims)}; run those shards again, or pass --allow-missing"
            )
        with _exclusive(claims, stopped, statistics):
            return finish(folder, plan, statistics, load_types(plan.config.model) if plan.bank else None, stopped)


def finish(
    folder: RunFolder, plan: RunPlan, statistics: RunStatistics, types: TypeSpace | None, stopped: Callable[[], bool]
) -> dict[str, Any]:
    """Parts -> stitched, typed cells -> files -> manifest, which is returned."""
    config, clock = plan.config, statistics.clock
    trim_memory()
    parts = [folder.parts / f"{name}.parquet" for name in plan.tiles if name in statistics.blocks]
    statistics.require_current(parts, plan.parts_hash)
    cache = min(CACHE_BYTES, int(config.max_ram_gb * 2**26)) if config.max_ram_gb else CACHE_BYTES
    result = stitch_and_type(parts, plan, types, clock, cache_bytes=cache)
    cells, typing, bank = result.cells, result.typing, result.bank
    provenance = Provenance(
        tool="wsiseg",
        version=__version__,
        slide=Path(plan.info.path).name,
        config_hash=plan.run_hash,
        details={"model": config.model, "method": config.method},
    )
    files = []
    for format_name in config.formats:
        if stopped():
            raise statistics.interrupted()
        with clock("write"):
            path = folder.path / FILE_NAMES[format_name]
            files.append((load_writer(format_name)(path, cells, typing, plan.info, provenance) or path).name)
    if bank is not None and not bank.from_other_slide:
        write_bank(folder.bank, bank, provenance.slide, plan.weights)
        files.append(folder.bank.name)
    folder.drop_old_files(files)
    outcome = statistics.account(plan)
    warnings = implausible(cells.areas, plan) if outcome["status"] == Status.COMPLETE else ()
    manifest = (
        describe(plan)
        | outcome
        | {
            "wsiseg": __version__,
            "versions": runs.versions(),
            "folder": str(folder.path),
            "files": files,
            "warnings": [*plan.warnings, *result.notes.warnings, *warnings],
            "types": typing.count(),
            "typing": typing_summary(typing, bank, result.notes) if bank else {},
        }
    )
    manifest["counts"] |= {"cells": len(cells)} | dataclasses.asdict(result.counts)
    manifest["model"] |= {"device": statistics.device}
    folder.write_manifest(manifest)
    logger.info(
        "%s: %d cells",
        folder.path,
        len(cells),
        extra={"event": "slide", "facts": {"folder": str(folder.path), **manifest["counts"]}},
    )
    return manifest


@dataclass(frozen=True)
class StitchedResult:
    """The result before it is written.

    Attributes
    ----------
    cells, typing
        Stitched cells in the order of the files, and a verdict on each.
    notes
        What typing found out, with the warnings about clicks.
    bank
        Of the plan; but for Chain-of-Prompts with the descriptors of the cells that the clicks mean here.
    counts
        Of stitching.
    """

    cells: StitchedCells
    typing: Typing
    notes: TypingNotes
    bank: Bank | None
    counts: StitchCounts


def stitch_and_type(
    sources: Sequence[Path | Cells],
    plan: RunPlan,
    types: TypeSpace | None,
    clock: Clock,
    *,
    cache_bytes: int = CACHE_BYTES,
) -> StitchedResult:
    """Outlines of all tiles, any order -> stitched cells and their types.

    The clicks are looked up in the stitched cells, as :func:`wsiseg.runs.retype.type_run` does, so that the same clicks give the same types. A
    click that means none of them adds the cell decoded from it, which competes with the rest: what somebody clicked is in the result even if no
    automatic prompt found it. Under Chain-of-Prompts the clicked cells compete from the start and keep the descriptors that its prompts spread
    from.
    """
    info, config, bank, notes = plan.info, plan.config, plan.bank, TypingNotes()
    reach_px0 = config.cop.click_reach_um / info.mpp

    def join(clicked: Cells) -> tuple[StitchedCells, StitchCounts]:
        with clock("stitch"):
            return stitch(
                [*sources, clicked],
                info.size_px0,
                config.masks.min_area_um2 / info.mpp**2,
                config.stitching,
                descriptor_size=plan.descriptor_size,
                cache_bytes=cache_bytes,
            )

    none = Cells.empty(plan.descriptor_size)
    if bank is None:
        cells, counts = join(none)
        return StitchedResult(cells, Typing.untyped(len(cells)), notes, None, counts)
    cells, counts = join(bank.cells if config.method == "cop" else none)
    missed = none if config.method == "cop" else missed_cells(bank, cells, reach_px0)
    if len(missed):
        cells, counts = join(missed)
    with clock("type"):
        descriptors = cells.descriptors()
        matched, rows, warnings = match_bank(bank, cells, descriptors, reach_px0)
        if config.method != "cop":
            bank = matched
        typing, notes = assign_types(descriptors, cells.points_xy * info.mpp, bank, types, config.typing)
        typing = set_click_labels(typing, rows)
        notes = dataclasses.replace(notes, warnings=(*notes.warnings, *warnings))
    return StitchedResult(cells, typing, notes, bank, counts)


def _segment(
    prepared: PreparedRun,
    blocks: list[Block],
    claims: Claims,
    statistics: RunStatistics,
    on_progress: Callable[[int, int, int], None] | None,
    stopped: Callable[[], bool],
) -> None:
    """Work through blocks until each is done, here or by another process on the same folder."""
    config, total = prepared.context.spec.config, sum(len(b.tiles) for b in blocks)

    def add(report: BlockReport) -> None:
        statistics.add(report)
        if on_progress:
            on_progress(statistics.tiles, total, statistics.outlines)

    tried: set[str] = set()
    idle = 0
    with statistics.clock("tiles"):
        while True:
            for block in blocks:
                format_name = (
                    None
                    if block.name in statistics.blocks
                    else finished_block(prepared.context.spec, block, failed=block.name in tried)
                )
                if format_name:
                    add(format_name)
            todo = [b for b in blocks if b.name not in statistics.blocks]
            if not todo:
                return
            if stopped():
                raise statistics.interrupted(len(blocks))
            busy = set(claims.busy(b.name for b in todo))
            if len(busy) == len(todo):  # other processes are working on all of them
                time.sleep(_POLL_S)
                continue
            if idle > _IDLE_ROUNDS:  # every process that claims them dies
                names = ", ".join(b.name for b in todo[:8])
                raise RunError(
                    f"{statistics.slide}: {len(todo)} blocks are claimed again and again, never finished ({names}); see the logs of workers"
                )
            claims.drop_stale()
            done = len(statistics.blocks)
            for report in map_blocks(
                segment_blocks,
                [b for b in todo if b.name not in busy],
                partial(open_worker_context, prepared.context.spec),
                workers=config.workers,
                scheduler=config.scheduler,
                cluster=config.cluster,
                context=prepared.context,
                scratch=prepared.context.spec.parts / partial_name("dask"),
                weight=lambda block: len(block.tiles),
                stopped=stopped,
            ):
                add(report)
            tried |= {b.name for b in todo}
            idle = idle + 1 if len(statistics.blocks) == done else 0


@contextlib.contextmanager
def _settled(folder: RunFolder, plan: RunPlan, claims: Claims, shard: Shard | None = None) -> Iterator[None]:
    """After an orderly stop the manifest says ``interrupted``, and no longer ``running``, unless another process is at work on the folder."""
    try:
        yield
    except InterruptedRunError:
        with contextlib.suppress(RunError):  # that the run was stopped is what there is to say
            if shard:
                interrupt_shard(folder, shard, plan.run_hash)
            if not claims.busy(plan.tiles) and claims.take(_END):
                try:
                    folder.interrupt(plan.run_hash)
                finally:
                    claims.release(_END)
        raise


@contextlib.contextmanager
def _exclusive(claims: Claims, stopped: Callable[[], bool], statistics: RunStatistics) -> Iterator[None]:
    """Only one process stitches and writes; the others wait, and find it done."""
    while not claims.take(_END):
        if stopped():
            raise statistics.interrupted()
        time.sleep(_POLL_S)
    try:
        claims.drop_stale()
        yield
    finally:
        claims.release(_END)
