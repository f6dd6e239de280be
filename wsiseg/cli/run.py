"""``wsiseg run``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import click

from wsiseg.cli import set_verbosity
from wsiseg.config import HALO_UM, TILE_UM, RunConfig, from_mapping, read_config

if TYPE_CHECKING:
    from collections.abc import Sequence

_DEFAULT = RunConfig()


def _choices(field: str) -> click.Choice[str]:
    return click.Choice(get_args(get_type_hints(RunConfig)[field]))


@click.command(short_help="Segment and type slides.")
@click.argument("slides", nargs=-1, required=True, metavar="SLIDE...")
@click.option("--seeds", metavar="FILE", help="Clicks, one or more per cell type: seeds.json, or points exported from QuPath.")
@click.option("--bank", metavar="FILE", help="bank.safetensors of another slide's run: its clicks type this one.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("wsiseg-out"), show_default=True, help="Folder of all runs.")
@click.option("--method", type=_choices("method"), help=f"How prompts are found.  [default: {_DEFAULT.method}]")
@click.option("--model", metavar="NAME|PATH", help=f"Model, or a .safetensors file of it.  [default: {_DEFAULT.model}]")
@click.option("--mpp", type=float, metavar="UM", help="Microns per level-0 pixel, when the slide does not say or says wrong.")
@click.option("--reader", type=_choices("reader"), help=f"Slide library.  [default: {_DEFAULT.reader}]")
@click.option("--roi", metavar="FILE", help="GeoJSON polygons (QuPath annotations): only cells inside.")
@click.option("--no-tissue", is_flag=True, help="Look everywhere, not only on tissue.")
@click.option("--tile-size", type=float, metavar="UM", help=f"Side of a tile's core, microns.  [default: {TILE_UM:g}, or what the model takes]")
@click.option("--halo", type=float, metavar="UM", help=f"Read around each tile, microns.  [default: {HALO_UM:g}, or what the model needs]")
@click.option("--format", "formats", metavar="LIST", help=f"Files to write, comma-separated.  [default: {','.join(_DEFAULT.formats)}]")
@click.option("--device", metavar="NAME", help=f"auto, cpu, cuda or cuda:N.  [default: {_DEFAULT.device}]")
@click.option("--precision", type=_choices("precision"), help=f"Of the encoder.  [default: {_DEFAULT.precision}: bf16 on a GPU, fp32 on the CPU]")
@click.option("--workers", type=click.IntRange(1, 1024), metavar="N", help=f"Processes on this machine.  [default: {_DEFAULT.workers}]")
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="TOML or JSON file of settings, or the manifest.json of a run.")
@click.option("--overwrite", is_flag=True, help="Replace a run with other settings in the same folder.")
@click.option("--no-progress", is_flag=True, help="No progress bar (there is none in a pipe anyway).")
@click.option("-v", "--verbose", count=True, help="Say more; twice for debugging.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing but errors.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    slides: Sequence[str],
    out: Path,
    config_file: Path | None,
    overwrite: bool,
    no_progress: bool,
    verbose: int,
    quiet: bool,
    **options: Any,  # noqa: ANN401
) -> None:
    """Outline every cell of SLIDE and, with --seeds, give each a type.

    Writes OUT/<slide-stem>/cells.parquet, cells.geojson.gz (drop it on the slide in QuPath) and manifest.json. Stopped at any moment, the same
    command goes on where it was. A flag beats the --config file, which beats the default.

    \b
    wsiseg run slide.svs --seeds seeds.json
    wsiseg run scan.tif --mpp 0.25 --roi tumour.geojson --out results
    """  # noqa: D301 - click's mark for lines that stay as they are
    set_verbosity(verbose, quiet)
    config = read_config(config_file) if config_file else RunConfig()
    if options["seeds"] or options["bank"]:  # either flag beats both in the file
        config = dataclasses.replace(config, seeds=None, bank=None)
    config = from_mapping(_as_settings(options), "command line", config)

    from wsiseg.cli.progress import Progress
    from wsiseg.errors import WsisegError
    from wsiseg.pipeline import segment_slide

    failed, holes = [], False
    for slide in slides:
        with Progress(Path(slide).name, hidden=no_progress or quiet) as progress:
            try:
                manifest = segment_slide(slide, config, out, overwrite=overwrite, on_progress=progress.update)
            except WsisegError as error:
                if len(slides) == 1:
                    raise
                failed.append(str(error))
                continue
        holes |= manifest["status"] != "complete"
        if not quiet:
            _report(manifest)
    for line in failed:
        click.echo(f"Error: {line}", err=True)
    if failed or holes:
        ctx.exit(1 if len(failed) == len(slides) else 3)


def _as_settings(options: dict[str, Any]) -> dict[str, Any]:
    """Options as the nested mapping that a configuration file would hold; options not given are left out."""
    tiling = {k: v for k, v in (("tile_um", options.pop("tile_size")), ("halo_um", options.pop("halo"))) if v is not None}
    settings = {k: v for k, v in options.items() if v is not None and k in {f.name for f in dataclasses.fields(RunConfig)}}
    if tiling:
        settings["tiling"] = tiling
    if options["no_tissue"]:
        settings["tissue"] = {"enabled": False}
    if "formats" in settings:
        settings["formats"] = tuple(f.strip() for f in settings["formats"].split(",") if f.strip())
    return settings


def _report(manifest: dict[str, Any]) -> None:
    for warning in manifest["warnings"]:
        click.echo(f"Warning: {warning}", err=True)
    for failure in manifest["failures"]:
        click.echo(f"Missing: {failure}", err=True)
    counts, types = manifest["counts"], manifest["types"]
    typed = ", ".join(f"{name} {n}" for name, n in types.items() if len(types) > 1)
    click.echo(f"{manifest['folder']}: {counts['cells']} cells{f' ({typed})' if typed else ''} in {manifest['seconds']['total']:.1f} s")
    if manifest["status"] != "complete":
        click.echo(f"{counts['tiles_failed']} of {counts['tiles']} tiles are missing; run the same command again to try them once more", err=True)
