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
    """List name, architecture, microns per pixel, licence and location of every model."""
    from wsiseg.models.catalogue import catalogue
    from wsiseg.models.store import models_folder

    rows = [("name", "architecture", "mpp", "licence", "where")]
    rows += [(row.name, row.architecture, f"{row.mpp:g}", row.licence, row.where) for row in catalogue()]
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


@command.command("import", cls=Working, short_help="Import a checkpoint of the SAM family.")
@click.argument("file", type=click.Path(path_type=Path))
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
    """Convert the checkpoint FILE and store it under a name for --model.

    FILE is a SAM with a ViT-B, ViT-L or ViT-H encoder: as published, fine-tuned (micro-sam, PathoSAM and others), or a training checkpoint
    (best.pt); .pt, .pth or .safetensors. Nothing in it is executed: a file that asks for that is refused.

    --mpp is the scale at which the model saw its images in training. A model trained on tiles of 512 px at
    0.25 um/px, enlarged to 1024 px (PathoSAM), works at 0.125.

    \b
    wsiseg models import vit_b_histopathology.pt --decoder vit_b_histopathology_decoder.pt --name patho-b --mpp 0.125
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
    rows = {
        "name": card.name,
        "architecture": card.architecture,
        "instance decoder": "yes" if card.instance_decoder else "no",
        "mpp": f"{card.mpp:g}",
        "normalise": card.normalise,
        "licence": card.licence,
        "source": card.source,
        "weights": card.weights,
        "sha256": card.sha256,
    }
    for key, value in rows.items():
        click.echo(f"{key}: {value}")
