"""Phrases: groups that mean the same get the same answer [1]_; or each phrase for itself, with supervision alone.

A step takes a window, what is meant in it, and K phrases for that. The window is encoded once; each phrase is answered on its own with one map
(`wsiseg.finetune.phrase_networks`). A network whose answers are cheap is asked for several intents in the same window: what tells them apart is then
in one gradient, and a type that is not there is asked for too.

References
----------
.. [1] Wu et al.: Prompt Group-Aware Training for Robust Text-Guided Nuclei Segmentation, arXiv:2603.06384, sections 2.2 and 2.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsiseg.errors import ConfigError
from wsiseg.finetune import losses
from wsiseg.finetune.phrase_networks import on_grid
from wsiseg.finetune.pictures import draw_masks
from wsiseg.finetune.prompts import LEVELS
from wsiseg.finetune.views import ALL, View, checked_views, draw_view, intents_of

if TYPE_CHECKING:
    from pathlib import Path

    from wsiseg.finetune.config import FinetuneConfig
    from wsiseg.finetune.data import Dataset
    from wsiseg.finetune.phrase_networks import PhraseNetwork
    from wsiseg.finetune.prompts import PromptBank

PICTURES = 4  #: validation windows that are drawn


@dataclass(frozen=True, kw_only=True)
class Group:
    """Phrases that mean the same, in random order."""

    intent: int
    phrases: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A window and the groups of phrases that are asked in it; ``seed`` of how they are varied."""

    view: View
    groups: tuple[Group, ...]
    seed: int


class TextTask:
    """The task.

    Parameters
    ----------
    phrased
        The network.
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
        phrased: PhraseNetwork,
        train: Dataset,
        valid: Dataset,
        also: Dataset | None,
        bank: PromptBank,
        config: FinetuneConfig,
        device: torch.device,
    ) -> None:
        torch.manual_seed(config.seed)
        self.phrased, self.config, self.device = phrased, config, device
        self.images = [part.images for part in (train, also) if part is not None]
        self.intents = intents_of(train, config.intent)
        self.names = {ALL: None} | dict(enumerate(train.type_names, 1))
        self.bank = bank
        self._text = self._encode_phrases()
        self.rate = config.rate if config.rate is not None else phrased.rate
        self.size = config.batch_size or phrased.size
        area = sum(image.label.size for image in train.images)
        self.epoch_steps = max(area / phrased.side**2, len(train.images)) * len(self.intents) / self.size
        self.checked = checked_views(valid, self.intents, phrased.side)

    @property
    def network(self) -> nn.Module:
        """What is trained."""
        return self.phrased.network

    @property
    def phrases(self) -> tuple[str, ...]:
        """All phrases that may be used."""
        return tuple(self._text)

    @property
    def types(self) -> tuple[str, ...]:
        """Types that may be meant."""
        return tuple(name for group in self.intents for intent in group if (name := self.names[intent]))

    def batch(self, step: int) -> list[Asked]:
        """Windows with groups of phrases."""
        out: list[Asked] = []
        tries = 0
        while len(out) < self.size:
            random = np.random.default_rng((self.config.seed, step, tries))
            group = self.intents[(step * self.size + tries) % len(self.intents)]
            tries += 1
            images = self.images[int(len(self.images) > 1 and random.random() < self.config.also_share)]
            intent = group[random.integers(len(group))]
            side = self.phrased.side
            view = draw_view(images, intent, side, random) or draw_view(self.images[0], intent, side, random)
            if view is not None:
                intents = (intent, *self._others(view, intent, random))
                groups = tuple(self._group(k, random) for k in intents)
                out.append(Asked(view=view, groups=groups, seed=int(random.integers(2**31))))
        return out

    def _others(self, view: View, intent: int, random: np.random.Generator) -> list[int]:
        """Further intents to ask for; types only where nuclei have types."""
        every = [k for group in self.intents for k in group if k != intent and (k == ALL or view.types.any())]
        count = min(self.phrased.intents - 1, len(every))
        return [every[k] for k in random.choice(len(every), count, replace=False)] if count else []

    def _group(self, intent: int, random: np.random.Generator) -> Group:
        phrases = self.bank.phrases(self.names[intent])
        chosen = random.choice(len(phrases), self.config.prompts_per_step, replace=False)
        return Group(intent=intent, phrases=tuple(phrases[k] for k in chosen))

    def losses(self, batch: list[Asked]) -> dict[str, Tensor]:
        """Loss of the groups, and how much their answers differ; means over the batch."""
        rows = []
        for asked in batch:
            seen, count = self.phrased.look(asked.view.image), self.config.prompts_per_step
            phrases = [self._text[phrase] for group in asked.groups for phrase in group.phrases]
            maps, presence = self.phrased.answer(seen, self.phrased.vary(phrases, np.random.default_rng(asked.seed)))
            presences = [None] * len(asked.groups) if presence is None else presence.split(count)
            rows += [
                self._group_losses(asked.view, group.intent, *answer)
                for group, *answer in zip(asked.groups, maps.split(count), presences, strict=True)
            ]
        return {name: torch.stack([row[name] for row in rows]).mean() for name in rows[0]}

    def _group_losses(self, view: View, intent: int, maps: Tensor, presence: Tensor | None) -> dict[str, Tensor]:
        target, known = self._on_grid(view, intent, (maps.shape[1], maps.shape[2]))
        each = torch.stack(
            [losses.focal_loss(logits, target, known) + losses.dice_loss(logits, target, known) for logits in maps]
        )
        if presence is not None:
            present = torch.ones_like(presence) * float(target.any())
            each = each + F.binary_cross_entropy_with_logits(presence, present, reduction="none")
        spread = {"_spread": each.detach().max() - each.detach().min()}
        if self.config.objective != "prompt-group":
            return {"mask": each.mean()} | spread
        return {
            "group": losses.prompt_group_loss(each),
            "consistency": losses.CONSISTENCY_WEIGHT * losses.consistency_loss(maps),
            "_least_weight": losses.prompt_weights(each).min(),
        } | spread

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
        """Weights to save."""
        return self.phrased.tensors(self.phrases)

    def _encode_phrases(self) -> dict[str, Tensor]:
        """Every phrase that may be used, encoded."""
        out: dict[str, Tensor] = {}
        for group in self.intents:
            for intent in group:
                phrases = self.bank.phrases(self.names[intent])
                if len(phrases) < (needed := self.config.prompts_per_step):
                    what = self.names[intent] or "all nuclei"
                    raise ConfigError(f"--prompts: {len(phrases)} phrases for {what}; a group needs {needed}")
                out |= {phrase: self.phrased.encode(phrase) for phrase in phrases}
        return out

    def _answers(self, view: View, intent: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Map, target and known pixels for the first phrase of each level of detail."""
        firsts = {level: self.bank.phrases(self.names[intent], level)[:1] for level in LEVELS}
        asked = [(level, phrase) for level, phrases in firsts.items() for phrase in phrases]
        maps, _ = self.phrased.answer(self.phrased.look(view.image), [self._text[phrase] for _, phrase in asked])
        target, known = self._on_grid(view, intent, (maps.shape[1], maps.shape[2]))
        return {level: (logits, target, known) for (level, _), logits in zip(asked, maps, strict=True)}

    def _on_grid(self, view: View, intent: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """What is meant, and where that is known."""
        planes = torch.from_numpy(np.stack([view.meant(intent), view.known])).to(self.device).float()
        target, known = on_grid(planes, shape)
        return target, known
