"""Which images train and which validate: whole slides or patients on one side, never crops of one on both."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from wsiseg.errors import ConfigError, counted

if TYPE_CHECKING:
    from wsiseg.finetune.data import Dataset


def split(data: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split by group.

    Parameters
    ----------
    data
        Images of at least two groups.
    share
        Of the images, about, that validate.
    seed
        Decides which groups.

    Returns
    -------
    train, valid
        Each with at least one group; which does not depend on the order of the images.

    Raises
    ------
    ConfigError
        All images are of one slide or patient.
    """
    groups = sorted({image.group for image in data.images})
    if len(groups) < 2:
        n = counted(len(data.images), "image")
        raise ConfigError(
            f"{data.place}: {n} of one slide or patient ({groups[0]}), which cannot both train and validate; "
            "give others with --valid, or --valid none to train without validation"
        )
    order = np.random.default_rng(seed).permutation(len(groups))
    chosen: set[str] = set()
    wanted = max(share * len(data.images), 1.0)
    for k in order[:-1]:
        size = sum(image.group in chosen for image in data.images)
        more = sum(image.group == groups[k] for image in data.images)
        if chosen and size + more / 2 > wanted:
            break
        chosen.add(groups[k])
    parts = [tuple(i for i in data.images if (i.group in chosen) == held) for held in (False, True)]
    return replace(data, images=parts[0]), replace(data, images=parts[1])


def require_disjoint(train: Dataset, valid: Dataset) -> None:
    """Refuse a slide, a patient or a file on both sides.

    Parameters
    ----------
    train, valid
        What is trained on, and what validates.

    Raises
    ------
    ConfigError
        With the first that both have.
    """
    shared = sorted({i.group for i in train.images} & {i.group for i in valid.images})
    if shared:
        raise ConfigError(
            f"{valid.place}: {shared[0]} is also in {train.place} ({counted(len(shared), 'slide or patient')} in both); "
            "what validates must not be trained on: take it out of one of them"
        )
    seen = {image.digest: image.name for image in train.images}
    for image in valid.images:
        if image.digest in seen:
            raise ConfigError(
                f"{valid.place}: {image.name} is the same file as {seen[image.digest]} of {train.place}; take it out of one of them"
            )
