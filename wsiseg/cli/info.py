"""``wsiseg info``."""

from __future__ import annotations

import json
from typing import Any, get_args, get_type_hints

import click

from wsiseg.cli.arguments import Command
from wsiseg.config import RunConfig


@click.command(cls=Command, short_help="What is known of a slide before a run.")
@click.argument("slide")
@click.option("--mpp", type=float, metavar="UM", help="Microns per level-0 pixel, when the slide does not say.")
@click.option("--reader", type=click.Choice(get_args(get_type_hints(RunConfig)["reader"])), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def command(slide: str, mpp: float | None, reader: str, as_json: bool) -> None:
    """Print format, size, levels, microns per pixel and where they are from, bounds, tissue, tiles, and what looks doubtful in SLIDE."""
    from wsiseg.planning import survey

    facts = survey(slide, mpp=mpp, reader=reader)
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
