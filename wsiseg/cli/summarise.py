"""``wsiseg summarise``."""

from __future__ import annotations

from pathlib import Path

import click

from wsiseg.cli.arguments import Command
from wsiseg.cli.failures import Failures
from wsiseg.cli.options import overwrite_option, runs_argument
from wsiseg.cli.streams import OUTPUT


@click.command(cls=Command, short_help="Tabulate counts, densities and areas of runs.")
@runs_argument
@click.option(
    "--roi",
    metavar="FILE",
    help="GeoJSON polygons (QuPath annotations): a row per class of region; {slide} in it stands for the name of RUN's folder.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FILE", help="Write the CSV to FILE.  [default: print it]"
)
@overwrite_option("Replace the --out file.")
@click.pass_context
def command(ctx: click.Context, /, runs: tuple[Path, ...], roi: str | None, out: Path | None, overwrite: bool) -> None:
    """Print a CSV table with one row per finished run: cells, cells per mm2, mean and median area, of all cells and of each type.

    Densities refer to the area that was searched for cells (tissue, or the run's own --roi); with --roi here, to the area of each region, which
    must lie within the searched area to be complete. A cell belongs to a region that holds its centroid.

    \b
    wsiseg summarise wsiseg-out/*/ --out cohort.csv
    wsiseg summarise wsiseg-out/slide --roi annotations.geojson
    wsiseg summarise wsiseg-out/*/ --roi "regions/{slide}.geojson"
    """  # noqa: D301 - click's mark for lines that stay as they are
    from wsiseg.errors import ConfigError
    from wsiseg.report.summary import check_roi, csv_table, summarise_run
    from wsiseg.runtime.atomic import atomic_path, require_free

    if out is not None:
        require_free(out, ConfigError, overwrite=overwrite)
    check_roi(roi, len(runs))
    failures, rows = Failures(len(runs)), []
    for run in runs:
        with failures.collect():
            rows += summarise_run(run, roi)
    text = csv_table(rows)
    if out is None:
        if rows:
            click.echo(text, nl=False)
    elif rows:
        OUTPUT.extra = True
        with atomic_path(out) as partial:
            partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        click.echo(f"{out}: {len(rows)} row{'s' * (len(rows) != 1)}")
    ctx.exit(failures.report())
