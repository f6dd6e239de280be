"""Types from clicks: reading the clicks, competition, rivals, local shares, abstention."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest

from wsiseg.celltypes import assignment, plda
from wsiseg.celltypes.assignment import assign_types, set_click_labels
from wsiseg.celltypes.plda import infer_hypotheses, learn_from_sure_cells, slide_space
from wsiseg.config import TypingConfig
from wsiseg.records import Bank, Cells, TypePrototypes, TypeSpace, Typing

SIZE = 24


def space(kinds: int = 0, spread: float = 40.0, distance: float = 6.0) -> TypeSpace:
    """Types of standard deviation 1; the first ``kinds`` axes point to known kinds."""
    known = distance * np.eye(SIZE)[:kinds]
    middle = known.mean(0) if kinds else np.zeros(SIZE)
    one = np.ones(SIZE)
    return TypeSpace(
        transform=np.eye(SIZE, dtype=np.float32),
        mean=middle,
        between_variance=spread * one,
        reference_classes=known,
        class_variance=0.5 * one,
        slide_variance=1.0 * one,
        class_names=tuple(f"kind {k}" for k in range(kinds)),
    )


def table(
    prevalence: list[float], n: int = 4000, distance: float = 6.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Cells around one mean per type, sd 1 -> (n, 24) float16, (n,) type index."""
    rng = np.random.default_rng(seed)
    kinds = rng.choice(len(prevalence), n, p=prevalence)
    z = distance * np.eye(SIZE)[kinds] + rng.standard_normal((n, SIZE))
    return z.astype(np.float16), kinds


def places(n: int, seed: int = 0, size_um: float = 1000.0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, size_um, (n, 2))


def bank_of(
    z: np.ndarray, kinds: np.ndarray, types: list[int], negative: list[int] | None = None, clicks: int = 1
) -> Bank:
    rows = [np.flatnonzero(kinds == t)[:clicks] for t in types]
    other = (
        np.concatenate([np.flatnonzero(kinds == t)[:1] for t in negative or []]).astype(int)
        if negative
        else np.empty(0, int)
    )
    against = tuple(z[other].astype(np.float32) if t == 0 else z[:0].astype(np.float32) for t in range(len(types)))
    prototypes = tuple(
        TypePrototypes(
            name=f"type {t}",
            color=(t, 0, 0),
            clicks=np.zeros((len(rows[k]), 2)),
            clicked=z[rows[k]].astype(np.float32),
            negative=against[k],
        )
        for k, t in enumerate(types)
    )
    return Bank(prototypes, Cells.empty(z.shape[1]))


def with_clicked(bank: Bank, *clicked: np.ndarray) -> Bank:
    """The bank with other descriptors of the clicked cells, type by type."""
    types = tuple(dataclasses.replace(of, clicked=z) for of, z in zip(bank.types, clicked, strict=True))
    return dataclasses.replace(bank, types=types)


@pytest.mark.parametrize("prevalence", [[0.5, 0.5], [0.95, 0.05], [0.7, 0.25, 0.05]])
def test_one_click_per_type_covers_common_and_rare_types(prevalence: list[float]) -> None:
    """A type of 95 % is covered as well as one of 5 %; mean + sd could cover at most half of the first."""
    z, kinds = table(prevalence, distance=9)
    typing, notes = assign_types(
        z, places(len(z)), bank_of(z, kinds, list(range(len(prevalence)))), space(), TypingConfig()
    )
    assert notes.warnings == ()
    for t in range(len(prevalence)):
        mine = kinds == t
        assert (typing.codes[mine] == t + 1).mean() > 0.9
        assert (typing.codes[~mine] == t + 1).mean() < 0.02


