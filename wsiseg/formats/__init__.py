"""Readers and writers of wsiseg's files. Nothing heavy is imported until a format is used.

``FORMATS`` maps the name given to ``--format`` to its writer; every writer has the signature of
:func:`wsiseg.formats.geoparquet.write_geoparquet`. ``FILE_NAMES`` has each one's file in the run folder.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Protocol, cast

from wsiseg.errors import ConfigError
from wsiseg.runtime.text import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from wsiseg.records import CellSource, Provenance, SlideInfo, Typing

FORMATS = {"geojson": "wsiseg.formats.geojson:write_geojson", "parquet": "wsiseg.formats.geoparquet:write_geoparquet"}
CHUNK = 5_000  #: cells that a writer asks for at once: 6 MB of polygons, and as much again in a source that reads ahead
FILE_NAMES = {"geojson": "cells.geojson.gz", "parquet": "cells.parquet"}
ZIP_NAME = "cells.geojson.zip"  #: GeoJSON of very many cells


class Writer(Protocol):
    """Writes the cells of one slide to one file; returns the path when it differs from the one asked for."""

    def __call__(
        self, path: Path, cells: CellSource, typing: Typing, info: SlideInfo, provenance: Provenance
    ) -> Path | None:
        """Write the file, whole or not at all."""


def load_writer(name: str) -> Writer:
    """The writer of one format.

    Parameters
    ----------
    name
        A key of ``FORMATS``.

    Returns
    -------
    Writer
        Its module is imported here, not before.

    Raises
    ------
    ConfigError
        No format has that name.
    """
    if name not in FORMATS:
        allowed = f"allowed are {', '.join(sorted(FORMATS))}, comma-separated"
        raise ConfigError(f"--format: unknown format {name!r}; {did_you_mean(name, FORMATS)}{allowed}")
    module, function = FORMATS[name].split(":")
    return cast("Writer", getattr(importlib.import_module(module), function))


def require_formats(names: Iterable[str]) -> None:
    """Refuse a format that nobody writes before work starts; raises the error of :func:`load_writer`."""
    for name in names:
        load_writer(name)
