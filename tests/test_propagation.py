"""Types from clicks: competition, calibration, abstention."""

from __future__ import annotations

import numpy as np
import pytest
import shapely

from wsiseg.config import TypingConfig
from wsiseg.propagation import assign_types, keep_clicks
from wsiseg.records import Bank, Cells, Typing


def table(prevalence: list[float], n: int = 4000, noise: float = 0.35, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Descriptors with a strong common mode and one direction per type -> (n, 24) float16, (n,) type index."""
    rng = np.random.default_rng(seed)
    kinds = rng.choice(len(prevalence), n, p=prevalence)
    z = 2 * np.eye(24)[23] + np.eye(24)[kinds] + noise * rng.standard_normal((n, 24))
    return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float16), kinds


def bank_of(z: np.ndarray, kinds: np.ndarray, types: list[int], negative: list[int] | None = None, clicks: int = 1) -> Bank:
    rows = [np.flatnonzero(kinds == t)[:clicks] for t in types]
    other = np.concatenate([np.flatnonzero(kinds == t)[:1] for t in negative or []]).astype(int) if negative else np.empty(0, int)
    against = tuple(z[other].astype(np.float32) if t == 0 else z[:0].astype(np.float32) for t in range(len(types)))
    empty = tuple(np.empty((0, 1), np.float32) for _ in types)
    return Bank(
        names=tuple(f"type {t}" for t in types), colors=tuple((t, 0, 0) for t in types),
        clicks=tuple(np.zeros((len(r), 2)) for r in rows), clicked=tuple(z[r].astype(np.float32) for r in rows),
        negative=against, cells=Cells.empty(z.shape[1]), high=empty, low=empty, floors=np.zeros(len(types), np.float32),
    )  # fmt: skip


@pytest.mark.parametrize("prevalence", [[0.5, 0.5], [0.95, 0.05], [0.7, 0.25, 0.05]])
def test_one_click_per_type_covers_common_and_rare_types(prevalence: list[float]) -> None:
    """A type of 95 % is covered as well as one of 5 %; mean + sd could cover at most half of the first."""
    z, kinds = table(prevalence, noise=0.15)
    typing, warnings = assign_types(z, bank_of(z, kinds, list(range(len(prevalence)))), TypingConfig())
    assert warnings == []
    for t in range(len(prevalence)):
        mine = kinds == t
        assert (typing.codes[mine] == t + 1).mean() > 0.9
        assert (typing.codes[~mine] == t + 1).mean() < 0.02


def test_order_of_the_cells_does_not_matter() -> None:
    z, kinds = table([0.6, 0.4])
    bank = bank_of(z, kinds, [0, 1])
    order = np.random.default_rng(1).permutation(len(z))
    a, _ = assign_types(z, bank, TypingConfig())
    b, _ = assign_types(z[order], bank, TypingConfig())
    np.testing.assert_array_equal(a.codes[order], b.codes)


def test_a_negative_click_keeps_its_type_away() -> None:
    """A third kind resembles type 0 and nobody asked for it: a negative click of type 0 on it takes it away from type 0 only."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 3, 3000)
    directions = np.stack([np.eye(24)[0], np.eye(24)[1], 0.8 * np.eye(24)[0] + 0.6 * np.eye(24)[2]])
    z = 2 * np.eye(24)[23] + directions[kinds] + 0.05 * rng.standard_normal((3000, 24))
    z = (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float16)
    without, _ = assign_types(z, bank_of(z, kinds, [0, 1]), TypingConfig())
    against, _ = assign_types(z, bank_of(z, kinds, [0, 1], negative=[2]), TypingConfig())
    assert (without.codes[kinds == 2] == 1).mean() > 0.9
    assert (against.codes[kinds == 2] == 1).mean() < 0.05
    for t in (0, 1):
        assert (against.codes[kinds == t] == t + 1).mean() > 0.95


def test_a_negative_click_on_another_types_cell_does_that_type_no_harm() -> None:
    z, kinds = table([0.4, 0.3, 0.3], noise=0.15)
    typing, _ = assign_types(z, bank_of(z, kinds, [0, 1, 2], negative=[1]), TypingConfig())
    for t in range(3):
        assert (typing.codes[kinds == t] == t + 1).mean() > 0.9


def test_types_that_cannot_be_told_apart_are_reported() -> None:
    rng = np.random.default_rng(0)
    z = rng.standard_normal((500, 24)).astype(np.float16)
    kinds = np.zeros(500, int)
    bank = bank_of(z, kinds, [0, 0], clicks=1)
    _, warnings = assign_types(z, bank, TypingConfig())
    assert warnings
    assert "hardly told apart" in warnings[0]


def test_one_type_alone() -> None:
    """Two clear groups: the clicked one is the type. One group: everything is."""
    z, kinds = table([0.5, 0.5], noise=0.1)
    typing, _ = assign_types(z, bank_of(z, kinds, [0]), TypingConfig())
    assert (typing.codes[kinds == 0] == 1).mean() > 0.95
    assert (typing.codes[kinds == 1] == 1).mean() < 0.05
    same, _ = assign_types(z[kinds == 0], bank_of(z, kinds, [0]), TypingConfig())
    assert (same.codes == 1).mean() > 0.95


def test_no_cells() -> None:
    z, kinds = table([1.0], n=10)
    typing, _ = assign_types(z[:0], bank_of(z, kinds, [0]), TypingConfig())
    assert len(typing.codes) == 0
    assert typing.names == ("unassigned", "type 0")


def test_clicked_cells_keep_their_type() -> None:
    shapes = np.array([shapely.box(0, 0, 10, 10), shapely.box(20, 0, 30, 10), shapely.box(40, 0, 50, 10)], object)
    cells = Cells(shapes, np.zeros((3, 2)), np.ones(3, np.float32), np.zeros((3, 2), np.float16))
    z, kinds = table([0.5, 0.5], n=20)
    bank = bank_of(z, kinds, [0, 1])
    bank = Bank(**{**bank.__dict__, "clicks": (np.array([[5.0, 5.0]]), np.array([[32.0, 5.0]]))})
    typing = Typing(("unassigned", "a", "b"), ((0, 0, 0),) * 3, np.array([2, 0, 1], np.int32), np.zeros(3, np.float32), np.zeros(3, np.float32))
    kept, doubts = keep_clicks(cells, typing, bank, 3.0)
    assert kept.codes.tolist() == [1, 2, 1]
    assert doubts == []
    kept, doubts = keep_clicks(cells, typing, bank, 1.0)
    assert kept.codes.tolist() == [1, 0, 1]
    assert doubts == ["the click on type 1 at [32, 5] meets no cell of the result"]
