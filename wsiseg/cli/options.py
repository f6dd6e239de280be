"""Options that several commands share, each written once; a command says in its own words what the option means there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, get_args, get_type_hints

import click

from wsiseg.config import CELLULAR_MPP, RunConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.decorators import FC

_DEFAULT = RunConfig()


def choices(field: str) -> click.Choice[str]:
    """Allowed values of a field of ``RunConfig``."""
    return click.Choice(get_args(get_type_hints(RunConfig)[field]))


def mpp_options(command: FC) -> FC:
    """Add ``--mpp`` and ``--force-mpp`` to a command; :func:`wsiseg.config.check_mpp` checks the two together."""
    low, high = CELLULAR_MPP
    force = click.option(
        "--force-mpp",
        is_flag=True,
        help=f"Accept an --mpp at which no cells can be found (outside {low:g} to {high:g}).",
    )
    scale = click.option(
        "--mpp",
        type=float,
        metavar="UM",
        help="Microns per level-0 pixel, when the slide states none or a wrong value.",
    )
    return scale(force(command))


reader_option = click.option("--reader", type=choices("reader"), help=f"Slide library.  [default: {_DEFAULT.reader}]")
model_option = click.option(
    "--model", metavar="NAME|PATH", help=f"Name of a model, or its .safetensors file.  [default: {_DEFAULT.model}]"
)
device_option = click.option(
    "--device", metavar="NAME", help=f"auto, cpu, cuda or cuda:N.  [default: {_DEFAULT.device}]"
)
known_types_option = click.option(
    "--known-types",
    is_flag=True,
    help="The model's own classes are types too: without clicks all of them, else those that no click covers.",
)
stain_option = click.option(
    "--stain",
    type=choices("stain"),
    help=f"H&E, or haematoxylin with a brown marker: ihc outside of nuclei, ihc-nuclear in them.  [default: {_DEFAULT.stain}]",
)
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Errors only.")
report_option = click.option(
    "--no-report", is_flag=True, help="Do not write report.html; `wsiseg report` writes it later."
)
runs_argument = click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))


def overwrite_option(sentence: str) -> Callable[[FC], FC]:
    """Add ``--overwrite``; ``sentence`` says what it replaces."""
    return click.option("--overwrite", is_flag=True, help=sentence)


def formats_option(sentence: str) -> Callable[[FC], FC]:
    """Add ``--format`` (parameter ``formats``, see :func:`split_list`); ``sentence`` ends the help text: restrictions, and the default."""
    return click.option("--format", "formats", metavar="LIST", help=f"Files to write, comma-separated{sentence}")


def config_option(sentence: str) -> Callable[[FC], FC]:
    """Add ``--config`` (parameter ``config_file``); ``sentence`` says what is read from it."""
    return click.option("--config", "config_file", type=click.Path(path_type=Path), help=sentence)


def split_list(text: str | None) -> tuple[str, ...] | None:
    """Split a comma-separated list; ``None`` stays ``None``."""
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())
