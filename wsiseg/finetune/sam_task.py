"""SAM on points: a few points mean all nuclei of the image, or all of a type, as SAMPO [1]_ trains it; or the same with supervision alone.

The networks are those of ``segment-anything``, used as they are: the fast forms of `wsiseg.models.sam` are for inference. As published: images of
224 px, adapters of rank 64 in all linear layers of image encoder and mask decoder, three masks per prompt. The paper does not say which mask is the
answer: here the one of highest predicted IoU, which the IoU head learns by mean squared error. The decoder's convolutions, norms and tokens are
trained too, the prompt encoder is not.

References
----------
.. [1] Wu et al.: SAMPO, arXiv:2508.02464v2, sections 3.2 and 4.2.
"""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsiseg.errors import ConfigError
from wsiseg.finetune import losses
from wsiseg.finetune.lora import add_adapters, plain_state
from wsiseg.finetune.pictures import draw_masks
from wsiseg.finetune.prompts import draw_point_sets
from wsiseg.finetune.views import View, checked_views, draw_view, intents_of
from wsiseg.models.sam.checkpoints import recognise
from wsiseg.models.sam.model import PIXEL_MEAN, PIXEL_SD
from wsiseg.models.sam.modules import build

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from wsiseg.finetune.config import FinetuneConfig
    from wsiseg.finetune.data import Dataset
    from wsiseg.finetune.prompts import PointSets

RATE, RANK = 3e-4, 64  #: SAMPO's
BATCH = {"cpu": 1, "cuda": 8}  #: images per step
QUALITIES = ("core", "border", "outside")  #: of the points that validate
PICTURES = 4  #: of these that are drawn


