"""The network keeps the contract that the pipeline relies on."""

from __future__ import annotations

import numpy as np
import pytest
import skimage.data
import torch

from wsiseg.config import HALO_UM, MaskConfig
from wsiseg.models.nuclei_compact import MASKS, NucleiCompact
from wsiseg.records import PromptExtras, WindowMasks
from wsiseg.segmentation.decoding import decode, decode_tiles


@pytest.fixture
def picture() -> torch.Tensor:
    """One image of real tissue of 448 x 448 model px (nearest-neighbour doubled)."""
    return torch.from_numpy(skimage.data.immunohistochemistry()[:224, :224].repeat(2, 0).repeat(2, 1).copy()).permute(
        2, 0, 1
    )[None]


def test_shapes_and_ranges(model, picture) -> None:
    with torch.inference_mode():
        e = model.encode(picture)
        masks = model.decode(e, torch.zeros(5, dtype=torch.long), torch.rand(5, 2) * 448)
    assert e.maps.shape == (1, 3, 224, 224)
    for features in (e.high, e.low):
        np.testing.assert_allclose(features.norm(dim=1), 1, atol=1e-4)
    assert masks.logits.shape == (5, 64, 64)
    assert ((masks.predicted_iou >= 0) & (masks.predicted_iou <= 1)).all()
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


def test_prompts_of_several_tiles_together_give_the_same_bytes(model, picture) -> None:
    """Batches that end within a tile, at its end, and hold all tiles; one tile has no prompts."""
    tiles = torch.cat([picture[..., :224, :224], picture[..., 224:, :224], picture[..., 224:, 224:]])
    rng = np.random.default_rng(0)
    points = [rng.uniform(0, 224, (n, 2)).astype(np.float32) for n in (70, 0, 45)]
    with torch.inference_mode():
        e = model.encode(tiles)
    apart = [list(decode(model, e, k, of, MaskConfig(min_score=0.05))) for k, of in enumerate(points)]
    for at_once in (32, 70, 4096):
        together = decode_tiles(model, e, range(3), points, MaskConfig(min_score=0.05, prompts_per_batch=at_once))
        assert not together[1]
        for k in (0, 2):
            expected, found = WindowMasks.concatenate(apart[k]), WindowMasks.concatenate(together[k])
            assert len(expected.logits) > 3
            for name in ("logits", "origin_xy", "predicted_iou", "stability", "descriptors", "points_xy"):
                assert torch.equal(getattr(expected, name), getattr(found, name)), name


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


