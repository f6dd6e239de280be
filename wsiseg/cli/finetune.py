"""``wsiseg finetune``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args, get_type_hints

import click

from wsiseg.cli.arguments import Working
from wsiseg.cli.imports import without_collection
from wsiseg.cli.logs import set_verbosity
from wsiseg.cli.options import device_option, model_option, overwrite_option, quiet_option
from wsiseg.finetune.config import FinetuneConfig

_DEFAULT = FinetuneConfig()


def _choices(field: str) -> click.Choice[str]:
    return click.Choice(get_args(get_type_hints(FinetuneConfig)[field]))


@click.command(cls=Working, short_help="Adapt a model to labelled images.")
@click.argument("data", metavar="DATA", type=click.Path(path_type=Path))
@model_option
@click.option(
    "--objective", type=_choices("objective"), help=f"What is learned, see above.  [default: {_DEFAULT.objective}]"
)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, metavar="FILE", help="Model to write: a .safetensors file."
)
@click.option(
    "--valid",
    metavar="DATA|none",
    help=f"Other images that validate, or none.  [default: {_DEFAULT.valid_share:.0%} of DATA, by slide or patient]",
)
@click.option(
    "--also",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="DATA",
    help="Further images, mixed in so that the model stays good at what they show; repeatable.",
)
@click.option(
    "--mpp", type=float, metavar="UM", help="Microns per px of the images, where they and images.csv do not say."
)
@click.option("--minutes", type=float, metavar="N", help=f"How long to train.  [default: {_DEFAULT.minutes:g}]")
@click.option("--epochs", type=float, metavar="N", help="How often to go through the images, in place of --minutes.")
@click.option(
    "--batch-size", type=int, metavar="N", help="Crops or images per step.  [default: by objective and device]"
)
@click.option("--rate", type=float, metavar="R", help="Largest learning rate.  [default: by objective]")
@click.option(
    "--lora-rank",
    type=int,
    metavar="N",
    help="Train adapters of this rank in the linear layers; 0: all weights.  [default: by objective]",
)
@click.option(
    "--keep",
    type=float,
    metavar="W",
    help=f"How strongly nuclei-compact is held near its former self.  [default: {_DEFAULT.keep:g}]",
)
@click.option(
    "--intent",
    type=_choices("intent"),
    help=f"What a prompt means: all nuclei, those of a type, or both in turn.  [default: {_DEFAULT.intent}: both, if there are types]",
)
@click.option(
    "--reading", type=_choices("reading"), help=f"Reading of SAMPO's preference loss.  [default: {_DEFAULT.reading}]"
)
@click.option(
    "--input-px",
    type=int,
    metavar="N",
    help=f"Side of the images SAM is adapted to; 0: its own.  [default: {_DEFAULT.input_px}]",
)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="JSON with more phrases for prompt groups (docs/finetune.md).",
)
@click.option(
    "--text-encoder",
    metavar="NAME|FOLDER",
    help=f"What reads phrases for nuclei-compact: a package, or a folder (docs/finetune.md).  [default: {_DEFAULT.text_encoder}]",
)
@click.option("--seed", type=int, metavar="N", help=f"Of split, crops and prompts.  [default: {_DEFAULT.seed}]")
@device_option
@click.option(
    "--precision", type=_choices("precision"), help=f"bf16 or fp32.  [default: {_DEFAULT.precision}: bf16 on a GPU]"
)
@overwrite_option("Replace the model, and a training that was stopped.")
@quiet_option
def command(
    data: Path,
    model: str | None,
    out: Path,
    valid: str | None,
    also: tuple[Path, ...],
    mpp: float | None,
    prompts: Path | None,
    overwrite: bool,
    quiet: bool,
    **settings: Any,  # noqa: ANN401 - the fields of FinetuneConfig
) -> None:
    """Adapt a model to the labelled images in DATA, and write it as a file that `wsiseg run --model FILE` takes.

    DATA holds image/ and label/ (integer ids; type/ and classes.json for types), or slides with outlines of the same names (a.svs, a.geojson), or is
    a run with corrected.geojson in it. Images of one slide or patient stay on one side of the split: name them in images.csv (image, group, mpp).

    \b
    --objective supervised     outlines of the labels (nuclei-compact), or masks of prompts
    --objective sampo          SAM: a few points mean all nuclei, or all of a type
    --objective prompt-group   SAM 3, nuclei-compact: different phrases mean the same

    \b
    wsiseg finetune my-images --mpp 0.25 --out mine.safetensors
    wsiseg run slide.svs --model mine.safetensors

    The same command continues a training that was stopped.
    """  # noqa: D301 - click's mark for lines that stay as they are
    from wsiseg.cli.progress import Progress
    from wsiseg.cli.stop import Stop

    with without_collection():
        from wsiseg.finetune.run import finetune

    set_verbosity(0, quiet=quiet)
    config = FinetuneConfig(**{name: value for name, value in settings.items() if value is not None})
    with Stop() as stop, Progress(out.name, hidden=quiet, unit="steps") as progress:
        done = finetune(
            data,
            out,
            model=model or "nuclei-compact",
            config=config,
            valid=None if valid in (None, "none") else Path(valid),
            no_valid=valid == "none",
            also=also,
            prompts=prompts,
            mpp=mpp,
            overwrite=overwrite,
            on_progress=lambda step, steps, loss: progress.update(step, steps, f"loss {loss:.3f}"),
            on_note=lambda note: None if quiet else click.echo(f"Warning: {note}", err=True),
            stopped=stop,
        )
    if quiet:
        return
    scores = ", ".join(
        f"{name} {done.before[name]:.3f} -> {done.after[name]:.3f}" for name in done.after if name != "score"
    )
    held = f"on {len(done.valid.images)} validation images: {scores}" if scores else "not validated"
    click.echo(f"{out}: {done.steps} steps on {len(done.train.images)} images; {held}")
    click.echo(f"wsiseg run SLIDE --model {out}{' --text PHRASE' if done.reads_text else ''}")
