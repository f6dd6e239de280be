"""``wsiseg doctor``: the readers read, the model encodes; GPU and disk are examined."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from wsiseg.cli.arguments import Command

if TYPE_CHECKING:
    from collections.abc import Callable


@click.command(cls=Command, short_help="Check what works on this machine.")
@click.pass_context
def command(ctx: click.Context) -> None:
    """Check readers, model, GPU and disk, with a remedy for each failure. Exit status 1 when something required is missing."""
    checks = _examine()
    width = max(len(c.what) for c in checks)
    for c in checks:
        click.echo(f"{'ok  ' if c.ok else 'FAIL' if c.needed else 'none'}  {c.what:<{width}}  {c.found}")
        if c.remedy:
            click.echo(f"      {'':<{width}}  -> {c.remedy}")
    if any(c.needed and not c.ok for c in checks):
        ctx.exit(1)


@dataclass(frozen=True, kw_only=True)
class _Check:
    """One line of the report. A check that is not ``needed`` may fail without harm."""

    what: str
    ok: bool
    found: str
    remedy: str = ""
    needed: bool = True


def _examine() -> list[_Check]:
    """Run every check."""
    from wsiseg.models.registry import MODELS
    from wsiseg.slide import READERS

    with tempfile.TemporaryDirectory() as folder:
        made = _attempt(
            "temporary folder", partial(_write, Path(folder)), "make room in it, or set TMPDIR to another one"
        )
        again = "install wsiseg again: pip install --force-reinstall ."
        checks = [
            _attempt(f"reader {name}", partial(_read, Path(folder) / "ihc.tiff", name), again)
            for name in READERS
            if made.ok
        ]
        checks += [] if made.ok else [made]
    remedy = "install wsiseg again: the weights are in the package"
    checks += [_attempt(f"model {name}", partial(_encode, name), remedy) for name in MODELS]
    return [*checks, _gpu(), _disk()]


def _attempt(what: str, trial: Callable[[], str], remedy: str) -> _Check:
    try:
        return _Check(what=what, ok=True, found=trial())
    except Exception as error:  # noqa: BLE001 - a doctor reports whatever breaks
        return _Check(
            what=what, ok=False, found=f"{type(error).__name__}: {' '.join(str(error).split())}", remedy=remedy
        )


def _write(folder: Path) -> str:
    from wsiseg.demo import write_demo

    return f"written to {write_demo(folder)[0].parent}"


def _read(slide: Path, name: str) -> str:
    from wsiseg.geometry import Box
    from wsiseg.slide import open_slide

    with open_slide(slide, mpp=0.5, reader=name) as reader:
        pixels = reader.read(0, Box(0, 0, 64, 64))
    return f"reads {reader.info.format}, 64 x 64 px, mean {pixels.mean():.0f}"


def _encode(name: str) -> str:
    import numpy as np
    import torch

    from wsiseg.models import load_model

    model = load_model(name)
    start = time.perf_counter()
    with torch.inference_mode():
        model.encode(torch.from_numpy(np.full((1, 3, 512, 512), 200, np.uint8)).to(model.device))
    return f"512 x 512 px on {model.device} in {time.perf_counter() - start:.2f} s"


def _gpu() -> _Check:
    try:
        import torch
    except Exception as error:  # noqa: BLE001 - a library of a driver may be missing
        return _Check(
            what="GPU", ok=False, found=f"torch: {' '.join(str(error).split())}", remedy="install torch again"
        )
    if torch.cuda.is_available():
        return _Check(what="GPU", ok=True, found=torch.cuda.get_device_name(0), needed=False)
    built = f"was built for CUDA {torch.version.cuda}" if torch.version.cuda else "is a CPU build"
    found = f"no GPU found; torch {torch.__version__} {built}; runs use the CPU"
    return _Check(what="GPU", ok=False, found=found, remedy="for a GPU, install a CUDA build of torch", needed=False)


def _disk() -> _Check:
    here, free = Path.cwd(), shutil.disk_usage(Path.cwd()).free / 2**30
    writable = os.access(here, os.W_OK)
    remedy = "" if writable and free > 1 else "pass --out with a folder on another disk"
    return _Check(
        what="disk",
        ok=writable and free > 1,
        found=f"{free:.0f} GiB free in {here}{'' if writable else ', not writable'}",
        remedy=remedy,
    )
