"""``wsiseg models``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from wsiseg.cli.arguments import Group, Working
from wsiseg.cli.options import overwrite_option
from wsiseg.cli.streams import one_line
from wsiseg.models.store import MPP_RANGE, NORMALISE

if TYPE_CHECKING:
    from wsiseg.models.cards import ModelCard


@click.group(cls=Group, short_help="List, check, import and download models.", name="models")
def command() -> None:
    """Manage models: the bundled one, and checkpoints of the SAM family, which are imported once and then used by name.

    \b
    wsiseg models list                                            models here and available for download
    wsiseg models download sam-vit-b                              download a published checkpoint
    wsiseg models import best.pt --name mine --mpp 0.25           import your own
    wsiseg run slide.svs --model mine

    Models are kept below your data folder, or in the folder that the environment variable WSISEG_MODELS names. No other command
    downloads anything.
    """  # noqa: D301 - click's mark for lines that stay as they are


@command.command("list", short_help="List models here and available for download.")
def list_() -> None:
    """List every model: name, architecture, what it takes, side of its tile, microns per pixel, licence and location.

    "maps" among what a model takes: it also makes instance maps, for --method apg.
    """
    from wsiseg.models.catalogue import catalogue
    from wsiseg.models.store import models_folder

    rows = [("name", "architecture", "takes", "tile um", "mpp", "licence", "where")]
    rows += [
        (
            row.name,
            row.architecture,
            row.takes,
            f"{row.tile_um:g}" if row.tile_um else "any",
            f"{row.mpp:g}",
            row.licence,
            row.where,
        )
        for row in catalogue()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    click.echo(one_line(f"Imported models are in {models_folder()}"), err=True)


@command.command(short_help="Show the card of a model.")
@click.argument("name")
def show(name: str) -> None:
    """Show the card of the model NAME."""
    from wsiseg.models.catalogue import known_card

    _report(known_card(name))


@command.command(short_help="Verify the checksums of weights.")
@click.argument("names", nargs=-1, metavar="[NAME...]")
@click.pass_context
def verify(ctx: click.Context, names: tuple[str, ...]) -> None:
    """Compare the weights of the models NAME, by default all, with the sha256 of their cards."""
    from wsiseg.models.catalogue import verify_all

    problems = verify_all(names)
    for name, wrong in problems.items():
        click.echo(f"Error: {one_line(wrong)}" if wrong else f"{name}: OK", err=bool(wrong))
    if any(problems.values()):
        ctx.exit(1)


@command.command("import", cls=Working, short_help="Import a model of the SAM family.")
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE|FOLDER")
@click.option("--name", required=True, help="Name for --model: lower-case letters, digits, dots, hyphens, underscores.")
@click.option(
    "--decoder", type=click.Path(path_type=Path), metavar="FILE", help="Instance decoder, if it is in a separate file."
)
@click.option(
    "--mpp",
    type=float,
    default=0.25,
    show_default=True,
    metavar="UM",
    help=f"Microns per px of the model's input images ({MPP_RANGE[0]:g} to {MPP_RANGE[1]:g}).",
)
@click.option(
    "--licence",
    default="",
    metavar="TEXT",
    help="Licence of the weights, for the card.  [default: what a folder's README.md states, else unknown]",
)
@click.option("--source", default="", metavar="TEXT", help="Source of the weights, for the card.  [default: the path]")
@click.option(
    "--normalise",
    type=click.Choice(NORMALISE),
    default=NORMALISE[0],
    show_default=True,
    help="Normalisation of each tile before the model.",
)
@overwrite_option("Replace an existing model of this name.")
def import_(
    file: Path, name: str, decoder: Path | None, mpp: float, licence: str, source: str, normalise: str, overwrite: bool
) -> None:
    """Convert the checkpoint FILE, or the model in FOLDER, and store it under a name for --model.

    FILE is a SAM with a ViT-B, ViT-L or ViT-H encoder: as published, fine-tuned (micro-sam, PathoSAM and others), or a training checkpoint
    (best.pt); .pt, .pth or .safetensors. FOLDER is one of the Hugging Face hub, with config.json and *.safetensors: SAM 2 or 2.1, SAM 3 (both need
    the package transformers: pip install '.[transformers]' in the checkout), or SAM. Nothing in it is executed: what asks for that is refused.

    --mpp is the scale at which the model saw its images in training. A model trained on tiles of 512 px at
    0.25 um/px, enlarged to 1024 px (PathoSAM), works at 0.125.

    \b
    wsiseg models import vit_b_histopathology.pt --decoder vit_b_histopathology_decoder.pt --name patho-b --mpp 0.125
    wsiseg models import sam2.1-hiera-large --name sam2.1-large --mpp 0.125
    """  # noqa: D301 - click's mark for lines that stay as they are
    from wsiseg.models.store import import_model

    _report(
        import_model(
            file,
            name,
            decoder=decoder,
            mpp=mpp,
            licence=licence,
            source=source,
            normalise=normalise,
            overwrite=overwrite,
            on_note=_note,
        )
    )


@command.command(cls=Working, short_help="Download a published checkpoint.")
@click.argument("name")
@overwrite_option("Replace an existing model of this name.")
def download(name: str, overwrite: bool) -> None:
    """Download the published checkpoint NAME (see `wsiseg models list`), verify its sha256, and import it.

    If the connection breaks, the same command resumes the download.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from wsiseg.models.download import download as fetch

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bars:
        task = bars.add_task(name, total=None)
        card = fetch(
            name,
            overwrite=overwrite,
            on_note=_note,
            on_progress=lambda done, total: bars.update(task, completed=done, total=total or None),
        )
    _report(card)


def _note(text: str) -> None:
    click.echo(f"Note: {text}", err=True)


def _report(card: ModelCard) -> None:
    from wsiseg.models.catalogue import abilities, expected_memory_gb, tile_px

    side = tile_px(card)
    rows = {
        "name": card.name,
        "architecture": card.architecture,
        "takes": abilities(card),
        "instance decoder": "yes" if card.instance_decoder else "no",
        "mpp": f"{card.mpp:g}",
        "tile": f"{side} x {side} px, {side * card.mpp:g} x {side * card.mpp:g} um" if side else "any size",
        "memory": f"about {expected_memory_gb(card):.1f} GB on the CPU, a tile at a time",
        "normalise": card.normalise,
        "licence": card.licence,
        "source": card.source,
        "weights": card.weights,
        "sha256": card.sha256,
    }
    for key, value in rows.items():
        click.echo(f"{key}: {value}")