def test_an_odd_click_is_put_right_by_the_kinds_and_by_the_other_clicks() -> None:
    """The click on type 0 lies nearer to kind 1; since the other click is clearly kind 1, it can only be kind 0."""
    z, kinds = table([0.5, 0.5])
    bank = bank_of(z, kinds, [0, 1])
    odd = 1.8 * np.eye(SIZE)[0] + 4.0 * np.eye(SIZE)[1]
    bank = with_clicked(bank, odd[None].astype(np.float32), 6 * np.eye(SIZE, dtype=np.float32)[1:2])
    informed, _ = assign_types(z, places(len(z)), bank, space(kinds=2), TypingConfig(local_shift=0))
    plain, _ = assign_types(z, places(len(z)), bank, space(kinds=0), TypingConfig(local_shift=0))
    assert (informed.codes == kinds + 1).mean() > 0.97
    assert (plain.codes == kinds + 1).mean() < (informed.codes == kinds + 1).mean() - 0.02
    assert infer_hypotheses([of.clicked for of in bank.types], space(kinds=2), TypingConfig())[0].classes == (0, 1)


def test_types_of_no_known_kind_are_told_apart_by_the_clicks() -> None:
    """Both types lie far from both known kinds."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 2, 3000)
    z = (12 * np.eye(SIZE)[5 + kinds] + rng.standard_normal((3000, SIZE))).astype(np.float16)
    bank = bank_of(z, kinds, [0, 1])
    clicked = [of.clicked.astype(float) for of in bank.types]
    assert infer_hypotheses(clicked, space(kinds=2), TypingConfig())[0].classes == (-1, -1)
    typing, _ = assign_types(z, places(len(z)), bank, space(kinds=2), TypingConfig())
    assert (typing.codes == kinds + 1).mean() > 0.97


def test_an_unclicked_kind_stays_unassigned() -> None:
    z, kinds = table([0.4, 0.3, 0.3])
    typing, _ = assign_types(z, places(len(z)), bank_of(z, kinds, [0, 1], clicks=3), space(kinds=3), TypingConfig())
    assert (typing.codes[kinds == 2] == 0).mean() > 0.95
    for t in (0, 1):
        assert (typing.codes[kinds == t] == t + 1).mean() > 0.95


def test_local_shares_settle_doubtful_cells() -> None:
    """On the left there is no cell of type 1; cells between the types are given to it on the right only."""
    rng = np.random.default_rng(1)
    xy = places(6000, size_um=4000.0)
    left = xy[:, 0] < 1800
    kinds = np.where(left, 0, rng.integers(0, 2, 6000))
    z = (3 * np.eye(SIZE)[kinds] + rng.standard_normal((6000, SIZE))).astype(np.float16)
    bank = bank_of(z, kinds, [0, 1], clicks=20)
    false = [
        (
            assign_types(z, xy, bank, space(), dataclasses.replace(TypingConfig(), prevalence_rounds=n))[0].codes[left]
            == 2
        ).mean()
        for n in (0, 20)
    ]
    assert false[0] > 0.01
    assert false[1] < false[0] / 3


def test_softer_probabilities_let_the_neighbours_say_more() -> None:
    """A tenth of the cells look a little like the third type, which is not here: they nearly vanish from it, the others keep theirs."""
    z, kinds = table([0.4, 0.4, 0.2], n=6000, distance=3)
    bank, here = bank_of(z, kinds, [0, 1, 2], clicks=20), kinds < 2
    odd = here & (np.random.default_rng(3).random(len(z)) < 0.1)
    z[odd] += np.float16(3) * np.eye(SIZE, dtype=np.float16)[2]
    false, right = [], []
    for temperature in (1.0, 4.0):
        typing, _ = assign_types(
            z[here],
            places(int(here.sum())),
            bank,
            space(),
            TypingConfig(prevalence_temperature=temperature, min_score=0.4),
        )
        false.append((typing.codes == 3).mean())
        right.append((typing.codes == kinds[here] + 1).mean())
    assert false[0] > 0.01
    assert false[1] < false[0] / 4
    assert right[1] > right[0] - 0.02


def test_a_type_that_occurs_nowhere_is_given_to_hardly_any_cell() -> None:
    """Mean + sd gives such a type about 16 % of the cells; three clicks on it elsewhere, none of its cells here."""
    z, kinds = table([0.4, 0.4, 0.2], n=6000)
    bank = bank_of(z, kinds, [0, 1, 2], clicks=3)
    here = kinds < 2
    cosine = z[here].astype(float) @ bank.types[2].clicked.mean(0)
    assert 0.1 < (cosine > cosine.mean() + cosine.std()).mean() < 0.22
    typing, _ = assign_types(z[here], places(int(here.sum())), bank, space(), TypingConfig())
    assert (typing.codes == 3).mean() < 0.01
    assert (typing.codes == kinds[here] + 1).mean() > 0.97


def test_a_stain_that_changes_over_the_slide_is_followed() -> None:
    """The right half is displaced by more than types are apart in that direction; the clicks are on the left."""
    z, kinds = table([0.5, 0.5], n=8000)
    xy = places(8000, size_um=3000.0)
    right = xy[:, 0] > 1500
    z[right] += np.float16(3) * np.eye(SIZE, dtype=np.float16)[0] - np.float16(3) * np.eye(SIZE, dtype=np.float16)[1]
    left = np.flatnonzero(~right)
    bank = bank_of(z[left], kinds[left], [0, 1], clicks=5)
    model = dataclasses.replace(space(kinds=2), slide_variance=np.full(SIZE, 9.0))
    good = [
        (assign_types(z, xy, bank, model, TypingConfig(local_shift=d, sure_cells=0))[0].codes == kinds + 1)[
            right
        ].mean()
        for d in (0, 0.25)
    ]
    assert good[0] < 0.8
    assert good[1] > 0.95


def test_a_click_between_two_kinds_is_called_doubtful() -> None:
    z, kinds = table([0.5, 0.5])
    between = 3 * np.eye(SIZE)[0] + 3 * np.eye(SIZE)[1]
    bank = with_clicked(bank_of(z, kinds, [0]), between[None].astype(np.float32))
    _, notes = assign_types(z, places(len(z)), bank, space(kinds=2), TypingConfig())
    assert any("the clicks on type 0 could mean kind" in w for w in notes.warnings)


def test_a_bank_of_another_slide_finds_this_slides_shift() -> None:
    """All cells of the second slide are displaced by more than types are apart from each other in that direction."""
    z, kinds = table([0.5, 0.5])
    bank = bank_of(z, kinds, [0, 1], clicks=5)
    displaced = (
        z + np.float16(3) * np.eye(SIZE, dtype=np.float16)[0] - np.float16(3) * np.eye(SIZE, dtype=np.float16)[1]
    ).astype(np.float16)
    model = dataclasses.replace(space(kinds=2), slide_variance=np.full(SIZE, 9.0))
    here, _ = assign_types(displaced, places(len(z)), bank, model, TypingConfig(local_shift=0, sure_cells=0))
    carried, _ = assign_types(
        displaced, places(len(z)), dataclasses.replace(bank, from_other_slide=True), model, TypingConfig()
    )
    assert (here.codes == kinds + 1).mean() < 0.8
    assert (carried.codes == kinds + 1).mean() > 0.95


def drifted(seed: int = 0) -> tuple[np.ndarray, np.ndarray, TypeSpace]:
    """Cells of two kinds, one of which differs here from what the model knows of it: it looks more like the other. sd 1."""
    rng = np.random.default_rng(seed)
    known = space(kinds=2, distance=4)
    kinds = rng.integers(0, 2, 4000)
    means = known.reference_classes + np.outer([1, 0], 2.5 * np.eye(SIZE)[1] + 2.5 * np.eye(SIZE)[2])
    return (means[kinds] + rng.standard_normal((4000, SIZE))).astype(np.float16), kinds, known


@pytest.mark.parametrize("elsewhere", [False, True])
def test_sure_cells_correct_what_one_click_gets_wrong(elsewhere: bool) -> None:
    """A click tells little of how the types differ here from those that the model knows; the cells that are sure tell more."""
    z, kinds, known = drifted()
    clicks_alone, with_cells = [], []
    for seed in range(8):
        shuffled = np.random.default_rng(seed).permutation(len(z))
        bank = dataclasses.replace(bank_of(z[shuffled], kinds[shuffled], [0, 1]), from_other_slide=elsewhere)
        for config, found in ((TypingConfig(sure_cells=0), clicks_alone), (TypingConfig(), with_cells)):
            typing, _ = assign_types(z, places(len(z)), bank, known, dataclasses.replace(config, local_shift=0))
            found.append((typing.codes == kinds + 1).mean())
    assert np.mean(with_cells) > np.mean(clicks_alone)
    assert np.min(with_cells) > np.min(clicks_alone)


def test_sure_cells_do_not_take_over_a_type_that_the_model_does_not_know() -> None:
    z, kinds, known = drifted()
    near = (
        30.0 * np.eye(SIZE)[9]
        + np.array([3.0, 3.0] + [0.0] * 22)
        + np.random.default_rng(2).standard_normal((300, SIZE))
    )
    z, kinds = np.concatenate([z, near.astype(np.float16)]), np.concatenate([kinds, np.full(300, 2)])
    clicked = [z[kinds == 0][:1].astype(float), 30.0 * np.eye(SIZE)[9:10]]
    (first, *_) = infer_hypotheses(clicked, known, TypingConfig())
    assert first.classes == (0, -1)
    (learned,) = learn_from_sure_cells([first], clicked, z.astype(np.float32), known, TypingConfig())
    truth = z[kinds == 0].astype(float).mean(0)
    at = [h.means[0] + h.slide_effect for h in (first, learned)]
    assert np.linalg.norm(at[1] - truth) < 0.8 * np.linalg.norm(at[0] - truth)
    own = [h.means[1] + h.slide_effect for h in (first, learned)]
    np.testing.assert_allclose(own[1], own[0], atol=0.1)
    assert learn_from_sure_cells([first], clicked, z.astype(np.float32), known, TypingConfig(sure_cells=0)) == [first]


def test_a_bank_keeps_how_its_types_differ_from_the_models_classes() -> None:
    """Clicks on one slide of a stain that the model does not know type another slide of that stain."""
    z, kinds, known = drifted()
    other, truth, _ = drifted(seed=1)
    bank = dataclasses.replace(bank_of(z, kinds, [0, 1], clicks=5), from_other_slide=True)
    config = TypingConfig(sure_cells=0)
    typing, _ = assign_types(other, places(len(other)), bank, known, config)
    none = Bank((), Cells.empty(SIZE))
    plain, _ = assign_types(other, places(len(other)), none, known, dataclasses.replace(config, known_types=True))
    assert (typing.codes == truth + 1).mean() > 0.985 > (plain.codes == truth + 1).mean()


def test_clicks_on_another_slide_count_less_beside_this_slides_cells() -> None:
    """The types of the second slide lie elsewhere; its own sure cells say so, and the first slide's many clicks do not keep them from it."""
    z, kinds, known = drifted()
    shifted = (z + np.where(kinds == 0, 1.5, 0.0)[:, None] * np.eye(SIZE)[7]).astype(np.float32)
    clicked = [z[kinds == t][:20].astype(float) for t in (0, 1)]
    here = infer_hypotheses(clicked, known, TypingConfig())[:1]
    truth = shifted[kinds == 0].mean(0)
    own, lent = (
        learn_from_sure_cells(here, clicked, shifted, known, TypingConfig(), moved)[0]
        for moved in (None, [np.zeros(SIZE)])
    )
    gaps = [np.linalg.norm(of.means[0] + of.slide_effect - truth) for of in (own, lent)]
    assert gaps[1] < 0.8 * gaps[0]
    nothing = np.full((100, SIZE), 50.0, np.float32)
    assert learn_from_sure_cells(here, clicked, nothing, known, TypingConfig(), [np.zeros(SIZE)]) == here


