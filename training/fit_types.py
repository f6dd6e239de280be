"""Fit the distribution of types among the finished network's descriptors, from typed dots; the last step of the recipe, one minute on a CPU.

    python -m training.fit_types --data DATA --weights OUT/calibrated.safetensors --out OUT/nuclei-compact.safetensors

Every dot of brca_m2c/train and nucls_mini/train is a click; its descriptor is a sample of its type in its image. Estimated are (names as in
`wsiseg.records.TypeSpace`): the covariance within a type and image, which `transform` makes the identity; the variance of the means of types in
general (`between_variance`); the means of the classes that both collections know (`reference_classes`), how much a class mean varies between
images (`class_variance`), and the variance of the shift that all types of an image share (`slide_variance`). Both collections have the same
weight. Patients of evaluation sets are left out as in training. Nothing is random. The file that is written is the one that ships: its kernels and
matrices are rounded to fp16.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.data import load_points
from wsiseg.models.nuclei_compact import LEARNED, MEASURED_SHARE, NucleiCompact
from wsiseg.records import TypeSpace
from wsiseg.slide.stain import (
    BROWN_AS_EOSIN,
    COUNTERSTAIN,
    HAEMATOXYLIN_AND_EOSIN,
    compose,
    optical_density,
    saturated,
    separate,
)
from wsiseg.slide.tissue import WHITE_POINT

if TYPE_CHECKING:
    from collections.abc import Callable

#: Collections with dots: enlargement to the model's scale, and which reference class each of their types is (the rest are of none).
SETS = {"brca_m2c": (2, {1: 0, 2: 1, 3: 2}), "nucls_mini": (1, {1: 1, 2: 2, 3: 0})}
CLASSES = 3
MEASURED = (
    0.1  #: share of the measurements in a distance; 0.3, as in the plain cosine, costs 0.01 macro-F1 with one click
)
SHRINK_WITHIN, SHRINK_SPREAD = (
    0.5,
    0.1,
)  #: towards a round cloud; 0.2 within costs 0.02 to 0.04 on other slides, the second hardly matters
COUNTERSTAIN_STRENGTH = (
    0.5  #: haematoxylin of immunohistochemistry, relative to H&E's; 0.25 and 1 give the same within 0.05 macro-F1
)
FEWEST = 5  #: dots of a type in an image that make a mean
LOOSE = 1.5  #: the strays of a mean from its kind are underestimated by fitting kind and shift to the same means

#: One image: descriptors (N, D) and types (N,).
Dots = tuple[np.ndarray, np.ndarray]


def as_ihc(image: np.ndarray) -> np.ndarray:
    """H&E (H, W, 3) as immunohistochemistry of the same tissue would be shown: its haematoxylin fainter, the eosin as brown (slide/stain.py)."""
    white = np.clip(np.percentile(image.reshape(-1, 3), WHITE_POINT, axis=0), 220, 255)
    haematoxylin, eosin = separate(optical_density(image, white), HAEMATOXYLIN_AND_EOSIN)
    return compose(saturated(COUNTERSTAIN_STRENGTH * haematoxylin), COUNTERSTAIN + BROWN_AS_EOSIN * eosin)


def describe(model: NucleiCompact, data: Path, name: str, show: Callable[[np.ndarray], np.ndarray]) -> list[Dots]:
    """Descriptors of all dots of a collection, image by image, as ``show`` makes them."""
    out = []
    for _, picture, dots in load_points(data, name, scale=SETS[name][0]):
        image = show(picture)
        pixels = np.pad(image, [(0, -n % model.stride_px) for n in image.shape[:2]] + [(0, 0)], mode="reflect")
        with torch.inference_mode():
            embeddings = model.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None])
            points = torch.from_numpy(dots[:, :2].astype(np.float32))
            found = model.decode(embeddings, torch.zeros(len(points), dtype=torch.long), points).descriptors
        out.append((found.double().numpy(), dots[:, 2].astype(int)))
    return out


def fit(collections: dict[str, list[Dots]]) -> TypeSpace:
    """Moments of the model in `wsiseg/celltypes/plda.py`."""
    size = next(iter(collections.values()))[0][0].shape[1]
    weights = np.ones(size)
    if size > LEARNED:
        weights[:LEARNED] = ((1 - MEASURED) / (1 - MEASURED_SHARE)) ** 0.5
        weights[LEARNED:] = (MEASURED / MEASURED_SHARE) ** 0.5
    within, between = (
        np.mean(parts, 0) for parts in zip(*(_covariances(c, weights) for c in collections.values()), strict=True)
    )
    within, between = _round(within, SHRINK_WITHIN), _round(between, SHRINK_SPREAD)
    values, vectors = np.linalg.eigh(within)
    white = vectors / np.sqrt(values)
    spread, turn = np.linalg.eigh(white.T @ between @ white)
    transform = weights[:, None] * (white @ turn)

    means = []  # (image, kind, D), NaN where an image has too few of a kind
    for name, images in collections.items():
        for z, types in images:
            rows = np.full((CLASSES, size), np.nan)
            for code, kind in SETS[name][1].items():
                if (types == code).sum() >= FEWEST:
                    rows[kind] = (z[types == code] @ transform).mean(0)
            means.append(rows)
    seen = np.array(
        [m for m in means if (~np.isnan(m[:, 0])).sum() > 1]
    )  # an image with one kind cannot tell shift from stray
    shift, kinds = np.zeros((len(seen), size)), np.nanmean(seen, 0)
    for _ in range(50):
        shift = np.nanmean(seen - kinds, 1)
        shift -= shift.mean(0)
        kinds = np.nanmean(seen - shift[:, None], 0)
    stray = np.nanmean((seen - kinds - shift[:, None]) ** 2, (0, 1)) * LOOSE
    return TypeSpace(
        transform=transform.astype(np.float32),
        mean=kinds.mean(0),
        between_variance=np.maximum(spread, 1e-6),
        reference_classes=kinds,
        class_variance=stray,
        slide_variance=(shift**2).mean(0),
    )


def _covariances(images: list[Dots], weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Within types, and of the types' means about their image's, each type of each image counting once."""
    within, between, degrees = [], [], 0
    for z, types in images:
        groups = [z[types == t] * weights for t in np.unique(types) if (types == t).sum() >= FEWEST]
        within += [np.cov(g, rowvar=False, bias=True) for g in groups]
        if len(groups) > 1:
            between.append(np.cov(np.stack([g.mean(0) for g in groups]), rowvar=False) * (len(groups) - 1))
            degrees += len(groups) - 1
    return np.mean(within, 0), np.sum(between, 0) / degrees


