"""``wsiseg type``."""

from __future__ import annotations

from pathlib import Path

import click

from wsiseg.cli.arguments import Working
from wsiseg.cli.failures import Failures
from wsiseg.cli.options import (
    config_option,
    formats_option,
    known_types_option,
    report_option,
    runs_argument,
    split_list,
)
from wsiseg.cli.report import report_after


@click.command(cls=Working, short_help="Re-type a finished run with other clicks.")
@runs_argument
@click.option(
    "--seeds",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Clicks on RUN's slide: seeds.json, or points exported from QuPath.",
)
@click.option(
    "--bank",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="bank.safetensors of another slide's run: type RUN by its clicks.",
)
@known_types_option
@click.option("--model", metavar="NAME|PATH", help="Model of RUN, if it is not the bundled one.")
@formats_option(": parquet alone halves the time.  [default: those of RUN]")
@config_option("TOML or JSON file; only its table `typing` is used.")
@report_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    runs: tuple[Path, ...],
    seeds: Path | None,
    bank: Path | None,
    known_types: bool,
    model: str | None,
    formats: str | None,
    config_file: Path | None,
    no_report: bool,
) -> None:
    """Re-type the cells of the finished run in folder RUN; neither slide nor GPU is needed.

    The types in cells.parquet and cells.geojson.gz, bank.safetensors and manifest.json of RUN are replaced; the outlines stay. With --bank, the
    clicks on one slide type any number of others.

    \b
    wsiseg type wsiseg-out/slide --seeds more-clicks.json
    wsiseg type wsiseg-out/b wsiseg-out/c --bank wsiseg-out/a/bank.safetensors
    """  # noqa: D301 - click's mark for lines that stay as they are
    from wsiseg.errors import ConfigError
    from wsiseg.runs.retype import type_run

    if seeds is not None and len(runs) > 1:
        raise ConfigError("--seeds: clicks belong to one slide; pass one RUN, or --bank for several")
    failures = Failures(len(runs))
    for run in runs:
        with failures.collect():
            manifest = type_run(
                run,
                seeds=seeds,
                bank=bank,
                known_types=known_types,
                model=model,
                settings=config_file,
                formats=split_list(formats),
            )
            report_after(manifest, wanted=not no_report)
            for warning in manifest.typing["warnings"]:
                click.echo(f"Warning: {warning}", err=True)
            typed = ", ".join(f"{name} {n}" for name, n in manifest.types.items())
            click.echo(f"{run}: {typed} in {manifest.seconds['retype']:.1f} s")
    ctx.exit(failures.report())
