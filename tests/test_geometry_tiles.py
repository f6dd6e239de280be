"""Frames, boxes and the tile plan."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsiseg.config import TilingConfig
from wsiseg.geometry import Box, Lattice, round_up
from wsiseg.slide.tiling import plan_blocks


def everywhere(*_: float) -> bool:
    return True


@given(
    st.floats(0.05, 2),
    st.floats(0.1, 1),
    st.lists(st.tuples(st.floats(0, 1e5), st.floats(0, 1e5)), min_size=1, max_size=20),
)
def test_frames_there_and_back(slide_mpp: float, model_mpp: float, points: list[tuple[float, float]]) -> None:
    lattice = Lattice(slide_mpp, model_mpp)
    xy = np.array(points)
    np.testing.assert_allclose(lattice.to_model(lattice.to_level0(xy)), xy, atol=1e-6)


def test_box_is_half_open() -> None:
    inside = Box(0, 0, 10, 10).contains(np.array([[0.0, 0.0], [9.99, 9.99], [10.0, 5.0], [5.0, 10.0], [-0.01, 5.0]]))
    assert inside.tolist() == [True, True, False, False, False]
    assert Box(0, 0, 10, 20).grow(3) == Box(-3, -3, 13, 23)


@pytest.mark.parametrize(("value", "multiple", "expected"), [(0, 16, 0), (1, 16, 16), (16, 16, 16), (16.01, 16, 32)])
def test_round_up(value: float, multiple: int, expected: int) -> None:
    assert round_up(value, multiple) == expected


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.floats(0.2, 1.1),
    st.floats(20, 200),
    st.floats(0, 40),
    st.integers(1, 5),
    st.floats(-500, 500),
)
def test_cores_partition_the_slide(
    width: int, height: int, mpp: float, tile_um: float, halo_um: float, block: int, origin: float
) -> None:
    """Every point of the slide lies in exactly one core, wherever the grid starts; outer boxes start on the model's lattice."""
    lattice = Lattice(mpp, 0.25)
    config = TilingConfig(tile_um=tile_um, halo_um=halo_um, block_tiles=block, origin_um=origin)
    blocks = plan_blocks((width, height), lattice, config, stride_px=16, reach_px=68, wanted=everywhere)
    tiles = [t for b in blocks for t in b.tiles]
    rng = np.random.default_rng(0)
    points = lattice.to_model(rng.uniform(0, 1, (50, 2)) * (width, height))
    owners = sum(t.core.contains(points).astype(int) for t in tiles)
    assert (owners == 1).all()
    assert len({b.name for b in blocks}) == len(blocks)
    for t in tiles:
        assert t.outer.x0 % 16 == t.outer.y0 % 16 == t.outer.width % 16 == t.outer.height % 16 == 0
        assert t.core.x0 - t.outer.x0 >= 68
        assert t.core.x0 - t.outer.x0 >= halo_um / 0.25


def test_unwanted_tiles_are_left_out() -> None:
    lattice = Lattice(0.5, 0.25)
    blocks = plan_blocks(
        (4000, 4000), lattice, TilingConfig(), stride_px=16, reach_px=68, wanted=lambda x0, y0, _x1, _y1: x0 == y0 == 0
    )
    assert [len(b.tiles) for b in blocks] == [1]
    assert plan_blocks((4000, 4000), lattice, TilingConfig(), stride_px=16, reach_px=68, wanted=lambda *_: False) == []
