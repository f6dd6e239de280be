"""Merging masks best score first: every rule at its limit, clusters, and a plain twin."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsiseg.reference.apg_v1 import cut_out
from wsiseg.reference.score_ordered_merge import ScoreMerge, merge_by_score

SHAPE = (40, 200)


def block(x0: int, x1: int, height: int = 10) -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    mask[:height, x0:x1] = True
    return mask


def merge(
    masks: list[np.ndarray], scores: list[float], prompts: object = None, **kwargs: object
) -> tuple[np.ndarray, list[int]]:
    """Each mask with a prompt of its own unless they are given."""
    found = cut_out(np.stack(masks))
    prompts = (
        np.stack([np.arange(len(masks)), np.zeros(len(masks))], 1) if prompts is None else np.array(prompts, float)
    )
    iou_pred = kwargs.pop("iou_pred", None)
    config = ScoreMerge(**kwargs) if kwargs else None
    labels, kept = merge_by_score(
        [m.mask for m in found], [m.box for m in found], scores, prompts, masks[0].shape, config, iou_pred=iou_pred
    )
    return labels, kept.tolist()


def test_labels_are_numbered_by_score() -> None:
    labels, kept = merge([block(0, 10), block(20, 30), block(40, 50)], [0.7, 0.9, 0.8])
    assert kept == [1, 2, 0]
    assert labels.dtype == np.int32
    assert labels[0, [5, 25, 45]].tolist() == [3, 1, 2]


def test_equal_scores_keep_their_order() -> None:
    assert merge([block(0, 10), block(0, 10)], [0.8, 0.8])[1] == [0]


def test_nothing_to_merge() -> None:
    labels, kept = merge_by_score([], [], [], np.empty((0, 2)), (4, 5))
    assert not labels.any()
    assert labels.shape == (4, 5)
    assert not len(kept)


@pytest.mark.parametrize(("start", "kept"), [(85, [0, 1]), (84, [0])])
def test_fifteen_of_a_hundred_may_be_taken(start: int, kept: list[int]) -> None:
    """One row: 15 % of the second mask lies on the first, or 16 %."""
    labels, found = merge([block(0, 100, 1), block(start, start + 100, 1)], [0.9, 0.8])
    assert found == kept
    assert (labels[0, :100] == 1).all()
    assert (labels[0, 100:185] == 2).all() == (len(kept) == 2)


def test_a_score_of_exactly_the_threshold_is_enough() -> None:
    assert merge([block(0, 10), block(20, 30)], [0.6, 0.59])[1] == [0]


def test_the_threshold_is_on_predicted_iou() -> None:
    """The order is that of the scores all the same."""
    masks = [block(0, 10), block(20, 30), block(40, 50)]
    assert merge(masks, [0.3, 0.9, 0.5], iou_pred=[0.9, 0.5, 0.7])[1] == [2, 0]


def test_fifty_free_pixels_must_remain() -> None:
    assert merge([block(0, 50, 1), block(60, 109, 1)], [0.9, 0.9])[1] == [0]
    labels, kept = merge([block(0, 100, 1), block(92, 150, 1)], [0.9, 0.8])  # 58 px, 8 taken
    assert kept == [0, 1]
    assert (labels == 2).sum() == 50
    assert merge([block(0, 100, 1), block(92, 149, 1)], [0.9, 0.8])[1] == [0]


def test_an_empty_mask_never_has_a_number() -> None:
    assert merge([np.zeros(SHAPE, bool), block(0, 10)], [0.9, 0.8], min_size=0)[1] == [1]
    assert merge([block(0, 10), block(0, 10)], [0.9, 0.8], min_size=0, max_overlap=1.0)[1] == [0]


def test_a_cluster_mask_does_not_swallow_its_members() -> None:
    """Members score better: the cluster's mask lies on what they have taken."""
    members = [block(0, 20), block(22, 42), block(44, 64)]
    assert merge([*members, block(0, 64)], [0.9, 0.8, 0.85, 0.7])[1] == [0, 2, 1]


def test_a_mask_over_two_small_members_is_refused_though_little_is_taken() -> None:
    """200 of 2000 px are taken, but they are all that two others have."""
    members, large = [block(0, 10), block(20, 30)], block(0, 100, 20)
    assert merge([*members, large], [0.9, 0.8, 0.7])[1] == [0, 1]
    assert merge([*members, large], [0.9, 0.8, 0.7], cluster=3)[1] == [0, 1, 2]
    assert merge([members[0], large], [0.9, 0.7])[1] == [0, 1]


