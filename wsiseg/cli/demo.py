"""``wsiseg demo``."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from wsiseg.cli.arguments import Working


@click.command(cls=Working, short_help="Write a small real slide with clicks.")
@click.argument("folder", type=click.Path(path_type=Path))
def command(folder: Path) -> None:
    """Write a small slide of real tissue and four clicks per cell type into FOLDER, and print the command to run on them."""
    from wsiseg.demo import write_demo

    slide, seeds = write_demo(folder)
    click.echo(shlex.join(["wsiseg", "run", str(slide), "--seeds", str(seeds), "--out", str(folder / "out")]))
