"""``wsiseg seeds``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from wsiseg.cli.arguments import Group, Working
from wsiseg.cli.options import device_option, model_option, mpp_options, overwrite_option, reader_option, stain_option
from wsiseg.config import RunConfig, check_mpp, from_mapping
from wsiseg.errors import counted

if TYPE_CHECKING:
    from collections.abc import Iterable

    from wsiseg.records import Seeds

_DEFAULT = RunConfig()


@click.group(cls=Group, short_help="Check, convert and preview files of clicks.", name="seeds")
def command() -> None:
    """Check, convert and preview files of clicks: seeds.json, or points exported from QuPath.

    \b
    wsiseg seeds check clicks.geojson --slide slide.svs          validate it, and check it against the slide
    wsiseg seeds convert clicks.geojson seeds.json               convert from QuPath, or back
    wsiseg seeds preview seeds.json slide.svs --out clicks.png   draw what each click hits
    """  # noqa: D301 - click's mark for lines that stay as they are


@command.command(short_help="Validate and summarise a file of clicks.")
@click.argument("seeds", type=click.Path(path_type=Path))
@click.option("--slide", help="Also check the clicks against this slide.")
@mpp_options
def check(seeds: Path, slide: str | None, mpp: float | None, force_mpp: bool) -> None:
    """Validate and summarise SEEDS; with --slide, also report clicks outside the slide or on glass."""
    from wsiseg.errors import SeedsError
    from wsiseg.formats.seeds import check_seeds, read_seeds

    check_mpp(mpp, force=force_mpp)
    found, glass = read_seeds(seeds), tuple[str, ...]()
    warnings = list(found.notes)
    if slide is not None:
        from wsiseg.seeds.glass import clicks_on_glass
        from wsiseg.slide import open_slide

        with open_slide(slide, mpp=mpp, force_mpp=force_mpp, require_mpp=False) as reader:
            found, more = check_seeds(found, reader.info)
            warnings = list(more)
            if math.isnan(reader.info.mpp):
                warnings.append("the slide has no microns per pixel, so clicks on glass are not found; pass --mpp")
            else:
                glass = clicks_on_glass(reader, found, _DEFAULT)
    _report(found, [*warnings, *glass[1:]])
    if glass:  # a run refuses them
        raise SeedsError(glass[0])
    click.echo(f"{seeds}: OK{'' if slide is None else f' for {slide}'}")


@command.command(cls=Working, short_help="Convert QuPath points to seeds.json, or back.")
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--slide",
    help="Check the clicks against this slide, and use the origin that OUT needs: the slide's corner, or QuPath's.",
)
@click.option(
    "--add",
    "earlier",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Clicks that stay: those of FILE come first, then those of IN. Needs --slide.",
)
@mpp_options
@overwrite_option("Replace OUT.")
def convert(
    source: Path,
    target: Path,
    slide: str | None,
    earlier: Path | None,
    mpp: float | None,
    force_mpp: bool,
    overwrite: bool,
) -> None:
    """Convert points, or corrected detections, exported from QuPath to a seeds.json, or a seeds.json to points for QuPath.

    The content of IN decides, not its name: GeoJSON (plain, .gz or .zip) and the points dialog's .tsv become a seeds.json, so OUT ends in
    .json; a seeds.json becomes point annotations with classes, so OUT ends in .geojson or .geojson.gz.

    QuPath has no negative clicks. They are written and read as points of the type's class whose annotation is named "not this type".

    Give --slide for slides with bounds (MRXS and some others): QuPath counts from the corner of the bounds. Without it no coordinate changes,
    and a seeds.json made from QuPath's points says so ("frame": "qupath"); every wsiseg command then moves them itself.

    \b
    wsiseg seeds convert clicks.geojson seeds.json --slide slide.mrxs
    wsiseg seeds convert seeds.json clicks.geojson --slide slide.mrxs
    wsiseg seeds convert corrected.geojson more.json --add seeds.json --slide slide.mrxs
    """  # noqa: D301 - click's mark for lines that stay as they are
    from wsiseg.formats.seeds import convert_seeds

    check_mpp(mpp, force=force_mpp)
    if slide is not None:
        from wsiseg.slide import open_slide

        with open_slide(slide, mpp=mpp, force_mpp=force_mpp, require_mpp=False) as reader:
            written, warnings = convert_seeds(source, target, reader.info, earlier=earlier, overwrite=overwrite)
    else:
        written, warnings = convert_seeds(source, target, earlier=earlier, overwrite=overwrite)
    _report(written, warnings)
    click.echo(f"{target}: written")


@command.command(cls=Working, short_help="Draw the cell that each click hits.")
@click.argument("seeds", type=click.Path(path_type=Path))
@click.argument("slide")
@click.option("--out", required=True, metavar="FILE.png", type=click.Path(path_type=Path), help="Picture to write.")
@mpp_options
@model_option
@device_option
@reader_option
@stain_option
@overwrite_option("Replace FILE.png.")
def preview(seeds: Path, slide: str, out: Path, overwrite: bool, **options: str | float | bool | None) -> None:
    """Draw one panel per click of SEEDS on SLIDE: its surroundings, and the outline of the cell that a run would match it to.

    A cross marks a click of the type, a diagonal cross a negative click. The caption gives the type, the click in level-0 px, and the
    score of the outline (predicted IoU x stability, 0 to 1). A click that a run would refuse has a red frame and the reason: on glass,
    or the same cell as a click of another type. An orange frame marks a click where the model finds no nucleus; a run uses it with a
    warning. The picture is always written; the first fault is then reported as the error, with exit status 1.

    \b
    wsiseg seeds preview seeds.json slide.svs --out clicks.png
    """  # noqa: D301 - click's mark for lines that stay as they are
    from wsiseg.cli.progress import Progress
    from wsiseg.errors import SeedsError
    from wsiseg.seeds.preview import preview_seeds

    config = from_mapping({name: value for name, value in options.items() if value is not None}, "command line")
    with Progress(seeds.name, hidden=False, unit="clicks") as progress:
        sheet = preview_seeds(seeds, slide, out, config, overwrite=overwrite, on_progress=progress.update)
    _report(sheet.seeds, sheet.warnings)
    click.echo(
        f"{out}: {sheet.drawn} of {counted(sheet.clicks, 'click')} drawn, {sheet.bad} bad, {sheet.doubtful} doubtful"
    )
    if sheet.faults:
        raise SeedsError(sheet.faults[0])


def _report(seeds: Seeds, warnings: Iterable[str]) -> None:
    for kind in seeds.types:
        negative = f", {len(kind.negative)} negative" if kind.negative else ""
        phrases = f", {counted(len(kind.text), 'phrase')}" if kind.text else ""
        click.echo(f"{kind.name}: {counted(len(kind.points), 'click')}{negative}{phrases}")
    for warning in warnings:
        click.echo(f"Warning: {warning}", err=True)