def test_a_member_is_covered_when_more_than_nine_tenths_are() -> None:
    members = [block(0, 10), block(40, 50)]
    exactly = block(1, 100, 20)  # 90 of the first's 100 px
    assert merge([*members, exactly], [0.9, 0.8, 0.7])[1] == [0, 1, 2]
    more = exactly.copy()
    more[0, 0] = True
    assert merge([*members, more], [0.9, 0.8, 0.7])[1] == [0, 1]


def test_cover_is_of_the_pixels_that_a_member_got() -> None:
    """The second member got 90 px of 100; these are covered, its lost ones are not."""
    members = [block(0, 100, 1), block(90, 190, 1), block(0, 10, 30)]
    members[2][:2] = False
    assert merge(members, [0.9, 0.8, 0.7])[1] == [0, 1, 2]
    large = block(100, 200, 40) | members[2]
    assert merge([*members, large], [0.9, 0.8, 0.7, 0.65])[1] == [0, 1, 2]


def test_masks_of_one_prompt_count_once() -> None:
    """Two masks from the same prompt are of one component, and so is the mask itself."""
    masks = [block(0, 10), block(20, 30), block(0, 100, 20)]
    apart, same, own = [(5, 5), (25, 5), (50, 5)], [(5, 5), (5, 5), (50, 5)], [(5, 5), (25, 5), (25, 5)]
    assert merge(masks, [0.9, 0.8, 0.7], apart)[1] == [0, 1]
    assert merge(masks, [0.9, 0.8, 0.7], same)[1] == [0, 1, 2]
    assert merge(masks, [0.9, 0.8, 0.7], own)[1] == [0, 1, 2]


def test_a_cluster_mask_that_scores_best_stays() -> None:
    """The limit L1 of the module: nothing is there yet that it could cover."""
    assert merge([block(0, 20), block(22, 42), block(0, 42)], [0.8, 0.8, 0.9])[1] == [2]


def plain(
    masks: np.ndarray, scores: np.ndarray, prompts: np.ndarray, config: ScoreMerge
) -> tuple[np.ndarray, list[int]]:
    """Full-size masks, one set of pixels per kept mask."""
    kept: list[int] = []
    got: list[np.ndarray] = []
    for k in sorted(range(len(masks)), key=lambda i: -scores[i]):
        taken = np.any(got, axis=0) if got else np.zeros(masks.shape[1:], bool)
        mask, free = masks[k], masks[k] & ~taken
        if scores[k] < config.score_threshold or not free.any() or free.sum() < config.min_size:
            continue
        if (mask & taken).sum() / mask.sum() > config.max_overlap:
            continue
        covered = {
            tuple(prompts[i])
            for i, g in zip(kept, got, strict=True)
            if (g & mask).sum() / g.sum() > config.cluster_cover
        }
        if len(covered - {tuple(prompts[k])}) >= config.cluster:
            continue
        kept.append(k)
        got.append(free)
    labels = np.zeros(masks.shape[1:], int)
    for number, g in enumerate(got, 1):
        labels[g] = number
    return labels, kept


@settings(deadline=None, max_examples=80)
@given(
    st.integers(0, 10**6),
    st.sampled_from(
        [
            ScoreMerge(),
            ScoreMerge(max_overlap=0.5, score_threshold=0.3, min_size=5, cluster=2, cluster_cover=0.5),
            ScoreMerge(max_overlap=0.9, score_threshold=0.0, min_size=1, cluster=1, cluster_cover=0.8),
        ]
    ),
)
def test_merging_is_that_of_the_plain_twin(seed: int, config: ScoreMerge) -> None:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:50, :60]
    cx, cy, rx, ry = (rng.integers(*span, (40, 1, 1)) for span in ((0, 60), (0, 50), (1, 15), (1, 15)))
    masks = (np.abs(x - cx) < rx) & (np.abs(y - cy) < ry) & (rng.random((40, 50, 60)) < 0.97)
    scores, prompts = rng.integers(4, 21, 40) / 20, rng.integers(0, 4, (40, 2))
    labels, kept = merge(list(masks), scores, prompts, **dataclasses.asdict(config))
    expected, expected_kept = plain(masks, scores, prompts, config)
    assert kept == expected_kept
    np.testing.assert_array_equal(labels, expected)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6))
def test_labels_do_not_depend_on_the_order_of_the_masks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    masks = [block(x0, x0 + 20, 8) for x0 in rng.integers(0, 180, 20)]
    scores, order = rng.permutation(20) / 50 + 0.6, rng.permutation(20)
    labels, kept = merge(masks, scores)
    again, kept_again = merge([masks[k] for k in order], scores[order], np.stack([order, 0 * order], 1))
    np.testing.assert_array_equal(labels, again)
    assert kept == order[kept_again].tolist()
