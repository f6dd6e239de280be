"""Published automatic prompt generation on maps of known circles: prompts, suppression, painting, and the whole path with a decoder that knows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage.segmentation import find_boundaries

from wsiseg.errors import ConfigError
from wsiseg.geometry import Box
from wsiseg.reference.apg_v1 import (
    ApgV1,
    Cutout,
    cut_out,
    filter_and_nms_v1,
    grown_boxes,
    paint_v1,
    prompts_v1,
    segment_v1,
    stability_v1,
)


def circles(discs: list[tuple[int, int, float]], shape: tuple[int, int]) -> np.ndarray:
    """Labels of discs (x, y, radius), each up to its nearest neighbour's half of the way."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    distance = np.stack([np.hypot(x - cx, y - cy) / r for cx, cy, r in discs])
    return np.where(distance.min(0) < 1, distance.argmin(0) + 1, 0)


def targets(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The maps that the decoder is trained on: f; distance to the centroid over its maximum; (max EDT - EDT) / max EDT."""
    c, b = np.ones((2, *labels.shape), np.float32)
    for k in range(1, labels.max() + 1):
        y, x = np.nonzero(labels == k)
        radius = np.hypot(y - y.mean(), x - x.mean())
        c[y, x] = radius / max(radius.max(), 1e-6)
        depth = ndimage.distance_transform_edt(labels == k)[y, x]
        b[y, x] = 1 - depth / depth.max()
    return (labels > 0).astype(np.float32), c, b


def grid(radius: int, rows: int, columns: int) -> np.ndarray:
    step = 2 * radius + 4
    discs = [(step * j + radius + 2, step * i + radius + 2, radius) for i in range(rows) for j in range(columns)]
    return circles(discs, (rows * step, columns * step))


class Oracle:
    """Answers a point with the true object under it, and a box with the object whose box is nearest; remembers what it was asked."""

    def __init__(self, labels: np.ndarray) -> None:
        self.labels, self.asked = labels, []

    def _answer(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.asked.append(len(numbers))
        numbers = numbers[:, None, None]
        logits = np.where((self.labels == numbers) & (numbers > 0), 8, -8).astype(np.float32)
        return logits, np.full(len(numbers), 0.9)

    def points(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x, y = points.astype(int).T
        return self._answer(self.labels[y, x])

    def boxes(self, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        true = np.array([(s[1].start, s[0].start, s[1].stop, s[0].stop) for s in ndimage.find_objects(self.labels)])
        return self._answer(np.abs(boxes[:, None] - true).sum(2).argmin(1) + 1)


def same_objects(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two label images differ in numbers only: every object has IoU 1 with one of the other's."""
    pairs = np.unique(np.stack([a.ravel(), b.ravel()]), axis=1)
    return np.array_equal(a > 0, b > 0) and len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1]


@pytest.mark.parametrize("radius", [4, 5, 8, 15])
def test_forty_circles_give_forty_prompts_and_forty_labels(radius: int) -> None:
    """The prompt of a circle is its centre; with a decoder that knows, every object comes back whole, in batches of 32."""
    truth = grid(radius, 5, 8)
    f, c, b = targets(truth)
    points = prompts_v1(f, c, b)
    centres = np.array(ndimage.center_of_mass(truth > 0, truth, range(1, 41)))[:, ::-1]
    np.testing.assert_allclose(points, centres, atol=1e-6)
    oracle = Oracle(truth)
    labels = segment_v1(f, c, b, oracle.points)
    assert labels.dtype == np.int32
    assert labels.max() == 40
    assert same_objects(labels, truth)
    assert oracle.asked == [32, 8]


def test_circles_of_min_size_have_prompts_and_no_labels() -> None:
    """Radius 3 is 25 px, and an area must exceed 25."""
    truth = grid(3, 5, 8)
    maps = targets(truth)
    assert len(prompts_v1(*maps)) == 40
    assert not segment_v1(*maps, Oracle(truth).points).any()
    assert same_objects(segment_v1(*maps, Oracle(truth).points, config=ApgV1(min_size=24)), truth)


