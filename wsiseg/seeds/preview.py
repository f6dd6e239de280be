"""Preview of the cells that the clicks of a seeds file hit, as one picture: a bad click is seen before a long run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import shapely

from wsiseg.config import RunConfig, check
from wsiseg.errors import RunError, SeedsError, counted
from wsiseg.formats.seed_rules import file_name, require_points
from wsiseg.formats.seeds import check_seeds, read_seeds
from wsiseg.geometry import Box, Lattice
from wsiseg.models import load_model
from wsiseg.runtime.atomic import atomic_path, require_free
from wsiseg.seeds.bank import find_clicked, on_one_cell, same_cell
from wsiseg.seeds.contact_sheet import Panel, draw_sheet, panel_side
from wsiseg.segmentation.nuclear_scale import require_scale
from wsiseg.slide import open_slide, read_region
from wsiseg.slide.stain import find_stain

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from wsiseg.models.contract import PromptableModel
    from wsiseg.records import Cells, Seeds
    from wsiseg.slide import SlideReader

WINDOW_UM = 48.0  #: side of a panel: a nucleus and its neighbours, enough to find the place again
MAX_PANELS = 640  #: on one sheet; the bad clicks first


@dataclass(frozen=True, kw_only=True)
class PreviewSummary:
    """Summary of a preview.

    Attributes
    ----------
    seeds
        In absolute level-0 px.
    clicks, drawn, bad, doubtful
        Numbers of clicks, of those on the sheet, of those that a run would refuse, and of those where the model finds no nucleus.
    faults
        The errors of a run for the bad ones, in its order; one for two types on one cell.
    warnings
        Warnings about the slide, the seeds and the doubtful clicks.
    """

    seeds: Seeds
    clicks: int
    drawn: int
    bad: int
    doubtful: int
    faults: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Click:
    """A click and its result: a cell, a fault, a doubt."""

    kind: int
    number: int
    negative: bool
    point: tuple[float, float]
    place: str
    cell: Cells | None = None
    fault: str = ""
    doubt: str = ""


def preview_seeds(
    seeds: Path,
    slide: str,
    out: Path,
    config: RunConfig | None = None,
    *,
    overwrite: bool = False,
    on_progress: Callable[[int, int, int], None] = lambda *_: None,
) -> PreviewSummary:
    """Draw every click with the outline decoded from it, and write the sheet.

    Parameters
    ----------
    seeds
        Any file that :func:`wsiseg.formats.seeds.read_seeds` reads.
    slide
        Path or URL.
    out
        The PNG to write.
    config
        ``model``, ``device``, ``mpp``, ``reader``, ``stain``, and how clicks are read (``cop``, ``apg``, ``masks``); defaults when absent.
    overwrite
        Replace ``out``.
    on_progress
        Called after each click with clicks done, clicks, cells found.

    Returns
    -------
    PreviewSummary
        Its ``faults`` are for the caller to report: a bad click is drawn, it raises nothing.

    Raises
    ------
    WsisegError
        The seeds, the slide or the model cannot be used at all, or ``out`` cannot be written; nothing is written then.
    """
    config = config or RunConfig()
    check(config)
    if out.suffix.lower() != ".png":
        raise RunError(f"{out}: the sheet is written as PNG; give it a name that ends in .png")
    require_free(out, RunError, overwrite=overwrite)
    found = read_seeds(seeds)
    if not any(kind.points for kind in found.types):
        require_points(found, "the picture of the clicks")
    with open_slide(
        slide, mpp=config.mpp, force_mpp=config.force_mpp, reader=config.reader, require_mpp=False
    ) as reader:
        require_scale(reader)
        info = reader.info
        found, warnings = check_seeds(found, info)
        stain = find_stain(reader, config.stain, config.tissue.overview_mpp)
        seen, warnings = stain.view(reader), [*warnings, *stain.warnings]
        model = load_model(config.model, config.device, config.precision)
        listed, clicks = _list_clicks(found), []
        for click in listed:
            clicks.append(_decode_click(click, seen, model, config))
            on_progress(len(clicks), len(listed), sum(c.cell is not None for c in clicks))
        clicks, faults = _mark_faults(clicks)
        drawn = _choose_panels(clicks)
        side = panel_side(len(drawn))
        panels = [_panel(click, reader, side) for click in drawn]
    bad, doubts = sum(bool(c.fault) for c in clicks), [c.doubt for c in clicks if c.doubt]
    title = (
        f"{seeds.name} on {file_name(info.path)}: {counted(len(clicks), 'click')}, {bad} bad, {len(doubts)} doubtful"
    )
    title += f"; a panel is {WINDOW_UM:g} um wide"
    if len(drawn) < len(clicks):
        title += f"; {len(drawn)} of them drawn"
    sheet = draw_sheet(panels, found.types, title, WINDOW_UM / side)
    with atomic_path(out) as partial:
        sheet.save(partial, format="PNG")
    return PreviewSummary(
        seeds=found,
        clicks=len(clicks),
        drawn=len(drawn),
        bad=bad,
        doubtful=len(doubts),
        faults=faults,
        warnings=(*info.warnings, *warnings, *doubts),
    )


def _list_clicks(seeds: Seeds) -> list[_Click]:
    """Every click, type by type, the negative ones of a type last."""
    return [
        _Click(
            kind=t,
            number=i,
            negative=negative,
            point=point,
            place=f"{seeds.source}: types[{t}].{'negative' if negative else 'points'}[{i}]",
        )
        for t, kind in enumerate(seeds.types)
        for negative, points in ((False, kind.points), (True, kind.negative))
        for i, point in enumerate(points)
    ]


def _decode_click(click: _Click, reader: SlideReader, model: PromptableModel, config: RunConfig) -> _Click:
    lattice = Lattice(reader.info.mpp, model.mpp)
    try:
        found = find_clicked(reader, model, click.point, lattice, config, click.place)
    except SeedsError as error:
        return dataclasses.replace(click, fault=str(error))
    return dataclasses.replace(click, cell=found.cell if len(found.cell) else None, doubt=found.doubt)


def _mark_faults(clicks: list[_Click]) -> tuple[list[_Click], tuple[str, ...]]:
    """Mark clicks with their faults, and list a run's messages in order: no cell, two types on one cell, no cell under a negative click."""
    marked = list(clicks)
    found = [(k, c.cell.polygons[0]) for k, c in enumerate(clicks) if c.cell is not None and not c.negative]
    shared = on_one_cell(
        [clicks[k].kind for k, _ in found], np.fromiter((polygon for _, polygon in found), object, len(found))
    )
    pairs = [(found[i][0], found[j][0]) for i, j in shared]
    for i, j in pairs:
        for this, that in ((i, j), (j, i)):
            if not marked[this].fault:
                marked[this] = dataclasses.replace(
                    marked[this], fault=same_cell(clicks[this].place, clicks[that].place)
                )
    positive, negative = ([c.fault for c in clicks if c.fault and c.negative is against] for against in (False, True))
    return marked, (*positive, *(same_cell(clicks[j].place, clicks[i].place) for i, j in pairs), *negative)


