"""Metrics on hand-made cases and their invariants."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsiseg.evaluation.metrics import aji, dice, matched_iou, msa, overlaps, pq, score


def test_identity_is_one_and_nothing_is_zero() -> None:
    label = np.zeros((20, 20), int)
    label[2:8, 2:8], label[10:15, 10:18] = 1, 2
    assert score(label, label) == {"aji": 1.0, "pq": 1.0, "msa": 1.0, "dice": 1.0}
    assert score(label, np.zeros_like(label)) == {"aji": 0.0, "pq": 0.0, "msa": 0.0, "dice": 0.0}
    assert score(np.zeros_like(label), np.zeros_like(label)) == {"aji": 1.0, "pq": 1.0, "msa": 1.0, "dice": 1.0}


def test_one_prediction_over_two_nuclei() -> None:
    """g1 = g2 = 60 px, p = 100 px covering 50 of each: AJI = 100 / 220."""
    truth, prediction = np.zeros((10, 30), int), np.zeros((10, 30), int)
    truth[:, 0:6], truth[:, 6:12] = 1, 2
    prediction[:, 1:11] = 1
    assert aji(overlaps(truth, prediction)) == pytest.approx(100 / 220)


def test_pq_and_msa_by_hand() -> None:
    """One pair at IoU 0.8, one missed, one invented."""
    truth, prediction = np.zeros((10, 60), int), np.zeros((10, 60), int)
    truth[:, 0:10], truth[:, 20:30] = 1, 2
    prediction[:, 2:10], prediction[:, 40:50] = 1, 2
    o = overlaps(truth, prediction)
    assert pq(o) == pytest.approx(0.8 / 2)
    assert msa(o) == pytest.approx(7 * (1 / 3) / 10)  # thresholds 0.50 ... 0.80
    assert matched_iou(o).tolist() == [pytest.approx(0.8)]


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"differ in shape: truth \(2, 2\), prediction \(2, 3\)"):
        overlaps(np.zeros((2, 2), int), np.zeros((2, 3), int))


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000))
def test_invariants(seed: int) -> None:
    """AJI <= foreground IoU <= Dice, PQ and mSA in [0, 1]; renumbering changes nothing (but AJI, whose "best p" is open on ties)."""
    rng = np.random.default_rng(seed)
    truth, prediction = (np.kron(rng.integers(0, 6, (6, 6)), np.ones((4, 4), int)) for _ in range(2))
    o = overlaps(truth, prediction)
    d = dice(o)
    assert aji(o) <= d / (2 - d) + 1e-12
    assert 0 <= pq(o) <= 1
    assert 0 <= msa(o) <= 1
    names = rng.permutation(100)[:6] + 1
    renamed = np.where(prediction > 0, names[prediction], 0)
    again = overlaps(truth, renamed)
    assert (pq(again), dice(again)) == pytest.approx((pq(o), d))
    np.testing.assert_allclose(np.sort(matched_iou(again)), np.sort(matched_iou(o)))
