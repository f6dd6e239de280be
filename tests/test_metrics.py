"""Metrics on hand-made cases, their invariants, and a second implementation that tries every matching."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from wsiseg.evaluation import contingency
from wsiseg.evaluation.assignment import assign
from wsiseg.evaluation.contingency import centroids, disjoint, majority, outline_overlaps, overlaps
from wsiseg.evaluation.detection import detect, match_points, pool_detections
from wsiseg.evaluation.metrics import (
    Quality,
    aji,
    aji_plus,
    class_quality,
    dice,
    dq,
    f1,
    matched_iou,
    mean_pq,
    msa,
    pool,
    pq,
    score,
    sq,
    tally,
)
from wsiseg.evaluation.rasterize import rasterise
from wsiseg.evaluation.summary import PointHits, mean_interval, retention

seeds = st.integers(0, 10_000)


def random_pair(seed: int, ids: int = 6, side: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth, prediction = (np.kron(rng.integers(0, ids, (side, side)), np.ones((4, 4), int)) for _ in range(2))
    return truth, np.roll(prediction, 2, axis=1)


def test_identity_is_one_and_nothing_is_zero() -> None:
    label = np.zeros((20, 20), int)
    label[2:8, 2:8], label[10:15, 10:18] = 1, 2
    assert score(label, label) == {"aji": 1.0, "pq": 1.0, "msa": 1.0, "dice": 1.0}
    assert score(label, np.zeros_like(label)) == {"aji": 0.0, "pq": 0.0, "msa": 0.0, "dice": 0.0}
    assert score(np.zeros_like(label), np.zeros_like(label)) == {"aji": 1.0, "pq": 1.0, "msa": 1.0, "dice": 1.0}
    empty = np.zeros_like(label)
    assert set(tally(overlaps(label, label), (0.5, 0.9)).values().values()) == {1.0}
    assert set(tally(overlaps(empty, empty)).values().values()) == {1.0}
    assert set(tally(overlaps(label, empty)).values().values()) == {0.0}
    assert set(tally(overlaps(empty, label)).values().values()) == {0.0}


def test_one_prediction_over_two_nuclei() -> None:
    """g1 = g2 = 60 px, p = 100 px covering 50 of each. AJI: p serves both, 100 / (110 + 110). AJI+: it serves one, 50 / (110 + 60)."""
    truth, prediction = np.zeros((10, 30), int), np.zeros((10, 30), int)
    truth[:, 0:6], truth[:, 6:12] = 1, 2
    prediction[:, 1:11] = 1
    o = overlaps(truth, prediction)
    assert aji(o) == pytest.approx(100 / 220)
    assert aji_plus(o) == pytest.approx(50 / 170)


def test_aji_plus_may_exceed_aji() -> None:
    """g1 = 100 px and its own p1 = 40 px; p2 = 200 px holds the rest of g1 and g2 = 10 px. AJI gives p1 to g1 and p2 to g2 as AJI+ does,
    until p2 is also the best of a third, g3 = 90 px: AJI counts the 200 px of p2 twice, AJI+ once."""
    truth, prediction = np.zeros((10, 60), int), np.zeros((10, 60), int)
    truth[:, 0:10], truth[0, 20:30], truth[1:, 20:30] = 1, 2, 3
    prediction[:, 0:4], prediction[:, 10:30] = 1, 2
    o = overlaps(truth, prediction)
    # AJI: shared 40 + 10 + 90, union 100 + 200 + 200. AJI+: shared 40 + 90, union 100 + 200, and g2 alone 10.
    assert aji(o) == pytest.approx(140 / 500)
    assert aji_plus(o) == pytest.approx(130 / 310)


def test_pq_and_msa_by_hand() -> None:
    """One pair at IoU 0.8, one missed, one invented."""
    truth, prediction = np.zeros((10, 60), int), np.zeros((10, 60), int)
    truth[:, 0:10], truth[:, 20:30] = 1, 2
    prediction[:, 2:10], prediction[:, 40:50] = 1, 2
    o = overlaps(truth, prediction)
    assert pq(o) == pytest.approx(0.8 / 2)
    assert (dq(o), sq(o)) == (pytest.approx(1 / 2), pytest.approx(0.8))
    assert msa(o) == pytest.approx(7 * (1 / 3) / 10)  # thresholds 0.50 ... 0.80
    assert matched_iou(o).tolist() == [pytest.approx(0.8)]
    assert (f1(o, 0.5), f1(o, 0.8), f1(o, 0.81)) == (0.5, 0.5, 0.0)


def test_a_good_pair_counts_though_two_poor_ones_weigh_more() -> None:
    """g1, p1 at IoU 7/13 = 0.54; p2 holds 3/10 of g1, g2 3/10 of p1: 0.6 together. mSA and F1 count the pair; AJI+ takes the two."""
    truth, prediction = np.zeros((1, 40), int), np.zeros((1, 40), int)
    truth[0, 10:20], truth[0, 20:23] = 1, 2  # g1 = 10 px, g2 = 3 px
    prediction[0, 13:23], prediction[0, 10:13] = 1, 2  # p1 = 10 px, p2 = 3 px
    o = overlaps(truth, prediction)
    assert sorted(o.iou) == pytest.approx([0.3, 0.3, 7 / 13])
    assert f1(o) == 0.5
    assert msa(o) == pytest.approx(1 / 3 / 10)
    assert matched_iou(o) == pytest.approx([0.3, 0.3])
    assert aji_plus(o) == pytest.approx(6 / 20)


def test_iou_of_one_half_is_a_hit_of_msa_and_none_of_pq() -> None:
    """g is split in two halves: each has IoU 0.5, one of them may count."""
    truth, prediction = np.ones((1, 10), int), np.repeat([[1, 2]], 5, axis=1)
    o = overlaps(truth, prediction)
    assert pq(o) == 0
    assert msa(o) == pytest.approx(1 / 2 / 10)  # TP 1, FP 1
    assert f1(o) == pytest.approx(2 / 3)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"differ in shape: truth \(2, 2\), prediction \(2, 3\)"):
        overlaps(np.zeros((2, 2), int), np.zeros((2, 3), int))
    with pytest.raises(ValueError, match="holds the id -1"):
        overlaps(np.full((2, 2), -1), np.zeros((2, 2), int))


def brute_force(truth: np.ndarray, prediction: np.ndarray) -> tuple[set[float], set[float], float, float]:
    """Every AJI and AJI+ that the definitions allow on ties, PQ and mSA; from sets of px and all matchings."""
    g = [set(np.flatnonzero(truth.ravel() == i).tolist()) for i in np.unique(truth) if i]
    p = [set(np.flatnonzero(prediction.ravel() == i).tolist()) for i in np.unique(prediction) if i]
    iou = np.array([[len(a & b) / len(a | b) for b in p] for a in g]).reshape(len(g), len(p))

    def aggregated(pairs: list[tuple[int, int]]) -> float:
        shared = sum(len(g[i] & p[j]) for i, j in pairs)
        union = sum(len(g[i] | p[j]) for i, j in pairs)
        union += sum(len(a) for i, a in enumerate(g) if i not in {i for i, _ in pairs})
        union += sum(len(b) for j, b in enumerate(p) if j not in {j for _, j in pairs})
        return round(shared / union, 12) if union else 1.0

    best = [(i, int(iou[i].argmax())) for i in range(len(g)) if len(p) and iou[i].max() > 0]
    every = permutations(range(max(len(p), len(g))), len(g))
    matchings = [[(i, j) for i, j in enumerate(columns) if j < len(p) and iou[i, j] > 0] for columns in every]
    sums = [sum(iou[i, j] for i, j in m) for m in matchings]
    plus = {aggregated(m) for m, s in zip(matchings, sums, strict=True) if s > max(sums) - 1e-9}
    both = len(g) + len(p)
    hits = [max(sum(iou[i, j] >= t - 1e-9 for i, j in m) for m in matchings) for t in np.arange(0.5, 1, 0.05)]
    panoptic = 2 * iou[iou > 0.5].sum() / both if both else 1.0
    return {aggregated(best)}, plus, panoptic, float(np.mean([h / (both - h) if both else 1.0 for h in hits]))


@settings(deadline=None, max_examples=60)
@given(seeds)
def test_agrees_with_the_definitions_tried_by_force(seed: int) -> None:
    truth, prediction = random_pair(seed, side=4)
    o = overlaps(truth, prediction)
    ajis, plus, panoptic, accuracy = brute_force(truth, prediction)
    assert round(aji(o), 12) in ajis
    assert round(aji_plus(o), 12) in plus
    assert pq(o) == pytest.approx(panoptic)
    assert msa(o) == pytest.approx(accuracy)


@settings(deadline=None, max_examples=50)
@given(seeds)
def test_invariants(seed: int) -> None:
    """AJI, AJI+ <= foreground IoU <= Dice, all in [0, 1]; renumbering changes nothing (but AJI and AJI+, which leave ties open)."""
    truth, prediction = random_pair(seed)
    o = overlaps(truth, prediction)
    d = dice(o)
    foreground = ((truth > 0) & (prediction > 0)).sum() / ((truth > 0) | (prediction > 0)).sum()
    assert foreground == pytest.approx(d / (2 - d))
    assert max(aji(o), aji_plus(o)) <= foreground + 1e-12
    assert all(0 <= value <= 1 for value in tally(o).values().values())
    assert dq(o) * sq(o) == pytest.approx(pq(o))
    names = np.random.default_rng(seed).permutation(100)[:6] + 1
    again = overlaps(truth, np.where(prediction > 0, names[prediction], 0))
    assert (pq(again), dice(again), msa(again), f1(again, 0.3)) == pytest.approx((pq(o), d, msa(o), f1(o, 0.3)))
    assert matched_iou(again).sum() == pytest.approx(matched_iou(o).sum())


@settings(deadline=None, max_examples=60)
@given(seeds)
def test_assignment_is_the_best_one(seed: int) -> None:
    """Against scipy on the full matrix; both solvers of the groups that are left."""
    from unittest.mock import patch

    from scipy.optimize import linear_sum_assignment

    rng = np.random.default_rng(seed)
    table = np.where(rng.random((8, 9)) < 0.4, np.round(rng.random((8, 9)), 1) + 0.1, 0)
    rows, columns = np.nonzero(table)
    best = table[linear_sum_assignment(table, maximize=True)].sum()
    for dense in (1000, 0):
        with patch("wsiseg.evaluation.assignment.DENSE", dense):
            chosen = assign(rows, columns, table[rows, columns])
        assert table[rows[chosen], columns[chosen]].sum() == pytest.approx(best)
        assert len(set(rows[chosen])) == len(set(columns[chosen])) == len(chosen)


@settings(deadline=None, max_examples=40)
@given(seeds, st.sampled_from([1, 30, 10_000]))
def test_counting_by_runs_is_counting(seed: int, band: int) -> None:
    """Whatever the bands, the ids and the memory layout."""
    from unittest.mock import patch

    truth, prediction = random_pair(seed)
    prediction = np.asfortranarray(prediction * 1000).astype(np.uint16)
    with patch.object(contingency, "BAND_PX", band):
        o, xy = overlaps(truth, prediction), centroids(truth)
    table = np.array(
        [
            [((truth == g) & (prediction == p)).sum() for p in np.unique(prediction[prediction > 0])]
            for g in np.unique(truth[truth > 0])
        ]
    )
    dense = np.zeros_like(table, float)
    dense[o.truth, o.prediction] = o.shared
    np.testing.assert_array_equal(dense, table)
    np.testing.assert_array_equal(o.truth_size, [(truth == g).sum() for g in np.unique(truth[truth > 0])])
    np.testing.assert_allclose(xy, [np.argwhere(truth == g).mean(0)[::-1] + 0.5 for g in np.unique(truth[truth > 0])])


def test_ids_may_be_huge_and_may_lack_px() -> None:
    truth = np.array([[0, 2**62, 2**62, 5]])
    o = overlaps(truth, truth)
    assert o.truth_size.tolist() == o.shared.tolist() == [1, 2]
    o = overlaps(np.array([[0, 3, 3]]), np.array([[1, 1, 0]]), truth_count=4)
    assert o.truth_size.tolist() == [0, 0, 2, 0]
    assert (o.truth.tolist(), o.prediction.tolist(), o.shared.tolist()) == ([2], [0], [1.0])


def test_majority_of_types() -> None:
    """Of px with a type; the lower id of two alike; 0 without any."""
    label = np.array([[1, 1, 1, 1, 7, 7, 9, 9, 9]])
    kinds = np.array([[0, 0, 3, 2, 0, 0, 4, 4, 1]])
    assert majority(label, kinds).tolist() == [2, 0, 4]


def test_pooled_is_the_ratio_of_sums() -> None:
    """Image 1: two px of two are right; image 2: one of g = 4 px, p = 1 px."""
    one = tally(overlaps(np.array([[1, 1]]), np.array([[1, 1]])))
    two = tally(overlaps(np.array([[1, 1, 1, 1]]), np.array([[1, 0, 0, 0]])))
    both = pool([one, two]).values()
    assert both["dice"] == pytest.approx(2 * 3 / (6 + 3))
    assert both["aji"] == both["aji_plus"] == pytest.approx(3 / 6)
    assert both["pq"] == pytest.approx(1 / (1 + 1 / 2 + 1 / 2))
    assert both["msa"] == pytest.approx(1 / 3)


def test_class_pq_by_hand() -> None:
    """Image 1: a found, b typed a. Image 2: b found, no a in the truth but one predicted."""
    o1 = overlaps(np.array([[1, 2]]), np.array([[1, 2]]))
    o2 = overlaps(np.array([[1, 0]]), np.array([[1, 2]]))
    images = [
        class_quality(o1, np.array(["a", "b"], object), np.array(["a", "a"], object)),
        class_quality(o2, np.array(["b"], object), np.array(["b", "a"], object)),
    ]
    assert images[0] == {"a": Quality(1, 2, 1, 1.0), "b": Quality(1, 0, 0, 0.0)}
    per_image, pooled = mean_pq(images)
    # a: image 1 only, TP 1, FP 1 -> 2/3; pooled TP 1, FP 2 -> 1/2. b: image 1 FN -> 0, image 2 -> 1; pooled TP 1, FN 1 -> 2/3.
    assert per_image == pytest.approx({"a": 2 / 3, "b": 1 / 2})
    assert pooled == pytest.approx({"a": 1 / 2, "b": 2 / 3})


def square(x: float, y: float, side: float) -> shapely.Polygon:
    return shapely.box(x, y, x + side, y + side)


@settings(deadline=None, max_examples=25)
@given(seeds)
def test_outlines_and_raster_agree(seed: int) -> None:
    """Squares on whole px, overlapping at random: the exact areas are the counts of px."""
    rng = np.random.default_rng(seed)
    sides = [
        np.array([square(*rng.integers(0, 30, 2), rng.integers(2, 9)) for _ in range(12)], object) for _ in range(2)
    ]
    exact = outline_overlaps(disjoint(sides[0])[0], disjoint(sides[1])[0])
    counted = overlaps(*(rasterise(s, (40, 40)) for s in sides), truth_count=12, prediction_count=12)
    np.testing.assert_allclose(exact.truth_size, counted.truth_size, atol=1e-9)
    assert (exact.truth.tolist(), exact.prediction.tolist()) == (counted.truth.tolist(), counted.prediction.tolist())
    np.testing.assert_allclose(exact.shared, counted.shared)


def test_holes_and_parts_are_kept() -> None:
    ring = shapely.Polygon(square(0, 0, 6).exterior.coords, [square(2, 2, 2).exterior.coords])
    pair = shapely.MultiPolygon([square(8, 0, 2), square(12, 0, 2)])
    label = rasterise(np.array([square(2, 2, 1), ring, pair], object), (6, 16))
    assert [(label == i).sum() for i in (1, 2, 3)] == [1, 32, 8]


def test_an_outline_drawn_twice_counts_against() -> None:
    twice = np.array([square(0, 0, 4), square(0, 0, 4)], object)
    out, cut = disjoint(twice)
    assert cut == 1
    o = outline_overlaps(twice[:1], out)
    assert (dice(o), pq(o)) == (1.0, pytest.approx(2 / 3))


def test_points_nearest_first_one_to_one() -> None:
    """b0 is nearer to a1 than to a0, which then takes b1 at exactly the radius."""
    a, b = np.array([[0.0, 0], [3, 0]]), np.array([[2.0, 0], [-4, 0]])
    i, j = match_points(a, b, 4.0)
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == [(1, 0), (0, 1)]
    assert len(match_points(a, b, 3.9)[0]) == 1
    assert len(match_points(a, np.empty((0, 2)), 4.0)[0]) == 0


def test_typed_detection_by_hand() -> None:
    """Truth a, a, b, b at x = 0, 10, 20, 30; predicted a, b, unassigned at 0, 10, 20 and an invented b."""
    truth, predicted = np.array([[0.0, 0], [10, 0], [20, 0], [30, 0]]), np.array([[0.0, 1], [10, 1], [20, 1], [90, 0]])
    d = detect(truth, predicted, 2.0, np.array(list("aabb"), object), np.array(["a", "b", "", "b"], object))
    assert (d.f1, d.precision, d.recall) == (pytest.approx(6 / 8), 3 / 4, 3 / 4)
    assert d.class_f1("a") == pytest.approx(2 / 3)  # 2 x 1 / (2 + 1)
    assert d.class_f1("b") == 0
    assert (d.macro_f1, d.type_accuracy, d.unassigned) == (pytest.approx(1 / 3), 1 / 2, 1 / 4)
    both = pool_detections([d, d])
    assert (both.truth("b"), both.prediction("b"), both.macro_f1) == (4, 4, pytest.approx(1 / 3))
    nothing = detect(truth[:0], predicted[:0], 2.0)
    assert nothing.f1 == 1
    assert np.isnan(nothing.macro_f1)


def test_interval_and_retention() -> None:
    """The same draws every time; an image without a value is left out of both means."""
    values = [0.2, 0.4, 0.9, float("nan")]
    found = mean_interval(values)
    assert (found.mean, found.n) == (pytest.approx(0.5), 3)
    assert 0.2 <= found.low < 0.5 < found.high <= 0.9
    assert found == mean_interval(values)
    assert np.isnan(mean_interval([0.4]).low)
    assert mean_interval([]).n == 0
    rows, base = [{"aji": 0.4}, {"aji": 0.6}, {"aji": np.nan}], [{"aji": 0.8}, {"aji": 0.7}, {"aji": 0.1}]
    assert retention(rows, base) == pytest.approx({"aji": 1.0 / 1.5})
    # 0.46541 and 0.50201 keep 92.71 %
    assert retention([{"aji": 0.46541}], [{"aji": 0.50201}])["aji"] == pytest.approx(0.9271, abs=5e-5)
    assert (PointHits(3, 2, 1) + PointHits(1, 1, 1)).values() == {
        "point_precision": 3 / 4,
        "typed_point_precision": 2 / 4,
    }