def test_circles_that_touch_stay_apart() -> None:
    truth = circles([(20, 20, 10), (38, 20, 10), (29, 35, 10), (70, 22, 14), (92, 22, 11)], (60, 120))
    f, c, b = targets(truth)
    points = prompts_v1(f, c, b)
    assert sorted(truth[points[:, 1].astype(int), points[:, 0].astype(int)]) == [1, 2, 3, 4, 5]
    assert same_objects(segment_v1(f, c, b, Oracle(truth).points), truth)


def test_circles_cut_by_the_border() -> None:
    """A prompt each, inside its circle, and off the image's border."""
    truth = circles([(0, 30, 12), (40, 2, 10), (97, 30, 12), (50, 58, 9), (0, 0, 10), (97, 59, 10)], (60, 98))
    points = prompts_v1(*targets(truth)).astype(int)
    assert sorted(truth[points[:, 1], points[:, 0]]) == [1, 2, 3, 4, 5, 6]
    assert (points > 0).all()
    assert (points < (97, 59)).all()


def test_no_prompt_without_seeds() -> None:
    f, c, b = np.zeros((16, 20)), np.zeros((16, 20)), np.zeros((16, 20))
    assert prompts_v1(f, c, b).shape == (0, 2)
    assert not segment_v1(f, c, b, lambda _: pytest.fail("there is nothing to decode")).any()


def test_thresholds_are_strict_for_distances_and_not_for_foreground() -> None:
    f, c, b = np.full((3, 9, 9), 0.4)
    f[:] = 0.5
    assert prompts_v1(f, c, b).tolist() == [[4, 4]]
    assert not len(prompts_v1(np.nextafter(f, 0), c, b))
    assert not len(prompts_v1(f, np.full_like(c, 0.5), b))
    assert not len(prompts_v1(f, c, np.full_like(b, 0.5)))


def test_the_images_border_bounds_depth() -> None:
    """Seeds everywhere: the deepest pixel is the middle, the first of the equal ones. One along the border: its first pixel."""
    ones = np.ones((6, 9))
    assert prompts_v1(ones, 0 * ones, 0 * ones).tolist() == [[2, 2]]
    c = ones.copy()
    c[0, 3:7] = 0
    assert prompts_v1(ones, c, 0 * ones).tolist() == [[3, 0]]


def test_corner_contacts_are_boundary() -> None:
    """Two squares of 4 px meet at a corner: 4-connectivity keeps them apart, and the pixels that meet have depth 0."""
    seed = np.zeros((12, 12), bool)
    seed[2:6, 2:6] = seed[6:10, 6:10] = True
    points = prompts_v1(np.ones((12, 12)), ~seed * 1.0, np.zeros((12, 12)))
    # Depth of the first square: 1 at its outline, 2 in the middle but for the pixel beside the corner that meets, which has sqrt(2).
    assert points.tolist() == [[3, 3], [8, 7]]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from([0.3, 0.5, 0.7, 0.95]))
def test_prompts_are_those_of_the_definition(seed: int, density: float) -> None:
    """One distance transform over the whole image and a loop over its components."""
    rng = np.random.default_rng(seed)
    c = ndimage.uniform_filter((rng.random((33, 41)) > density).astype(float), rng.integers(1, 5))
    f, b = rng.random((33, 41)) + 0.45, np.zeros((33, 41))
    components, count = ndimage.label((c < 0.5) & (f >= 0.5))
    outer = find_boundaries(components, mode="outer")
    outer[0] = outer[-1] = True
    outer[:, 0] = outer[:, -1] = True
    depth = ndimage.distance_transform_edt(~outer)
    expected = []
    for k in range(1, count + 1):
        y, x = np.nonzero(components == k)
        best = depth[y, x].argmax()
        expected.append((x[best], y[best]))
    np.testing.assert_array_equal(prompts_v1(f, c, b), np.array(expected, float).reshape(-1, 2))


def test_stability() -> None:
    """4 pixels above 1, 2 more above -1; a mask without any pixel has 0."""
    logits = np.full((3, 4, 4), -5.0, np.float32)
    logits[0, 0], logits[0, 1, :2], logits[0, 1, 2:] = 3, 0.5, -1.0
    logits[1] = 5
    np.testing.assert_allclose(stability_v1(logits), [4 / 6, 1, 0])
    np.testing.assert_allclose(stability_v1(logits, 3, 1)[:2], [0, 1])


