"""Page of a cohort: the counts, densities and warnings of many runs side by side, whole in one file as the page of a run is."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote

from wsiseg.formats.geoparquet import as_format_error, read_header
from wsiseg.records import UNASSIGNED
from wsiseg.report.page import page_template
from wsiseg.report.summary import open_finished, summarise_run
from wsiseg.runs.folder import REPORT_NAME
from wsiseg.runtime.atomic import atomic_path
from wsiseg.runtime.version import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from wsiseg.report.summary import FinishedRun, RegionSummary

TEMPLATE = "cohort.html.j2"
_BAR_PX = 300  #: width of a slide's bar of shares


@dataclass(frozen=True, kw_only=True)
class SlideRow:
    """One run of the cohort.

    Attributes
    ----------
    summary
        Cells of the area that the run searched.
    colors
        Of its types, by name.
    notes
        What is missing, and warnings.
    page
        Relative address of the run's own page; empty when there is none.
    """

    summary: RegionSummary
    colors: dict[str, tuple[int, ...]]
    notes: tuple[str, ...]
    page: str

    def per_mm2(self, name: str | None = None) -> float:
        """Density of a type, or of all cells; NaN for a type that the run was not typed with."""
        if name is not None and name not in self.summary.types:
            return math.nan
        of = self.summary.all if name is None else self.summary.types[name]
        return of.cells / self.summary.area_mm2 if self.summary.area_mm2 else math.nan

    def share(self, name: str) -> float:
        """Share of a type among all cells; NaN without cells, or for a type that the run was not typed with."""
        if name not in self.summary.types or not self.summary.all.cells:
            return math.nan
        return self.summary.types[name].cells / self.summary.all.cells

    @property
    def bar(self) -> list[tuple[str, float, float]]:
        """Name, start and width in px of each type in the bar of shares."""
        parts, start = [], 0.0
        for name in self.summary.types:
            width = _BAR_PX * (0.0 if math.isnan(self.share(name)) else self.share(name))
            if width:
                parts.append((name, start, width))
            start += width
        return parts


def read_row(run: Path, beside: Path) -> SlideRow:
    """Read what the page says of a run; addresses are relative to the folder ``beside``.

    Raises
    ------
    WsisegError
        The run is not finished, or its table is damaged.
    """
    finished = open_finished(run)
    (summary,) = summarise_run(run)
    with as_format_error(finished.table):
        note = read_header(finished.table)[2]
    manifest = finished.manifest
    return SlideRow(
        summary=summary,
        colors={str(kind["name"]): tuple(int(part) for part in kind["color"]) for kind in note["types"]},
        notes=(*(f"missing: {failure}" for failure in manifest.failures), *manifest.warnings),
        page=_address(finished, beside),
    )


def write_cohort(rows: Sequence[SlideRow], path: Path) -> None:
    """Write the page, atomically.

    Parameters
    ----------
    rows
        At least one run, in the order of the page.
    path
        File to write; it is replaced.

    Raises
    ------
    WsisegError
        The page cannot be written.
    """
    typed = [row for row in rows if len(row.summary.types) > 1]
    names = list(dict.fromkeys(name for row in typed for name in row.summary.types if name != UNASSIGNED))
    names += [UNASSIGNED] if typed else []
    colors = {name: next(row.colors[name] for row in typed if name in row.colors) for name in names}
    text = page_template(TEMPLATE).render(
        rows=rows,
        names=names,
        colors=colors,
        spreads=[(name, _spread([row.per_mm2(name) for row in rows])) for name in (None, *names)],
        cells=sum(row.summary.all.cells for row in rows),
        area_mm2=sum(row.summary.area_mm2 for row in rows),
        bar_px=_BAR_PX,
        version=__version__,
    )
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def _address(run: FinishedRun, beside: Path) -> str:
    page = run.folder.path / REPORT_NAME
    return quote(os.path.relpath(page.resolve(), beside.resolve()).replace(os.sep, "/")) if page.is_file() else ""


def _spread(values: list[float]) -> tuple[float, float, float, list[float]]:
    """Lowest, median and highest of the known values, and each as a share of the highest (NaN stays)."""
    known = sorted(v for v in values if math.isfinite(v))
    if not known:
        return math.nan, math.nan, math.nan, [math.nan] * len(values)
    middle = (known[(len(known) - 1) // 2] + known[len(known) // 2]) / 2
    return known[0], middle, known[-1], [v / known[-1] if known[-1] else 0.0 for v in values]
