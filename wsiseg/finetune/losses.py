"""Losses of fine-tuning: supervision, SAMPO's preferences [1]_, and prompt groups [2]_. Pure functions of tensors.

Symbol      here             shape             meaning
Z           logits           (K, J, H, W)      mask logits: K prompts that mean the same, J hypotheses of each
Z_ref       reference        (K, J, H, W)      the same of the frozen initial model
M           target           (H, W)            what was meant, 0 or 1
r           iou              (K, J)            IoU([Z > 0], M)
w, l        winner, loser                      best and worst member of a pair, by r
Delta       log_ratio        (K, J)            log pi(M) - log pi_ref(M)
beta, alpha beta, alpha                        temperature of the preference; weight of pairs within a prompt
L_i, tau    losses, tau      (K,)              segmentation loss of each prompt of a group; temperature

SAMPO::

    log pi(y | Z) = 1/|W| sum_p [ y_p log s(Z_p) + (1 - y_p) log(1 - s(Z_p)) ]                     s: logistic function
    L_inter = 1/J sum_j -log s(beta b),   w = argmax_k r_kj, l = argmin_k r_kj                     eq. 2
    L_intra = 1/K sum_k -log s(beta b),   w = argmax_j r_kj, l = argmin_j r_kj                     eq. 3
    L_pref  = L_inter + alpha L_intra                                                              eq. 4
    L_sup   = mean over the pairs of 1/2 [ l(Z_w, M) + l(Z_l, M) ],   l = BCE + Dice               eq. 5
    L       = L_sup + lambda L_pref                                                                eq. 6

The paper does not say what y is. Two readings of the bracket b are here::

    A   y is the annotation:            b = Delta_w - Delta_l
    B   y_w, y_l are the masks found:   b = 1/|W| sum_p (y_w - y_l)_p (Z_l - Z_ref,l)_p            y = [Z > 0], no gradient

B is direct preference optimisation [3]_ with one context, the losing prompt's: log pi(y_w) - log pi(y_l) is linear in its logits, so that only
pixels on which the two masks differ count.

Prompt groups::

    q_i = mean(L) - L_i (no gradient),  w = softmax(-L / tau),  L_group = -sum_i q_i log w_i      eq. 4 to 7
    L_cons = 1/(K-1) sum_{i >= 2} mean_p (Z_i - Z_1)_p^2,  no gradient into Z_1                    eq. 8
    L      = mean(L) + lambda L_group + beta L_cons                                                eq. 9

Departures:

D1  Log-likelihoods are means over pixels, not sums, which would saturate the logistic function on any real image.
D2  Pairs whose members differ by less than ``tie`` in IoU say nothing about preference and are left out of it; they are supervised all the same.
D3  As printed, w has no gradient, and L_group neither: here w carries it. As sum_i q_i = 0, L_group = 1/tau sum_i q_i L_i, and prompt i has the
    weight 1/K - lambda (L_i - mean(L)) / tau, which turns negative for a hard prompt and would teach the model to fail it: negative weights
    are set to 0, and the others scaled so that they sum to 1 as before.
D4  The norm of eq. 8 is a mean over pixels, so that beta does not depend on the image's size.

References
----------
.. [1] Wu et al.: SAMPO, arXiv:2508.02464v2, section 3.2.
.. [2] Wu et al.: Prompt Group-Aware Training for Robust Text-Guided Nuclei Segmentation, arXiv:2603.06384, section 2.
.. [3] Rafailov et al.: Direct Preference Optimization, NeurIPS 2023, arXiv:2305.18290, eq. 7.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Reading = Literal["A", "B"]

BETA = 10.0  #: keeps beta |b| near 1: mean log-ratios of a trained network differ by about 0.1
ALPHA = 1.0  #: both kinds of pairs count the same; the paper names no value
TIE = 0.02  #: IoU: smaller differences are within the noise of an annotated border
TAU = 1.0  #: the prompt-group paper's
GROUP_WEIGHT = 1.0  #: lambda of prompt groups, the paper's
CONSISTENCY_WEIGHT = 0.1  #: beta of prompt groups, the paper's
_SMOOTH_PX = 1.0  #: keeps Dice defined for empty masks


class PreferencePairs(NamedTuple):
    """Pairs of K x J hypotheses, ``k J + j``: first J pairs between prompts, then K within a prompt.

    Attributes
    ----------
    winner, loser
        int64 of shape (J + K,); the same hypothesis twice where there is only one to choose from.
    decided
        bool of shape (J + K,): the two differ by the tie threshold or more.
    """

    winner: Tensor
    loser: Tensor
    decided: Tensor


def mask_log_likelihood(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean log-likelihood per pixel of masks under independent Bernoulli pixels.

    Parameters
    ----------
    logits
        (..., H, W).
    target
        (..., H, W), broadcast against ``logits``; in [0, 1].
    weight
        (..., H, W), broadcast; 0 where nothing is known. All pixels count the same when it is left out.

    Returns
    -------
    Tensor
        (...,), at most 0. It is 0 where no pixel has weight.

    Examples
    --------
    >>> import torch
    >>> mask_log_likelihood(torch.zeros(2, 2), torch.ones(2, 2)).exp().item()
    0.5
    """
    negative = F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype).expand_as(logits), reduction="none")
    return -_mean_px(negative, weight)


