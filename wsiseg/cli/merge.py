"""``wsiseg merge``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from wsiseg.cli.arguments import Working
from wsiseg.cli.failures import Failures
from wsiseg.cli.imports import without_collection
from wsiseg.cli.logs import set_verbosity
from wsiseg.cli.options import formats_option, quiet_option, report_option, runs_argument, split_list
from wsiseg.cli.report import report_after

if TYPE_CHECKING:
    from pathlib import Path


@click.command(cls=Working, short_help="Merge the shards of a run.")
@runs_argument
@click.option(
    "--allow-missing", is_flag=True, help="Write the files even if blocks are missing; the exit status is then 3."
)
@formats_option(".  [default: those of the shards]")
@quiet_option
@report_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    runs: tuple[Path, ...],
    allow_missing: bool,
    formats: str | None,
    no_report: bool,
    quiet: bool,
) -> None:
    """Stitch, type and write the results of the shards of `wsiseg run --shard K/N` in the folder RUN.

    Neither slide nor GPU is needed. An incomplete run is refused with a list of what is missing. Merging again changes nothing.

    \b
    wsiseg run slide.svs --seeds seeds.json --shard 1/2
    wsiseg run slide.svs --seeds seeds.json --shard 2/2
    wsiseg merge wsiseg-out/slide
    """  # noqa: D301 - click's mark for lines that stay as they are
    from wsiseg.cli.run import report
    from wsiseg.cli.stop import Stop

    with without_collection():
        from wsiseg.runs.slide import merge_run

    set_verbosity(0, quiet)
    failures, incomplete = Failures(len(runs)), False
    with Stop() as stopped:
        for run in runs:
            with failures.collect():
                manifest = merge_run(run, allow_missing=allow_missing, formats=split_list(formats), stopped=stopped)
                incomplete |= manifest.status != "complete"
                report_after(manifest, wanted=not no_report)
                if not quiet:
                    report(manifest)
    ctx.exit(failures.report() or (3 if incomplete else 0))