class SamTask:
    """The task.

    Parameters
    ----------
    tensors
        Of the parent's file: ``sam.*``; those of an instance decoder are kept as they are.
    train, valid, also
        New images, those that validate (empty: none do), and further ones that are mixed in.
    config
        Settings.
    device
        Where to train.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        train: Dataset,
        valid: Dataset,
        also: Dataset | None,
        config: FinetuneConfig,
        device: torch.device,
    ) -> None:
        torch.manual_seed(config.seed)
        self.others = {k: v for k, v in tensors.items() if not k.startswith("sam.")}
        sam = {k.removeprefix("sam."): v.float() for k, v in tensors.items() if k.startswith("sam.")}
        if self.others and config.input_px not in (0, _side(sam)):
            raise ConfigError(
                f"--input-px {config.input_px}: this model has an instance decoder for images of {_side(sam)} px; use --input-px 0"
            )
        sam = resized(sam, config.input_px) if config.input_px else sam
        self.side = _side(sam)
        self.network: Any = build(recognise(sam))
        self.network.load_state_dict(sam)
        self.network.to(device).eval()
        self.parent = copy.deepcopy(self.network).requires_grad_(requires_grad=False)
        self.network["prompt_encoder"].requires_grad_(requires_grad=False)
        rank = RANK if config.lora_rank is None else config.lora_rank
        if rank:
            self.network["image_encoder"].requires_grad_(requires_grad=False)
            for part in self.network["mask_decoder"].modules():
                if isinstance(part, nn.Linear):
                    part.requires_grad_(requires_grad=False)
            add_adapters([self.network["image_encoder"], self.network["mask_decoder"]], rank)
        self.config, self.device = config, device
        self.images = [part.images for part in (train, also) if part is not None]
        self.intents = intents_of(train, config.intent)
        self.rate = config.rate if config.rate is not None else RATE
        self.size = config.batch_size or BATCH[device.type]
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
        area = sum(image.label.size for image in train.images)
        self.epoch_steps = max(area / self.side**2, len(train.images)) * len(self.intents) / self.size
        self.checked = checked_views(valid, self.intents, self.side)

    def batch(self, step: int) -> list[tuple[View, Tensor, PointSets]]:
        """Windows, what is meant in each, and K sets of points."""
        out: list[tuple[View, Tensor, PointSets]] = []
        tries = 0
        while len(out) < self.size:
            random = np.random.default_rng((self.config.seed, step, tries))
            group = self.intents[(step * self.size + tries) % len(self.intents)]
            tries += 1
            images = self.images[int(len(self.images) > 1 and random.random() < self.config.also_share)]
            intent = group[random.integers(len(group))]
            view = draw_view(images, intent, self.side, random)
            if view is None:  # of the further images, none may have this type
                view = draw_view(self.images[0], intent, self.side, random)
            if view is not None:
                target = view.meant(intent)
                sets = draw_point_sets(target, view.label, view.known, self.config.prompts_per_step, random)
                out.append((view, torch.from_numpy(target), sets))
        return out

    def losses(self, batch: list[tuple[View, Tensor, PointSets]]) -> dict[str, Tensor]:
        """Supervision of both members of every pair, preference between them, and the IoU head; means over the batch."""
        images = torch.stack([_pixels(view) for view, _, _ in batch]).to(self.device)
        embeddings = self._encode(self.network, images)
        prefer = self.config.objective == "sampo" and self.config.preference > 0
        before = self._encode(self.parent, images) if prefer else embeddings
        rows: list[dict[str, Tensor]] = []
        for k, (view, meant, sets) in enumerate(batch):
            target, known = meant.to(self.device).float(), torch.from_numpy(view.known).to(self.device).float()
            logits, predicted = self._decode(self.network, embeddings[k : k + 1], sets)
            iou = losses.hypothesis_iou(logits, target, known)
            row = {"quality": F.mse_loss(predicted, iou), "_iou": iou.mean()}
            if prefer:
                pairs = losses.preference_pairs(iou)
                with torch.no_grad():
                    reference, _ = self._decode(self.parent, before[k : k + 1], sets)
                options: dict[str, Any] = {"reading": self.config.reading, "weight": known, "pairs": pairs}
                row["mask"] = losses.supervised_pair_loss(logits, target, weight=known, pairs=pairs)
                row["preference"] = self.config.preference * losses.preference_loss(
                    logits, reference, target, **options
                )
                del options["reading"]
                margin = losses.preference_margin(
                    logits.detach(), reference, target, pairs, reading=self.config.reading, weight=known
                )
                row["_beta_margin"] = losses.BETA * margin.abs().mean()
            else:
                row["mask"] = losses.segmentation_loss(logits, target, known).mean()
            rows.append(row)
        return {name: torch.stack([row[name] for row in rows]).mean() for name in rows[0]}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean Dice of the answers to points of each quality, and its spread between them."""
        found = {quality: [] for quality in QUALITIES} if self.checked else dict[str, list[float]]()
        for k, (view, intent) in enumerate(self.checked):
            for quality, answer in self._answers(k, view, intent).items():
                meant, known = view.meant(intent), view.known
                both = (answer & meant & known).sum()
                found[quality].append(float((2 * both + 1) / ((answer & known).sum() + (meant & known).sum() + 1)))
        if not found:
            return {}
        means = {f"dice_{quality}": float(np.mean(values)) for quality, values in found.items()}
        dice = float(np.mean(list(means.values())))
        return {"score": dice, "dice": dice, **means, "spread": float(np.ptp(list(means.values())))}

    @torch.no_grad()
    def draw(self, path: Path) -> None:
        """Validation windows: what is meant, and the answer to points in the core."""
        rows = [
            (v.image, v.meant(i), self._answers(k, v, i)["core"]) for k, (v, i) in enumerate(self.checked[:PICTURES])
        ]
        draw_masks(path, rows)

    def tensors(self) -> dict[str, Tensor]:
        """Weights to save, adapters merged."""
        return {f"sam.{k}": v for k, v in plain_state(self.network).items()} | dict(self.others)

    def _answers(self, number: int, view: View, intent: int) -> dict[str, Any]:
        """The mask of highest predicted IoU, bool (S, S), for points of each quality."""
        embedding = self._encode(self.network, _pixels(view)[None].to(self.device))
        out = {}
        for quality in QUALITIES:
            random = np.random.default_rng((self.config.seed, number))
            sets = draw_point_sets(view.meant(intent), view.label, view.known, 1, random, quality)
            logits, predicted = self._decode(self.network, embedding, sets)
            out[quality] = (logits[0, predicted[0].argmax()] > 0).cpu().numpy()
        return out

    def _encode(self, network: Any, images: Tensor) -> Tensor:  # noqa: ANN401
        """uint8 (B, 3, S, S) -> image embeddings (B, 256, g, g)."""
        mean, sd = (torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in (PIXEL_MEAN, PIXEL_SD))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            embedding: Tensor = network["image_encoder"]((images.float() - mean) / sd)
        return embedding.float()

    def _decode(self, network: Any, embedding: Tensor, sets: PointSets) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        """Logits (K, 3, S, S), and predicted IoU (K, 3)."""
        encoder = network["prompt_encoder"]
        # (SAM takes pixel indices and adds half a pixel)
        points = torch.from_numpy(sets.xy).to(self.device) - 0.5, torch.from_numpy(sets.labels).to(self.device)
        tokens, dense = encoder(points=points, boxes=None, masks=None)
        masks, quality = network["mask_decoder"](
            image_embeddings=embedding,
            image_pe=encoder.get_dense_pe(),
            sparse_prompt_embeddings=tokens,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )
        return F.interpolate(masks.float(), size=(self.side, self.side), mode="bilinear", align_corners=False), quality


def resized(sam: Mapping[str, Tensor], side: int) -> dict[str, Tensor]:
    """A SAM for images of another size: its positions, absolute and relative, are interpolated; windows stay as they are.

    Parameters
    ----------
    sam
        Tensors under SAM's own names.
    side
        Of the images, px: a multiple of the patch.

    Returns
    -------
    dict
        All tensors.

    Raises
    ------
    ConfigError
        ``side`` is not a multiple of the patch.
    """
    architecture = recognise(sam)
    if side % architecture.patch:
        raise ConfigError(
            f"--input-px {side}: not a multiple of {architecture.patch}, the side of SAM's patches; 224 is SAMPO's"
        )
    grid = side // architecture.patch
    out = dict(sam)
    if grid == architecture.grid:
        return out
    key = "image_encoder.pos_embed"
    out[key] = F.interpolate(
        sam[key].permute(0, 3, 1, 2), size=(grid, grid), mode="bilinear", align_corners=False
    ).permute(0, 2, 3, 1)
    for name, table in sam.items():
        block = re.match(r"image_encoder\.blocks\.(\d+)\.attn\.rel_pos_[hw]$", name)
        if block and int(block[1]) in architecture.global_blocks:
            out[name] = F.interpolate(table.T[None], size=2 * grid - 1, mode="linear")[0].T
    return {k: v.contiguous() for k, v in out.items()}


def _side(sam: Mapping[str, Tensor]) -> int:
    architecture = recognise(sam)
    return architecture.grid * architecture.patch


def _pixels(view: View) -> Tensor:
    return torch.from_numpy(view.image).permute(2, 0, 1)