def test_the_halo_hides_the_border_of_a_tile(model) -> None:
    """The maps of an image cut in two are those of the whole, a halo away from the cut."""
    image = torch.from_numpy(skimage.data.immunohistochemistry().repeat(2, 0).repeat(2, 1).copy())
    image = image.permute(2, 0, 1)[None, :, :448]
    halo = round(HALO_UM / model.mpp) // 2
    with torch.inference_mode():
        whole, part = (model.encode(x).maps.sigmoid() for x in (image, image[..., 512:]))
    difference = (whole[..., 256:] - part).abs()
    assert difference[..., halo:].max() < 0.01
    assert difference[..., : halo // 8].max() > 0.05  # a narrow one would not do


def test_bf16_stays_close(model, picture) -> None:
    from wsiseg.models import load_model
    from wsiseg.models.registry import WEIGHTS_FOLDER

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
                    found += [masks.logits, masks.predicted_iou, masks.stability, masks.descriptors]
            seen.append(found)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def extras_of(n: int, **given: torch.Tensor) -> PromptExtras:
    """Padding and no box, but for what is given."""
    plain = {"points_xy": torch.zeros(n, 1, 2), "labels": -torch.ones(n, 1), "boxes": torch.full((n, 4), torch.nan)}
    return PromptExtras(**{**plain, **given})


@pytest.fixture
def pair(model):
    """Two touching dark discs of 11 px radius on pink, encoded; their centres."""
    y, x = np.mgrid[:192, :192] + 0.5
    image = np.full((192, 192, 3), (225, 180, 205), np.uint8)
    centres = torch.tensor([[85.0, 96.0], [107.0, 96.0]])
    for cx, cy in centres.tolist():
        image[(np.hypot((x - cx) / 10.6, (y - cy) / 13)) < 1] = (95, 60, 140)
    with torch.inference_mode():
        return model.encode(torch.from_numpy(image).permute(2, 0, 1)[None]), centres


def masks_on_tile(masks, size: int = 96) -> list[np.ndarray]:
    """Each window's mask on the whole tile, in cells of 2 px."""
    out = []
    for logits, (ox, oy) in zip(masks.logits.numpy(), (masks.origin_xy // 2).tolist(), strict=True):
        whole = np.zeros((size + 128, size + 128), bool)
        whole[oy + 64 : oy + 128, ox + 64 : ox + 128] = logits > 0
        out.append(whole[64 : 64 + size, 64 : 64 + size])
    return out


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / max((a | b).sum(), 1)


def test_two_touching_nuclei_give_two_masks(model, pair) -> None:
    e, centres = pair
    with torch.inference_mode():
        first, second = masks_on_tile(model.decode(e, torch.zeros(2, dtype=torch.long), centres))
    assert overlap(first, second) < 0.2
    y, x = np.mgrid[:96, :96] * 2 + 1
    for mask, (cx, cy) in zip((first, second), centres.tolist(), strict=True):
        assert overlap(mask, np.hypot((x - cx) / 10.6, (y - cy) / 13) < 1) > 0.7


def test_hints_that_say_nothing_change_nothing(model, pair) -> None:
    e, centres = pair
    tile = torch.zeros(2, dtype=torch.long)
    with torch.inference_mode():
        plain, hinted = model.decode(e, tile, centres), model.decode(e, tile, centres, extras=extras_of(2))
    assert torch.equal(plain.logits, hinted.logits)


def test_a_box_decides_between_one_nucleus_and_its_neighbour(model, pair) -> None:
    """The click is on the seam: the box says which of the two is meant."""
    e, centres = pair
    seam = torch.tensor([[96.0, 96.0]]).repeat(2, 1)
    boxes = torch.tensor([[74.4, 83, 95.6, 109], [96.4, 83, 117.6, 109]])
    tile, extras = torch.zeros(2, dtype=torch.long), extras_of(2, boxes=boxes)
    with torch.inference_mode():
        left, right = masks_on_tile(model.decode(e, tile, (boxes[:, :2] + boxes[:, 2:]) / 2, extras=extras))
        by_click = masks_on_tile(model.decode(e, tile, seam, extras=extras))
    y, x = np.mgrid[:96, :96] * 2 + 1
    truth = [np.hypot((x - cx) / 10.6, (y - cy) / 13) < 1 for cx, cy in centres.tolist()]
    for mask, mine, other in (
        (left, *truth),
        (right, *truth[::-1]),
        (by_click[0], *truth),
        (by_click[1], *truth[::-1]),
    ):
        assert overlap(mask, mine) > max(0.5, 2 * overlap(mask, other))


def test_further_points_inside_and_outside(model) -> None:
    """Two pale discs that overlap: a point outside, on the other one, keeps the mask off it; a point inside does not."""
    y, x = np.mgrid[:192, :192] + 0.5
    image = np.full((192, 192, 3), (225, 180, 205), np.uint8)
    for cx in (88, 104):
        image[np.hypot((x - cx) / 10.6, (y - 96) / 13) < 1] = (173, 132, 179)
    other = torch.tensor([[[104.0, 96.0]]])
    area = {}
    with torch.inference_mode():
        e = model.encode(torch.from_numpy(image).permute(2, 0, 1)[None])
        for label in (1.0, 0.0, -1.0):  # foreground, background, padding
            extras = extras_of(1, points_xy=other, labels=torch.tensor([[label]]))
            (mask,) = masks_on_tile(
                model.decode(e, torch.zeros(1, dtype=torch.long), torch.tensor([[92.0, 96.0]]), extras=extras)
            )
            area[label] = mask[:, 50:].sum()  # the far half of the other disc
    assert area[0.0] < 0.6 * area[-1.0]
    assert area[1.0] > 1.5 * area[0.0]


def test_the_order_and_number_of_further_points(model, pair) -> None:
    e, centres = pair
    points, labels = torch.tensor([[[90.0, 92.0], [107.0, 96.0]]]), torch.tensor([[1.0, 0.0]])
    none = PromptExtras(torch.zeros(1, 0, 2), torch.zeros(1, 0), torch.tensor([[74.4, 83, 95.6, 109]]))
    tile = torch.zeros(1, dtype=torch.long)
    with torch.inference_mode():
        plain = model.decode(e, tile, centres[:1])
        a = model.decode(e, tile, centres[:1], extras=extras_of(1, points_xy=points, labels=labels))
        b = model.decode(e, tile, centres[:1], extras=extras_of(1, points_xy=points.flip(1), labels=labels.flip(1)))
        box_alone = model.decode(e, tile, centres[:1], extras=none)
        nothing = model.decode(e, tile[:0], centres[:0], extras=extras_of(0))
    np.testing.assert_allclose(a.logits, b.logits, atol=1e-3)
    assert not torch.allclose(a.logits, plain.logits, atol=0.1)
    assert not torch.allclose(box_alone.logits, plain.logits, atol=0.1)
    assert nothing.logits.shape == (0, 64, 64)


def test_several_masks_for_each_prompt(model, pair) -> None:
    """The first is the one that is given alone; the others differ from it and from one another."""
    e, centres = pair
    tile = torch.zeros(2, dtype=torch.long)
    with torch.inference_mode():
        one, three = model.decode(e, tile, centres), model.decode(e, tile, centres, multimask=True)
    assert three.logits.shape == (2 * MASKS, 64, 64)
    np.testing.assert_allclose(three.logits[::MASKS], one.logits, atol=1e-4)
    assert torch.equal(three.points_xy, centres.repeat_interleave(MASKS, 0))
    assert (three.predicted_iou.view(2, MASKS).max(1).values > 0.5).all()
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(three.logits[a], three.logits[b], atol=0.1)
