"""The watershed on instance maps of known circles."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage
from skimage.filters import gaussian

from wsiseg.reference.ais import AisConfig, ais_labels


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


def overlap(labels: np.ndarray, truth: np.ndarray) -> list[float]:
    """IoU of each true object with the label that covers most of it."""
    found = []
    for k in range(1, truth.max() + 1):
        mine = truth == k
        best = labels == np.bincount(labels[mine]).argmax()
        found.append((mine & best).sum() / (mine | best).sum())
    return found


@pytest.mark.parametrize(("radius", "least"), [(6, 0.85), (9, 0.9), (15, 0.95)])
def test_forty_circles_give_forty_labels(radius: int, least: float) -> None:
    step = 2 * radius + 6
    truth = circles(
        [(step * j + step // 2, step * i + step // 2, radius) for i in range(5) for j in range(8)], (5 * step, 8 * step)
    )
    labels = ais_labels(*targets(truth))
    assert labels.dtype == np.int32
    assert np.unique(labels).tolist() == list(range(41))
    assert min(overlap(labels, truth)) > least


def test_circles_that_touch_are_split_where_they_touch() -> None:
    truth = circles([(20, 20, 10), (38, 20, 10), (29, 36, 10), (75, 22, 14), (98, 22, 11)], (60, 120))
    labels = ais_labels(*targets(truth))
    assert labels.max() == 5
    assert min(overlap(labels, truth)) > 0.85


def test_circles_cut_by_the_border() -> None:
    truth = circles([(0, 30, 12), (40, 2, 12), (97, 30, 12), (50, 58, 12)], (60, 98))
    labels = ais_labels(*targets(truth))
    assert labels.max() == 4
    assert min(overlap(labels, truth)) > 0.85


def test_labels_are_the_foreground_that_markers_reach() -> None:
    """The second circle has no marker: its centre distance is high."""
    truth = circles([(15, 15, 10), (45, 15, 10)], (30, 60))
    f, c, b = targets(truth)
    c[truth == 2] = 0.9
    labels = ais_labels(f, c, b)
    assert labels.max() == 1
    inside, _ = ndimage.label(gaussian(f, 1.0, mode="mirror", truncate=3) > 0.5)
    np.testing.assert_array_equal(labels > 0, inside == inside[15, 15])


def test_nothing_on_background() -> None:
    assert not ais_labels(np.zeros((20, 30)), np.zeros((20, 30)), np.zeros((20, 30))).any()


def test_maps_are_not_changed() -> None:
    maps = targets(circles([(15, 15, 10)], (30, 30)))
    before = [m.copy() for m in maps]
    ais_labels(*maps)
    for one, two in zip(maps, before, strict=True):
        np.testing.assert_array_equal(one, two)


def test_small_objects_are_dropped_and_the_rest_renumbered() -> None:
    """No smoothing, so areas are known: 25 and 36 px."""
    f, c, b = np.zeros((20, 30)), np.zeros((20, 30)), np.zeros((20, 30))
    f[2:7, 2:7] = f[2:8, 12:18] = 1
    plain = {"foreground_sigma": 0, "distance_sigma": 0}
    assert np.bincount(ais_labels(f, c, b, config=AisConfig(**plain)).ravel())[1:].tolist() == [25, 36]
    assert np.bincount(ais_labels(f, c, b, config=AisConfig(**plain, min_size=25)).ravel())[1:].tolist() == [25, 36]
    assert np.bincount(ais_labels(f, c, b, config=AisConfig(**plain, min_size=26)).ravel())[1:].tolist() == [36]


def test_markers_that_meet_at_a_corner_are_one() -> None:
    f, c, b = np.zeros((20, 20)), np.zeros((20, 20)), np.zeros((20, 20))
    f[2:8, 2:8] = f[8:14, 8:14] = 1
    assert ais_labels(f, c, b, config=AisConfig(foreground_sigma=0, distance_sigma=0)).max() == 1


def test_thresholds_are_strict() -> None:
    half = np.full((12, 12), 0.5)
    zero, one = np.zeros((12, 12)), np.ones((12, 12))
    plain = AisConfig(foreground_sigma=0, distance_sigma=0)
    assert not ais_labels(half, zero, zero, config=plain).any()
    assert not ais_labels(one, half, zero, config=plain).any()
    assert not ais_labels(one, zero, half, config=plain).any()
    assert ais_labels(np.nextafter(half, 1), np.nextafter(half, 0), np.nextafter(half, 0), config=plain).all()
