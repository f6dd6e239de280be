"""Augmented crops of labelled images, with targets and prompts: what ``nuclei-compact`` is trained and adapted on.

Geometry first (scale, rotation, mirror), then stain in optical density, then optics. All draws come from one generator that is
passed in, so that a crop is a function of its image and a seed.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from skimage.color import hed_from_rgb, rgb_from_hed
from skimage.measure import label as components

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

CROP = 224  #: px on a side: six nuclei across, and a step of eight crops fits a laptop
INSTANCES = 22  #: prompts per crop
BACKGROUND = 5  #: of these at least, on background
HINTS = 2  #: further points of a prompt, at most
DIAMETERS = (0.72, 1.4)  #: range of the enlargement: between 20x and 40x scanners that state a wrong scale
_TYPICAL_PX = 26.0  #: diameter of a nucleus at 0.25 um, where an image has none


@dataclass
class Field:
    """A labelled image.

    Attributes
    ----------
    name, collection
        Name of the image, and of the set that it is from.
    image
        uint8 RGB of shape (H, W, 3), model px.
    label
        int32 of shape (H, W): instance ids 1 to n, 0 = background.
    distances
        float32 of shape (2, H, W): :func:`distances_of`.
    weight
        float32 of shape (H, W): 0 where nothing is known.
    types
        int64 of shape (n + 1,): type of each instance, 0 = unknown.
    diameter
        Median diameter of the nuclei, px.
    share
        How often the image is taken, relative to the others of its set.
    sizes_px
        Range that the nuclei's diameter is drawn from; ``None``: around ``diameter``.
    pale
        Its background is white, where tissue would be eosin-red.
    """

    name: str
    collection: str
    image: NDArray[np.uint8]
    label: NDArray[np.int32]
    distances: NDArray[np.float32]
    weight: NDArray[np.float32]
    types: NDArray[np.int64]
    diameter: float
    share: float = 1.0
    sizes_px: tuple[float, float] | None = None
    pale: bool = False


def make_field(
    name: str, collection: str, image: NDArray[np.uint8], label: NDArray[np.int32], types: NDArray[np.int64]
) -> Field:
    """Make a labelled image with its distance maps; all of it is known."""
    sizes = np.bincount(label.ravel())[1:]
    sizes = sizes[sizes > 0]
    diameter = float(np.median(2 * np.sqrt(sizes / np.pi))) if len(sizes) else _TYPICAL_PX
    return Field(name, collection, image, label, distances_of(label), np.ones(label.shape, np.float32), types, diameter)


def distances_of(label: NDArray[Any]) -> NDArray[Any]:
    """Centre and boundary distance of every instance, each divided by its maximum: 0 innermost, 1 far end and outside."""
    ids = np.arange(1, label.max() + 1)
    out = np.ones((2, *label.shape), np.float32)
    if not len(ids):
        return out
    inside = label > 0
    yy, xx = np.nonzero(inside)
    owner = label[inside]
    count = np.bincount(owner, minlength=len(ids) + 1).clip(1)
    cy, cx = (np.bincount(owner, weights=v, minlength=len(ids) + 1) / count for v in (yy, xx))
    centre = np.hypot(yy - cy[owner], xx - cx[owner])
    top = np.zeros(len(ids) + 1)
    np.maximum.at(top, owner, centre)
    out[0][inside] = centre / top[owner].clip(1)
    # One distance transform for all: pixels that touch another instance count as outside.
    padded = np.pad(label, 1, mode="edge")
    contact = np.zeros(label.shape, bool)
    for dy, dx in ((0, 1), (1, 0), (1, 2), (2, 1)):
        contact |= padded[dy : dy + label.shape[0], dx : dx + label.shape[1]] != label
    depth = ndimage.distance_transform_edt(inside & ~contact)[inside] + 1
    top = np.ones(len(ids) + 1)
    np.maximum.at(top, owner, depth)
    out[1][inside] = 1 - (depth - 1) / (top[owner] - 1).clip(1)
    return out


def _nuclei(density: NDArray[Any], label: NDArray[Any], depth: NDArray[Any], rng: np.random.Generator) -> NDArray[Any]:
    """Redraw the nuclei of a crop in optical density: paler or darker each on its own, vesicular (a rim around a pale inside), clumped chromatin.

    ``depth`` is the boundary distance (0 innermost, 1 at the border and outside). What changes is how far a nucleus stands out from the
    tissue around it, so that a pale nucleus gets the colour of its surroundings, not white.
    """
    inside = label > 0
    if not inside.any():
        return density
    # Colour of the tissue around, from the places without nuclei, on a coarse grid (cheap and smooth enough).
    free = torch.from_numpy((~inside).astype(np.float32))[None, None]
    coarse = F.avg_pool2d(torch.cat([torch.from_numpy(density.transpose(2, 0, 1))[None] * free, free], 1), 8)
    coarse = F.avg_pool2d(coarse, 5, 1, 2, count_include_pad=False)
    mean = coarse[:, :3].sum((2, 3), keepdim=True) / coarse[:, 3:].sum().clamp_min(1e-3)
    around = torch.where(
        coarse[:, 3:] > 0.02, coarse[:, :3] / coarse[:, 3:].clamp_min(0.02), mean
    )  # amid giant nuclei nothing is near
    colour = F.interpolate(around, scale_factor=8, mode="bilinear", align_corners=False)[0].permute(1, 2, 0).numpy()
    gain = np.exp(rng.normal(rng.normal(-0.1, 0.25), rng.uniform(0, 0.3), label.max() + 1)).astype(np.float32)[label]
    if rng.random() < 0.4:  # vesicular
        rim = np.clip((depth - rng.uniform(0.2, 0.6)) / rng.uniform(0.15, 0.5), 0, 1)
        hollow = rng.uniform(0.25, 0.9, label.max() + 1).astype(np.float32)[label]
        gain = gain * (hollow + (1 - hollow) * rim)
    if rng.random() < 0.4:  # chromatin: smooth grains of 1 to 2 um, or few dark nucleoli
        k = int(rng.integers(24, 70))
        noise = torch.from_numpy(rng.standard_normal((1, 1, k, k)).astype(np.float32))
        grain = F.interpolate(noise, size=label.shape, mode="bicubic", align_corners=False)[0, 0].numpy()
        gain = (
            gain * (1 + rng.uniform(0.1, 0.5) * grain)
            if rng.random() < 0.6
            else gain + rng.uniform(0.3, 1.0) * np.clip(grain - 1, 0, 2)
        )
    soft = ndimage.gaussian_filter(inside.astype(np.float32), 0.7)
    redrawn: NDArray[Any] = density + (soft * (np.clip(gain, 0.3, 2.0) - 1))[..., None] * (density - colour)
    return redrawn


def _stain(
    image: NDArray[Any], label: NDArray[Any], depth: NDArray[Any], rng: np.random.Generator, pale: bool, strength: float
) -> NDArray[Any]:
    """Move the stains in optical-density space; give pale backgrounds an eosin-like texture now and then."""
    density = -np.log((image.astype(np.float32) + 1) / 256)
    if pale and rng.random() < 0.6:
        noise = sum(
            ndimage.zoom(rng.random((k, k)).astype(np.float32), CROP / k, order=1)[:CROP, :CROP] for k in (4, 14, 32)
        )
        eosin = np.array([0.07, 0.99, 0.11]) * 0.8 + rng.random(3) * [0.15, 0.2, 0.4]
        keep = 1 - 0.8 * ndimage.gaussian_filter((label > 0).astype(np.float32), 1.0)
        density = density + rng.uniform(0.1, 0.55) * (noise / 1.5)[..., None] * eosin * keep[..., None]
    density = density.astype(np.float32)
    if rng.random() < 0.6 * strength:
        density = _nuclei(density, label, depth, rng)
    stains = density @ hed_from_rgb.astype(np.float32)
    colours = rgb_from_hed.astype(np.float32) + rng.normal(0, 0.04, (3, 3)).astype(np.float32)
    if (
        rng.random() < 0.12 * strength
    ):  # immunohistochemistry: what eosin stains turns brown, haematoxylin bluer and weaker
        brown = np.array([0.27, 0.57, 0.78]) * rng.uniform(0.6, 1.8)
        colours[1] = colours[1] + rng.uniform(0.6, 1.0) * (brown - colours[1])
        colours[0] = colours[0] * [1.0, rng.uniform(0.6, 1.0), rng.uniform(0.4, 0.9)]
    stains = stains * np.exp(rng.normal(0, [0.25, 0.32, 0.3])) + rng.normal(0, 0.015, 3)
    channels = (
        np.exp(rng.uniform(np.log(0.7), np.log(1.4), 3))
        if rng.random() < 0.5 * strength
        else rng.uniform(0.85, 1.15, 3)
    )
    density = (stains @ colours) * channels + rng.uniform(0, 0.06)
    stained: NDArray[Any] = np.clip(np.exp(-density) * 255, 0, 255)
    return stained


def _optics(image: NDArray[Any], rng: np.random.Generator, strength: float) -> NDArray[Any]:
    """Blur, coarse sampling (a 0.35-0.5 mpp source), JPEG, noise."""
    if rng.random() < 0.25 * strength:
        image = ndimage.gaussian_filter(image, (s := rng.uniform(0.4, 1.6), s, 0))
    picture = Image.fromarray(image.astype(np.uint8))
    if rng.random() < 0.25 * strength:
        small = int(CROP / rng.uniform(1.3, 2.1))
        picture = picture.resize((small, small), Image.Resampling.BOX).resize((CROP, CROP), Image.Resampling.BILINEAR)
    if rng.random() < 0.3 * strength:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=int(rng.integers(35, 92)))
        picture = Image.open(buffer)
    image = np.asarray(picture).astype(np.float32)
    if rng.random() < 0.25 * strength:
        image = image + rng.normal(0, rng.uniform(1, 7), image.shape)
    damaged: NDArray[np.uint8] = np.clip(image, 0, 255).astype(np.uint8)
    return damaged


def crop(field: Field, rng: np.random.Generator, strength: float = 1.0) -> dict[str, Tensor]:
    """One augmented crop of ``CROP`` px at 0.25 um with its targets and prompts. ``strength`` scales how often a crop is damaged or restained."""
    target = rng.uniform(*field.sizes_px) if field.sizes_px else field.diameter * rng.uniform(*DIAMETERS)
    if rng.random() < 0.04:
        target *= rng.uniform(1.5, 3)  # giant nuclei, up to the mask window
    scale = target / field.diameter
    angle = rng.uniform(0, 2 * np.pi)
    stretch = np.exp(rng.normal(0, 0.06))
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ np.diag(
        [stretch, 1 / stretch]
    )
    if rng.random() < 0.5:
        matrix[:, 0] *= -1
    height, width = field.label.shape
    centre = rng.uniform(0.1, 0.9, 2) * [width, height]
    if field.label.any() and rng.random() < 0.5:  # half of the crops are centred near a nucleus
        yy, xx = np.nonzero(field.label)
        k = rng.integers(len(yy))
        centre = np.array([xx[k], yy[k]]) + rng.uniform(-60, 60, 2)
    # Keep most of the crop on the image; what overhangs is the mirrored image with its labels.
    half = np.minimum(0.45 * CROP / scale, np.array([width, height]) / 2)
    centre = np.clip(centre, half, np.array([width, height]) - half)
    offsets = torch.from_numpy((np.arange(CROP) + 0.5 - CROP / 2) / scale).float()
    oy, ox = torch.meshgrid(offsets, offsets, indexing="ij")
    x = centre[0] + matrix[0, 0] * ox + matrix[0, 1] * oy
    y = centre[1] + matrix[1, 0] * ox + matrix[1, 1] * oy
    grid = torch.stack([x * 2 / width - 1, y * 2 / height - 1], -1)[None].float()
    source = torch.tensor(field.image).permute(2, 0, 1)[None].float()
    if scale < 0.7:
        source = F.avg_pool2d(source, 3, 1, 1)
    image = (
        F.grid_sample(source, grid, mode="bilinear", padding_mode="reflection", align_corners=False)[0]
        .permute(1, 2, 0)
        .numpy()
    )
    planes = np.stack([field.label.astype(np.float32), field.distances[0], field.distances[1], field.weight])
    planes = F.grid_sample(
        torch.from_numpy(planes)[None], grid, mode="nearest", padding_mode="reflection", align_corners=False
    )[0].numpy()
    sampled = planes[0].astype(np.int64)
    mirrored = (grid[0].abs() > 1).any(-1).numpy()
    edge = np.unique(np.concatenate([field.label[0], field.label[-1], field.label[:, 0], field.label[:, -1]]))
    # A nucleus that the image's border cuts gets a mirrored half that is not its own.
    planes[3][mirrored & (sampled > 0) & np.isin(sampled, edge)] = 0
    # Mirror images of one nucleus are nuclei of their own.
    label = components(sampled, background=0, connectivity=1)
    _, first = np.unique(label.ravel(), return_index=True)
    types_of = (
        field.types[sampled.ravel()[first]]
        if label.min() == 0
        else np.concatenate([[0], field.types[sampled.ravel()[first]]])
    )
    image = _optics(_stain(image, label, planes[2], rng, field.pale, strength), rng, strength)
    points, owners = _prompts(label, planes[1], rng)
    hint_xy, hint_labels, boxes = _hints(label, points, owners, rng)
    return {
        "image": torch.from_numpy(image.copy()).permute(2, 0, 1),
        "label": torch.from_numpy(label),
        "foreground": F.avg_pool2d(torch.from_numpy((label > 0).astype(np.float32))[None], 2)[0],
        "distances": torch.from_numpy(planes[1:3, 1::2, 1::2].copy()),
        "weight": torch.from_numpy(planes[3, 1::2, 1::2].copy()),
        "points": torch.from_numpy(points),
        "owners": torch.from_numpy(owners),
        "hint_xy": torch.from_numpy(hint_xy),
        "hint_labels": torch.from_numpy(hint_labels),
        "boxes": torch.from_numpy(boxes),
        "types": torch.from_numpy(types_of[owners]),
    }


def _prompts(label: NDArray[Any], centre: NDArray[Any], rng: np.random.Generator) -> tuple[NDArray[Any], NDArray[Any]]:
    """Clicks: most inside a nucleus (near its centre or anywhere), some on background (owner 0) -> (K, 2) xy, (K,) owner."""
    sizes = np.bincount(label.ravel())
    ids = np.nonzero(sizes >= 30)[0]
    ids = ids[ids > 0]
    rng.shuffle(ids)
    ids = np.resize(ids, INSTANCES - BACKGROUND) if len(ids) else ids  # few nuclei: several clicks each
    points = np.zeros((INSTANCES, 2), np.float32)
    owners = np.zeros(INSTANCES, np.int64)
    flat_order = np.argsort(label.ravel(), kind="stable")
    starts = np.searchsorted(label.ravel()[flat_order], np.arange(label.max() + 2))
    for k in range(INSTANCES):
        owner = int(ids[k]) if k < len(ids) else 0
        inside = flat_order[starts[owner] : starts[owner + 1]]
        if owner and rng.random() < 0.6:
            near = inside[centre.ravel()[inside] < 0.5]
            inside = near if len(near) else inside
        if not len(inside):
            inside = flat_order
            pick = int(rng.choice(inside))
            owner = int(label.ravel()[pick])
        else:
            pick = int(inside[rng.integers(len(inside))])
        points[k] = pick % CROP + rng.random(), pick // CROP + rng.random()
        owners[k] = owner
    return points, owners


def _hints(
    label: NDArray[Any], points: NDArray[Any], owners: NDArray[Any], rng: np.random.Generator
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """What nearly half of the prompts say beside their point: a box (half of these without a click), more points inside, points outside.

    Changes ``points`` of the prompts that are a box alone -> (K, HINTS, 2) xy, (K, HINTS) labels (1, 0, -1 = padding), (K, 4) boxes (NaN = none).
    """
    xy = np.zeros((INSTANCES, HINTS, 2), np.float32)
    labels = np.full((INSTANCES, HINTS), -1, np.float32)
    boxes = np.full((INSTANCES, 4), np.nan, np.float32)
    slices = ndimage.find_objects(label)
    for k in np.flatnonzero(owners):
        kind, owner = rng.random(), owners[k]
        rows, columns = slices[owner - 1]
        if kind < 0.16:
            box = np.array([columns.start, rows.start, columns.stop, rows.stop], np.float32)
            side = np.array([box[2] - box[0], box[3] - box[1]] * 2)
            boxes[k] = box + rng.normal(0, 0.05, 4) * side
            if kind < 0.08:
                points[k] = (boxes[k, :2] + boxes[k, 2:]) / 2
        elif kind < 0.30:
            yy, xx = np.nonzero(label[rows, columns] == owner)
            for j in range(int(rng.integers(1, HINTS + 1))):
                i = rng.integers(len(yy))
                xy[k, j], labels[k, j] = (xx[i] + columns.start + rng.random(), yy[i] + rows.start + rng.random()), 1
        elif kind < 0.44:
            angle, far = rng.uniform(0, 2 * np.pi, 16), rng.uniform(8, 40, 16)
            near = (points[k] + np.stack([np.cos(angle), np.sin(angle)], 1) * far[:, None]).astype(np.int64)
            near = near[((near >= 0) & (near < CROP)).all(1)]
            near = near[label[near[:, 1], near[:, 0]] != owner]
            near = near[np.argsort(label[near[:, 1], near[:, 0]] == 0, kind="stable")]  # neighbours first
            count = min(len(near), int(rng.integers(1, HINTS + 1)))
            xy[k, :count], labels[k, :count] = near[:count] + 0.5, 0
    return xy, labels, boxes
