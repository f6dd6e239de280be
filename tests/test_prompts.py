"""APG on maps of known circles; Chain-of-Prompts on features of known types."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import ndimage
from scipy.special import expit

from wsiseg.config import ApgConfig, CopConfig
from wsiseg.segmentation.prompts.apg import apg_points
from wsiseg.segmentation.prompts.chain_of_prompts import (
    component_points,
    farthest_point_recursion,
    gate_map,
    hierarchical_seeds,
    resize_unit,
)


def circle_maps(centres: list[tuple[float, float]], radius: float, size: int = 96) -> np.ndarray:
    """Logits of foreground, centre and boundary distance of discs at (x, y), in cells."""
    y, x = np.mgrid[:size, :size] + 0.5
    distance = np.min([np.hypot(x - cx, y - cy) for cx, cy in centres], 0) / radius
    f, c, b = distance < 1, np.clip(distance, 0, 1), np.clip(distance, 0, 1)
    p = np.clip(np.stack([np.where(f, 0.95, 0.05), c, b]), 0.01, 0.99)
    return np.log(p / (1 - p)).astype(np.float32)


def by_distance_transform(maps: np.ndarray, config: ApgConfig) -> np.ndarray:
    """The definition, with a distance transform of the whole map."""
    f, c, b = expit(maps)
    seed = (f >= config.foreground) & (c < config.centre) & (b < config.boundary)
    components, count = ndimage.label(seed)
    depth = ndimage.distance_transform_edt(np.pad(seed, 1))[1:-1, 1:-1]
    points = []
    for k in range(1, count + 1):
        y, x = np.nonzero(components == k)
        if len(y) * 0.25 >= config.min_component_um2:
            best = np.lexsort((x, y, -depth[y, x]))[0]
            points.append((2 * x[best] + 1, 2 * y[best] + 1))
    return np.array(points, np.float32).reshape(-1, 2)


@pytest.mark.parametrize("smooth", [0.7, 2, 5, 12])
def test_points_are_those_of_a_distance_transform(smooth: float) -> None:
    """Specks, nuclei, and blobs deeper than the rings that are looked at; touching the border, and each other at corners."""
    rng = np.random.default_rng(int(10 * smooth))
    maps = np.stack([ndimage.gaussian_filter(rng.normal(0, 1, (260, 240)), smooth) for _ in range(3)])
    maps = (maps / maps.std() * 2 + [[[1]], [[-1]], [[-1]]]).astype(np.float32)
    config = ApgConfig(foreground=0.5, centre=0.5, boundary=0.6, min_component_um2=0.5)
    expected = by_distance_transform(maps, config)
    assert len(expected) >= 5
    np.testing.assert_array_equal(apg_points(maps, 2, 0.25, config), expected)
    strided = np.moveaxis(np.ascontiguousarray(np.moveaxis(maps, 0, -1)), -1, 0)  # as a network on a CPU gives them
    np.testing.assert_array_equal(apg_points(strided, 2, 0.25, config), expected)


def test_one_point_per_circle_at_its_centre() -> None:
    centres = [(20.5, 20.5), (60.5, 30.5), (40.5, 70.5), (80.5, 80.5)]
    points = apg_points(circle_maps(centres, 9), 2, 0.25, ApgConfig())
    assert len(points) == 4
    expected = np.array(sorted(centres, key=lambda p: (p[1], p[0]))) * 2
    np.testing.assert_allclose(points[np.lexsort((points[:, 0], points[:, 1]))], expected, atol=2)


def test_touching_circles_give_two_points() -> None:
    assert len(apg_points(circle_maps([(30.5, 40.5), (46.5, 40.5)], 9), 2, 0.25, ApgConfig())) == 2


def test_nothing_on_background() -> None:
    maps = np.full((3, 32, 32), -4, np.float32)
    assert apg_points(maps, 2, 0.25, ApgConfig()).shape == (0, 2)


def test_small_components_are_dropped() -> None:
    maps = circle_maps([(20.5, 20.5)], 3)
    assert len(apg_points(maps, 2, 0.25, ApgConfig(min_component_um2=0.1))) == 1
    assert len(apg_points(maps, 2, 0.25, ApgConfig(min_component_um2=50))) == 0


def test_points_do_not_depend_on_the_tile() -> None:
    """The same maps seen through a shifted window give the same points."""
    maps = circle_maps([(30.5, 33.5), (52.5, 41.5), (40.5, 60.5)], 8)
    whole = apg_points(maps, 2, 0.25, ApgConfig())
    part = apg_points(maps[:, 16:, 8:], 2, 0.25, ApgConfig()) + (16, 32)
    np.testing.assert_array_equal(whole, part)


# ------------------------------------------------------------------------------------------------------------- Chain-of-Prompts


def type_features(
    seed: int = 0, size: int = 64, noise: float = 0.05
) -> tuple[np.ndarray, dict[int, list[tuple[int, int]]]]:
    """Features of background and two orthogonal types on a grid of 4x4-cell nuclei: (C, h, w), and the (x, y) centres of each type."""
    rng = np.random.default_rng(seed)
    vectors = np.eye(16, dtype=np.float32)[:3]
    kind = np.zeros((size, size), int)
    centres: dict[int, list[tuple[int, int]]] = {1: [], 2: []}
    for i, y in enumerate(range(4, size - 4, 10)):
        for j, x in enumerate(range(4, size - 4, 10)):
            t = 1 + (i + j) % 2
            kind[y : y + 4, x : x + 4] = t
            centres[t].append((x + 2, y + 2))
    features = vectors[kind].transpose(2, 0, 1) + noise * rng.standard_normal((16, size, size)).astype(np.float32)
    return (features / np.linalg.norm(features, axis=0)).astype(np.float32), centres


@pytest.mark.parametrize("gate", ["product", "candidate"])
def test_a_click_finds_its_type_exactly(gate: str) -> None:
    """Two orthogonal types: the reliable set is the clicked type's nuclei, all of them under the paper's gate, and no other."""
    high, centres = type_features()
    config = dataclasses.replace(CopConfig(), gate=gate, min_component_um2=4, dedup_um=3)
    chain = farthest_point_recursion(centres[1][0], high, high, 1.0, config)
    found = {tuple(np.rint(p).astype(int)) for p in chain}
    assert found <= set(centres[1])
    if gate == "product":
        assert found == set(centres[1])


def test_candidate_gate_keeps_the_top_only() -> None:
    """mean + sd over candidates keeps only a tail of them: the documented flaw of the statistic, which chaining does not repair here."""
    high, centres = type_features()
    config = dataclasses.replace(CopConfig(), gate="candidate", min_component_um2=4)
    x, y = centres[1][0]
    assert 0 < len(hierarchical_seeds((y, x), high, high, 4, config)) < len(centres[1])


def test_a_gate_with_a_floor_finds_nothing_where_the_type_is_absent() -> None:
    """Against a bank, a tile without the type has no candidates, while mean + sd always finds some."""
    high, _ = type_features()
    absent = np.eye(16, dtype=np.float32)[3:4]
    gate = gate_map(high, high, absent, absent)
    assert len(component_points(gate, 0.5, 1)) == 0
    assert (gate > gate.mean() + gate.std()).mean() > 0.02


def test_bank_gate_finds_all_of_the_type() -> None:
    high, centres = type_features()
    x, y = centres[2][0]
    gate = gate_map(high, resize_unit(high[:, ::2, ::2], (32, 32)), high[None, :, y, x], high[None, :, y, x])
    found = {tuple(np.rint(p).astype(int)) for p in component_points(gate, 0.6, 4)}
    assert found == set(centres[2])


def test_recursion_stops_and_is_deterministic() -> None:
    high, centres = type_features(noise=0.3)
    few, many = (dataclasses.replace(CopConfig(), max_hops=hops) for hops in (1, 5))
    first, second = (farthest_point_recursion(centres[1][3], high, high, 1.0, many) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    short = farthest_point_recursion(centres[1][3], high, high, 1.0, few)
    assert 0 < len(short) < len(first)
    np.testing.assert_array_equal(short, first[: len(short)])


def test_resize_keeps_unit_norm_and_position() -> None:
    features = np.zeros((2, 4, 4), np.float32)
    features[0], features[1, :, 2:] = 1, 3
    out = resize_unit(features, (8, 8))
    np.testing.assert_allclose(np.linalg.norm(out, axis=0), 1, atol=1e-5)
    assert out[1, 0, 2] == 0
    assert out[1, 0, 5] > 0.9
