"""``wsiseg merge``."""

from __future__ import annotations

from pathlib import Path

import click

from wsiseg.cli.arguments import Working
from wsiseg.cli.streams import one_line


@click.command(cls=Working, short_help="Merge the shards of a run.")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option(
    "--allow-missing", is_flag=True, help="Write the files even if blocks are missing; the exit status is then 3."
)
@click.option(
    "--format", "formats", metavar="LIST", help="Files to write, comma-separated.  [default: those of the shards]"
)
@click.option("-q", "--quiet", is_flag=True, help="Errors only.")
@click.pass_context
def command(
    ctx: click.Context, /, runs: tuple[Path, ...], allow_missing: bool, formats: str | None, quiet: bool
) -> None:
    """Stitch, type and write the results of the shards of `wsiseg run --shard K/N` in the folder RUN.

    Neither slide nor GPU is needed. An incomplete run is refused with a list of what is missing. Merging again changes nothing.

    \b
    wsiseg run slide.svs --seeds seeds.json --shard 1/2
    wsiseg run slide.svs --seeds seeds.json --shard 2/2
    wsiseg merge wsiseg-out/slide
    """  # noqa: D301 - click's mark for lines that stay as they are
    from wsiseg.cli import set_verbosity
    from wsiseg.cli.run import report
    from wsiseg.cli.stop import Stop
    from wsiseg.errors import InterruptedRunError, WsisegError
    from wsiseg.runs.slide import merge_run

    set_verbosity(0, quiet)
    wanted = tuple(f.strip() for f in formats.split(",") if f.strip()) if formats is not None else None
    failed, holes = [], False
    with Stop() as stopped:
        for run in runs:
            try:
                manifest = merge_run(run, allow_missing=allow_missing, formats=wanted, stopped=stopped)
            except InterruptedRunError:
                raise
            except WsisegError as error:
                if len(runs) == 1:
                    raise
                failed.append(one_line(str(error)))
                continue
            holes |= manifest.status != "complete"
            if not quiet:
                report(manifest)
    for line in failed:
        click.echo(f"Error: {line}", err=True)
    if failed or holes:
        ctx.exit(1 if len(failed) == len(runs) else 3)
