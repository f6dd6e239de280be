"""``wsiseg run``."""

from __future__ import annotations

import dataclasses
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wsiseg.cli.arguments import Working
from wsiseg.cli.imports import without_collection
from wsiseg.cli.logs import set_verbosity
from wsiseg.cli.options import (
    choices,
    config_option,
    device_option,
    formats_option,
    known_types_option,
    model_option,
    mpp_options,
    overwrite_option,
    quiet_option,
    reader_option,
    report_option,
    split_list,
    stain_option,
)
from wsiseg.cli.report import report_after
from wsiseg.config import CHAINED, HALO_UM, TILE_UM, RunConfig, from_mapping, read_config
from wsiseg.errors import counted
from wsiseg.formats import FILE_NAMES

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from wsiseg.cli.stop import Stop
    from wsiseg.runs.manifest import Manifest
    from wsiseg.runs.slide_list import Entry
    from wsiseg.runs.statistics import ShardRecord
    from wsiseg.runtime.shards import Shard

_DEFAULT = RunConfig()


@click.command(cls=Working, short_help="Segment and type slides.")
@click.argument("slides", nargs=-1, metavar="SLIDE...")
@click.option(
    "--seeds", metavar="FILE", help="Clicks, one or more per cell type: seeds.json, or points exported from QuPath."
)
@click.option("--bank", metavar="FILE", help="bank.safetensors of another slide's run: type this slide by its clicks.")
@click.option(
    "--text",
    multiple=True,
    metavar="PHRASE",
    help="Words for a type of cell, such as lymphocyte, in place of clicks; once per type (docs/methods.md).",
)
@known_types_option
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("wsiseg-out"),
    show_default=True,
    help="Folder for the run folders.",
)
@click.option("--method", type=choices("method"), help=f"How cells are found.  [default: {_DEFAULT.method}]")
@model_option
@mpp_options
@reader_option
@stain_option
@click.option(
    "--outlines",
    metavar="FILE",
    help="Cells outlined by another program (GeoJSON, GeoParquet, label image): keep these; type them with wsiseg type.",
)
@click.option("--roi", metavar="FILE", help="GeoJSON polygons (QuPath annotations): segment only inside them.")
@click.option("--no-tissue", is_flag=True, help="Search the whole slide, not only tissue.")
@click.option(
    "--tile-size",
    type=float,
    metavar="UM",
    help=f"Side of a tile's core, microns.  [default: {TILE_UM:g}, or the model's input size]",
)
@click.option(
    "--halo",
    type=float,
    metavar="UM",
    help=f"Margin read around each tile, microns.  [default: {HALO_UM:g}, or what the model needs]",
)
@formats_option(f".  [default: {','.join(_DEFAULT.formats)}]")
@device_option
@click.option(
    "--precision",
    type=choices("precision"),
    help=f"Encoder precision.  [default: {_DEFAULT.precision}: bf16 on a GPU, fp32 on the CPU]",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    metavar="N",
    help="Tiles encoded together.  [default: 1 on a CPU, as many as fit on a GPU]",
)
@click.option(
    "--max-ram",
    "max_ram_gb",
    type=float,
    metavar="GB",
    help="Memory limit per process; queues and batches are sized to fit.",
)
@click.option("--max-vram", "max_vram_gb", type=float, metavar="GB", help="GPU memory limit per process.")
@click.option(
    "--workers",
    type=click.IntRange(1, 1024),
    metavar="N",
    help=f"Processes on this machine, or jobs to submit.  [default: {_DEFAULT.workers}]",
)
@click.option(
    "--scheduler",
    metavar="ADDRESS|NAME",
    help="tcp://host:port of a Dask scheduler; or slurm, pbs, lsf, sge to submit jobs.",
)
@click.option(
    "--shard",
    metavar="K/N",
    help="Process shard K of N: blocks of one slide (then `wsiseg merge`), or slides of a list; or slurm to take K/N from the job array.",
)
@click.option(
    "--slides",
    "slide_list",
    type=click.Path(path_type=Path),
    metavar="CSV",
    help="CSV list of slides: columns path, mpp, seeds, name.",
)
@config_option("TOML or JSON file of settings, or the manifest.json of a run.")
@overwrite_option("Replace a run with other settings in the same folder.")
@click.option(
    "--log-json",
    "log_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Append events as JSON lines; - is stderr.",
)
@report_option
@click.option("--no-progress", is_flag=True, help="No progress bar (never shown in a pipe).")
@click.option("-v", "--verbose", count=True, help="Verbose; twice for debugging.")
@quiet_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    slides: Sequence[str],
    out: Path,
    slide_list: Path | None,
    shard: str | None,
    config_file: Path | None,
    overwrite: bool,
    log_file: Path | None,
    no_report: bool,
    no_progress: bool,
    verbose: int,
    quiet: bool,
    **options: Any,  # noqa: ANN401
) -> None:
    """Outline every cell of SLIDE and, with --seeds, give each a type.

    Writes OUT/<slide-stem>/cells.parquet, cells.geojson.gz (drag it onto the slide in QuPath), manifest.json and report.html. If a run is
    stopped, the same command resumes it; Ctrl-C, SIGTERM and SIGUSR1 finish the current block first. Flags override the --config
    file, which overrides the defaults.

    \b
    wsiseg run slide.svs --seeds seeds.json
    wsiseg run scan.tif --mpp 0.25 --roi tumour.geojson --out results
    wsiseg run --slides list.csv --out results
    """  # noqa: D301 - click's mark for lines that stay as they are
    set_verbosity(verbose, quiet)
    if bool(slides) == (slide_list is not None):
        raise click.UsageError("Give either SLIDE... or --slides CSV.")
    forced = RunConfig(force_mpp=options.pop("force_mpp"))
    config = read_config(config_file, forced) if config_file is not None else forced
    if not options["text"]:
        del options["text"]
    if options["seeds"] is not None or options["bank"] is not None or "text" in options:  # each beats all in the file
        config = dataclasses.replace(config, seeds=None, bank=None, text=())
    config = from_mapping(_as_settings(options), "command line", config)

    from wsiseg.cli.stop import Stop
    from wsiseg.runtime.shards import read_shard

    if log_file is not None:
        from wsiseg.cli.logs import log_json

        log_json(log_file)
    selected_shard = read_shard(shard, os.environ) if shard is not None else None
    with Stop() as stopped:
        from wsiseg.runs.slide_list import Entry, read_list

        entries = (
            read_list(slide_list, force_mpp=config.force_mpp)
            if slide_list is not None
            else [Entry(slide) for slide in slides]
        )
        hidden = no_progress or quiet
        if slide_list is not None or len(slides) > 1:
            status = _many(
                entries,
                config,
                out,
                stopped,
                shard=selected_shard,
                overwrite=overwrite,
                hidden=hidden,
                quiet=quiet,
                page=not no_report,
            )
        else:
            status = _one(
                slides[0],
                config,
                out,
                stopped,
                shard=selected_shard,
                overwrite=overwrite,
                hidden=hidden,
                quiet=quiet,
                page=not no_report,
            )
    ctx.exit(status)


