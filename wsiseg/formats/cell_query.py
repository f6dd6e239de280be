"""The cells of a cells.parquet by place and type, as one object in memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from wsiseg.errors import ConfigError, FormatError
from wsiseg.formats import FILE_NAMES
from wsiseg.formats.geoparquet import TYPE, CellTable, as_format_error, read_header
from wsiseg.records import TypedCells
from wsiseg.runtime.paths import kind_of
from wsiseg.runtime.text import did_you_mean, show

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyarrow.dataset import Expression


def read_cells(
    path: str | os.PathLike[str], *, bbox: Sequence[float] | None = None, types: str | Sequence[str] | None = None
) -> TypedCells:
    """Read the cells of a run, or those of a part of the slide, or of some types.

    Parameters
    ----------
    path
        A cells.parquet of wsiseg, of any version, or the folder of a run.
    bbox
        (xmin, ymin, xmax, ymax), level-0 px: cells whose own box meets it. Row groups elsewhere are not read.
    types
        Names of types, or one name; ``"unassigned"`` is one. All when absent.

    Returns
    -------
    TypedCells
        In the order of the file.

    Raises
    ------
    FormatError
        The file is missing, damaged, or was not written by wsiseg.
    ConfigError
        ``bbox`` is not a box, or no type has that name.

    Examples
    --------
    >>> import wsiseg
    >>> from wsiseg.demo import write_demo
    >>> slide, seeds = write_demo("demo")
    >>> run = wsiseg.segment_slide(slide, seeds=seeds, out="demo/out")
    >>> cells = wsiseg.read_cells(run.path / "cells.parquet")
    >>> corner = wsiseg.read_cells(run.path, bbox=(0, 0, 256, 256), types="epithelium")
    >>> 0 < len(corner) < len(cells)
    True
    >>> set(corner.types)
    {'epithelium'}
    """
    file, box = _table_of(path), _box(bbox)
    with as_format_error(file):
        held, schema, note, columns = read_header(file)
        known, mpp = [str(kind["name"]) for kind in note["types"]], float(note["mpp"])
    wanted = None if types is None else [types] if isinstance(types, str) else list(types)
    for name in wanted or ():
        if name not in known:
            raise ConfigError(
                f"types: {file} has no type {show(name)}; {did_you_mean(name, known)}it has {', '.join(known)}"
            )
    with as_format_error(file):
        measured = CellTable(path=file, schema=schema, note=note, table=pa.table({})).measurement_names
        names = [*columns, "id", "geometry", *measured]
        stored = [held.names[schema.get_field_index(name)] for name in names]
        table = pq.read_table(file, columns=stored, filters=box, partitioning=None).rename_columns(names)
        if wanted is not None:
            table = table.filter(pc.is_in(table[TYPE].cast("string"), value_set=pa.array(wanted, pa.string())))
        found = CellTable(path=file, schema=schema, note=note, table=table.select(columns))
        ids = np.array(table["id"].to_pylist(), np.str_)
    cells = found.with_polygons(found.table, table["geometry"], table)
    return TypedCells(cells=cells, typing=found.typing(), ids=ids, mpp=mpp, slide=str(note["slide"]))


def _table_of(path: str | os.PathLike[str]) -> Path:
    """The file of a path that may be the folder of a run."""
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(f"path: found {show(path)}; pass the path of a cells.parquet, or of the folder of a run")
    file = Path(path)
    if kind_of(file, FormatError) != "folder":
        return file
    inside = file / FILE_NAMES["parquet"]
    if kind_of(inside, FormatError) != "file":
        raise FormatError(
            f"{file}: no {inside.name} in this folder; pass the folder of one slide's run with format parquet, for example wsiseg-out/slide"
        )
    return inside


def _box(bbox: Sequence[float] | None) -> Expression | None:
    """The condition that a cell's box meets ``bbox``."""
    if bbox is None:
        return None
    try:
        left, top, right, bottom = (float(number) for number in bbox)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"bbox: found {show(bbox)}; four numbers are needed, (xmin, ymin, xmax, ymax) in px"
        ) from error
    if not (left <= right and top <= bottom):  # false for NaN as well
        raise ConfigError(
            f"bbox: ({left:g}, {top:g}, {right:g}, {bottom:g}) is not a box; (xmin, ymin, xmax, ymax) in px are needed"
        )
    side = {name: pc.field(("bbox", name)) for name in ("xmin", "ymin", "xmax", "ymax")}
    return (side["xmin"] <= right) & (side["xmax"] >= left) & (side["ymin"] <= bottom) & (side["ymax"] >= top)
