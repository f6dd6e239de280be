"""``wsiseg check``."""

from __future__ import annotations

from pathlib import Path

import click

from wsiseg.cli.arguments import Command
from wsiseg.cli.failures import Failures
from wsiseg.cli.streams import one_line


@click.command(cls=Command, short_help="Check files of cells before QuPath reads them.")
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path(path_type=Path))
@click.pass_context
def command(ctx: click.Context, /, files: tuple[Path, ...]) -> None:
    """Check that QuPath will read FILE, and say what is in it. FILE is GeoJSON of any program, a cells.parquet, or the folder of a run.

    One bad object stops QuPath's whole import, with a message that does not name it: here each fault has a line, with its place
    (features[3].geometry). The rules are those of QuPath 0.4 to 0.7. Exit status 1 when there is a fault.

    \b
    wsiseg check wsiseg-out/slide
    wsiseg check annotations.geojson
    """  # noqa: D301 - click's mark for lines that stay as they are
    from wsiseg.formats.check import check_files

    failures, faulty = Failures(len(files)), False
    for file in files:
        with failures.collect():
            for found in check_files(file):
                for problem in found.problems:
                    click.echo(one_line(f"Error: {found.path}: {problem}"), err=True)
                faulty |= bool(found.problems)
                if not found.problems:
                    reader = "sound" if found.path.suffix == ".parquet" else "QuPath will read it"
                    click.echo(one_line(f"{found.path}: {reader}: {found.summary}"))
    if failures.report() or faulty:
        ctx.exit(1)
