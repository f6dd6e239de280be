"""Checks of cell files: GeoJSON by the rules of QuPath's import, GeoParquet by reading all of it; of a run folder, every such file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import shapely

from wsiseg.errors import FormatError, counted
from wsiseg.formats import CHUNK, FILE_NAMES, ZIP_NAME
from wsiseg.formats.geoparquet import read_table
from wsiseg.formats.qupath.validation import MAX_PROBLEMS, QUPATH_SUFFIXES, summarise_geojson
from wsiseg.runtime.paths import kind_of

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class FileCheck:
    """Result of the check of one file.

    Attributes
    ----------
    path
        The file.
    problems
        One message per problem, beginning with its place; empty for a sound file.
    summary
        Content in words: ``139 detections; types: stroma 78, ...``.
    """

    path: Path
    problems: tuple[str, ...]
    summary: str


def check_files(path: Path) -> list[FileCheck]:
    """Check a file of cells, or those of a run folder.

    Parameters
    ----------
    path
        GeoJSON (``.geojson``, ``.json``, either with ``.gz``, or ``.zip``), a cells.parquet, or a folder with ``cells.*`` in it.

    Returns
    -------
    list of FileCheck
        One per file.

    Raises
    ------
    FormatError
        Nothing there, a file of another kind, or a folder without such files.
    """
    kind = kind_of(path, FormatError)
    if kind == "nothing":
        raise FormatError(f"{path}: no such file; give a .geojson, a cells.parquet or the folder of a run")
    if kind == "special":
        raise FormatError(f"{path}: a pipe or a device; give a .geojson, a cells.parquet or the folder of a run")
    if kind == "folder":
        names = (*FILE_NAMES.values(), ZIP_NAME)
        files = [path / name for name in names if kind_of(path / name, FormatError) == "file"]
        if not files:
            raise FormatError(f"{path}: none of {', '.join(names)} in this folder; give the folder of a finished run")
        return [_check_file(file) for file in files]
    return [_check_file(path)]


def _check_file(path: Path) -> FileCheck:
    if path.name.lower().endswith(".parquet"):
        return _check_geoparquet(path)
    if path.name.lower().endswith(QUPATH_SUFFIXES):
        return _check_geojson(path)
    raise FormatError(f"{path}: neither GeoJSON ({', '.join(QUPATH_SUFFIXES)}) nor GeoParquet (.parquet) by its name")


def _check_geojson(path: Path) -> FileCheck:
    found = summarise_geojson(path)
    objects = [counted(n, kind) for kind, n in found.objects.most_common()]
    unclassed = found.objects.total() - found.classes.total()
    classes = dict(found.classes.most_common()) | ({"without class": unclassed} if unclassed else {})
    return FileCheck(path, tuple(found.problems), _summary(" and ".join(objects) or "no objects", classes))


def _check_geoparquet(path: Path) -> FileCheck:
    """Read all of a table of cells; its polygons must be valid, as QuPath and geopandas want them."""
    try:
        table = read_table(path)
        types = table.typing().count()
        problems, start = list[str](), 0
        for cells in table.chunks(CHUNK):
            problems += _polygon_problems(cells.polygons, start)
            start += len(cells)
    except FormatError as error:
        return FileCheck(path, (str(error).removeprefix(f"{path}: "),), "")
    if len(problems) > MAX_PROBLEMS:
        problems = [*problems[:MAX_PROBLEMS], f"and more: only the first {MAX_PROBLEMS} problems are listed"]
    return FileCheck(path, tuple(problems), _summary(counted(len(table), "cell"), types))


def _polygon_problems(polygons: np.ndarray[tuple[int], np.dtype[np.object_]], start: int) -> list[str]:
    other = shapely.get_type_id(polygons) != shapely.GeometryType.POLYGON
    bad = np.flatnonzero(other | shapely.is_empty(polygons) | ~shapely.is_valid(polygons))
    return [
        f"row {start + k}: the geometry is not a valid polygon ({shapely.is_valid_reason(polygons[k])})"
        for k in bad.tolist()
    ]


def _summary(content: str, types: dict[str, int]) -> str:
    named = ", ".join(f"{name} {n}" for name, n in types.items())
    return f"{content}; types: {named}" if named else content