def _one(
    slide: str,
    config: RunConfig,
    out: Path,
    stopped: Stop,
    *,
    shard: Shard | None,
    overwrite: bool,
    hidden: bool,
    quiet: bool,
    page: bool,
) -> int:
    """Run one slide, or a shard of it, and return the exit status."""
    from wsiseg.cli.progress import Progress

    with without_collection():
        from wsiseg.runs.slide import segment_slide

    with Progress(Path(slide).name, hidden=hidden) as progress:
        printed = _WarningPrinter(quiet=quiet)
        result = segment_slide(
            slide,
            config,
            out,
            overwrite=overwrite,
            shard=shard,
            on_progress=progress.update,
            on_phase=progress.phase,
            on_warning=printed,
            stopped=stopped,
        )
    report_after(result, wanted=page)
    if not quiet:
        report(result, printed.warnings, details=True)
    return 3 if result.failures else 0


def _many(
    entries: list[Entry],
    config: RunConfig,
    out: Path,
    stopped: Stop,
    *,
    shard: Shard | None,
    overwrite: bool,
    hidden: bool,
    quiet: bool,
    page: bool,
) -> int:
    """Run one slide after the other, print a table, and return the exit status."""
    from wsiseg.cli.progress import Progress
    from wsiseg.runs.slide_list import segment_slides

    rows, printed = [], _WarningPrinter(quiet=quiet)
    with Progress("", hidden=hidden) as progress:

        def follow(slide: str) -> Callable[[int, int, int], None]:
            progress.retitle(Path(slide).name)
            printed.begin(slide)
            return progress.update

        for row in segment_slides(
            entries, config, out, overwrite=overwrite, shard=shard, progress=follow, on_warning=printed, stopped=stopped
        ):
            rows.append(row)
            if row["manifest"]:
                report_after(row["manifest"], wanted=page)
            if row["manifest"] and not quiet:
                report(row["manifest"], printed.warnings)
            elif not row["manifest"]:
                click.echo(f"Error: {row['message']}", err=True)
    bad = [row for row in rows if row["status"] != "complete"]
    if not quiet:
        width = max((len(Path(row["slide"]).name) for row in rows), default=0)
        click.echo(f"\n{'slide':{width}}  status      {'cells':>9}  {'missing tiles':>13}  {'seconds':>8}")
        for row in rows:
            line = f"{Path(row['slide']).name:{width}}  {row['status']:10}  {row['cells']:>9}  {row['tiles_failed']:>13}  {row['seconds']:>8}"
            click.echo(line.rstrip())  # the error was printed when it occurred, and is in summary.csv
        again = "; run the same command again to retry the others" if bad else ""
        click.echo(f"{len(rows) - len(bad)} of {counted(len(rows), 'slide')} complete{again}")
    failed = sum(row["status"] == "failed" for row in rows)
    return 0 if not bad else 1 if failed == len(rows) else 3


