"""``wsiseg info``."""

from __future__ import annotations

import json

import click

from wsiseg.cli.arguments import Command
from wsiseg.cli.options import mpp_options, reader_option
from wsiseg.config import RunConfig, check_mpp

_DEFAULT = RunConfig()


@click.command(cls=Command, short_help="Show a slide's metadata and a run estimate.")
@click.argument("slide")
@mpp_options
@reader_option
@click.option(
    "--no-estimate", is_flag=True, help="Do not estimate microns per pixel from the nuclei, which takes some seconds."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    slide: str, mpp: float | None, force_mpp: bool, reader: str | None, no_estimate: bool, as_json: bool
) -> None:
    """Show the metadata of SLIDE and a run estimate: format, size, levels, microns per pixel and their source, bounds, tissue, tiles and warnings.

    "mpp by nuclei" is an estimate from the size of some nuclei, accurate to about a third: enough to tell 20x from 40x.
    """
    check_mpp(mpp, force=force_mpp)
    from wsiseg.runs.survey import survey

    facts = survey(slide, mpp=mpp, force_mpp=force_mpp, reader=reader or _DEFAULT.reader, estimate=not no_estimate)
    if as_json:
        click.echo(json.dumps(facts.document(), indent=2))
        return
    lines = facts.lines()
    width = max(map(len, lines))
    for name, texts in lines.items():
        for i, line in enumerate(texts):
            click.echo(f"{name if not i else '':<{width}}  {line}")
