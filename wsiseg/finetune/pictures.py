"""Pictures of a training: what was annotated, and what is found."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from skimage.segmentation import find_boundaries

from wsiseg.runtime.atomic import atomic_path

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

SIDE = 512  #: px of each image that are drawn
TRUTH, FOUND = (0, 160, 60), (255, 200, 0)  #: colours of borders


def draw_outlines(
    path: Path, rows: Sequence[tuple[NDArray[np.uint8], NDArray[np.integer], NDArray[np.integer]]]
) -> None:
    """Draw images side by side, annotated borders green and found ones yellow.

    Parameters
    ----------
    path
        PNG to write.
    rows
        Image (H, W, 3), annotated and found ids (H, W) of each; nothing is written without any.
    """
    panels = []
    for image, truth, found in rows:
        panel = np.full((SIDE, SIDE, 3), 255, np.uint8)
        part = image[:SIDE, :SIDE].copy()
        part[find_boundaries(truth[:SIDE, :SIDE], mode="inner")] = TRUTH
        part[find_boundaries(found[:SIDE, :SIDE], mode="inner")] = FOUND
        panel[: part.shape[0], : part.shape[1]] = part
        panels.append(panel)
    if panels:
        with atomic_path(path) as partial:
            Image.fromarray(np.concatenate(panels, 1)).save(partial, "PNG")


def draw_masks(path: Path, rows: Sequence[tuple[NDArray[np.uint8], NDArray[np.bool_], NDArray[np.bool_]]]) -> None:
    """Draw images with the border of what is meant, green, and of the answer, yellow; arguments as of :func:`draw_outlines`, with masks."""
    draw_outlines(path, [(image, meant.astype(np.int8), answer.astype(np.int8)) for image, meant, answer in rows])