def test_on_another_stain_the_clicks_say_more_than_the_models_classes() -> None:
    """Both types look here like one of the classes, which are those of H&E; two clicks tell them apart if the classes may be off."""
    rng = np.random.default_rng(0)
    known, kinds = space(kinds=2, distance=6), rng.integers(0, 2, 3000)
    means = known.reference_classes[[0, 0]] + np.outer([-1, 1], 2 * np.eye(SIZE)[5])
    z = (means[kinds] + rng.standard_normal((3000, SIZE))).astype(np.float16)
    bank = bank_of(z, kinds, [0, 1], clicks=2)
    right = {
        stain: (assign_types(z, places(3000), bank, known, TypingConfig(), stain)[0].codes == kinds + 1).mean()
        for stain in ("auto", "he", "ihc", "ihc-nuclear")
    }
    assert right["auto"] == right["he"] < right["ihc"] == right["ihc-nuclear"]
    same, notes = assign_types(z, places(3000), bank, known, TypingConfig(other_stain=1), "ihc")
    assert (same.codes == kinds + 1).mean() == right["he"]
    assert not any("could mean" in w for w in notes.warnings)
    between = with_clicked(bank_of(z, kinds, [0]), 3 * np.ones((1, SIZE), np.float32) * (np.arange(SIZE) < 2))
    he, ihc = (assign_types(z, places(3000), between, known, TypingConfig(), s)[1].warnings for s in ("he", "ihc"))
    assert any("could mean" in w for w in he)
    assert not any("could mean" in w for w in ihc)
    unclicked, own = Bank((), Cells.empty(SIZE)), TypingConfig(known_types=True)
    without = [assign_types(z, places(3000), unclicked, known, own, s)[0].codes for s in ("he", "ihc")]
    np.testing.assert_array_equal(*without)


