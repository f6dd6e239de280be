"""Marching squares on many images: the same rings as scikit-image traces one by one."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage
from skimage.draw import polygon2mask
from skimage.measure import find_contours

from wsiseg.segmentation.contours import zero_rings


def rings_of(images: np.ndarray) -> list[list[np.ndarray]]:
    rings = zero_rings(images)
    out: list[list[np.ndarray]] = [[] for _ in images]
    for first, count, image in zip(rings.first, rings.count, rings.image, strict=True):
        out[image].append(rings.xy[first : first + count])
    return out


def closed_in(images: np.ndarray) -> np.ndarray:
    images[:, [0, -1]] = images[:, :, [0, -1]] = -1
    return images.astype(np.float32)


@pytest.mark.parametrize("sigma", [0, 0.7, 2, 5])
def test_rings_are_scikit_images(sigma: float) -> None:
    """White noise has saddles, rings of four vertices and holes in holes; smooth noise has long rings."""
    rng = np.random.default_rng(0)
    images = closed_in(np.stack([ndimage.gaussian_filter(rng.standard_normal((40, 50)), sigma) for _ in range(20)]))
    for image, mine in zip(images, rings_of(images), strict=True):
        theirs = [ring[:-1, ::-1] for ring in find_contours(image.astype(float), 0.0)]
        assert sorted(len(r) for r in theirs) == sorted(len(r) for r in mine)
        vertices = [np.concatenate(rings) if rings else np.empty((0, 2)) for rings in (theirs, mine)]
        a, b = (v[np.lexsort(np.round(v, 6).T)] for v in vertices)
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_vertices_are_in_order() -> None:
    rng = np.random.default_rng(1)
    images = closed_in(np.stack([ndimage.gaussian_filter(rng.standard_normal((60, 60)), 1) for _ in range(10)]))
    for ring in (r for rings in rings_of(images) for r in rings):
        assert np.abs(ring - np.roll(ring, 1, 0)).max() <= 1 + 1e-6  # neighbours lie on the edges of one cell


def test_area_of_a_disc_and_its_hole() -> None:
    y, x = np.mgrid[:80, :80]
    distance = np.hypot(x - 40.3, y - 39.6)
    rings = zero_rings(np.stack([20 - distance, np.minimum(20 - distance, distance - 8)]).astype(np.float32))
    assert rings.image.tolist() == [0, 1, 1]
    np.testing.assert_allclose(sorted(rings.area), [np.pi * 64, np.pi * 400, np.pi * 400], rtol=4e-3)


def test_enclosing_is_polygon2masks() -> None:
    rng = np.random.default_rng(2)
    images = closed_in(np.stack([ndimage.gaussian_filter(rng.standard_normal((30, 30)), 2) for _ in range(30)]))
    points = rng.integers(1, 29, (30, 2)).astype(float)
    rings = zero_rings(images)
    found = rings.enclose(points)
    for first, count, image, inside in zip(rings.first, rings.count, rings.image, found, strict=True):
        ring = rings.xy[first : first + count]
        x, y = points[image].astype(int)
        assert polygon2mask((30, 30), ring[:, ::-1])[y, x] == inside
    assert found.any()
    assert not found.all()


def test_nothing_inside_gives_no_ring() -> None:
    rings = zero_rings(np.full((3, 8, 8), -1, np.float32))
    assert len(rings.first) == 0
    assert rings.xy.shape == (0, 2)