def bar(x0: int, x1: int, height: int = 1) -> np.ndarray:
    mask = np.zeros((12, 120), bool)
    mask[:height, x0:x1] = True
    return mask


def test_cut_out_keeps_everything() -> None:
    masks = np.random.default_rng(0).random((6, 9, 11)) > np.array([0.5, 0.9, 0.98, 0.99, 1, 0]).reshape(-1, 1, 1)
    found = cut_out(masks)
    for mask, (box, crop) in zip(masks, found, strict=True):
        again = np.zeros_like(mask)
        again[box.y0 : box.y1, box.x0 : box.x1] = crop
        np.testing.assert_array_equal(again, mask)
        assert not crop.size or (crop[0].any() and crop[-1].any() and crop[:, 0].any() and crop[:, -1].any())
    assert found[4].box == (0, 0, 0, 0)


def test_a_mask_must_exceed_min_size() -> None:
    masks = np.stack([bar(0, 25), bar(30, 56), np.zeros((12, 120), bool)])
    assert filter_and_nms_v1(masks, np.ones(3), np.ones(3)).tolist() == [1]
    assert filter_and_nms_v1(masks, np.ones(3), np.ones(3), min_size=0).tolist() == [0, 1]


@pytest.mark.parametrize(("nms", "kept"), [(0.9, [1, 0]), (math.nextafter(0.9, 0), [1])])
def test_an_iou_of_exactly_the_threshold_is_allowed(nms: float, kept: list[int]) -> None:
    """IoU 90 / 100."""
    assert filter_and_nms_v1(np.stack([bar(0, 90), bar(0, 100)]), [0.5, 0.6], [1, 1], nms=nms).tolist() == kept


def test_the_score_is_quality_times_stability_and_ties_keep_their_order() -> None:
    same = np.stack([bar(0, 40), bar(0, 40), bar(60, 99), bar(60, 99)])
    assert filter_and_nms_v1(same, [0.9, 0.8, 0.5, 0.5], [0.5, 0.9, 1, 1]).tolist() == [1, 2]


def test_intersection_over_min_suppresses_what_is_inside() -> None:
    masks = np.stack([bar(0, 90), bar(10, 50)])
    assert filter_and_nms_v1(masks, [0.9, 0.8], [1, 1]).tolist() == [0, 1]
    assert filter_and_nms_v1(masks, [0.9, 0.8], [1, 1], intersection_over_min=True).tolist() == [0]


def dense_nms(masks: np.ndarray, score: np.ndarray, min_size: int, nms: float, over_min: bool) -> list[int]:
    """Every pair, pixel by pixel."""
    kept: list[int] = []
    for i in sorted(range(len(masks)), key=lambda k: -score[k]):
        if masks[i].sum() <= min_size:
            continue
        for j in kept:
            shared = (masks[i] & masks[j]).sum()
            whole = min(masks[i].sum(), masks[j].sum()) if over_min else (masks[i] | masks[j]).sum()
            if shared / whole > nms:
                break
        else:
            kept.append(i)
    return kept


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 10**6), st.sampled_from([0.3, 0.5, 0.7, 0.9]), st.booleans(), st.sampled_from([0, 25]))
def test_suppression_is_that_of_all_pairs(seed: int, nms: float, over_min: bool, min_size: int) -> None:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:40, :50]
    parts = rng.integers(0, 50, (30, 2))[:, :, None, None], rng.integers(0, 12, (30, 2))[:, :, None, None]
    masks = (np.abs(x - parts[0][:, 0]) < parts[1][:, 0]) & (np.abs(y - parts[0][:, 1]) < parts[1][:, 1])
    masks = masks[rng.integers(0, 30, 60)] & (rng.random((60, 40, 50)) < rng.choice([1, 0.95, 0.8], (60, 1, 1)))
    quality, stability = rng.integers(1, 6, (2, 60)) / 4
    found = filter_and_nms_v1(masks, quality, stability, min_size=min_size, nms=nms, intersection_over_min=over_min)
    assert found.tolist() == dense_nms(masks, quality * stability, min_size, nms, over_min)


