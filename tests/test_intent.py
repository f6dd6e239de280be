"""The intent decoder on made-up features: what its answers may depend on, and that it learns what a click means."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from training.intent import DESCRIPTION_SIZE, HYPOTHESES, Clicked, IntentDecoder
from training.intent_data import BACKGROUND, BORDER, CENTRE, OUTSIDE, Scene, draw_clicks, places, stack, target_of
from wsiseg.finetune.losses import supervised_pair_loss
from wsiseg.models.phrases import WIDTHS


def made_up(rng: np.random.Generator, side: int = 32) -> Scene:
    """Squares of 4 x 4 cells of two types, whose features differ in one channel of each level, and a click on each."""
    owner = np.zeros((side, side), np.int32)
    types, rows = [0], []
    for k, (y, x) in enumerate(((y, x) for y in range(2, side - 4, 8) for x in range(2, side - 4, 8)), 1):
        owner[y : y + 4, x : x + 4] = k
        types.append(1 + int(rng.integers(2)))
    kind = np.array(types)[owner]
    pyramid = {}
    for name, width in WIDTHS.items():
        step = 2 if name == "p8" else 1
        levels = rng.normal(0, 0.3, (width, side // step, side // step))
        levels[0] += 2.0 * (kind[::step, ::step] == 1)
        levels[1] += 2.0 * (kind[::step, ::step] == 2)
        pyramid[name] = torch.from_numpy(levels).half()
    for k in range(1, len(types)):
        described = rng.normal(0, 0.3, DESCRIPTION_SIZE)
        described[types[k] - 1] += 2
        rows.append(described)
    return Scene(
        name="made up",
        collection="brca_m2c",
        pyramid=pyramid,
        owner=torch.from_numpy(owner),
        share=torch.from_numpy((owner > 0).astype(np.uint8) * 255),
        known=torch.ones((side, side), dtype=torch.bool),
        types=np.array(types),
        descriptions=torch.from_numpy(np.array(rows)).half(),
        nuclei=np.arange(1, len(types)),
        kinds=np.full(len(types) - 1, CENTRE),
    )


def ask(
    network: IntentDecoder, here: Scene, clicked: Clicked, *, everything: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    features = network.features({k: v[None].float() for k, v in here.pyramid.items()})
    q = len(clicked.signs)
    return network(features, torch.zeros(q, dtype=torch.long), clicked, all_nuclei=torch.full((q,), everything))


def split(here: Scene, kind: int) -> tuple[np.ndarray, np.ndarray]:
    of = here.types[here.present]
    return here.present[of == kind], here.present[of != kind]


def test_shapes_and_that_order_and_padding_do_not_matter() -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    here, network = made_up(rng), IntentDecoder().eval()
    meant, other = split(here, 1)
    clicked = stack([draw_clicks(here, meant, other, rng, quality=CENTRE, positives=3, negatives=2)] * 2)
    assert (clicked.signs[0] == torch.tensor([1.0, 1, 1, -1, -1, 0])).all()
    with torch.inference_mode():
        logits, quality = ask(network, here, clicked)
        assert logits.shape == (2, HYPOTHESES, 32, 32)
        assert quality.shape == (2, HYPOTHESES)
        assert ((quality >= 0) & (quality <= 1)).all()
        other_order = torch.tensor([4, 2, 0, 5, 1, 3])
        moved, _ = ask(network, here, Clicked(clicked.descriptions[:, other_order], clicked.signs[:, other_order]))
        torch.testing.assert_close(moved, logits, rtol=1e-4, atol=1e-4)
        rubbish = clicked.descriptions.clone()
        rubbish[clicked.signs == 0] = 100
        padded, _ = ask(network, here, Clicked(rubbish, clicked.signs))
        torch.testing.assert_close(padded, logits, rtol=1e-5, atol=1e-5)
        against, _ = ask(network, here, Clicked(clicked.descriptions, -clicked.signs))
    assert not torch.allclose(against, logits, atol=1e-2)


def test_it_learns_which_type_is_meant() -> None:
    """On squares of two types that it has not seen, a click on one gives the map of that one; a type that is not there, an empty map."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    network = IntentDecoder()
    optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(150):
        here, kind = made_up(rng), int(rng.integers(1, 3))
        meant, other = split(here, kind)
        if not len(meant) or not len(other):
            continue
        drawn = [draw_clicks(here, meant, other, rng, quality=CENTRE, positives=1, negatives=k % 2) for k in range(3)]
        logits, _ = ask(network, here, stack(drawn))
        loss = supervised_pair_loss(logits, target_of(here, meant))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    found = []
    with torch.inference_mode():
        for _ in range(4):
            here = made_up(rng)
            for kind in (1, 2):
                meant, other = split(here, kind)
                drawn = [draw_clicks(here, meant, other, rng, quality=CENTRE, positives=1, negatives=0)]
                mask = ask(network, here, stack(drawn))[0][0].mean(0) > 0
                target = target_of(here, meant) > 0.5
                found.append(float(2 * (mask & target).sum() / (mask.sum() + target.sum())))
    assert np.mean(found) > 0.85, found


def test_clicks_lie_where_they_say() -> None:
    label = np.zeros((60, 80), np.int32)
    label[10:30, 10:30], label[20:50, 40:70] = 1, 2
    rows = places(label, np.ones(label.shape, bool), np.random.default_rng(0), background=10)
    at = {kind: rows[rows[:, 3] == kind] for kind in (CENTRE, BORDER, OUTSIDE, BACKGROUND)}
    assert [len(at[k]) for k in (CENTRE, BORDER, OUTSIDE, BACKGROUND)] == [2, 2, 2, 10]
    for kind in (CENTRE, BORDER):
        assert [label[int(y), int(x)] for x, y, *_ in at[kind]] == [1, 2]
    x, y = at[CENTRE][0, :2]
    assert 18 <= x <= 22
    assert 18 <= y <= 22
    assert all(label[int(y), int(x)] == 0 for x, y, *_ in np.concatenate([at[OUTSIDE], at[BACKGROUND]]))


def test_without_nuclei_of_a_kind_the_centre_is_clicked() -> None:
    rng = np.random.default_rng(0)
    here = made_up(rng)
    meant, other = split(here, 1)
    one, signs = draw_clicks(here, meant, other, rng, quality=OUTSIDE, positives=2, negatives=0)
    assert signs.tolist() == [1, 1, 0, 0, 0, 0]
    assert one[:2].abs().sum() > 0
    assert one[2:].abs().sum() == pytest.approx(0)
