"""Scenes for the intent decoder: frozen features of labelled images, what a click anywhere near a nucleus would tell, and who is meant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from training.data import Field, load_instances
from training.fit_types import as_ihc
from training.intent import DESCRIPTION_SIZE, Clicked, describe_clicked
from training.pseudo_labels import pseudo_masks
from wsiseg.models.phrases import STRIDE_PX, pyramid_of

if TYPE_CHECKING:
    from pathlib import Path

    from wsiseg.models.nuclei_compact import NucleiCompact

CENTRE, BORDER, OUTSIDE, BACKGROUND = range(4)  #: where a click lies
NEAR_PX = 2  #: a click near the border lies at most this far inside, one just outside at most this far from the nucleus
AWAY_PX = 8  #: background clicks are further from every nucleus
CLICKS = 3  #: of each sign at most
IHC_SHARE = 0.15  #: images shown as immunohistochemistry


@dataclass
class Scene:
    """One image, encoded.

    ``pyramid`` fp16 as :func:`wsiseg.models.intent.pyramid_of` gives it, without the batch axis; ``owner`` (h, w) int32, the nucleus with
    most of each cell of ``STRIDE_PX``; ``share`` (h, w) uint8, 255 x share of the cell that nuclei cover; ``known`` (h, w) bool;
    ``types`` by nucleus (0: none given); clicks: ``descriptions`` fp16 (M, 267), ``nuclei`` (M,), 0 on background, and ``kinds`` (M,).
    """

    name: str
    collection: str
    pyramid: dict[str, Tensor]
    owner: Tensor
    share: Tensor
    known: Tensor
    types: np.ndarray
    descriptions: Tensor
    nuclei: np.ndarray
    kinds: np.ndarray

    @property
    def present(self) -> np.ndarray:
        """Nuclei that can be clicked."""
        return np.unique(self.nuclei[self.nuclei > 0])

    def clicks(self, wanted: np.ndarray, kind: int) -> np.ndarray:
        """Rows of the clicks of a kind on the wanted nuclei."""
        return np.flatnonzero((self.kinds == kind) & np.isin(self.nuclei, wanted))


def places(label: np.ndarray, known: np.ndarray, rng: np.random.Generator, background: int = 40) -> np.ndarray:
    """Rows of x, y, nucleus, kind: for every nucleus a click at its innermost point, one near its border and one just outside; some on background."""
    rows: list[tuple[float, float, int, int]] = []
    inside = ndimage.distance_transform_edt(label > 0)
    for i, where in enumerate(ndimage.find_objects(label), 1):
        if where is None:
            continue
        y0, x0 = max(where[0].start - 4, 0), max(where[1].start - 4, 0)
        here = label[y0 : where[0].stop + 4, x0 : where[1].stop + 4]
        depth = np.where(here == i, inside[y0 : where[0].stop + 4, x0 : where[1].stop + 4], 0)
        around = ndimage.distance_transform_edt(here != i)
        options = (
            (CENTRE, depth >= max(depth.max() - 0.5, 0.5)),
            (BORDER, (depth > 0) & (depth <= NEAR_PX)),
            (OUTSIDE, (here == 0) & (around <= NEAR_PX)),
        )
        for kind, allowed in options:
            yy, xx = np.nonzero(allowed)
            if len(yy):
                k = rng.integers(len(yy))
                rows.append((xx[k] + x0 + 0.5, yy[k] + y0 + 0.5, i, kind))
    yy, xx = np.nonzero((ndimage.distance_transform_edt(label == 0) > AWAY_PX) & known)
    chosen = rng.choice(len(yy), min(background, len(yy)), replace=False) if len(yy) else ()
    rows.extend((xx[k] + 0.5, yy[k] + 0.5, 0, BACKGROUND) for k in chosen)
    return np.array(rows, np.float64).reshape(-1, 4)


@torch.inference_mode()
def scene(model: NucleiCompact, field: Field, rng: np.random.Generator, *, augment: bool) -> Scene:
    """Encode an image; ``augment`` turns, mirrors and restains it first."""
    image, label, known = field.image, field.label, field.weight > 0
    if augment:
        turns, mirror = int(rng.integers(4)), bool(rng.integers(2))
        image, label, known = (np.rot90(a, turns) for a in (image, label, known))
        if mirror:
            image, label, known = (a[:, ::-1] for a in (image, label, known))
        if rng.random() < IHC_SHARE:
            image = as_ihc(image)
        density = (
            -np.log((image.astype(np.float32) + 1) / 256) * np.exp(rng.normal(0, 0.15)) * np.exp(rng.normal(0, 0.08, 3))
        )
        image = np.clip(np.exp(-density) * 255, 0, 255).astype(np.uint8)
    height, width = label.shape
    pad = [(0, -n % model.stride_px) for n in (height, width)]
    pixels = np.pad(image, [*pad, (0, 0)], mode="reflect")
    embeddings = model.encode(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None])
    pyramid = pyramid_of(embeddings)
    at = places(np.ascontiguousarray(label), np.ascontiguousarray(known), rng)
    found = []
    for start in range(0, len(at), 256):
        xy = torch.from_numpy(at[start : start + 256, :2].astype(np.float32))
        tile = torch.zeros(len(xy), dtype=torch.long)
        found.append(describe_clicked(pyramid, tile, model.decode(embeddings, tile, xy)).half())
    padded = np.pad(label, pad)
    h, w = padded.shape[0] // STRIDE_PX, padded.shape[1] // STRIDE_PX
    blocks = padded.reshape(h, STRIDE_PX, w, STRIDE_PX).transpose(0, 2, 1, 3).reshape(h, w, -1)
    middle = np.sort(blocks, -1)[..., STRIDE_PX * STRIDE_PX // 2]
    owner = np.where(
        middle > 0, middle, blocks.max(-1)
    )  # the nucleus that covers half of the cell, else one that touches it
    keep = np.pad(known, pad).reshape(h, STRIDE_PX, w, STRIDE_PX).all((1, 3))
    return Scene(
        field.name,
        field.collection,
        {k: v[0].half() for k, v in pyramid.items()},
        torch.from_numpy(owner.astype(np.int32)),
        torch.from_numpy(((blocks > 0).mean(-1) * 255).astype(np.uint8)),
        torch.from_numpy(keep),
        field.types,
        torch.cat(found) if found else torch.zeros((0, DESCRIPTION_SIZE), dtype=torch.half),
        at[:, 2].astype(int),
        at[:, 3].astype(int),
    )


def fields_of(model: NucleiCompact, data: Path, split: str) -> list[Field]:
    """Typed dots with the packaged network's masks, and untyped outlines."""
    dots = pseudo_masks(model, data, torch.device("cpu"), split)
    outlines = [
        f for name in ("tnbc", "nuinsseg", "dsb2018_histology", "nucls_mini") for f in load_instances(data, name, split)
    ]
    return dots + outlines


