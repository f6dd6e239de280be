"""Other clicks on a finished run: the cells are there, only their types are decided again. No slide, no GPU; seconds for a million cells."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from wsiseg.celltypes.assignment import assign_types, set_click_labels, typing_summary
from wsiseg.config import CHAINED, check, from_mapping, read_config
from wsiseg.errors import ConfigError, RunError, SeedsError
from wsiseg.formats import FILE_NAMES, load_writer, require_formats
from wsiseg.formats.bank import write_bank
from wsiseg.formats.geoparquet import CellTable, read_table, write_retyped
from wsiseg.formats.seed_rules import require_points
from wsiseg.formats.seeds import check_seeds, read_seeds
from wsiseg.models import find_weights, load_types
from wsiseg.models.cards import file_hash
from wsiseg.records import Bank, Cells, Provenance, SlideInfo, TypePrototypes
from wsiseg.runs.folder import RunFolder, refuse_own_bank
from wsiseg.runs.inputs import load_bank, require_known_types
from wsiseg.runs.manifest import FINISHED, Status
from wsiseg.runtime.paths import kind_of
from wsiseg.runtime.version import __version__
from wsiseg.seeds.bank import same_cell
from wsiseg.seeds.matching import describe_nearest, match_groups

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from wsiseg.config import RunConfig
    from wsiseg.records import Seeds, Typing
    from wsiseg.runs.manifest import Manifest


def type_run(
    run: Path,
    *,
    seeds: Path | None = None,
    bank: Path | None = None,
    known_types: bool = False,
    model: str | None = None,
    settings: Path | None = None,
    formats: tuple[str, ...] | None = None,
) -> Manifest:
    """Give the cells of a finished run new types; its files are replaced, one by one and whole.

    Parameters
    ----------
    run
        Folder of one slide's run.
    seeds, bank
        Clicks on this slide, or the bank of another one; at most one of the two.
    known_types
        The model's own classes are types too; without clicks, all the types.
    model
        Name or weights of the run's model, when they are not those of the package any more.
    settings
        TOML or JSON file; its table ``typing`` changes the run's priors and thresholds.
    formats
        Files to write; those of the run when absent. ``parquet`` is always written; without ``geojson`` the file with the old types is removed.

    Returns
    -------
    Manifest
        As written.

    Raises
    ------
    WsisegError
        The run is not finished, its table is damaged, the weights are others, or a click meets no cell. Nothing has been written then.
    """
    started = time.perf_counter()
    check_source(seeds, bank, known_types=known_types)
    folder, manifest = _finished_run(run)
    config = from_mapping(manifest.config, str(folder.manifest_path))
    config = dataclasses.replace(
        config, seeds=_named(seeds), bank=_named(bank), text=(), model=config.model if model is None else model
    )
    if settings is not None:
        config = dataclasses.replace(config, typing=read_config(settings, config).typing)
    if known_types:
        config = dataclasses.replace(config, typing=dataclasses.replace(config.typing, known_types=True))
    if formats:
        config = dataclasses.replace(config, formats=tuple(dict.fromkeys((*formats, "parquet"))))
    require_formats(config.formats)
    check(config, str(folder.manifest_path))
    if config.method in CHAINED:
        raise RunError(
            f"{run}: has only cells that looked like its own clicks (--method {config.method}); run the slide with --method apg or amg"
        )
    if bank is not None:
        refuse_own_bank(folder, bank)
    name = config.model
    weights = find_weights(name)[1]
    if file_hash(weights) != manifest.model["sha256"]:
        raise ConfigError(
            f"{run}: was made with other weights than {weights.name} of this wsiseg; pass them with --model, or run the slide again"
        )
    types = load_types(name)
    if config.typing.known_types:
        require_known_types(name, types)
    table = read_table(folder.path / FILE_NAMES["parquet"])
    info = manifest.slide_info(folder.manifest_path)
    clicks = Bank((), Cells.empty(table.descriptors.shape[1]))
    warnings: list[str] = []
    rows: list[NDArray[np.intp]] = []
    if seeds is not None:
        checked, warnings = check_seeds(read_seeds(seeds), info)
        require_points(checked, "wsiseg type")
        clicks, rows = bank_of_table(table, checked, config, info.mpp)
    elif bank is not None:
        clicks = load_bank(bank, weights)
    result, notes = assign_types(
        table.descriptors, table.points_xy * info.mpp, clicks, types, config.typing, config.stain
    )
    result = set_click_labels(result, rows)
    notes = dataclasses.replace(notes, warnings=(*warnings, *notes.warnings))

    # Not the hash of `run` with these clicks: there a click where no cell was found adds one.
    source = seeds or bank
    clicked = file_hash(source) if source else ""
    digest = hashlib.sha256(
        json.dumps(["type", manifest.parts_hash, clicked, dataclasses.asdict(config.typing)]).encode()
    ).hexdigest()[:16]
    provenance = Provenance(
        tool="wsiseg",
        version=__version__,
        slide=table.note["slide"],
        config_hash=digest,
        details={"model": config.model, "method": config.method},
    )
    table.check()  # damage is found before anything is written
    replace(manifest, status=Status.RETYPING, status_before=manifest.status).write(folder.manifest_path)
    files = _write(folder, table, config.formats, result, clicks, info, provenance, file_hash(weights))
    earlier = manifest.typing.get("warnings", [])
    manifest = replace(
        manifest,
        config=dataclasses.asdict(config),
        seeds=config.seeds or config.bank,
        warnings=(*(w for w in manifest.warnings if w not in earlier), *notes.warnings),
        retyped=True,
        run_hash=provenance.config_hash,
        types=result.count(),
        typing=typing_summary(result, clicks, notes),
        files=tuple(files),
        seconds=manifest.seconds | {"retype": round(time.perf_counter() - started, 3)},
    )
    manifest.write(folder.manifest_path)
    return manifest


def _named(path: Path | None) -> str | None:
    return None if path is None else str(path)


def check_source(seeds: Path | None, bank: Path | None, *, known_types: bool) -> None:
    """Check that the types come from one place.

    Raises
    ------
    ConfigError
        They come from none, or from two.
    """
    if (seeds is not None and bank is not None) or (seeds is None and bank is None and not known_types):
        raise ConfigError(
            "types come from --seeds FILE, --bank FILE or --known-types; pass one of the first two, or the last alone"
        )


def _finished_run(run: Path) -> tuple[RunFolder, Manifest]:
    """The folder and its manifest."""
    folder = RunFolder(run)
    manifest = folder.manifest()
    if manifest is None:
        raise RunError(
            f"{run}: no manifest.json of wsiseg in it; pass the folder of one slide's run, for example wsiseg-out/slide"
        )
    if manifest.status == Status.RETYPING:  # an earlier `type` was stopped between two files; this one writes all
        manifest = replace(manifest, status=manifest.status_before or Status.COMPLETE, status_before="")
    if manifest.status not in FINISHED:
        raise RunError(f"{run}: the run is not finished (status {manifest.status}); run its command again first")
    needed = {"parts_hash": manifest.parts_hash, "sha256": manifest.model.get("sha256"), "seconds": manifest.seconds}
    missing = [key for key, value in needed.items() if not value]
    if missing:
        raise RunError(
            f"{folder.manifest_path}: damaged (no {missing[0]!r} in it); run the slide again: its parts are used"
        )
    if kind_of(folder.path / FILE_NAMES["parquet"], RunError) == "nothing":
        raise RunError(
            f"{run}: no cells.parquet in it; run the slide again with --format geojson,parquet, its finished parts are used again"
        )
    return folder, manifest


def _write(
    folder: RunFolder,
    table: CellTable,
    formats: tuple[str, ...],
    typing: Typing,
    clicks: Bank,
    info: SlideInfo,
    provenance: Provenance,
    weights: str,
) -> list[str]:
    """The run's files with the new types; names of those written."""
    write_retyped(folder.path / FILE_NAMES["parquet"], table, typing, provenance)
    files = [FILE_NAMES["parquet"]]
    if table.measurement_names and formats != ("parquet",):
        table = read_table(folder.path / FILE_NAMES["parquet"])  # with the distances to the new types
    for format_name in formats:
        if format_name != "parquet":
            path = folder.path / FILE_NAMES[format_name]
            files.append((load_writer(format_name)(path, table, typing, info, provenance) or path).name)
    if clicks.types and not clicks.from_other_slide:
        write_bank(folder.bank, clicks, table.note["slide"], weights)
        files.append(folder.bank.name)
    folder.drop_old_files(files)
    return files


