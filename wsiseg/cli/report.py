"""``wsiseg report``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from wsiseg.cli.arguments import Working
from wsiseg.cli.failures import Failures
from wsiseg.cli.options import overwrite_option, runs_argument
from wsiseg.cli.streams import one_line
from wsiseg.errors import counted

if TYPE_CHECKING:
    from wsiseg.runs.manifest import Manifest
    from wsiseg.runs.statistics import ShardRecord


@click.command(cls=Working, short_help="Write the report of a run as one HTML page.")
@runs_argument
@click.option(
    "--slide", type=click.Path(path_type=Path), metavar="FILE", help="Where RUN's slide is now, if it was moved."
)
@click.option(
    "--cohort",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write one page about all RUNs to FILE instead; it links to their own pages.",
)
@overwrite_option("Replace the --cohort file.")
@click.pass_context
def command(
    ctx: click.Context, /, runs: tuple[Path, ...], slide: Path | None, cohort: Path | None, overwrite: bool
) -> None:
    """Write RUN/report.html: overview, counts, densities, distributions, example cells of each type, timings, how to reproduce.

    The page is one file without scripts; it opens offline. `wsiseg run` writes it at the end, and this writes it again, for example after
    `wsiseg type`. Without the slide it has no overview and no example cells.

    \b
    wsiseg report wsiseg-out/slide
    wsiseg report wsiseg-out/slide --slide /archive/slide.svs
    wsiseg report wsiseg-out/*/ --cohort cohort.html
    """  # noqa: D301 - click's mark for lines that stay as they are
    from wsiseg.errors import ConfigError
    from wsiseg.report.page import write_report

    if slide is not None and len(runs) > 1:
        raise ConfigError("--slide: belongs to one run; pass one RUN")
    if slide is not None and cohort is not None:
        raise ConfigError("--slide: the page of --cohort has no pictures of slides; leave one of the two out")
    failures = Failures(len(runs))
    if cohort is not None:
        _write_cohort(runs, cohort, failures, overwrite=overwrite)
        ctx.exit(failures.report())
    for run in runs:
        with failures.collect():
            path, reason = write_report(run, slide=slide)
            if reason:
                click.echo(f"Warning: no pictures of the slide: {reason}; pass --slide FILE", err=True)
            click.echo(str(path))
    ctx.exit(failures.report())


def _write_cohort(runs: tuple[Path, ...], path: Path, failures: Failures, *, overwrite: bool) -> None:
    from wsiseg.errors import ConfigError
    from wsiseg.report.cohort import read_row, write_cohort
    from wsiseg.runtime.atomic import require_free

    require_free(path, ConfigError, overwrite=overwrite)
    rows = []
    for run in runs:
        with failures.collect():
            rows.append(read_row(run, path.parent))
    if rows:
        write_cohort(rows, path)
        click.echo(f"{path}: {counted(len(rows), 'slide')}")


def report_after(result: Manifest | ShardRecord, *, wanted: bool) -> None:
    """Write the report at the end of a command that has written the files of ``result``; a fault of it is a warning, for the files are there."""
    from wsiseg.errors import WsisegError
    from wsiseg.formats import FILE_NAMES
    from wsiseg.report.page import write_report
    from wsiseg.runs.folder import REPORT_NAME
    from wsiseg.runs.manifest import Manifest

    if not wanted or not isinstance(result, Manifest) or FILE_NAMES["parquet"] not in result.files:
        return
    folder = Path(result.folder)
    if result.already and (folder / REPORT_NAME).exists():
        return
    try:
        write_report(folder)
    except WsisegError as error:
        click.echo(f"Warning: no report: {one_line(str(error))}", err=True)