def _as_settings(options: dict[str, Any]) -> dict[str, Any]:
    """Options as the nested mapping that a configuration file would hold; options not given are left out."""
    tiling = {
        k: v for k, v in (("tile_um", options.pop("tile_size")), ("halo_um", options.pop("halo"))) if v is not None
    }
    settings = {
        k: v for k, v in options.items() if v is not None and k in {f.name for f in dataclasses.fields(RunConfig)}
    }
    if tiling:
        settings["tiling"] = tiling
    if options["no_tissue"]:
        settings["tissue"] = {"enabled": False}
    if options["known_types"]:
        settings["typing"] = {"known_types": True}
    if "formats" in settings:
        settings["formats"] = split_list(settings["formats"])
    return settings


class _WarningPrinter:
    """Printer of the warnings that come before the work on a slide; keeps them, so that they are not repeated at the end."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet, self.place, self.warnings = quiet, "", list[str]()

    def begin(self, slide: str) -> None:
        """Start one slide of several; it is named in the warnings that follow."""
        self.place = f"{Path(slide).name}: "
        self.warnings.clear()

    def __call__(self, warning: str) -> None:
        self.warnings.append(warning)
        if not self.quiet:
            click.echo(f"Warning: {self.place}{warning}", err=True)


def report(result: Manifest | ShardRecord, printed: Collection[str] = (), *, details: bool = False) -> None:
    """Print the outcome of a run, or of a shard; ``printed`` holds the warnings already printed. With ``details``, of a run more than a line."""
    from wsiseg.runs.manifest import Manifest

    for warning in dict.fromkeys(result.warnings if isinstance(result, Manifest) else ()):
        if warning not in printed:
            click.echo(f"Warning: {warning}", err=True)
    for failure in result.failures:
        click.echo(f"Missing: {failure}", err=True)
    counts = result.counts
    if not isinstance(result, Manifest):
        done = f"{counted(counts['blocks'], 'block')}, {counted(counts['outlines'], 'outline')} in {result.seconds['total']:.1f} s"
        click.echo(
            f"{result.folder}: shard {result.shard}: {done}; when all shards are done: wsiseg merge {result.folder}"
        )
        return
    typed = ", ".join(f"{name} {n}" for name, n in result.types.items() if len(result.types) > 1)
    when = "already complete" if result.already else f"in {result.seconds['total']:.1f} s"
    click.echo(f"{result.folder}: {counted(counts['cells'], 'cell')}{f' ({typed})' if typed else ''}, {when}")
    if details and not result.already:
        for line in summary_lines(result):
            click.echo(line)
    if result.status != "complete":
        again = (
            "run those shards again, then merge"
            if counts["blocks_missing"]
            else "run the same command again to retry them"
        )
        failed = counts["tiles_failed"]
        click.echo(
            f"{failed} of {counted(counts['tiles'], 'tile')} {'is' if failed == 1 else 'are'} missing; {again}",
            err=True,
        )


def summary_lines(manifest: Manifest) -> list[str]:
    """Lines about a finished run: cells and density per type, cost, files, and what to do next."""
    area, cost = float(manifest.slide.get("searched_mm2") or 0), manifest.seconds_per_mm2
    rows = [(name, n) for name, n in manifest.types.items() if n] if len(manifest.types) > 1 else []
    rows.append(("all", manifest.counts["cells"]))
    width, digits = max(len(name) for name, _ in rows), max(len(str(n)) for _, n in rows)
    lines = [f"  {name:{width}}  {n:>{digits}}" + (f"  {n / area:6.0f} per mm2" if area else "") for name, n in rows]
    lines.append(f"  {area:.3g} mm2 searched, {cost:.3g} s per mm2, {manifest.peak_ram_mb:.0f} MB of memory at most")
    lines.append(f"  files: {', '.join(manifest.files)}")
    steps = next_steps(manifest)
    return [*lines, f"  next: {'; '.join(steps)}"] if steps else lines


def next_steps(manifest: Manifest) -> list[str]:
    """What to do with a finished run."""
    from wsiseg.runs.folder import REPORT_NAME

    steps = [f"look at {page}"] if (page := Path(manifest.folder) / REPORT_NAME).exists() else []
    if any(name.startswith("cells.geojson") for name in manifest.files):
        steps.append("drag the GeoJSON onto the slide in QuPath")
    if manifest.config["method"] not in CHAINED and FILE_NAMES["parquet"] in manifest.files:
        steps.append(f"click cells: wsiseg view {shlex.quote(manifest.folder)}")
        steps.append(f"other clicks: wsiseg type {shlex.quote(manifest.folder)} --seeds FILE")
    return steps