def bank_of_table(table: CellTable, seeds: Seeds, config: RunConfig, mpp: float) -> tuple[Bank, list[NDArray[np.intp]]]:
    """The clicked cells, found in the table.

    Parameters
    ----------
    table, seeds
        Of the same slide; clicks in level-0 px.
    config, mpp
        ``cop.click_reach_um``; microns per px.

    Returns
    -------
    bank, rows
        Rows of the clicked cells, type by type.

    Raises
    ------
    SeedsError
        A click meets no cell, or clicks of two types meet the same.
    """
    points = [kind.points for kind in seeds.types] + [kind.negative for kind in seeds.types]
    places = [f"{seeds.source}: types[{t}].{side}" for side in ("points", "negative") for t in range(len(seeds.types))]
    clicks = [np.array(p, float).reshape(-1, 2) for p in points]
    found = match_groups(clicks, table, config.cop.click_reach_um / mpp)
    owner: dict[int, tuple[int, str]] = {}
    for t, (place, mine) in enumerate(zip(places, found, strict=True)):
        for i, row in enumerate(mine.tolist()):
            if row < 0:
                raise SeedsError(_no_cell(f"{place}[{i}]", points[t][i], table, mpp))
            if t >= len(seeds.types):  # a click against a type may hit any cell
                continue
            other, where = owner.setdefault(row, (t, f"{place}[{i}]"))
            if other != t:
                raise SeedsError(same_cell(f"{place}[{i}]", where))
    rows, against = found[: len(seeds.types)], found[len(seeds.types) :]
    z = table.descriptors
    types = tuple(
        TypePrototypes(
            name=kind.name,
            color=kind.color,
            clicks=clicks[t],
            clicked=z[rows[t]].astype(np.float32),
            negative=z[against[t]].astype(np.float32),
            negative_clicks=clicks[len(rows) + t],
        )
        for t, kind in enumerate(seeds.types)
    )
    return Bank(types, Cells.empty(z.shape[1])), rows


def _no_cell(place: str, point: tuple[float, float], table: CellTable, mpp: float) -> str:
    """The sentence on a click that meets no cell."""
    where = f"{place} = [{point[0]:g}, {point[1]:g}]: no cell there"
    if not len(table):
        return f"{where}: the run found no cells at all"
    return f"{where}; {describe_nearest(point, table, mpp)}; move the click onto a nucleus, or run the slide again with this click"
