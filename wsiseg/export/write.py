"""Export of one run: its inputs are checked before anything is written."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from wsiseg.errors import ConfigError, RunError
from wsiseg.export import EXPORTS, check_formats, load_exporter
from wsiseg.export.source import ExportSettings, open_run

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

MPP_RANGE = (0.05, 100.0)
SQUARE_RANGE_UM = (1.0, 10_000.0)


def export_run(
    path: Path,
    formats: Sequence[str],
    out: Path,
    *,
    roi: Path | None = None,
    mpp: float | None = None,
    square_um: float | None = None,
    overwrite: bool = False,
) -> Iterator[tuple[Path, list[str]]]:
    """Write a run's cells in other formats.

    Parameters
    ----------
    path
        Folder of one slide's run.
    formats
        Keys of ``EXPORTS``.
    out
        Folder of the files, created if missing.
    roi, mpp, square_um
        Regions, and as in :class:`ExportSettings`.
    overwrite
        Replace files that exist.

    Yields
    ------
    tuple of (Path, list of str)
        Each file as it is complete, and with the first the warnings about the regions.

    Raises
    ------
    ConfigError
        A format or a setting is wrong; nothing has been written then.
    RunError
        A file exists, or the run is not finished; nothing has been written then.
    FormatError
        The table or the regions cannot be read.
    """
    names = check_formats(formats)
    settings = ExportSettings()
    for option, value, (low, high) in (("mpp", mpp, MPP_RANGE), ("square", square_um, SQUARE_RANGE_UM)):
        if value is not None and not (math.isfinite(value) and low <= value <= high):
            raise ConfigError(f"--{option}: found {value:g}; {low:g} to {high:g} microns are allowed")
    settings = dataclasses.replace(settings, mpp=mpp, square_um=settings.square_um if square_um is None else square_um)
    run, warnings = open_run(path, roi)
    files = {name: out / EXPORTS[name].file for name in names}
    if not overwrite:
        for file in files.values():
            if file.exists():
                raise RunError(f"{file}: exists; pass --overwrite to replace it, or another --out")
    for name, file in files.items():
        load_exporter(name)(file, run, settings)
        yield file, warnings
        warnings = []
