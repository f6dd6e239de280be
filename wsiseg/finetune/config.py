"""Settings of fine-tuning: every default once, with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from wsiseg.runtime.settings import setting

Objective = Literal["supervised", "sampo", "prompt-group"]
Intent = Literal["auto", "all", "type", "both"]


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Settings of one fine-tuning.

    Attributes
    ----------
    objective
        ``supervised``: outlines, or masks of prompts, against the labels; ``sampo``: points of varied quality mean all nuclei, or all of a type;
        ``prompt-group``: phrases that mean the same.
    minutes
        How long to train, validation included: steps are timed before the first one, and their number is fixed then.
    epochs
        How often to go through the images instead; ``None``: ``minutes`` decides.
    batch_size
        Crops, or images, per step; ``None``: what the objective takes.
    rate
        Largest learning rate; ``None``: what the objective takes.
    lora_rank
        Rank of the adapters in linear layers; 0: all weights are trained; ``None``: what the objective takes.
    valid_share
        Share of the images that are kept for validation, where no others are given.
    checks
        How often the model is validated.
    patience
        Validations without improvement after which training ends.
    also_share
        Share of the crops that are taken from the further folders.
    keep
        Weight of staying close to the parent's answers on the new images.
    intent
        What prompts mean: all nuclei, those of a type, or both in turn; ``auto``: both where the labels have types.
    prompts_per_step
        K: prompts that mean the same.
    text_encoder
        What reads phrases for ``nuclei-compact``: ``wordllama``, or a folder (`wsiseg.models.text_encoder`).
    reading
        Of SAMPO's preference, ``A`` or ``B`` (`wsiseg.finetune.losses`).
    preference
        lambda of SAMPO: weight of the preference loss.
    input_px
        Side of the images that SAM is adapted to; 0: its own.
    seed
        Of the split, the crops and the prompts.
    device, precision
        As for a run; bf16 on a GPU.
    """

    objective: Objective = "supervised"
    minutes: float = setting(15.0, 0.01, 100_000)  # of a laptop: a coffee
    epochs: float | None = setting(None, 0.001, 100_000)
    batch_size: int | None = setting(None, 1, 1024)
    rate: float | None = setting(None, 0.0, 1e6)
    lora_rank: int | None = setting(None, 0, 1024)
    valid_share: float = setting(0.2, 0.01, 0.9)  # a fifth, as usual
    checks: int = setting(6, 1, 1000)  # validating costs as much as dozens of steps
    patience: int = setting(4, 1, 1000)  # the rate falls towards the end, and scores often rise with that
    also_share: float = setting(0.3, 0.0, 0.95)  # the new images are why one trains
    keep: float = setting(0.5, 0.0, 100.0)
    intent: Intent = "auto"
    prompts_per_step: int = setting(3, 1, 64)  # K = 3 in both papers
    text_encoder: str = "wordllama"  # the small one that a package on PyPI carries
    reading: Literal["A", "B"] = "A"
    preference: float = setting(1.0, 0.0, 100.0)  # SAMPO's lambda; 2 was worse
    input_px: int = setting(224, 0, 4096)  # SAMPO's
    seed: int = setting(0, 0, 2**31 - 1)
    device: str = setting("auto", group="execution")
    precision: Literal["auto", "fp32", "bf16"] = "auto"
