"""The network keeps the contract that the pipeline relies on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wsiseg.config import MaskConfig
from wsiseg.masks import decode
from wsiseg.models.nuclei_compact import NucleiCompact


@pytest.fixture
def picture(cmu_crop: np.ndarray) -> torch.Tensor:
    """One H&E image of 448 x 448 model px (nearest-neighbour doubled)."""
    return torch.from_numpy(cmu_crop[:224, :224].repeat(2, 0).repeat(2, 1).copy()).permute(2, 0, 1)[None]


def test_shapes_and_ranges(model, picture) -> None:
    with torch.inference_mode():
        e = model.encode(picture)
        masks = model.decode(e, torch.zeros(5, dtype=torch.long), torch.rand(5, 2) * 448)
    assert e.maps.shape == (1, 3, 224, 224)
    for features in (e.high, e.low):
        np.testing.assert_allclose(features.norm(dim=1), 1, atol=1e-4)
    assert masks.logits.shape == (5, 64, 64)
    assert ((masks.quality >= 0) & (masks.quality <= 1)).all()
    assert ((masks.stability >= 0) & (masks.stability <= 1)).all()
    np.testing.assert_allclose(masks.descriptors.norm(dim=1), 1, atol=1e-4)
    assert masks.descriptors.shape[1] == model.descriptor_size


def test_the_point_lies_in_its_window_and_the_window_within_reach(model, picture) -> None:
    points = torch.rand(200, 2) * 448
    with torch.inference_mode():
        masks = model.decode(model.encode(picture), torch.zeros(200, dtype=torch.long), points)
    low, high = masks.origin_xy, masks.origin_xy + 128
    assert ((points >= low) & (points < high)).all()
    assert (points - low <= model.reach_px).all()
    assert (high - points <= model.reach_px).all()


def test_a_prompt_does_not_depend_on_its_batch(model, picture) -> None:
    """Alone, among others, or in another order: the same mask, descriptor and score."""
    points = (np.random.default_rng(0).random((40, 2)) * 448).astype(np.float32)
    with torch.inference_mode():
        e = model.encode(picture)
    config = MaskConfig(min_score=0.0)
    (together,) = decode(model, e, 0, points, config)
    apart = list(decode(model, e, 0, points, MaskConfig(min_score=0.0, prompts_per_batch=7)))
    logits, descriptors = (torch.cat([getattr(b, k) for b in apart]) for k in ("logits", "descriptors"))
    np.testing.assert_allclose(logits, together.logits, atol=2e-4)
    np.testing.assert_allclose(descriptors.float(), together.descriptors.float(), atol=2e-3)


def test_no_prompts_give_no_masks(model, picture) -> None:
    with torch.inference_mode():
        e = model.encode(picture)
    assert list(decode(model, e, 0, np.empty((0, 2), np.float32), MaskConfig())) == []


def test_folded_batch_norms_change_nothing(picture) -> None:
    torch.manual_seed(0)
    plain = NucleiCompact().eval()
    for module in plain.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    folded = NucleiCompact()
    folded.load_state_dict(plain.state_dict())
    folded.ready(torch.device("cpu"), bf16=False)
    with torch.inference_mode():
        np.testing.assert_allclose(folded.encode(picture).maps, plain.encode(picture).maps, atol=1e-3)


def test_bf16_stays_close(model, picture) -> None:
    low = NucleiCompact()
    from wsiseg.models import WEIGHTS_FOLDER, load_model

    low = load_model(str(WEIGHTS_FOLDER / "nuclei-compact.safetensors"), "cpu", "bf16")
    with torch.inference_mode():
        a, b = (m.encode(picture).maps[0, 0].sigmoid() > 0.5 for m in (model, low))
    assert (a == b).float().mean() > 0.99


def test_the_number_of_threads_does_not_show(model, picture) -> None:
    """The same bits from one thread and from two: processes on one machine share its cores."""
    config = MaskConfig(min_score=0.0)
    before = torch.get_num_threads()
    seen = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with torch.inference_mode():
                e = model.encode(picture)
            found = [e.maps, e.high, e.low]
            for count in (1, 5, 9, 33, 140):
                points = (np.random.default_rng(count).random((count, 2)) * 448).astype(np.float32)
                for masks in decode(model, e, 0, points, config):
                    found += [masks.logits, masks.quality, masks.stability, masks.descriptors]
            seen.append(found)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
