"""``wsiseg export``."""

from __future__ import annotations

from pathlib import Path

import click

from wsiseg.cli.arguments import Working
from wsiseg.cli.failures import Failures
from wsiseg.cli.options import overwrite_option, runs_argument, split_list
from wsiseg.export import EXPORTS

_FORMATS = "; ".join(f"{name}: {export.what}" for name, export in EXPORTS.items())


@click.command(cls=Working, short_help="Write a run's cells for other programs.")
@runs_argument
@click.option(
    "--format", "formats", metavar="LIST", required=True, help=f"Files to write, comma-separated. {_FORMATS}."
)
@click.option(
    "--roi",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="GeoJSON of regions: only cells whose centroid lies in them, and images of that part of the slide.",
)
@click.option(
    "--mpp", type=float, metavar="UM", help="Microns per px of the label images.  [default: those of the slide]"
)
@click.option(
    "--square", "square_um", type=float, metavar="UM", help="Side of the squares of the density maps.  [default: 100]"
)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="Folder of the files.  [default: RUN/export]"
)
@overwrite_option("Replace files that exist.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    runs: tuple[Path, ...],
    formats: str,
    roi: Path | None,
    mpp: float | None,
    square_um: float | None,
    out: Path | None,
    overwrite: bool,
) -> None:
    """Write the cells of the finished run in folder RUN for other programs; the slide is not needed.

    Numbers in the label image are rows of cells.parquet, counted from 1. With --out and several runs, each has a folder of its name below it.

    \b
    wsiseg export wsiseg-out/slide --format labels,csv
    wsiseg export wsiseg-out/slide --format coco,gpkg --roi region.geojson --out exported
    wsiseg export wsiseg-out/* --format density --square 50
    """  # noqa: D301 - click's mark for lines that stay as they are
    from wsiseg.export.write import export_run

    chosen, failures = split_list(formats) or (), Failures(len(runs))
    for run in runs:
        with failures.collect():
            folder = run / "export" if out is None else out / run.resolve().name if len(runs) > 1 else out
            for file, warnings in export_run(
                run, chosen, folder, roi=roi, mpp=mpp, square_um=square_um, overwrite=overwrite
            ):
                for warning in warnings:
                    click.echo(f"Warning: {warning}", err=True)
                held = [file, *file.rglob("*")] if file.is_dir() else [file]
                click.echo(f"{file}: {sum(one.stat().st_size for one in held) / 1e6:.1f} MB")
    ctx.exit(failures.report())