def draw_clicks(
    here: Scene,
    meant: np.ndarray,
    other: np.ndarray,
    rng: np.random.Generator,
    *,
    quality: tuple[float, float, float] | int,
    positives: int,
    negatives: int,
) -> tuple[Tensor, Tensor]:
    """Descriptions (2 CLICKS, 267) and signs (2 CLICKS,) of one prompt set.

    ``quality``: chances of a click at the centre, near the border and just outside, or the kind of all. ``other``: nuclei that are not
    meant; without any, the negatives lie on background.
    """
    descriptions, signs = torch.zeros((2 * CLICKS, DESCRIPTION_SIZE)), torch.zeros(2 * CLICKS)
    rows, marks = [], []
    for wanted, count, sign in ((meant, positives, 1), (other, negatives, -1)):
        for nucleus in rng.choice(wanted, min(count, len(wanted)), replace=False) if len(wanted) else ():
            kind = quality if isinstance(quality, int) else int(rng.choice(3, p=quality))
            kind = kind if sign == 1 else CENTRE
            found = here.clicks(np.array([nucleus]), kind)
            rows.append(int(found[0]) if len(found) else int(here.clicks(np.array([nucleus]), CENTRE)[0]))
            marks.append(sign)
    if negatives and not len(other):
        background = np.flatnonzero(here.kinds == BACKGROUND)
        for row in rng.choice(background, min(negatives, len(background)), replace=False) if len(background) else ():
            rows.append(int(row))
            marks.append(-1)
    descriptions[: len(rows)] = here.descriptions[rows].float()
    signs[: len(rows)] = torch.tensor(marks, dtype=torch.float)
    return descriptions, signs


def stack(drawn: list[tuple[Tensor, Tensor]]) -> Clicked:
    """Prompt sets as one batch."""
    return Clicked(torch.stack([d for d, _ in drawn]), torch.stack([s for _, s in drawn]))


def target_of(here: Scene, meant: np.ndarray) -> Tensor:
    """Share of each cell that the meant nuclei cover, float (h, w)."""
    chosen = torch.zeros(len(here.types) + 1)
    chosen[torch.from_numpy(meant)] = 1
    return here.share.float() / 255 * chosen[here.owner.long()]


def crop_of(here: Scene, side: int, rng: np.random.Generator) -> tuple[slice, slice]:
    """A random square of ``side`` cells (a multiple of 2 away from the corner, for p8)."""
    h, w = here.owner.shape
    y, x = (int(rng.integers(0, max(n - side, 0) // 2 + 1)) * 2 for n in (h, w))
    return slice(y, y + side), slice(x, x + side)


def pyramid_crop(here: Scene, rows: slice, columns: slice) -> dict[str, Tensor]:
    """The pyramid of a square."""
    halves = slice(rows.start // 2, rows.stop // 2), slice(columns.start // 2, columns.stop // 2)
    return {k: (v[:, *halves] if k == "p8" else v[:, rows, columns]).float() for k, v in here.pyramid.items()}


def coarse(logits: Tensor, shape: tuple[int, int]) -> Tensor:
    """Maps (..., h, w) of a whole image at its pixels (height, width)."""
    return F.interpolate(logits, scale_factor=STRIDE_PX, mode="bilinear", align_corners=False)[
        ..., : shape[0], : shape[1]
    ]
