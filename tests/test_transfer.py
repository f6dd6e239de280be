"""Packed logits give the outlines of whole ones, at a fraction of the bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import shapely
import torch

from wsiseg.config import MaskConfig, RunConfig
from wsiseg.geometry import Box, Lattice
from wsiseg.records import WindowMasks
from wsiseg.segmentation import decoding, transfer
from wsiseg.segmentation.polygons import trace
from wsiseg.segmentation.transfer import OUTSIDE, PackedLogits, pack, unpack

if TYPE_CHECKING:
    import pytest

    from wsiseg.models.nuclei_compact import NucleiCompact


def masks_of(logits: torch.Tensor) -> WindowMasks:
    count = len(logits)
    return WindowMasks(
        logits=logits,
        origin_xy=torch.zeros((count, 2), dtype=torch.long),
        mask_stride_px=2,
        predicted_iou=torch.ones(count),
        stability=torch.ones(count),
        descriptors=torch.zeros((count, 4)),
        points_xy=torch.full((count, 2), 64.0),
    )


def test_outlines_stay() -> None:
    """Discs of all sizes and steepness, with specks beside them, up to masks that fill their window; and nothing at all."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :64] + 0.5
    logits = []
    for radius in np.linspace(1.5, 46, 60):
        centre = rng.uniform(26, 38, 2)
        disc = (radius - np.hypot(y - centre[0], x - centre[1])) * rng.uniform(0.2, 6) + rng.normal(0, 0.3, (64, 64))
        logits.append(disc)
    whole = torch.from_numpy(np.stack([*logits, np.full((64, 64), -3.0), np.full((64, 64), 5.0)])).float()
    packed = pack(whole)
    back = unpack(packed)
    assert back.shape == whole.shape
    assert ((back > 0) == (whole > 0)).all()
    assert (back[-2] == OUTSIDE).all()
    config, lattice = MaskConfig(min_area_um2=0), Lattice(0.25, 0.25)
    expected, touching = trace(masks_of(whole), Box(0, 0, 128, 128), lattice, config)
    found, still_touching = trace(masks_of(back), Box(0, 0, 128, 128), lattice, config)
    assert (len(found), still_touching) == (len(expected), touching)
    assert touching > 3
    apart = [shapely.hausdorff_distance(a, b) for a, b in zip(found.polygons, expected.polygons, strict=True)]
    assert max(apart) * 0.25 < 0.01  # one step of the grid that vertices are rounded to is 0.004 um
    assert np.median(apart) == 0


def test_a_batch_without_masks() -> None:
    packed = pack(torch.zeros((0, 64, 64)))
    assert packed.nbytes == 0
    assert unpack(packed).shape == (0, 64, 64)


def test_real_masks(model: NucleiCompact, cmu_crop: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 2.5 kB a mask, 16 without; the same outlines to a thousandth of a micron."""
    pixels = np.repeat(np.repeat(cmu_crop[:352, :352], 2, 0), 2, 1)
    with torch.inference_mode():
        embeddings = model.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    rng, config = np.random.default_rng(0), RunConfig().masks
    points = rng.uniform(40, 660, (400, 2)).astype(np.float32)
    outlines, copied = [], []
    for way in (lambda logits: logits.float(), lambda logits: unpack(kept(pack(logits)))):

        def kept(packed: PackedLogits) -> PackedLogits:
            copied.append((packed.nbytes, len(packed.boxes)))
            return packed

        monkeypatch.setattr(transfer, "logits_to_host", way)
        masks = list(decoding.decode(model, embeddings, 0, points, config))
        outlines.append([trace(m, Box(0, 0, 704, 704), Lattice(0.25, 0.25), config)[0].polygons for m in masks])
    before, after = (np.concatenate(part) for part in outlines)
    assert len(before) == len(after) > 50
    bytes_copied, count = np.sum(copied, 0)
    assert bytes_copied / count < 2500
    assert max(shapely.hausdorff_distance(before, after)) * 0.25 < 0.01
    assert np.mean(shapely.hausdorff_distance(before, after) == 0) > 0.95
