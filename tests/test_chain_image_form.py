"""Chain-of-Prompts on one image of known truth: F_h tells nuclei from background, F_l tells types apart."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from wsiseg.config import CopConfig, RunConfig
from wsiseg.records import Bank, Cells, ChainPrototypes, Embeddings, TypePrototypes
from wsiseg.seeds.bank import _floor
from wsiseg.segmentation.prompts import find_points
from wsiseg.segmentation.prompts.chain_of_prompts import farthest_point_recursion, gate_map, hierarchical_seeds

SIDE, STEP = 4, 10  #: cells of a nucleus, and from one nucleus to the next
AXES = np.eye(32, dtype=np.float32)
BACKGROUND, NUCLEUS = AXES[30], AXES[31]
SETTINGS = CopConfig(min_component_um2=4, dedup_um=3)


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def image_of(vectors: np.ndarray, noise: float = 0.02, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An image with one nucleus per row of ``vectors`` (n * n, C), its F_l -> F_h (C, h, w), F_l (C, h / 2, w / 2), centres (n * n, 2) x, y."""
    n = round(len(vectors) ** 0.5)
    size = n * STEP
    high, low = np.tile(BACKGROUND, (size, size, 1)), np.tile(BACKGROUND, (size, size, 1))
    corners = np.stack(np.meshgrid(np.arange(n), np.arange(n)), -1).reshape(-1, 2) * STEP + 2
    for (x, y), vector in zip(corners, vectors, strict=True):
        high[y : y + SIDE, x : x + SIDE], low[y : y + SIDE, x : x + SIDE] = NUCLEUS, vector
    rng = np.random.default_rng(seed)
    high, low = (unit(f + noise * rng.standard_normal(f.shape)) for f in (high, low[::2, ::2]))
    return high.transpose(2, 0, 1), low.transpose(2, 0, 1), corners + SIDE // 2


def rounded(points: np.ndarray) -> list[tuple[int, int]]:
    return sorted(tuple(int(v) for v in p) for p in np.rint(points))


def near(direction: np.ndarray, mean: float, sd: float, count: int, seed: int = 0) -> np.ndarray:
    """Unit vectors whose cosine with ``direction`` is N(mean, sd)."""
    rng = np.random.default_rng(seed)
    cosine = np.clip(rng.normal(mean, sd, count), -1, 1)[:, None]
    rest = rng.standard_normal((count, len(direction))) * (direction == 0) * (BACKGROUND == 0)
    return (cosine * direction + np.sqrt(1 - cosine**2) * unit(rest)).astype(np.float32)


def bank_of(vectors: np.ndarray, floor: float) -> Bank:
    no = np.empty((0, 2))
    high = np.tile(NUCLEUS, (len(vectors), 1))
    chain = ChainPrototypes(high, vectors, float(np.float32(floor)))
    one = TypePrototypes(name="a", color=(0, 0, 0), clicks=no, clicked=no, negative=no, chain=chain)
    return Bank((one,), Cells.empty(2))


@pytest.mark.parametrize("gate", ["product", "candidate"])
@pytest.mark.parametrize("clicked", [0, 17, 99])
def test_one_click_recovers_the_places_of_its_type_exactly(gate: str, clicked: int) -> None:
    """Two orthogonal types, a third of the nuclei of the clicked one: all of them once, at their centres, and nothing else."""
    types = np.arange(100) % 3 == clicked % 3
    high, low, centres = image_of(np.where(types[:, None], AXES[0], AXES[1]))
    chain = farthest_point_recursion(tuple(centres[clicked]), high, low, 1.0, dataclasses.replace(SETTINGS, gate=gate))
    assert rounded(chain) == rounded(centres[types])


def test_the_candidate_gate_finds_none_of_a_dominant_type() -> None:
    """At 70 % the mean + sd of the candidates' similarity is 0.7 + 0.46, above what a perfect match reaches; the product gate is not touched."""
    types = np.arange(100) % 10 < 7
    high, low, centres = image_of(np.where(types[:, None], AXES[0], AXES[1]))
    found = {
        g: farthest_point_recursion(tuple(centres[0]), high, low, 1.0, dataclasses.replace(SETTINGS, gate=g))
        for g in ("candidate", "product")
    }
    assert len(found["candidate"]) == 0
    assert rounded(found["product"]) == rounded(centres[types])


def test_mean_and_sd_find_a_type_that_is_not_there_and_the_floor_of_a_bank_does_not() -> None:
    """400 nuclei of other types with near-normal similarity to the prompt: mean + sd passes its upper tail, 16 %; the bank's floor under 1 %."""
    others = near(AXES[0], 0.35, 0.08, 400)
    high, low, centres = image_of(others)
    row = column = low.shape[1] - 1  # the prompt: one cell in the corner, too small to be a component
    low[:, row, column], high[:, 2 * row, 2 * column] = AXES[0], NUCLEUS
    low = low.repeat(2, 1).repeat(2, 2)
    found = hierarchical_seeds((2 * row, 2 * column), high, low, 4, dataclasses.replace(SETTINGS, gate="candidate"))
    assert 0.12 < len(found) / 400 < 0.20

    clicked = near(AXES[0], 0.9, 0.03, 40, seed=1)  # the type's own cells, on another image
    rows = np.arange(16)
    floor = _floor(np.tile(NUCLEUS, (40, 1)), clicked, rows, CopConfig().floor_percentile)
    gate = gate_map(high, low[:, ::2, ::2], np.tile(NUCLEUS, (16, 1)), clicked[rows])
    assert (gate[centres[:, 1], centres[:, 0]] >= floor).mean() < 0.01


@pytest.mark.parametrize("mean", [0.35, 0.9])
def test_prompts_of_a_tile_against_a_bank(mean: float) -> None:
    """``find_points`` without instance maps: under 1 % of the nuclei of other types, at least 90 % of the type's own."""
    own = near(AXES[0], 0.9, 0.03, 40, seed=1)
    rows = np.arange(16)
    bank = bank_of(own[rows], _floor(np.tile(NUCLEUS, (40, 1)), own, rows, CopConfig().floor_percentile))
    high, low, centres = image_of(near(AXES[0], mean, 0.05 if mean < 0.5 else 0.03, 400, seed=2), noise=0.01)
    embeddings = Embeddings(high=torch.from_numpy(high)[None], low=torch.from_numpy(low)[None], maps=None, extra={})
    config = dataclasses.replace(RunConfig(), method="cop", cop=SETTINGS)
    points = find_points(embeddings, high.shape[2], 1.0, config, bank)
    gaps = np.hypot(*(points[:, None] - centres[None]).transpose(2, 0, 1)) if len(points) else np.empty((0, 400))
    hit = (gaps <= 2).any(0).mean()
    assert hit < 0.01 if mean < 0.5 else hit > 0.9
    assert len(points) <= 400


def test_a_lone_click_has_a_floor_of_one_half() -> None:
    assert _floor(NUCLEUS[None], AXES[:1], np.arange(1), 5.0) == 0.5
