"""Losses of fine-tuning against their equations: closed-form gradients, finite differences, and the cases that the papers leave open."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from wsiseg.finetune import losses as L

K, J, H, W = 3, 2, 4, 5


@pytest.fixture
def case():
    """Logits of a model and of its reference, and a target, in double precision; every pair is decided."""
    random = torch.Generator().manual_seed(3)
    logits = torch.randn(K, J, H, W, generator=random, dtype=torch.float64) * 2
    reference = torch.randn(K, J, H, W, generator=random, dtype=torch.float64) * 2
    target = (torch.rand(H, W, generator=random) > 0.5).double()
    return logits, reference, target


def gradient(function, at):
    at = at.clone().requires_grad_()
    return torch.autograd.grad(function(at), at)[0]


def differences(function, at, step=1e-6):
    """Central finite differences of a number with respect to every entry."""
    out = torch.zeros_like(at)
    for index in itertools.product(*map(range, at.shape)):
        moved = [at.clone(), at.clone()]
        moved[0][index] += step
        moved[1][index] -= step
        out[index] = (function(moved[0]) - function(moved[1])) / (2 * step)
    return out


def test_log_likelihood_is_the_mean_over_pixels_that_are_known(case):
    logits, _, target = case
    p = logits.sigmoid()
    by_hand = target * p.log() + (1 - target) * (1 - p).log()
    assert torch.allclose(L.mask_log_likelihood(logits, target), by_hand.mean((-2, -1)))
    weight = torch.zeros(H, W, dtype=torch.float64)
    weight[0, :2] = 1
    assert torch.allclose(L.mask_log_likelihood(logits, target, weight), by_hand[..., 0, :2].mean(-1))
    assert (L.mask_log_likelihood(logits, target, weight * 0) == 0).all()


@pytest.mark.parametrize("reading", ["A", "B"])
@pytest.mark.parametrize("known", [False, True])
def test_preference_gradient_equals_finite_differences(case, reading, known):
    logits, reference, target = case
    weight = (torch.arange(H * W).view(H, W) % 3 > 0).double() if known else None
    pairs = L.preference_pairs(L.hypothesis_iou(logits, target, weight))
    assert pairs.decided.all()

    def loss(z):
        return L.preference_loss(z, reference, target, beta=3.0, alpha=0.7, reading=reading, weight=weight, pairs=pairs)

    assert torch.allclose(gradient(loss, logits), differences(loss, logits), atol=1e-8)


@pytest.mark.parametrize("reading", ["A", "B"])
def test_preference_gradient_has_its_closed_form(case, reading):
    """-beta s(-beta b) db/dZ per pair; db/dZ = (M - s(Z)) / |W| for A, (y_w - y_l) / |W| at the loser for B."""
    logits, reference, target = case
    beta, alpha = 4.0, 0.5
    expected = torch.zeros_like(logits)
    iou = L.hypothesis_iou(logits, target)
    couples = [((iou[:, j].argmax(), j), (iou[:, j].argmin(), j), 1 / J) for j in range(J)]
    couples += [((k, iou[k].argmax()), (k, iou[k].argmin()), alpha / K) for k in range(K)]
    for w, worst, share in couples:
        if reading == "A":
            d_w, d_l = ((target - logits[i].sigmoid()) / (H * W) for i in (w, worst))
            ratio = [L.mask_log_likelihood(z[i], target) for i in (w, worst) for z in (logits, reference)]
            bracket = ratio[0] - ratio[1] - ratio[2] + ratio[3]
        else:
            differ = (logits[w] > 0).double() - (logits[worst] > 0).double()
            d_w, d_l = torch.zeros(H, W).double(), -differ / (H * W)
            bracket = (differ * (logits[worst] - reference[worst])).mean()
        force = -share * beta * torch.sigmoid(-beta * bracket)
        expected[w] += force * d_w
        expected[worst] -= force * d_l
    found = gradient(
        lambda z: L.preference_loss(z, reference, target, beta=beta, alpha=alpha, reading=reading, tie=0), logits
    )
    assert torch.allclose(found, expected, atol=1e-12)


def test_reading_b_is_the_difference_of_log_likelihoods_under_the_losing_prompt(case):
    """The short form used equals log pi(y_w) - log pi(y_l), both under the loser's logits, minus the same of the reference."""
    logits, reference, target = case
    pairs = L.preference_pairs(L.hypothesis_iou(logits, target))
    flat, ref = logits.flatten(0, 1), reference.flatten(0, 1)
    found = (flat > 0).double()
    y_w, y_l, z, z_ref = found[pairs.winner], found[pairs.loser], flat[pairs.loser], ref[pairs.loser]
    expected = (
        L.mask_log_likelihood(z, y_w)
        - L.mask_log_likelihood(z_ref, y_w)
        - L.mask_log_likelihood(z, y_l)
        + L.mask_log_likelihood(z_ref, y_l)
    )
    assert torch.allclose(L.preference_margin(logits, reference, target, pairs, reading="B"), expected)


