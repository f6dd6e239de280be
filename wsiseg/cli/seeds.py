"""``wsiseg seeds``."""

from __future__ import annotations

from pathlib import Path

import click


@click.group(short_help="Check a file of clicks.", name="seeds")
def command() -> None:
    """Work with files of clicks."""


@command.command()
@click.argument("seeds", type=click.Path(path_type=Path))
@click.option("--slide", help="Also check the clicks against this slide.")
@click.option("--mpp", type=float, metavar="UM", help="Microns per level-0 pixel of the slide, when it does not say.")
def check(seeds: Path, slide: str | None, mpp: float | None) -> None:
    """Say what is in SEEDS, or what is wrong with it."""
    from wsiseg.formats.seeds import check_seeds, read_seeds

    found = read_seeds(seeds)
    warnings = list(found.notes)
    if slide:
        from wsiseg.slide import open_slide

        with open_slide(slide, mpp=mpp, require_mpp=False) as reader:
            found, warnings = check_seeds(found, reader.info)
    for kind in found.types:
        negative = f", {len(kind.negative)} negative" if kind.negative else ""
        click.echo(f"{kind.name}: {len(kind.points)} click{'s' if len(kind.points) != 1 else ''}{negative}")
    for warning in warnings:
        click.echo(f"Warning: {warning}", err=True)
    click.echo(f"{seeds}: fine{f' for {slide}' if slide else ''}")