def _choose_panels(clicks: list[_Click]) -> list[_Click]:
    """At most ``MAX_PANELS`` clicks in their order: all bad ones that fit, then the doubtful, then the first others."""
    worst_first = sorted(range(len(clicks)), key=lambda k: (not clicks[k].fault, not clicks[k].doubt))[:MAX_PANELS]
    return [clicks[k] for k in sorted(worst_first)]


def _panel(click: _Click, reader: SlideReader, side: int) -> Panel:
    lattice = Lattice(reader.info.mpp, WINDOW_UM / side)
    centre = lattice.to_model(np.array(click.point))
    x0, y0 = (int(c) for c in np.floor(centre - side / 2))
    pixels = read_region(reader, Box(x0, y0, x0 + side, y0 + side), lattice)
    outline = score = None
    if click.cell is not None:
        outline = lattice.to_model(shapely.get_coordinates(click.cell.polygons[0].exterior)) - (x0, y0)
        score = float(click.cell.scores[0])
    # The caption already shows the place: "on glass, ..." remains of "seeds.json: types[0].points[0] = [5, 5]: on glass, ...".
    fault, doubt = (said.removeprefix(click.place).partition(": ")[2] for said in (click.fault, click.doubt))
    at = (float(centre[0] - x0), float(centre[1] - y0))
    return Panel(
        kind=click.kind,
        number=click.number,
        negative=click.negative,
        point=click.point,
        pixels=pixels,
        click_xy=at,
        outline=outline,
        score=score,
        fault=fault,
        doubt=doubt,
    )