def test_order_of_the_cells_does_not_matter() -> None:
    z, kinds = table([0.6, 0.4])
    xy, bank = places(len(z)), bank_of(z, kinds, [0, 1])
    order = np.random.default_rng(1).permutation(len(z))
    a, _ = assign_types(z, xy, bank, space(), TypingConfig())
    b, _ = assign_types(z[order], xy[order], bank, space(), TypingConfig())
    for name in ("codes", "scores", "margins", "prototypes"):
        np.testing.assert_array_equal(getattr(a, name)[order], getattr(b, name))


def test_numbers_do_not_depend_on_how_many_cells_are_worked_on_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads take slices of the cells; with places of several squares, so that slices end within and between them."""
    z, kinds = table([0.5, 0.3, 0.2], distance=4)
    xy, bank = places(len(z), size_um=3000.0), bank_of(z, kinds, [0, 1], negative=[2])
    whole, _ = assign_types(z, xy, bank, space(kinds=3), TypingConfig())
    for rows in (1000, 37):
        for module in (assignment, plda):
            monkeypatch.setattr(module, "ROWS", rows)
        sliced, _ = assign_types(z, xy, bank, space(kinds=3), TypingConfig())
        for name in ("codes", "scores", "margins", "prototypes"):
            assert getattr(sliced, name).tobytes() == getattr(whole, name).tobytes(), name


def test_a_negative_click_keeps_its_type_away() -> None:
    """A third kind resembles type 0 and nobody asked for it: a negative click of type 0 on it takes it away from type 0 only."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 3, 3000)
    directions = np.stack([10 * np.eye(SIZE)[0], 10 * np.eye(SIZE)[1], 9 * np.eye(SIZE)[0] + 7 * np.eye(SIZE)[2]])
    z = (directions[kinds] + rng.standard_normal((3000, SIZE))).astype(np.float16)
    without, _ = assign_types(z, places(3000), bank_of(z, kinds, [0, 1]), space(), TypingConfig())
    against, _ = assign_types(z, places(3000), bank_of(z, kinds, [0, 1], negative=[2]), space(), TypingConfig())
    assert (without.codes[kinds == 2] == 1).mean() > 0.9
    assert (against.codes[kinds == 2] == 1).mean() < 0.05
    for t in (0, 1):
        assert (against.codes[kinds == t] == t + 1).mean() > 0.95


