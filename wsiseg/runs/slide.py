"""The whole program on one page: inputs -> folder -> plan -> parts of outlines -> stitched, typed cells -> files.

``segmentation/tile.py`` has the steps of one tile, ``finish.py`` those of the cells of all tiles.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from wsiseg.errors import RunError
from wsiseg.formats import require_formats
from wsiseg.models import find_weights, load_types
from wsiseg.models.cards import file_hash
from wsiseg.runs.finish import finish
from wsiseg.runs.folder import RunFolder, check_out, choose_folder, claim_folder, drop_stale_files
from wsiseg.runs.inputs import read_inputs
from wsiseg.runs.manifest import Manifest, Status
from wsiseg.runs.plan import plan_run
from wsiseg.runs.plan_file import keep_plan, read_plan
from wsiseg.runs.scheduling import recorded_interruption, segment_all, sole_writer
from wsiseg.runs.statistics import RunStatistics
from wsiseg.runtime.claims import Claims

if TYPE_CHECKING:
    from collections.abc import Callable

    from wsiseg.config import RunConfig
    from wsiseg.records import Seeds
    from wsiseg.runs.statistics import ShardRecord
    from wsiseg.runtime.shards import Shard


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
    on_phase: Callable[[str], None] = lambda _: None,
    on_warning: Callable[[str], None] = lambda _: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Manifest | ShardRecord:
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
        Called with tiles done, tiles in all, outlines so far: before the first tile, and as blocks are finished.
    on_phase
        Called with the name of each phase that has no tiles, as it begins.
    on_warning
        Called with each sentence about what is doubtful before the work begins. The manifest has them as well, with those of the result.
    stopped
        When it turns true, the current block is finished and no other is started.

    Returns
    -------
    Manifest or ShardRecord
        The manifest, as written. Its ``status`` is ``incomplete`` when tiles could not be read; the same call again tries just those blocks.
        ``already`` is true when there was nothing to do. Of a shard: its record.

    Raises
    ------
    InterruptedRunError
        ``stopped`` turned true before the end. Finished parts are kept.
    WsisegError
        Wrong input; nothing has been written then.
    """
    if not str(out).strip():
        raise RunError("the folder of all runs is empty; give a path")
    slide, out = str(slide), Path(out)
    check_out(out, name)
    statistics = RunStatistics(slide)
    on_phase("reading inputs")
    with statistics.clock("plan"):
        inputs = read_inputs(slide, config, clicks=seeds)
    with inputs.reader:
        with statistics.clock("plan"):
            folder = choose_folder(out, inputs, name=name, overwrite=overwrite)
            if not overwrite and folder.is_complete(inputs.run_hash, config.formats):
                return folder.opened()
            on_phase("planning")
            run = plan_run(inputs, folder.parts)
        for warning in run.plan.warnings:
            on_warning(warning)
        folder = claim_folder(out, Manifest.of(run.plan), name=name, overwrite=overwrite)
        run = run.at(folder.parts)
        drop_stale_files(folder, set(run.plan.tiles))
        keep_plan(folder.parts, run.plan, run.given)
        with run.context.claims as claims, recorded_interruption(folder, run.plan, claims, shard):
            statistics.begin(run.context.model.device, folder, run.plan, shard)
            blocks = shard.of(run.blocks) if shard else run.blocks
            segment_all(run, blocks, claims, statistics, on_progress=on_progress, stopped=stopped)
            if shard:
                return statistics.end_shard(folder, shard)
            with sole_writer(claims, stopped, statistics):
                if not overwrite and folder.is_complete(run.plan.run_hash, config.formats):  # another process was first
                    return folder.opened()
                return finish(folder, run.plan, statistics, run.context.model.types, stopped, on_phase)


def merge_run(
    run: Path,
    *,
    allow_missing: bool = False,
    formats: tuple[str, ...] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Manifest:
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
    Manifest
        As written.

    Raises
    ------
    RunError
        Parts are missing, or this is not the folder of a run.
    """
    folder = RunFolder(run)
    plan = read_plan(folder.parts)
    if plan is None:
        raise RunError(
            f"{run}: no parts/plan.json of wsiseg in it; pass the folder of one slide's run, for example wsiseg-out/slide"
        )
    manifest = folder.manifest()
    if manifest and (manifest.retyped or manifest.status == Status.RETYPING):
        raise RunError(f"{run}: was re-typed with `wsiseg type`, which a merge would undo; use that for other clicks")
    if manifest and manifest.run_hash != plan.run_hash:
        raise RunError(
            f"{run}: another run was begun over the shards; run it to its end, or the shards again with --overwrite"
        )
    typed = plan.bank is not None or plan.config.typing.known_types
    if typed and file_hash(find_weights(plan.config.model)[1]) != plan.weights:
        raise RunError(
            f"{run}: was made with other weights than {plan.config.model} has here; merge it with the wsiseg that ran the shards"
        )
    if formats:
        plan = dataclasses.replace(plan, config=dataclasses.replace(plan.config, formats=formats))
    require_formats(plan.config.formats)
    statistics = RunStatistics(plan.info.path)
    with Claims(folder.parts) as claims, recorded_interruption(folder, plan, claims):
        missing = statistics.collect(folder, plan)
        if missing and not allow_missing:
            raise RunError(
                f"{run}: {statistics.describe_missing(folder, missing, plan, claims)}; run those shards again, or pass --allow-missing"
            )
        with sole_writer(claims, stopped, statistics):
            return finish(folder, plan, statistics, load_types(plan.config.model) if typed else None, stopped)
