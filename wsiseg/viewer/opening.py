"""From what the user named, a slide or a run, to a page that is ready to be served."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from wsiseg.errors import ConfigError, RunError, SlideError
from wsiseg.formats import FILE_NAMES
from wsiseg.runs.folder import RunFolder, check_out, find_folder
from wsiseg.runs.inputs import slide_path
from wsiseg.runs.manifest import FINISHED, Status
from wsiseg.runtime.paths import kind_of
from wsiseg.slide import open_slide
from wsiseg.slide.stain import unrendered
from wsiseg.viewer.page import SlidePage
from wsiseg.viewer.segmenting import OnDemand
from wsiseg.viewer.tiles import SlideTiles

if TYPE_CHECKING:
    from collections.abc import Callable

    from wsiseg.config import RunConfig
    from wsiseg.runs.manifest import Manifest
    from wsiseg.slide import SlideReader


def open_page(
    target: str,
    config: RunConfig,
    out: Path,
    *,
    seeds: Path | None = None,
    slide: Path | None = None,
    on_warning: Callable[[str], None] = lambda _: None,
) -> SlidePage:
    """Open the page of a slide or of a run.

    Parameters
    ----------
    target
        The folder of a run, or a slide: then the finished run of that slide below ``out`` if there is one, else a run is begun there, and blocks
        are segmented as they are looked at.
    config
        Settings of a run that is begun; without clicks.
    out
        Folder of all runs.
    seeds
        Clicks to begin with.
    slide
        Where the slide of a run is now, if it was moved.
    on_warning
        Called with each sentence about what is doubtful.

    Returns
    -------
    SlidePage
        To be closed by the caller.

    Raises
    ------
    WsisegError
        The slide or the run cannot be used, or another page is open on it.
    """
    named = RunFolder(Path(target))
    manifest = named.manifest() if "://" not in target and kind_of(named.path, RunError) == "folder" else None
    if manifest is None:
        if slide is not None:
            raise ConfigError("--slide: says where the slide of a RUN is now; pass the folder of a run")
        check_out(out, None)
        named = find_folder(out, slide_path(target))
        manifest = named.manifest()
        if manifest is None or not _has_table(named, manifest):
            return _begin(target, config, out, seeds, on_warning)
    elif not _has_table(named, manifest):
        place = str(slide) if slide is not None else str(manifest.slide["path"])
        raise RunError(
            f"{target}: the run is not finished (status {manifest.status}); open its slide instead: "
            f"wsiseg view {place} --out {named.path.parent}"
        )
    reader = _slide_of(named, manifest, target, slide)
    try:
        if manifest.status == Status.RETYPING:
            on_warning(
                f"{named.path}: typing was stopped between two files; press Apply, or use wsiseg type, to write them all"
            )
        return SlidePage(reader, SlideTiles(reader), named, seeds=seeds)
    except BaseException:
        reader.close()
        raise


def _has_table(folder: RunFolder, manifest: Manifest) -> bool:
    finished = manifest.status in FINISHED or manifest.status == Status.RETYPING
    return finished and kind_of(folder.path / FILE_NAMES["parquet"], RunError) == "file"


def _begin(
    target: str, config: RunConfig, out: Path, seeds: Path | None, on_warning: Callable[[str], None]
) -> SlidePage:
    on_demand = OnDemand(target, config, out)
    try:
        for warning in on_demand.warnings:
            on_warning(warning)
        shown = unrendered(on_demand.reader)
        return SlidePage(shown, SlideTiles(shown), on_demand.folder, on_demand=on_demand, seeds=seeds)
    except BaseException:
        on_demand.close()
        raise


def _slide_of(folder: RunFolder, manifest: Manifest, target: str, moved: Path | None) -> SlideReader:
    """Open the slide of a run: where the user says, or where it was."""
    info = manifest.slide_info(folder.manifest_path)
    known = [str(manifest.slide.get("target") or info.path), info.path]
    places = [str(moved)] if moved is not None else known
    place = next((p for p in places if "://" in p or Path(p).exists()), places[0])
    force = bool(manifest.config.get("force_mpp", False))
    try:
        reader = open_slide(place, mpp=info.mpp, force_mpp=force, reader=info.reader)
    except (SlideError, ConfigError) as error:
        raise SlideError(f"{target}: its slide cannot be opened ({error}); pass --slide FILE") from error
    if reader.info.size_px0 != info.size_px0:
        sizes = [f"{width} x {height}" for width, height in (reader.info.size_px0, info.size_px0)]
        reader.close()
        raise SlideError(f"{place}: has {sizes[0]} px, the run's slide {sizes[1]}; pass the right one with --slide")
    return reader
