"""Training losses of ``nuclei-compact`` on a batch of crops (`wsiseg.finetune.crops`): those of its recipe, and of its adaptation.

Each is a mean over what it covers::

    maps        cross-entropy + Dice of the foreground, L1 of the two distance maps (twice the weight inside nuclei)
    mask        cross-entropy + Dice of every prompt's window; of the best of three for some of them
    quality     cross-entropy of the predicted IoU with the true IoU (0 for clicks on known background)
    high        pairs of places on F_h: nucleus-nucleus alike, nucleus-background not
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from wsiseg.finetune.crops import INSTANCES
from wsiseg.finetune.losses import dice_loss
from wsiseg.models.morphology import windows
from wsiseg.models.nuclei_compact import MASK_STRIDE_PX, MASKS, WINDOW_SIZE, NucleiCompact
from wsiseg.records import Embeddings, PromptExtras, WindowMasks

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

AMBIGUOUS = 12  #: prompts per batch that also train the alternative masks
SHARES = {"maps": 1.0, "mask": 1.0, "quality": 0.5, "high": 0.5}  #: of the losses in the sum


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What the network said about a batch of B crops with ``INSTANCES`` prompts each.

    Attributes
    ----------
    losses
        By name, see above.
    embeddings, masks
        Of the crops, and of their N prompts.
    tile, points, owners
        (N,) crop, (N, 2) place and (N,) instance of each prompt; owner 0: background.
    iou
        (N,): of each mask with its instance.
    """

    losses: dict[str, Tensor]
    embeddings: Embeddings
    masks: WindowMasks
    tile: Tensor
    points: Tensor
    owners: Tensor
    iou: Tensor


def answer(model: NucleiCompact, batch: Mapping[str, Tensor], *, amp: bool) -> Answers:
    """Run the network on a batch and compare its answers with the labels.

    Parameters
    ----------
    model
        The network, not folded.
    batch
        Crops, stacked.
    amp
        Encode in bf16.

    Returns
    -------
    Answers
        With gradients. The prompts and places that some losses are taken of are drawn from torch's generator.
    """
    images = batch["image"].contiguous(memory_format=torch.channels_last)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        e = model.encode(images)
    extra = {k: v.float() for k, v in e.extra.items()}
    e = Embeddings(high=e.high.float(), low=e.low.float(), maps=extra["maps"], extra=extra)
    weight, foreground = batch["weight"], batch["foreground"]
    out = {"maps": _maps_loss(extra["maps"], foreground, batch["distances"], weight)}

    tile = torch.arange(len(images), device=images.device).repeat_interleave(INSTANCES)
    points, owners = batch["points"].flatten(0, 1), batch["owners"].flatten()
    extras = PromptExtras(
        batch["hint_xy"].flatten(0, 1), batch["hint_labels"].flatten(0, 1), batch["boxes"].flatten(0, 1)
    )
    masks = model.decode(e, tile, points, extras=extras)
    origin = masks.origin_xy // MASK_STRIDE_PX
    label = batch["label"].float()[:, None] + 1  # 0 is "outside the crop" after windowing
    window = windows(label, tile, origin * MASK_STRIDE_PX, WINDOW_SIZE * MASK_STRIDE_PX)
    inside = F.max_pool2d(window, MASK_STRIDE_PX)[:, 0] > 0
    known = windows(weight[:, None], tile, origin, WINDOW_SIZE)[:, 0] * inside
    target = F.avg_pool2d((window == (owners + 1)[:, None, None, None]).float(), MASK_STRIDE_PX)[:, 0]
    click = owners > 0
    per, iou = compare_masks(masks.logits, target, known)
    out["mask"] = (per * click).sum() / click.sum().clamp_min(1)
    sure = click | is_known(weight, tile, points)
    # (what is not a number is left to the sum of the losses, which says so; this function would only fail)
    out["quality"] = F.binary_cross_entropy(masks.predicted_iou.nan_to_num(), iou * click, weight=sure.float())
    few = click.nonzero()[:, 0]
    few = few[torch.randperm(len(few), device=few.device)[:AMBIGUOUS]]
    if len(few):
        several = model.decode(
            e,
            tile[few],
            points[few],
            extras=PromptExtras(extras.points_xy[few], extras.labels[few], extras.boxes[few]),
            multimask=True,
        )
        loss, true = compare_masks(
            several.logits, target[few].repeat_interleave(MASKS, 0), known[few].repeat_interleave(MASKS, 0)
        )
        out["mask"] = out["mask"] + 0.25 * loss.view(-1, MASKS).min(1).values.mean()
        out["quality"] = out["quality"] + 0.25 * F.binary_cross_entropy(several.predicted_iou.nan_to_num(), true)
    out["high"] = _pair_loss(e.high, foreground, weight)
    return Answers(losses=out, embeddings=e, masks=masks, tile=tile, points=points, owners=owners, iou=iou)


def is_known(weight: Tensor, tile: Tensor, points: Tensor) -> Tensor:
    """Whether the place under each point is labelled: ``weight`` (B, H / 2, W / 2), points (N, 2) in px of the crop -> bool (N,)."""
    cell = (points / 2).long().clamp(0, weight.shape[-1] - 1)
    return weight[tile, cell[:, 1], cell[:, 0]] > 0


def compare_masks(logits: Tensor, target: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and true IoU of every mask (N, h, w), where ``known`` is not 0."""
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    per = (bce * known).sum((1, 2)) / known.sum((1, 2)).clamp_min(1) * 8 + dice_loss(logits, target, known)
    with torch.no_grad():
        hard, truth = (logits > 0) & (known > 0), (target >= 0.5) & (known > 0)
        iou = (hard & truth).sum((1, 2)) / (hard | truth).sum((1, 2)).clamp_min(1)
    return per, iou


def _maps_loss(maps: Tensor, foreground: Tensor, distances: Tensor, weight: Tensor) -> Tensor:
    """Loss of the three instance maps (B, 3, h, w)."""
    fg = maps[:, 0]
    bce = F.binary_cross_entropy_with_logits(fg, foreground, reduction="none")
    loss = (bce * weight).sum() / weight.sum() + dice_loss(fg, foreground, weight).mean()
    emphasis = weight * (1 + foreground)
    error = (maps[:, 1:].sigmoid() - distances).abs().sum(1)
    return loss + 2.0 * (error * emphasis).sum() / emphasis.sum()


def _pair_loss(high: Tensor, foreground: Tensor, weight: Tensor) -> Tensor:
    """Loss of pairs of places on F_h (B, C, h / 4, w / 4); pairs of background with background say nothing."""
    coarse = F.avg_pool2d(foreground[:, None], 2)[:, 0].flatten(1)
    sure = (F.avg_pool2d(weight[:, None], 2)[:, 0].flatten(1) == 1) & ((coarse > 0.9) | (coarse < 0.05))
    pick = (torch.rand_like(coarse) * (0.2 + (coarse > 0.9)) * sure).topk(192, 1).indices
    v = torch.gather(high.flatten(2), 2, pick[:, None].expand(-1, high.shape[1], -1))
    is_nucleus = torch.gather(coarse, 1, pick) > 0.5
    cosine = torch.einsum("bci,bcj->bij", v, v)
    same = is_nucleus[:, :, None] & is_nucleus[:, None, :]
    pair = (is_nucleus[:, :, None] | is_nucleus[:, None, :]) & torch.gather(sure, 1, pick)[:, None, :]
    pairs = F.binary_cross_entropy_with_logits(8 * (cosine - 0.4), same.float(), reduction="none")
    return (pairs * pair).sum() / pair.sum().clamp_min(1)
