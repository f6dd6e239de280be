"""The end of a run: the outlines of all parts are stitched and typed, and the files are written."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wsiseg.celltypes.assignment import assign_types, set_click_labels, typing_summary
from wsiseg.celltypes.described import assign_described
from wsiseg.formats import FILE_NAMES, load_writer
from wsiseg.formats.bank import write_bank
from wsiseg.measurements import measure
from wsiseg.records import Bank, Cells, Provenance, Typing, TypingNotes
from wsiseg.runs.manifest import Manifest, Status
from wsiseg.runs.plausibility import implausible
from wsiseg.runtime.profiling import Clock, trim_memory
from wsiseg.runtime.version import __version__
from wsiseg.seeds.bank import match_bank, missed_cells
from wsiseg.stitching.outline_store import CACHE_BYTES
from wsiseg.stitching.stitch import keep_all, stitch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from wsiseg.config import RunConfig
    from wsiseg.records import DescribedType, SlideInfo, TypeSpace
    from wsiseg.runs.folder import RunFolder
    from wsiseg.runs.plan_file import RunPlan
    from wsiseg.runs.statistics import RunStatistics
    from wsiseg.stitching.stitch import StitchCounts
    from wsiseg.stitching.stitched_cells import StitchedCells

logger = logging.getLogger(__name__)


def finish(
    folder: RunFolder,
    plan: RunPlan,
    statistics: RunStatistics,
    types: TypeSpace | None,
    stopped: Callable[[], bool],
    on_phase: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Stitch and type the outlines of the parts, write the files and the manifest, and return it."""
    on_phase("stitching and typing")
    config, clock = plan.config, statistics.clock
    trim_memory()
    parts = [folder.parts / f"{name}.parquet" for name in plan.tiles if name in statistics.blocks]
    statistics.require_current(parts, plan.parts_hash)
    cache = min(CACHE_BYTES, int(config.max_ram_gb * 2**26)) if config.max_ram_gb else CACHE_BYTES
    result = stitch_and_type(
        parts,
        info=plan.info,
        config=config,
        bank=plan.bank,
        types=types,
        described=plan.described,
        descriptor_size=plan.descriptor_size,
        clock=clock,
        cache_bytes=cache,
    )
    cells, typing, bank = result.cells, result.typing, result.bank
    provenance = Provenance(
        tool="wsiseg",
        version=__version__,
        slide=Path(plan.info.path).name,
        config_hash=plan.run_hash,
        details={"model": config.model, "method": config.method},
    )
    files = []
    with clock("measure"):
        measured = measure(cells, typing, plan.info.mpp)
    for format_name in config.formats:
        if stopped():
            raise statistics.interrupted()
        on_phase(f"writing {FILE_NAMES[format_name]}")
        with clock("write"):
            path = folder.path / FILE_NAMES[format_name]
            files.append((load_writer(format_name)(path, measured, typing, plan.info, provenance) or path).name)
    if bank is not None and not bank.from_other_slide:
        write_bank(folder.bank, bank, provenance.slide, plan.weights)
        files.append(folder.bank.name)
    folder.drop_old_files(files)
    outcome = statistics.account(plan)
    warnings = implausible(cells.areas, plan) if outcome["status"] == Status.COMPLETE else ()
    begun = Manifest.of(plan)
    counts = outcome.pop("counts") | {"cells": len(cells)} | dataclasses.asdict(result.counts)
    manifest = dataclasses.replace(
        begun,
        model=begun.model | {"device": statistics.device},
        folder=str(folder.path),
        files=tuple(files),
        warnings=(*plan.warnings, *result.notes.warnings, *warnings),
        counts=counts,
        types=typing.count(),
        typing=typing_summary(typing, bank, result.notes, plan.described) if len(typing.names) > 1 else {},
        **outcome,
    )
    manifest.write(folder.manifest_path)
    facts = {"folder": str(folder.path), **counts}
    logger.info("%s: %d cells", folder.path, len(cells), extra={"event": "slide", "facts": facts})
    return manifest


@dataclass(frozen=True)
class StitchedResult:
    """The result before it is written.

    Attributes
    ----------
    cells, typing
        Stitched cells in the order of the files, and their types.
    notes
        What the typing step reports, with the warnings about clicks.
    bank
        Of the plan; except under Chain-of-Prompts, with the descriptors of the stitched cells that were clicked.
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
    *,
    info: SlideInfo,
    config: RunConfig,
    bank: Bank | None,
    types: TypeSpace | None,
    described: Sequence[DescribedType] = (),
    descriptor_size: int,
    clock: Clock | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> StitchedResult:
    """Stitch the outlines of all tiles, in any order, and type the cells.

    The clicks are looked up in the stitched cells, as :func:`wsiseg.runs.retype.type_run` does, so that the same clicks give the same types. A
    click on none of them adds the cell decoded from it, which competes with the rest: what somebody clicked is in the result even if no
    automatic prompt found it. Under Chain-of-Prompts the clicked cells compete from the start and keep the descriptors that its prompts spread
    from. What a detector found as a described type is of that type; descriptors do not decide then.

    Parameters
    ----------
    sources
        Part files, or outlines in memory.
    info, config, bank
        The slide, resolved settings, and the clicked types.
    types
        The model's distribution of types; ``None``: it is taken from this slide's cells.
    described
        The types that the detector was asked for.
    descriptor_size
        D of the outlines' descriptors.
    clock
        Takes the seconds of both steps.
    cache_bytes
        Memory for part files that are read more than once.
    """
    clock, notes = clock or Clock(), TypingNotes()
    reach_px0 = config.cop.click_reach_um / info.mpp

    def join(clicked: Cells) -> tuple[StitchedCells, StitchCounts]:
        with clock("stitch"):
            if config.method == "outlines":
                return keep_all(sources, info.size_px0, descriptor_size=descriptor_size, cache_bytes=cache_bytes)
            cells, counts = stitch(
                [*sources, clicked],
                info.size_px0,
                config.masks.min_area_um2 / info.mpp**2,
                config.stitching,
                descriptor_size=descriptor_size,
                cache_bytes=cache_bytes,
            )
            return cells, dataclasses.replace(counts, from_clicks=len(clicked))

    none = Cells.empty(descriptor_size)
    if bank is None:
        cells, counts = join(none)
        typing = Typing.untyped(len(cells))
        if described:
            with clock("type"):
                typing = assign_described(cells.concept_scores(len(described)), described, config.typing)
        elif config.typing.known_types:
            with clock("type"):
                xy_um = cells.points_xy * info.mpp
                typing, notes = assign_types(
                    cells.descriptors(), xy_um, Bank((), none), types, config.typing, config.stain
                )
        return StitchedResult(cells, typing, notes, None, counts)
    cells, counts = join(bank.cells if config.method == "cop" else none)
    missed = none if config.method == "cop" else missed_cells(bank, cells, reach_px0)
    if len(missed):
        cells, counts = join(missed)
    with clock("type"):
        descriptors = cells.descriptors()
        matched, rows, warnings = match_bank(bank, cells, descriptors, reach_px0)
        if config.method != "cop":
            bank = matched
        if described:
            typing = assign_described(cells.concept_scores(len(described)), described, config.typing)
        else:
            typing, notes = assign_types(
                descriptors, cells.points_xy * info.mpp, bank, types, config.typing, config.stain
            )
        typing = set_click_labels(typing, rows)
        notes = dataclasses.replace(notes, warnings=(*notes.warnings, *warnings))
    return StitchedResult(cells, typing, notes, bank, counts)