@pytest.mark.parametrize("reading", ["A", "B"])
def test_a_step_down_the_preference_raises_the_margin(case, reading):
    logits, reference, target = case
    pairs = L.preference_pairs(L.hypothesis_iou(logits, target))
    step = gradient(lambda z: L.preference_loss(z, reference, target, reading=reading, pairs=pairs), logits)
    before, after = (
        L.preference_loss(z, reference, target, reading=reading, pairs=pairs) for z in (logits, logits - 0.05 * step)
    )
    assert after < before


def test_no_gradient_reaches_the_reference(case):
    logits, reference, target = case
    reference.requires_grad_()
    L.preference_loss(logits.requires_grad_(), reference, target).backward()
    assert reference.grad is None


def test_pairs_name_best_and_worst_of_each_slot_and_of_each_prompt():
    iou = torch.tensor([[0.10, 0.80, 0.30], [0.60, 0.79, 0.30]])
    pairs = L.preference_pairs(iou, tie=0.02)
    assert pairs.winner.tolist() == [3, 1, 2, 1, 4]
    assert pairs.loser.tolist() == [0, 4, 2, 0, 5]
    assert pairs.decided.tolist() == [True, False, False, True, True]  # 0.80 and 0.79 tie; a slot of equals has no pair


def test_ties_are_supervised_but_not_preferred():
    """Two prompts that are equally good: nothing to prefer, still something to learn."""
    logits, target = torch.full((2, 1, 2, 2), 1.0), torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    assert L.preference_loss(logits, logits * 0, target) == 0
    assert torch.allclose(L.supervised_pair_loss(logits, target), L.segmentation_loss(logits[0, 0], target))


def test_one_prompt_and_one_hypothesis_is_the_supervised_loss(case):
    logits, reference, target = case
    one, ref = logits[:1, :1], reference[:1, :1]
    assert torch.allclose(L.supervised_pair_loss(one, target), L.segmentation_loss(one[0, 0], target))
    for reading in ("A", "B"):
        assert L.preference_loss(one, ref, target, reading=reading) == 0


def test_supervision_covers_both_members_of_every_pair(case):
    logits, _, target = case
    pairs = L.preference_pairs(L.hypothesis_iou(logits, target))
    moved = gradient(lambda z: L.supervised_pair_loss(z, target), logits).flatten(0, 1).abs().sum((1, 2)) > 0
    members = torch.zeros(K * J, dtype=torch.bool)
    members[torch.cat([pairs.winner, pairs.loser])] = True
    assert (moved == members).all()
    function = L.supervised_pair_loss
    assert torch.allclose(
        gradient(lambda z: function(z, target, pairs=pairs), logits),
        differences(lambda z: function(z, target, pairs=pairs), logits),
        atol=1e-8,
    )


def test_segmentation_loss_of_empty_targets_asks_for_an_empty_mask():
    empty = torch.zeros(4, 4)
    assert L.segmentation_loss(torch.full((4, 4), -12.0), empty) < 1e-3
    assert L.segmentation_loss(torch.full((4, 4), 12.0), empty) > 10
    assert L.hypothesis_iou(torch.full((4, 4), -1.0), empty) == 1
    assert L.hypothesis_iou(torch.full((4, 4), 1.0), empty) == 0


