"""``wsiseg info``."""

from __future__ import annotations

import json
from typing import Any

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
        click.echo(json.dumps(facts, indent=2))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        for i, line in enumerate(_lines(value)):
            click.echo(f"{name if not i else '':<{width}}  {line}")


def _lines(value: Any) -> list[str]:  # noqa: ANN401
    if isinstance(value, list):
        return [str(v) for v in value] or ["none"]
    return ["none" if value is None else str(value)]
