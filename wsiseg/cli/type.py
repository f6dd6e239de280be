"""``wsiseg type``."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import click

from wsiseg.cli.arguments import Working
from wsiseg.cli.failures import Failures
from wsiseg.cli.imports import without_collection
from wsiseg.cli.options import (
    config_option,
    device_option,
    formats_option,
    known_types_option,
    mpp_options,
    report_option,
    runs_argument,
    split_list,
)
from wsiseg.cli.report import report_after
from wsiseg.cli.run import next_steps


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
@click.option(
    "--outlines",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="RUN is a slide, and these are its cells, outlined by another program: GeoJSON, GeoParquet or a label image.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="With --outlines: folder of all runs.  [default: wsiseg-out]",
)
@mpp_options
@device_option
@click.option("--model", metavar="NAME|PATH", help="Model of RUN, if it is not the bundled one.")
@formats_option(": parquet alone halves the time.  [default: those of RUN]")
@config_option("TOML or JSON file; only its table `typing` is used, with --outlines all of it.")
@report_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    runs: tuple[Path, ...],
    seeds: Path | None,
    bank: Path | None,
    known_types: bool,
    outlines: Path | None,
    out: Path | None,
    mpp: float | None,
    force_mpp: bool,
    device: str | None,
    model: str | None,
    formats: str | None,
    config_file: Path | None,
    no_report: bool,
) -> None:
    """Re-type the cells of the finished run in folder RUN; neither slide nor GPU is needed.

    The types in cells.parquet and cells.geojson.gz, bank.safetensors and manifest.json of RUN are replaced; the outlines stay. With --bank, the
    clicks on one slide type any number of others.

    With --outlines, RUN is a slide: the cells that another program outlined on it are kept as they are, described by the network, and typed; the
    run folder that this makes is one like any other. wsiseg run --outlines does the first half with all the options of a run.

    \b
    wsiseg type wsiseg-out/slide --seeds more-clicks.json
    wsiseg type wsiseg-out/b wsiseg-out/c --bank wsiseg-out/a/bank.safetensors
    wsiseg type slide.svs --outlines cells.geojson --seeds seeds.json
    """  # noqa: D301 - click's mark for lines that stay as they are
    from wsiseg.errors import ConfigError

    with without_collection():
        from wsiseg.runs.retype import check_source, type_run

    check_source(seeds, bank, known_types=known_types)
    if seeds is not None and len(runs) > 1:
        raise ConfigError("--seeds: clicks belong to one slide; pass one RUN, or --bank for several")
    if outlines is not None:
        if len(runs) > 1:
            raise ConfigError("--outlines: belong to one slide; pass one")
        settings = {"mpp": mpp, "force_mpp": force_mpp or None, "device": device, "model": model}
        runs = (_described(runs[0], outlines, out or Path("wsiseg-out"), config_file, settings),)
    elif out is not None or mpp is not None or force_mpp or device is not None:
        raise ConfigError("--out, --mpp, --force-mpp and --device: only with --outlines; a finished run has its own")
    failures, steps = Failures(len(runs)), list[str]()
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
            steps = next_steps(manifest) if len(runs) == 1 else []
    folders = " ".join(shlex.quote(str(run)) for run in runs[:2]) + (" ..." if len(runs) > 2 else "")
    if not failures.messages:
        click.echo(f"  next: {'; '.join([*steps, f'a table: wsiseg summarise {folders} --out cohort.csv'])}")
    ctx.exit(failures.report())


def _described(slide: Path, outlines: Path, out: Path, config_file: Path | None, settings: dict[str, Any]) -> Path:
    """Describe outlines on a slide, and return the folder of the run that holds them."""
    from wsiseg.cli.progress import Progress
    from wsiseg.cli.stop import Stop
    from wsiseg.config import RunConfig, from_mapping, read_config
    from wsiseg.errors import RunError, counted

    with without_collection():
        from wsiseg.runs.slide import segment_slide

    config = RunConfig() if config_file is None else read_config(config_file, RunConfig())
    given = {name: value for name, value in settings.items() if value is not None} | {"outlines": str(outlines)}
    config = from_mapping(given, "command line", dataclasses.replace(config, seeds=None, bank=None, text=()))
    with Stop() as stopped, Progress(slide.name, hidden=False) as progress:
        manifest = segment_slide(
            str(slide),
            config,
            out,
            on_progress=progress.update,
            on_warning=lambda warning: click.echo(f"Warning: {warning}", err=True),
            stopped=stopped,
        )
    if manifest.failures:
        raise RunError(
            f"{manifest.failures[0]}; {counted(len(manifest.failures), 'tile')} missing: run the same command again"
        )
    return Path(manifest.folder)