def half_size(model: NucleiCompact) -> dict[str, Tensor]:
    """Tensors of the file that ships: kernels and matrices in fp16; what is one number per channel stays, some variances are below its range."""
    wide = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    return {k: (v.half() if k in wide else v.clone()).contiguous() for k, v in model.state_dict().items()}


def _round(covariance: np.ndarray, share: float) -> np.ndarray:
    return (1 - share) * covariance + share * np.trace(covariance) / len(covariance) * np.eye(len(covariance))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    model = NucleiCompact()
    model.load_state_dict(load_file(options.weights))
    tensors = half_size(model)
    model.load_state_dict(tensors)  # the types are those of the rounded weights
    model.ready(torch.device("cpu"), bf16=False)
    views = (np.asarray, as_ihc)
    space = fit({name: [x for show in views for x in describe(model, options.data, name, show)] for name in SETS})
    fitted = {
        "transform": space.transform,
        "middle": space.mean,
        "spread": space.between_variance,
        "kinds": space.reference_classes,
        "kind_spread": space.class_variance,
        "shift": space.slide_variance,
    }  # by their names in the weight file
    for name, values in fitted.items():
        tensors[f"type_{name}"] = torch.from_numpy(values).float().contiguous()
    save_file(tensors, options.out)
    print(
        f"{options.out}: variance between types {space.between_variance.sum():.1f}, of the slide {space.slide_variance.sum():.1f}, "
        f"of a class {space.class_variance.sum():.1f}"
    )


if __name__ == "__main__":
    main()