def test_dice_and_focal_loss_by_hand():
    logits = torch.tensor([[0.0, 0.0]])
    target = torch.tensor([[1.0, 0.0]])
    assert L.dice_loss(logits, target).item() == pytest.approx(1 - (2 * 0.5 + 1) / (0.5 + 0.5 + 1 + 1))
    log2 = torch.log(torch.tensor(2.0)).item()
    assert L.focal_loss(logits, target).item() == pytest.approx((0.25 + 0.75) / 2 * 0.25 * log2)
    entropy = F.binary_cross_entropy_with_logits(logits, target)
    assert L.focal_loss(logits, target, gamma=0, positive=0.5).item() == pytest.approx(entropy.item() / 2)


def test_hypothesis_iou_leaves_out_unknown_pixels():
    logits = torch.tensor([[1.0, 1.0, -1.0]])
    target = torch.tensor([[1.0, 0.0, 1.0]])
    assert L.hypothesis_iou(logits, target).item() == pytest.approx(1 / 3)
    assert L.hypothesis_iou(logits, target, torch.tensor([[1.0, 0.0, 1.0]])).item() == pytest.approx(1 / 2)


def test_group_gradient_has_its_closed_form_and_equals_finite_differences():
    losses = torch.tensor([0.4, 0.9, 0.5], dtype=torch.float64)
    for tau in (1.0, 2.5):
        found = gradient(lambda x, tau=tau: L.group_regularisation(x, tau), losses)
        assert torch.allclose(found, (losses.mean() - losses) / tau)
    quality = losses.mean() - losses

    def with_fixed_quality(x):
        return -(quality * torch.log_softmax(-x, 0)).sum()

    assert torch.allclose(gradient(L.group_regularisation, losses), differences(with_fixed_quality, losses), atol=1e-8)


def test_prompt_group_loss_has_the_gradient_of_equation_9_until_a_weight_is_clipped():
    losses = torch.tensor([0.4, 0.6, 0.5], dtype=torch.float64)
    printed = gradient(lambda x: x.mean() + L.group_regularisation(x), losses)
    assert torch.allclose(gradient(L.prompt_group_loss, losses), printed)
    assert (printed > 0).all()
    hard = torch.tensor([0.1, 0.1, 1.9], dtype=torch.float64)
    assert (gradient(lambda x: x.mean() + L.group_regularisation(x), hard) < 0).any()  # what the paper would do
    assert gradient(L.prompt_group_loss, hard).tolist() == [0.5, 0.5, 0.0]


@given(st.lists(st.floats(0, 50), min_size=1, max_size=8), st.floats(0.05, 10), st.floats(0, 5))
@settings(max_examples=200, deadline=None)
def test_no_prompt_ever_has_a_negative_weight(losses, tau, group_weight):
    weights = L.prompt_weights(torch.tensor(losses, dtype=torch.float64), tau, group_weight)
    assert (weights >= 0).all()
    assert weights.sum().item() == pytest.approx(1)
    order = torch.tensor(losses, dtype=torch.float64).argsort()
    assert (weights[order].diff() <= 1e-9).all()  # the harder, the less


def test_a_group_of_one_prompt_is_the_supervised_loss():
    loss = torch.tensor([0.7])
    assert L.prompt_group_loss(loss) == loss[0]
    assert L.consistency_loss(torch.randn(1, 3, 3)) == 0
    with pytest.raises(ValueError, match="at least one"):
        L.prompt_group_loss(torch.zeros(0))


def test_consistency_pulls_to_the_first_map_only():
    random = torch.Generator().manual_seed(0)
    maps = torch.randn(3, 2, 2, generator=random, dtype=torch.float64)
    found = gradient(L.consistency_loss, maps)
    assert (found[0] == 0).all()
    assert torch.allclose(found[1:], 2 * (maps[1:] - maps[0]) / (2 * 4))
    first = maps[0]

    def with_fixed_reference(rest):
        return ((rest - first) ** 2).mean((1, 2)).sum() / 2

    assert torch.allclose(found[1:], differences(with_fixed_reference, maps[1:].clone()), atol=1e-8)
    assert L.consistency_loss(maps) == pytest.approx(with_fixed_reference(maps[1:]).item())