def test_a_negative_click_on_another_types_cell_does_that_type_no_harm() -> None:
    z, kinds = table([0.4, 0.3, 0.3], distance=9)
    typing, _ = assign_types(z, places(len(z)), bank_of(z, kinds, [0, 1, 2], negative=[1]), space(), TypingConfig())
    for t in range(3):
        assert (typing.codes[kinds == t] == t + 1).mean() > 0.9


def test_types_that_cannot_be_told_apart_are_reported() -> None:
    rng = np.random.default_rng(0)
    z = (0.1 * rng.standard_normal((500, SIZE))).astype(np.float16)
    _, notes = assign_types(z, places(500), bank_of(z, np.zeros(500, int), [0, 0]), space(), TypingConfig())
    assert len(notes.warnings) == 1
    assert "types type 0 and type 0 are hard to tell apart" in notes.warnings[0]


def test_one_type_alone() -> None:
    """Cells of another known kind are not given the only type there is."""
    z, kinds = table([0.5, 0.5])
    typing, _ = assign_types(z, places(len(z)), bank_of(z, kinds, [0]), space(kinds=2), TypingConfig())
    assert (typing.codes[kinds == 0] == 1).mean() > 0.95
    assert (typing.codes[kinds == 1] == 1).mean() < 0.05


def test_the_most_similar_click_is_named() -> None:
    z, kinds = table([0.5, 0.5])
    z[kinds == 0] += (
        np.float16(6)
        * np.eye(SIZE, dtype=np.float16)[7]
        * (np.arange((kinds == 0).sum()) % 2)[:, None].astype(np.float16)
    )
    bank = bank_of(z, kinds, [0, 1], clicks=2)
    typing, _ = assign_types(z, places(len(z)), bank, space(), TypingConfig())
    assert set(np.unique(typing.prototypes[typing.codes == 1])) == {0, 1}
    assert set(np.unique(typing.prototypes[typing.codes == 2])) <= {2, 3}
    assert (typing.prototypes[typing.codes == 0] == -1).all()
    mine = np.flatnonzero(kinds == 0)
    assert (typing.prototypes[mine] == np.arange(len(mine)) % 2).mean() > 0.9


