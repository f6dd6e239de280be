"""A small real slide and its clicks, made from an image that ships with scikit-image."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import tifffile
from skimage import data

from wsiseg.errors import RunError
from wsiseg.formats.seeds import write_seeds
from wsiseg.records import Seeds, SeedType
from wsiseg.runtime.atomic import atomic_path

MPP = 0.5  # not stated with the image; a colon gland's nuclei (about 12 x 5 um) fit this
_TILE = 256

# Four nuclei of each of the three kinds that anybody can tell apart in it: in the brown glands, round and angular ones between them, long and thin
# ones between them. Of 40 draws from the dots of benchmarks/ihc (without the third that is held out) the one that types this slide best, not an
# average one: an antibody's brown hides much of what tells types apart, so that clicks differ in worth.
_SEEDS = (
    SeedType("epithelium", (200, 80, 0), ((67.0, 82.0), (310.0, 340.0), (147.0, 108.0), (293.0, 152.0))),
    SeedType("immune", (0, 80, 200), ((271.0, 271.0), (433.0, 330.0), (131.0, 261.0), (298.0, 252.0))),
    SeedType("stroma", (0, 140, 60), ((508.0, 160.0), (486.0, 58.0), (486.0, 233.0), (243.0, 271.0))),
)


def write_demo(folder: str | Path) -> tuple[Path, Path]:
    """Write ``ihc.tiff`` (pyramidal, 512 x 512 px, 0.5 um/px) and ``seeds.json``.

    Parameters
    ----------
    folder
        Made when missing. Files of these names that are already there are left alone.

    Returns
    -------
    slide, seeds : Path
        The two files.

    Raises
    ------
    RunError
        The folder cannot be written.

    Examples
    --------
    >>> from wsiseg.demo import write_demo
    >>> slide, seeds = write_demo("demo")
    >>> slide.name, seeds.name
    ('ihc.tiff', 'seeds.json')
    """
    folder = Path(folder)
    slide, seeds = folder / "ihc.tiff", folder / "seeds.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in (slide, seeds):
            if path.is_dir():
                raise RunError(f"{path}: is a folder; pass another folder to `wsiseg demo`")
        if not slide.exists():
            with atomic_path(slide) as partial:
                _write_pyramid(partial, data.immunohistochemistry())
        if not seeds.exists():
            write_seeds(seeds, dataclasses.replace(demo_seeds(), source=str(seeds), slide=slide.name))
    except OSError as error:
        if isinstance(error, RunError):
            raise
        raise RunError(
            f"{folder}: cannot be written ({error.strerror}); pass a folder that you may write to"
        ) from error
    return slide, seeds


def demo_seeds() -> Seeds:
    """The demo's clicks, px of the image."""
    return Seeds(_SEEDS, "demo", None)


def _write_pyramid(path: Path, image: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
    """Tiled TIFF with levels of 1, 2 and 4 x, as slide scanners write it."""
    with tifffile.TiffWriter(path) as tiff:
        for level in range(3):
            step = 2**level
            small = (
                image.reshape(image.shape[0] // step, step, image.shape[1] // step, step, 3)
                .mean((1, 3))
                .round()
                .astype(np.uint8)
            )
            per_cm = 1e4 / (MPP * step)
            tiff.write(
                small,
                tile=(_TILE, _TILE),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": 95},
                metadata=None,
                subfiletype=int(level > 0),
                resolution=(per_cm, per_cm),
                resolutionunit="CENTIMETER",
                software=False,
            )
