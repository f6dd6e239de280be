"""Counts, densities and areas of finished runs, one row per slide or region."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
import shapely

from wsiseg.errors import ConfigError, RunError
from wsiseg.formats import FILE_NAMES
from wsiseg.formats.geoparquet import AREA, TYPE, as_format_error, read_header, type_codes
from wsiseg.formats.regions import read_named_regions
from wsiseg.records import UNASSIGNED
from wsiseg.runs.folder import RunFolder
from wsiseg.runs.manifest import FINISHED
from wsiseg.runtime.paths import kind_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from wsiseg.records import SlideInfo
    from wsiseg.runs.manifest import Manifest

PLACE = "{slide}"  #: in ``--roi``, the name of a run's folder
SEARCHED = "searched"  #: name of the region when none is given: the tissue, or the region of the run


@dataclass(frozen=True, kw_only=True)
class TypeSummary:
    """Cells of one type in one region; areas in square microns, NaN without cells."""

    cells: int
    mean_area_um2: float
    median_area_um2: float


@dataclass(frozen=True, kw_only=True)
class RegionSummary:
    """Cells of one slide in one region.

    Attributes
    ----------
    slide, run, status
        File name of the slide, folder of the run, and its status: of an ``incomplete`` one, tiles are missing.
    region, area_mm2
        Name of the region; its area.
    all
        All cells of the region.
    types
        By name, ``unassigned`` last.
    """

    slide: str
    run: str
    status: str
    region: str
    area_mm2: float
    all: TypeSummary
    types: dict[str, TypeSummary]


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, opened."""

    folder: RunFolder
    manifest: Manifest
    info: SlideInfo

    @property
    def table(self) -> Path:
        """``cells.parquet``."""
        return self.folder.path / FILE_NAMES["parquet"]


def open_finished(run: Path) -> FinishedRun:
    """Open the folder of a finished run with a cells.parquet.

    Raises
    ------
    RunError
        It is not one; the message says what to do.
    """
    folder = RunFolder(run)
    manifest = folder.manifest()
    if manifest is None:
        raise RunError(
            f"{run}: no manifest.json of wsiseg in it; pass the folder of one slide's run, for example wsiseg-out/slide"
        )
    if manifest.status not in FINISHED:
        raise RunError(f"{run}: the run is not finished (status {manifest.status}); run its command again first")
    if kind_of(folder.path / FILE_NAMES["parquet"], RunError) != "file":
        raise RunError(
            f"{run}: no cells.parquet in it; run the slide again with --format geojson,parquet, its finished parts are used again"
        )
    return FinishedRun(folder, manifest, manifest.slide_info(folder.manifest_path))


def summarise_run(run: Path, roi: str | None = None) -> list[RegionSummary]:
    """Summarise a finished run; of its table, only the columns that are needed are read.

    Parameters
    ----------
    run
        Folder of one slide's run.
    roi
        GeoJSON of regions, with ``{slide}`` for the name of the run's folder. A cell belongs to the regions that hold its centroid. Polygons of
        one class, or without a class of one name, are one region. ``None``: the area that the run searched.

    Returns
    -------
    list of RegionSummary
        One per region, in the order of the file.

    Raises
    ------
    WsisegError
        The run is not finished, or a file is damaged or missing.
    """
    finished = open_finished(run)
    regions = None
    if roi is not None:
        regions = read_named_regions(Path(roi.replace(PLACE, run.resolve().name)), finished.info)
    path = finished.table
    with as_format_error(path):
        held, schema, note, _ = read_header(path)
        names = [str(kind["name"]) for kind in note["types"]]
        wanted = [TYPE, AREA, *(("x", "y") if regions else ())]
        stored = [held.names[schema.get_field_index(name)] for name in wanted]
        table = pq.read_table(path, columns=stored, partitioning=None).rename_columns(wanted)
        codes, areas = type_codes(table[TYPE], tuple(names)), table[AREA].to_numpy()
    slide, status = Path(str(note["slide"])).name, str(finished.manifest.status)

    def region(name: str, area_mm2: float, inside: NDArray[np.bool_] | slice) -> RegionSummary:
        mine, of = areas[inside], codes[inside]
        order = [*range(1, len(names)), 0]
        return RegionSummary(
            slide=slide,
            run=str(run),
            status=status,
            region=name,
            area_mm2=area_mm2,
            all=_summary(mine),
            types={names[code]: _summary(mine[of == code]) for code in order},
        )

    if regions is None:
        return [region(SEARCHED, float(finished.manifest.slide["searched_mm2"]), slice(None))]
    x, y = table["x"].to_numpy(), table["y"].to_numpy()
    mm2_per_px = (finished.info.mpp / 1000) ** 2
    found = []
    for name, shape in regions.items():
        shapely.prepare(shape)
        found.append(region(name, shape.area * mm2_per_px, shapely.contains_xy(shape, x, y)))
    return found


def _summary(areas: NDArray[np.float32]) -> TypeSummary:
    if not len(areas):
        return TypeSummary(cells=0, mean_area_um2=math.nan, median_area_um2=math.nan)
    return TypeSummary(
        cells=len(areas), mean_area_um2=float(areas.mean(dtype=np.float64)), median_area_um2=float(np.median(areas))
    )


def check_roi(roi: str | None, runs: int) -> None:
    """Refuse one file of regions for several slides.

    Raises
    ------
    ConfigError
        ``roi`` names one file, and there are several runs.
    """
    if roi is not None and runs > 1 and PLACE not in roi:
        raise ConfigError(
            f"--roi {roi}: regions belong to one slide; write {PLACE} for the name of a run's folder, for example regions/{PLACE}.geojson"
        )


def csv_table(rows: Iterable[RegionSummary]) -> str:
    """The rows as CSV.

    Columns: slide, run, status, region, area_mm2, then of all cells and of each type of any slide: cells, cells per mm2, mean and median area;
    of a type also its share of the cells. Cells of a type that a slide was not typed with are empty.
    """
    rows = list(rows)
    types = list(dict.fromkeys(name for row in rows for name in row.types if name != UNASSIGNED))
    types += [UNASSIGNED] if any(len(row.types) > 1 for row in rows) else []
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    header = [
        "slide",
        "run",
        "status",
        "region",
        "area_mm2",
        "cells",
        "cells_per_mm2",
        "mean_area_um2",
        "median_area_um2",
    ]
    for name in types:
        header += [
            f"{name}: {what}" for what in ("cells", "cells_per_mm2", "share", "mean_area_um2", "median_area_um2")
        ]
    writer.writerow(header)
    for row in rows:
        line: list[str | int] = [row.slide, row.run, row.status, row.region, _number(row.area_mm2, 6)]
        line += [row.all.cells, *_numbers(row.all, row.area_mm2)]
        for name in types:
            of = row.types.get(name)
            if of is None:
                line += [""] * 5
                continue
            density, *sizes = _numbers(of, row.area_mm2)
            line += [of.cells, density, _number(of.cells / row.all.cells if row.all.cells else math.nan, 5), *sizes]
        writer.writerow(line)
    return out.getvalue()


def _numbers(of: TypeSummary, area_mm2: float) -> Iterator[str]:
    yield _number(of.cells / area_mm2 if area_mm2 else math.nan, 2)
    yield _number(of.mean_area_um2, 3)
    yield _number(of.median_area_um2, 3)


def _number(value: float, digits: int) -> str:
    """A number with so many decimals; empty when it is not one."""
    return f"{value:.{digits}f}" if math.isfinite(value) else ""
