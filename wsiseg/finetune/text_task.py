"""SAM 3 on phrases: groups of phrases that mean the same get the same answer [1]_; or each phrase for itself, with supervision alone.

A step takes a window, what is meant in it, and K phrases for that. The image is encoded once; each phrase is answered on its own. The answer of a
phrase is one map: of the queries that say there is an instance, the pixelwise largest mask logit. Phrases are encoded by the parent's text encoder,
which stays as it is; everything else that answers phrases is trained, whole (as published) or by adapters. The tracker, which answers points, is not
trained, but sees the same trunk: adapt a model for phrases or for points, not one for both.

References
----------
.. [1] Wu et al.: Prompt Group-Aware Training for Robust Text-Guided Nuclei Segmentation, arXiv:2603.06384, sections 2.2 and 2.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsiseg.errors import ConfigError
from wsiseg.finetune import losses
from wsiseg.finetune.lora import add_adapters, plain_state
from wsiseg.finetune.pictures import draw_masks
from wsiseg.finetune.prompts import LEVELS
from wsiseg.finetune.views import ALL, View, checked_views, draw_view, intents_of
from wsiseg.models.transformers.detector import Sam3Detector

if TYPE_CHECKING:
    from pathlib import Path

    from wsiseg.finetune.config import FinetuneConfig
    from wsiseg.finetune.data import Dataset
    from wsiseg.finetune.prompts import PromptBank
    from wsiseg.models.transformers.sam3 import Sam3

RATE = 1e-4  #: the paper's
MIN_SCORE, MOST_QUERIES = 0.3, 100  #: queries in a phrase's map: as the library keeps instances; at least the best one
PICTURES = 4  #: validation windows that are drawn


@dataclass(frozen=True, kw_only=True)
class Group:
    """A window and phrases that mean the same in it, in random order."""

    view: View
    intent: int
    phrases: tuple[str, ...]


class TextTask:
    """The task.

    Parameters
    ----------
    network
        A SAM 3 with a detector, filled.
    train, valid, also
        New images, those that validate (empty: none do), and further ones that are mixed in.
    bank
        Phrases.
    config
        Settings.
    device
        Where to train.

    Raises
    ------
    ConfigError
        There are fewer phrases than a group needs, or one is too long for the model.
    """

    def __init__(
        self,
        network: Sam3,
        train: Dataset,
        valid: Dataset,
        also: Dataset | None,
        bank: PromptBank,
        config: FinetuneConfig,
        device: torch.device,
    ) -> None:
        torch.manual_seed(config.seed)
        self.network: nn.Module = network.to(device).eval().requires_grad_(requires_grad=False)
        self.model: Any = network.detector_model
        self.detector = Sam3Detector(self.model, network.recipe.tokenizer)
        self.standardised, self.side = network.standardised, network.input_px
        self.config, self.device = config, device
        self.images = [part.images for part in (train, also) if part is not None]
        self.intents = intents_of(train, config.intent)
        self.names = {ALL: None} | dict(enumerate(train.type_names, 1))
        self.bank = bank
        self._text = self._encode_phrases()
        self._choose_trained(config.lora_rank or 0)
        self.rate = config.rate if config.rate is not None else RATE
        self.size = config.batch_size or 1
        area = sum(image.label.size for image in train.images)
        self.epoch_steps = max(area / self.side**2, len(train.images)) * len(self.intents) / self.size
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
        self.checked = checked_views(valid, self.intents, self.side)

    def batch(self, step: int) -> list[Group]:
        """Windows with groups of phrases."""
        out: list[Group] = []
        tries = 0
        while len(out) < self.size:
            random = np.random.default_rng((self.config.seed, step, tries))
            group = self.intents[(step * self.size + tries) % len(self.intents)]
            tries += 1
            images = self.images[int(len(self.images) > 1 and random.random() < self.config.also_share)]
            intent = group[random.integers(len(group))]
            view = draw_view(images, intent, self.side, random) or draw_view(self.images[0], intent, self.side, random)
            if view is not None:
                phrases = self.bank.phrases(self.names[intent])
                chosen = random.choice(len(phrases), self.config.prompts_per_step, replace=False)
                out.append(Group(view=view, intent=intent, phrases=tuple(phrases[k] for k in chosen)))
        return out

    def losses(self, batch: list[Group]) -> dict[str, Tensor]:
        """Loss of the groups, and how much their answers differ; means over the batch."""
        rows = []
        for group in batch:
            levels = self._levels(group.view)
            target, known = self._on_grid(group.view, group.intent, levels[0].shape[-1])
            answers = [self._answer(levels, phrase) for phrase in group.phrases]
            maps = torch.stack([logits for logits, _ in answers])
            present = torch.ones_like(answers[0][1]) * float(target.any())
            each = torch.stack(
                [
                    losses.focal_loss(logits, target, known)
                    + losses.dice_loss(logits, target, known)
                    + F.binary_cross_entropy_with_logits(presence, present)
                    for logits, presence in answers
                ]
            )
            if self.config.objective == "prompt-group":
                row = {
                    "group": losses.prompt_group_loss(each),
                    "consistency": losses.CONSISTENCY_WEIGHT * losses.consistency_loss(maps),
                    "_least_weight": losses.prompt_weights(each).min(),
                }
            else:
                row = {"mask": each.mean()}
            rows.append(row | {"_spread": each.detach().max() - each.detach().min()})
        return {name: torch.stack([row[name] for row in rows]).mean() for name in rows[0]}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean Dice of the first phrase of each level of detail, and its spread between the levels."""
        found: dict[str, list[float]] = {level: [] for level in LEVELS}
        for view, intent in self.checked:
            for level, (logits, target, known) in self._answers(view, intent).items():
                answer, meant = (logits > 0) & (known > 0), (target > 0.5) & (known > 0)
                found[level].append(float((2 * (answer & meant).sum() + 1) / (answer.sum() + meant.sum() + 1)))
        means = {f"dice_{level}": float(np.mean(values)) for level, values in found.items() if values}
        if not means:
            return {}
        dice = float(np.mean(list(means.values())))
        return {"score": dice, "dice": dice, **means, "spread": float(np.ptp(list(means.values())))}

    @torch.no_grad()
    def draw(self, path: Path) -> None:
        """Validation windows: what is meant, and the answer to the shortest phrase."""
        rows = []
        for view, intent in self.checked[:PICTURES]:
            logits, *_ = self._answers(view, intent)[LEVELS[0]]
            whole = F.interpolate(logits[None, None], size=view.label.shape, mode="bilinear", align_corners=False)[0, 0]
            rows.append((view.image, view.meant(intent), (whole > 0).cpu().numpy()))
        draw_masks(path, rows)

    def tensors(self) -> dict[str, Tensor]:
        """Weights to save, adapters merged."""
        return plain_state(self.network)

    def _encode_phrases(self) -> dict[str, Tensor]:
        """Tokens (L, C) of every phrase that may be used."""
        out: dict[str, Tensor] = {}
        for group in self.intents:
            for intent in group:
                phrases = self.bank.phrases(self.names[intent])
                if len(phrases) < (needed := self.config.prompts_per_step):
                    what = self.names[intent] or "all nuclei"
                    raise ConfigError(f"--prompts: {len(phrases)} phrases for {what}; a group needs {needed}")
                for phrase in phrases:
                    if (count := self.detector.count_tokens(phrase)) > self.detector.max_tokens:
                        raise ConfigError(
                            f"--prompts: {phrase!r} has {count} tokens, and the model reads {self.detector.max_tokens}; make it shorter"
                        )
                    with torch.no_grad():
                        out[phrase] = self.detector.encode_text(phrase).detach()
        return out

    def _choose_trained(self, rank: int) -> None:
        model = self.model
        parts = [
            model.vision_encoder,
            model.detr_encoder,
            model.detr_decoder,
            model.mask_decoder,
            model.dot_product_scoring,
        ]
        if rank:
            add_adapters(parts, rank)
        else:
            for part in parts:
                part.requires_grad_(requires_grad=True)

    def _levels(self, view: View) -> tuple[Tensor, ...]:
        """The detector's pyramid of a window."""
        pixels = self.standardised(torch.from_numpy(view.image).permute(2, 0, 1)[None].to(self.device))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            seen = self.model.get_vision_features(pixels, return_dict=True).fpn_hidden_states
        return self.detector.levels([level.float() for level in seen])

    def _answer(self, levels: tuple[Tensor, ...], phrase: str) -> tuple[Tensor, Tensor]:
        """Map (h, w), logits, and presence, logit."""
        answer = self.detector.answer(levels, self._text[phrase])
        kept = answer.scores.detach() > MIN_SCORE
        order = answer.scores.detach().argsort(descending=True)[: max(1, min(int(kept.sum()), MOST_QUERIES))]
        masks = self.model.mask_decoder(
            decoder_queries=answer.queries[None, order],
            backbone_features=list(levels),
            encoder_hidden_states=answer.encoded,
            prompt_features=answer.prompt,
            prompt_mask=None,
        ).pred_masks[0]
        return masks.float().amax(0), answer.presence

    def _answers(self, view: View, intent: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Map, target and known pixels for the first phrase of each level of detail."""
        levels = self._levels(view)
        target, known = self._on_grid(view, intent, levels[0].shape[-1])
        out = {}
        for level in LEVELS:
            phrases = self.bank.phrases(self.names[intent], level)
            if phrases:
                out[level] = (self._answer(levels, phrases[0])[0], target, known)
        return out

    def _on_grid(self, view: View, intent: int, side: int) -> tuple[Tensor, Tensor]:
        """What is meant, and where that is known, (side, side): 1 where most of a cell is."""
        planes = torch.from_numpy(np.stack([view.meant(intent), view.known])).to(self.device).float()
        target, known = (F.adaptive_avg_pool2d(planes[None], side)[0] >= 0.5).float()
        return target, known
