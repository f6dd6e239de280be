"""report.html: one page per run, whole in one file. It has no script, and its policy forbids the browser every request.

Everything that comes from files (names of slides and types, messages, settings) is escaped by the template engine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jinja2
import numpy as np

from wsiseg.errors import SlideError
from wsiseg.report import pictures
from wsiseg.report.contents import MOST_TYPES, Histogram, read_contents
from wsiseg.report.seams import BAND_UM, BANDS, NEAR_UM, seam_facts
from wsiseg.report.summary import open_finished
from wsiseg.runs.folder import REPORT_NAME
from wsiseg.runtime.atomic import atomic_path
from wsiseg.runtime.version import __version__

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from wsiseg.report.contents import ReportContents, TypeFacts
    from wsiseg.report.pictures import Crop, DensityMap, Picture

TEMPLATE = "page.html.j2"
_CHART = (300, 110)  #: width and height of a histogram, px
_STAGES = {
    "plan": "plan",
    "read": "read tiles",
    "encode": "encode",
    "prompt": "find prompts",
    "decode": "decode masks",
    "vectorise": "trace outlines",
    "stitch": "stitch",
    "type": "type",
    "measure": "measure",
    "write": "write files",
    "retype": "re-type",
    "total": "total",
}


@dataclass(frozen=True, kw_only=True)
class TypeSection:
    """What the page shows of one type."""

    facts: TypeFacts
    map: DensityMap
    charts: tuple[tuple[Histogram, str], ...]
    crops: tuple[tuple[str, tuple[Crop, ...]], ...]


def write_report(run: Path, *, slide: Path | None = None) -> tuple[Path, str]:
    """Write the report of a finished run into its folder, atomically.

    Parameters
    ----------
    run
        Folder of one slide's run.
    slide
        Where the slide is now; ``None``: where it was at the time of the run.

    Returns
    -------
    tuple of (Path, str)
        The page, and why it has no pictures of the slide; empty when it has.

    Raises
    ------
    WsisegError
        The run is not finished, its table is damaged, ``slide`` is not its slide, or the page cannot be written.
    """
    contents = read_contents(open_finished(run))
    shown = sorted(contents.types, key=lambda of: -len(of.rows))[:MOST_TYPES]
    rows = np.array(sorted({row for of in shown for _, found in of.examples for row in found.tolist()}), np.intp)
    picture, found, reason = None, dict[int, pictures.Crop](), ""
    try:
        with pictures.opened_slide(contents.run, slide) as reader:
            picture, found = pictures.overview(reader), pictures.crops(reader, contents.run, rows)
    except SlideError as error:
        if slide is not None:
            raise
        reason = str(error)
    path = contents.run.folder.path / REPORT_NAME
    text = _render(contents, picture, found, reason)
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path, reason


def _render(contents: ReportContents, overview: Picture | None, crops: dict[int, Crop], reason: str) -> str:
    run, columns = contents.run, contents.columns
    sections = [
        TypeSection(
            facts=facts,
            map=pictures.density_map(columns.xy[facts.rows], run.info.size_px0, run.info.mpp),
            charts=tuple((histogram, _bars(histogram)) for histogram in facts.histograms),
            crops=tuple(
                (kind, tuple(crops[row] for row in rows.tolist() if row in crops)) for kind, rows in facts.examples
            ),
        )
        for facts in contents.types
    ]
    manifest = run.manifest
    width, height = run.info.size_px0
    return page_template(TEMPLATE).render(
        contents=contents,
        manifest=manifest,
        overview=overview,
        sections=sections,
        reason=reason,
        columns=columns,
        size_mm=(width * run.info.mpp / 1000, height * run.info.mpp / 1000),
        stages=[(words, manifest.seconds[name]) for name, words in _STAGES.items() if name in manifest.seconds],
        seams=(seams := seam_facts(run, columns.xy)),
        seam_bars=_seam_bars(seams.profile.ratios) if seams and seams.profile else "",
        near_um=NEAR_UM,
        bands_um=BANDS * BAND_UM,
        chart=_CHART,
        crop_um=pictures.CROP_UM,
        version=__version__,
    )


def _bars(histogram: Histogram) -> str:
    """The bars as the path of an SVG, ``_CHART`` px large."""
    width, height = _CHART
    step = width / len(histogram.shares)
    tallest = max(float(histogram.shares.max(initial=0)), 1e-9)
    bars = ((k * step, share / tallest * (height - 4)) for k, share in enumerate(histogram.shares.tolist()) if share)
    return "".join(f"M{left:.1f} {height}v{-tall:.1f}h{step - 1:.1f}v{tall:.1f}z" for left, tall in bars)


def _seam_bars(ratios: NDArray[np.float64]) -> str:
    """Bars of the cells by distance from a seam, as the path of an SVG; the average is at half of the height."""
    width, height = _CHART
    step = width / len(ratios)
    tall = [0.0 if math.isnan(ratio) else min(ratio, 2.0) * height / 2 for ratio in ratios.tolist()]
    return "".join(f"M{k * step:.1f} {height}v{-up:.1f}h{step - 1:.1f}v{up:.1f}z" for k, up in enumerate(tall) if up)


def page_template(name: str) -> jinja2.Template:
    """A template of this folder; what it is given is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("wsiseg.report", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": _number, "percent": _percent}
    return environment.get_template(name)


def _number(value: object, digits: int = 0) -> str:
    """A number with thousands separated; a dash where a manifest has none."""
    known = isinstance(value, int | float | np.number) and math.isfinite(value)
    return f"{value:,.{digits}f}" if known else "–"


def _percent(value: object) -> str:
    return f"{value:.1%}" if isinstance(value, int | float) else "–"