def test_painting_is_largest_first() -> None:
    """50 px, then the first of two of 40, then the other; what is left of the second is smaller than 25 px unless that is allowed."""
    masks = np.stack([bar(30, 70), bar(0, 50), bar(65, 105)])
    labels = paint_v1(masks, (12, 120), min_size=20)
    assert np.flatnonzero(np.diff(labels[0])).tolist() == [49, 69, 104]
    assert labels[0, [0, 50, 70]].tolist() == [1, 2, 3]
    assert np.bincount(paint_v1(masks, (12, 120)).ravel())[1:].tolist() == [50, 35]


def test_fragments_become_objects_and_small_ones_go() -> None:
    """A mask in parts of 40, 25 and 24 px: two objects, for a fragment may have min_size. Parts that meet at a corner are apart."""
    mask = bar(0, 40) | bar(50, 75) | bar(80, 104)
    labels = paint_v1(mask[None], (12, 120))
    assert np.bincount(labels.ravel()).tolist() == [12 * 120 - 65, 40, 25]
    diagonal = np.zeros((1, 12, 120), bool)
    diagonal[0, :6, :6] = diagonal[0, 6:, 6:12] = True
    assert paint_v1(diagonal, (12, 120)).max() == 2


def test_masks_side_by_side_are_two_objects() -> None:
    labels = paint_v1(np.stack([bar(0, 40), bar(40, 80)]), (12, 120))
    assert np.bincount(labels.ravel())[1:].tolist() == [40, 40]


def test_painting_nothing() -> None:
    assert not paint_v1([], (4, 5)).any()
    assert paint_v1(np.zeros((2, 4, 5), bool), (4, 5)).shape == (4, 5)


def test_a_cluster_mask_swallows_its_members() -> None:
    """The known flaw of the method: IoU 1 / 3 is no reason to suppress either, and the largest is painted first, whatever its score."""
    truth = circles([(20, 20, 9), (40, 20, 9), (60, 20, 9)], (40, 80))
    cluster = truth > 0
    cluster[20, 20:60] = True
    masks = np.stack([*(truth == k for k in (1, 2, 3)), cluster])
    assert filter_and_nms_v1(masks, [0.9, 0.9, 0.9, 0.1], np.ones(4)).tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(paint_v1(masks, truth.shape), cluster)
    assert paint_v1(masks[:3], truth.shape).max() == 3


def test_boxes_grow_by_their_own_size_and_stay_in_the_image() -> None:
    """Wide image: x is bounded by 300, y by 100."""
    masks = [
        Cutout(Box(150, 20, 250, 40), np.ones((20, 100), bool)),
        Cutout(Box(0, 0, 300, 100), np.ones((100, 300), bool)),
    ]
    np.testing.assert_allclose(grown_boxes(masks, (100, 300)), [[149.01, 19.81, 249.99, 39.19], [0, 0, 300, 99.99]])
    assert grown_boxes([], (100, 300)).shape == (0, 4)


def test_refinement_asks_again_with_boxes() -> None:
    """First masks are eroded, second ones whole; an empty first mask is not asked for again."""
    truth = grid(8, 5, 8)
    maps = targets(truth)
    oracle, eroded = Oracle(truth), Oracle(truth * ndimage.binary_erosion(truth > 0, iterations=2))
    config = ApgV1(refine_with_box=True)
    assert not same_objects(segment_v1(*maps, eroded.points), truth)
    assert same_objects(segment_v1(*maps, eroded.points, config=config, decode_boxes=oracle.boxes), truth)
    assert oracle.asked == [32, 8]
    blind = Oracle(np.where(truth == 7, 0, truth))  # the seventh is not found from its point
    oracle.asked.clear()
    labels = segment_v1(*maps, blind.points, config=config, decode_boxes=oracle.boxes)
    assert oracle.asked == [32, 7]
    assert labels.max() == 39


def test_refinement_needs_its_decoder() -> None:
    with pytest.raises(ConfigError, match="decode_boxes"):
        segment_v1(*np.zeros((3, 8, 8)), lambda _: pytest.fail("not asked"), config=ApgV1(refine_with_box=True))


def test_logits_must_have_the_maps_shape() -> None:
    f, c, b = targets(grid(5, 1, 2))
    with pytest.raises(ValueError, match="upsample"):
        segment_v1(f, c, b, lambda p: (np.zeros((len(p), 4, 4), np.float32), np.zeros(len(p))))