def test_no_cells() -> None:
    z, kinds = table([1.0], n=10)
    typing, _ = assign_types(z[:0], np.empty((0, 2)), bank_of(z, kinds, [0]), space(), TypingConfig())
    assert len(typing.codes) == 0
    assert typing.names == ("unassigned", "type 0")


def test_clicked_cells_keep_their_type() -> None:
    codes, none = np.array([2, 0, 1], np.int32), np.full(3, -1, np.int32)
    typing = Typing(
        names=("unassigned", "a", "b"),
        colors=((0, 0, 0),) * 3,
        codes=codes,
        scores=np.zeros(3, np.float32),
        margins=np.zeros(3, np.float32),
        prototypes=none,
    )
    kept = set_click_labels(typing, [np.array([0]), np.array([-1, 1])])
    assert kept.codes.tolist() == [1, 2, 1]
    assert kept.prototypes.tolist() == [0, 2, -1]
    assert kept.scores.tolist() == kept.margins.tolist() == [1, 1, 0]
    assert typing.codes.tolist() == [2, 0, 1]


def test_a_space_is_found_on_the_slide_when_the_weights_have_none() -> None:
    """Three clouds in 40 numbers; one click each, and nothing but the cells themselves to learn from."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 3, 600)
    z = rng.standard_normal((3, 40))[kinds] + 0.4 * rng.standard_normal((600, 40))
    z = (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float16)
    space = slide_space(z)
    assert np.isfinite(space.transform).all()
    assert (space.between_variance > 0).all()
    xy = rng.uniform(0, 1000, (600, 2))
    bank = bank_of(z, kinds, [0, 1, 2])
    typing, notes = assign_types(z, xy, bank, None, TypingConfig())
    assert (typing.codes == kinds + 1).mean() > 0.97
    assert not notes.reference_classes[0]
    few, _ = assign_types(z[:2], xy[:2], bank, None, TypingConfig())
    assert len(few.codes) == 2


def test_without_a_click_the_models_own_classes_are_the_types() -> None:
    """On a slide whose stain shifts all cells; no cell has a click to resemble, and a sentence says so."""
    z, kinds = table([0.5, 0.3, 0.2])
    z = (z.astype(float) + 1.2 * np.random.default_rng(1).standard_normal(SIZE)).astype(np.float16)
    config = TypingConfig(known_types=True)
    typing, notes = assign_types(z, places(len(z)), Bank((), Cells.empty(SIZE)), space(kinds=3), config)
    assert typing.names == ("unassigned", "kind 0", "kind 1", "kind 2")
    assert len(set(typing.colors)) == 4
    assert (typing.codes == kinds + 1).mean() > 0.95
    assert (typing.prototypes == -1).all()
    assert notes.reference_classes == ()
    assert notes.warnings == (
        "the types are the model's own (kind 0, kind 1, kind 2), without a click: check them, or click one cell per type",
    )


def test_clicks_refine_the_models_own_classes() -> None:
    """A class that a click covers is that click's type; the others stay types of their own, and so does a class of a clicked type's name."""
    z, kinds = table([0.5, 0.3, 0.2])
    bank = bank_of(z, kinds, [1], clicks=3)
    typing, notes = assign_types(z, places(len(z)), bank, space(kinds=3), TypingConfig(known_types=True))
    assert typing.names == ("unassigned", "type 1", "kind 0", "kind 2")
    for kind, name in ((0, "kind 0"), (1, "type 1"), (2, "kind 2")):
        assert (typing.codes[kinds == kind] == typing.names.index(name)).mean() > 0.95
    assert (typing.prototypes[typing.codes != 1] == -1).all()
    assert notes.warnings == ()
    named = dataclasses.replace(bank, types=(dataclasses.replace(bank.types[0], name="Kind 2"),))
    typing, _ = assign_types(z, places(len(z)), named, space(kinds=3), TypingConfig(known_types=True))
    assert typing.names == ("unassigned", "Kind 2", "kind 0")


def test_types_do_not_depend_on_the_number_of_threads() -> None:
    """To the last bit, whatever the threads of BLAS, in the space of the packaged network."""
    script = """
import hashlib
import numpy as np
from wsiseg.celltypes.assignment import assign_types
from wsiseg.config import TypingConfig
from wsiseg.models import load_types
from wsiseg.records import Bank, Cells
rng = np.random.default_rng(0)
space = load_types("nuclei-compact")
z = (rng.normal(size=(167, len(space.transform))) / 9).astype(np.float16)
typing, _ = assign_types(z, rng.uniform(0, 500, (167, 2)), Bank((), Cells.empty(z.shape[1])), space, TypingConfig(known_types=True))
print(hashlib.sha256(space.project(z).tobytes() + typing.scores.tobytes() + typing.codes.tobytes()).hexdigest())
"""
    said = set()
    for threads in ("1", "2", "3"):
        env = os.environ | {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        said.add(
            subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env).stdout
        )
    assert len(said) == 1