def dice_loss(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """1 - Dice of the probabilities, one number per mask.

    Parameters
    ----------
    logits
        (..., H, W).
    target, weight
        As for :func:`mask_log_likelihood`.

    Returns
    -------
    Tensor
        (...,) in [0, 1]; one pixel is added to either side, so that an empty answer to an empty target is right.
    """
    probability, target = logits.sigmoid(), target.to(logits.dtype)
    known = torch.ones_like(logits) if weight is None else weight.to(logits.dtype)
    overlap = (probability * target * known).sum((-2, -1))
    return 1 - (2 * overlap + _SMOOTH_PX) / (((probability + target) * known).sum((-2, -1)) + _SMOOTH_PX)


def segmentation_loss(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy plus Dice loss of each mask, the ``l`` of SAMPO's eq. 5.

    Parameters
    ----------
    logits
        (..., H, W).
    target, weight
        As for :func:`mask_log_likelihood`.

    Returns
    -------
    Tensor
        (...,), at least 0.

    Examples
    --------
    >>> import torch
    >>> right = torch.tensor([[9.0, -9.0], [-9.0, -9.0]])
    >>> round(segmentation_loss(right, (right > 0).float()).item(), 3)
    0.0
    """
    return dice_loss(logits, target, weight) - mask_log_likelihood(logits, target, weight)


def focal_loss(
    logits: Tensor, target: Tensor, weight: Tensor | None = None, *, gamma: float = 2.0, positive: float = 0.25
) -> Tensor:
    """Focal loss of each mask [1]_, as SAM is trained with.

    Parameters
    ----------
    logits
        (..., H, W).
    target, weight
        As for :func:`mask_log_likelihood`.
    gamma
        How much pixels that are right already are discounted; 0: not at all.
    positive
        Weight of pixels inside; those outside have the rest to 1.

    Returns
    -------
    Tensor
        (...,), at least 0.

    References
    ----------
    .. [1] Lin et al.: Focal Loss for Dense Object Detection, ICCV 2017, arXiv:1708.02002, eq. 5.
    """
    target = target.to(logits.dtype).expand_as(logits)
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    probability = logits.sigmoid()
    wrong = probability + target - 2 * probability * target
    balance = positive * target + (1 - positive) * (1 - target)
    return _mean_px(balance * wrong**gamma * entropy, weight)


def hypothesis_iou(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """IoU of masks with the target, without gradient.

    Parameters
    ----------
    logits
        (..., H, W); a mask is where they are positive.
    target, weight
        As for :func:`mask_log_likelihood`; the target is where it is at least 0.5, and pixels without weight are left out.

    Returns
    -------
    Tensor
        (...,) in [0, 1], of the type of ``logits``; 1 when both are empty.
    """
    with torch.no_grad():
        found, true = logits > 0, (target >= 0.5).expand_as(logits)
        if weight is not None:
            found, true = found & (weight > 0), true & (weight > 0)
        union = (found | true).sum((-2, -1))
        return torch.where(union > 0, (found & true).sum((-2, -1)) / union.clamp_min(1), 1.0).to(logits.dtype)


def preference_pairs(iou: Tensor, tie: float = TIE) -> PreferencePairs:
    """Best and worst hypotheses: between prompts for each of the J slots, and within each of the K prompts.

    Parameters
    ----------
    iou
        (K, J): how well each hypothesis answers what was meant. Of equal ones the first counts as best and as worst.
    tie
        Pairs that differ by less are not ``decided``.

    Returns
    -------
    PreferencePairs
        J + K pairs.

    Examples
    --------
    >>> import torch
    >>> preference_pairs(torch.tensor([[0.9, 0.5], [0.2, 0.5]]))
    PreferencePairs(winner=tensor([0, 1, 0, 3]), loser=tensor([2, 1, 1, 2]), decided=tensor([ True, False,  True,  True]))
    """
    prompts, slots = iou.shape
    slot, prompt = torch.arange(slots, device=iou.device), torch.arange(prompts, device=iou.device) * slots
    winner = torch.cat([iou.argmax(0) * slots + slot, prompt + iou.argmax(1)])
    loser = torch.cat([iou.argmin(0) * slots + slot, prompt + iou.argmin(1)])
    flat = iou.flatten()
    gap = flat[winner] - flat[loser]
    return PreferencePairs(winner, loser, (winner != loser) & (gap >= tie))


def preference_margin(
    logits: Tensor,
    reference: Tensor,
    target: Tensor,
    pairs: PreferencePairs,
    *,
    reading: Reading = "A",
    weight: Tensor | None = None,
) -> Tensor:
    """The bracket b of every pair: how much more than the reference the model prefers the winner.

    Parameters
    ----------
    logits, reference
        (K, J, H, W), of the model that is trained and of the frozen one; no gradient goes into the reference.
    target
        (H, W): what was meant.
    pairs
        Of :func:`preference_pairs`.
    reading
        ``A``: likelihoods of the annotation; ``B``: of the masks that were found, under the loser's logits.
    weight
        (H, W); 0 where nothing is known.

    Returns
    -------
    Tensor
        (J + K,).
    """
    logits, reference = logits.flatten(0, 1), reference.detach().flatten(0, 1)
    if reading == "A":
        ratio = mask_log_likelihood(logits, target, weight) - mask_log_likelihood(reference, target, weight)
        return ratio[pairs.winner] - ratio[pairs.loser]
    found = (logits.detach() > 0).to(logits.dtype)
    differ = found[pairs.winner] - found[pairs.loser]
    return _mean_px(differ * (logits[pairs.loser] - reference[pairs.loser]), weight)


def preference_loss(
    logits: Tensor,
    reference: Tensor,
    target: Tensor,
    *,
    beta: float = BETA,
    alpha: float = ALPHA,
    reading: Reading = "A",
    tie: float = TIE,
    weight: Tensor | None = None,
    pairs: PreferencePairs | None = None,
) -> Tensor:
    """SAMPO's preference loss, eq. 2 to 4: between prompts and within them.

    Parameters
    ----------
    logits, reference
        (K, J, H, W): K prompts that mean the same, J hypotheses of each; of the model that is trained and of the frozen one.
    target
        (H, W): what was meant.
    beta
        Temperature.
    alpha
        Weight of pairs within a prompt.
    reading
        ``A`` or ``B``, of :func:`preference_margin`.
    tie
        Pairs that differ by less in IoU are left out.
    weight
        (H, W); 0 where nothing is known.
    pairs
        Of :func:`preference_pairs` for these logits, where they were made already.

    Returns
    -------
    Tensor
        A number, at least 0; 0 when no pair is decided, as with one prompt and one hypothesis.

    Examples
    --------
    >>> import torch
    >>> target = torch.tensor([[1.0, 0.0]])
    >>> good, bad = torch.tensor([[2.0, -2.0]]), torch.tensor([[-2.0, 2.0]])
    >>> before = torch.stack([good, bad])[:, None]
    >>> print(f"{preference_loss(before, before, target):.3f}")  # -log s(0): nothing is preferred yet
    0.693
    """
    if pairs is None:
        pairs = preference_pairs(hypothesis_iou(logits, target, weight), tie)
    prompts, slots = logits.shape[:2]
    margin = preference_margin(logits, reference, target, pairs, reading=reading, weight=weight)
    share = torch.cat([margin.new_full((slots,), 1 / slots), margin.new_full((prompts,), alpha / prompts)])
    return (-F.logsigmoid(beta * margin) * share * pairs.decided).sum()


def supervised_pair_loss(
    logits: Tensor, target: Tensor, *, weight: Tensor | None = None, pairs: PreferencePairs | None = None
) -> Tensor:
    """Supervision of both members of every pair, SAMPO's eq. 5; of undecided pairs too.

    Parameters
    ----------
    logits
        (K, J, H, W).
    target
        (H, W): what was meant.
    weight
        (H, W); 0 where nothing is known.
    pairs
        Of :func:`preference_pairs` for these logits, where they were made already.

    Returns
    -------
    Tensor
        A number. With one prompt and one hypothesis it is :func:`segmentation_loss`.
    """
    if pairs is None:
        pairs = preference_pairs(hypothesis_iou(logits, target, weight))
    each = segmentation_loss(logits.flatten(0, 1), target, weight)
    return (each[pairs.winner] + each[pairs.loser]).mean() / 2


def group_regularisation(losses: Tensor, tau: float = TAU) -> Tensor:
    """L_group as it is printed, eq. 7, with the gradient through w (D3): for reference; :func:`prompt_group_loss` is trained with.

    Parameters
    ----------
    losses
        (K,).
    tau
        Temperature.

    Returns
    -------
    Tensor
        A number; its gradient with respect to loss i is (mean(L) - L_i) / tau.
    """
    quality = (losses.mean() - losses).detach()
    return -(quality * F.log_softmax(-losses / tau, 0)).sum()


def prompt_weights(losses: Tensor, tau: float = TAU, group_weight: float = GROUP_WEIGHT) -> Tensor:
    """Weight of each prompt of a group in the gradient of mean(L) + lambda L_group, never negative (D3).

    Parameters
    ----------
    losses
        (K,).
    tau
        Temperature.
    group_weight
        lambda; 0: all prompts count the same.

    Returns
    -------
    Tensor
        (K,), at least 0, of sum 1, without gradient.

    Examples
    --------
    >>> import torch
    >>> prompt_weights(torch.tensor([1.0, 1.0, 1.6])).round(decimals=3)
    tensor([0.5000, 0.5000, 0.0000])
    """
    losses = losses.detach()
    weights = (1 / len(losses) - group_weight * (losses - losses.mean()) / tau).clamp_min(0)
    return weights / weights.sum()


def prompt_group_loss(losses: Tensor, tau: float = TAU, group_weight: float = GROUP_WEIGHT) -> Tensor:
    """mean(L) + lambda L_group of eq. 9, as a mean of the losses with the weights of :func:`prompt_weights`.

    Parameters
    ----------
    losses
        (K,): segmentation loss of each prompt of the group.
    tau
        Temperature.
    group_weight
        lambda.

    Returns
    -------
    Tensor
        A number. With one prompt it is its loss. Where no weight had to be clipped, its gradient is that of eq. 9 without the consistency term.

    Raises
    ------
    ValueError
        ``losses`` is empty.
    """
    if not len(losses):
        raise ValueError("a prompt group needs at least one prompt")
    return (prompt_weights(losses, tau, group_weight) * losses).sum()


def consistency_loss(maps: Tensor) -> Tensor:
    """Mean squared difference of the logits of a group's prompts from those of its first, eq. 8.

    Parameters
    ----------
    maps
        (K, ...): logits of each prompt, in random order; the first is the reference and gets no gradient.

    Returns
    -------
    Tensor
        A number; 0 with one prompt.
    """
    if len(maps) < 2:
        return maps.sum() * 0
    return (maps[1:] - maps[:1].detach()).square().mean()


def _mean_px(values: Tensor, weight: Tensor | None) -> Tensor:
    """Mean over the last two axes; 0 where no pixel has weight."""
    if weight is None:
        return values.mean((-2, -1))
    known = weight.to(values.dtype).expand_as(values)
    return (values * known).sum((-2, -1)) / known.sum((-2, -1)).clamp_min(torch.finfo(values.dtype).tiny)
