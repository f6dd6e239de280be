"""Supervised adaptation of ``nuclei-compact``: its own losses on the new images, held near its former self.

Batch norms keep the statistics of the parent: a handful of images would replace them by their own. The parent, frozen, answers the same crops, and
the network is held to its features, descriptors and maps (``keep``): the type space of the weights was fitted to those descriptors.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from wsiseg.config import RunConfig, TilingConfig
from wsiseg.evaluation.metrics import score
from wsiseg.evaluation.rasterize import rasterise
from wsiseg.finetune.compact import SHARES, answer
from wsiseg.finetune.crops import CROP, crop, make_field
from wsiseg.finetune.pictures import draw_outlines
from wsiseg.models.nuclei_compact import NucleiCompact
from wsiseg.runs.image import segment_image

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from wsiseg.finetune.config import FinetuneConfig
    from wsiseg.finetune.crops import Field
    from wsiseg.finetune.data import Dataset, LabelledImage

RATE = 2e-4  #: a tenth of the recipe's: 5e-4 loses for the first dozens of steps, and there are no more than a hundred
BATCH = {"cpu": 8, "cuda": 32}  #: crops; the recipe's on a CPU
STRENGTH = 0.5  #: how often a crop is restained or damaged, relative to the recipe: less, as the new images are all from one laboratory
LARGEST_TILE_PX = 1024  #: a tile of validation: its memory is that of a step
PICTURES = 4  #: validation images that are drawn


class CompactTask:
    """The task.

    Parameters
    ----------
    tensors
        Weights of the parent.
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
        self.network = NucleiCompact()
        self.network.load_state_dict({k: v.float() for k, v in tensors.items()})
        self.network.to(device).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.parent = copy.deepcopy(self.network).requires_grad_(requires_grad=False)
        self.config, self.device, self.valid = config, device, valid
        self.rate = config.rate if config.rate is not None else RATE
        self.size = config.batch_size or BATCH[device.type]
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
        self.fields = [[_field(image) for image in part.images] for part in (train, also) if part is not None]
        self._drawn: list[tuple[NDArray[np.uint8], NDArray[np.int32], NDArray[np.int32]]] = []
        area = sum(image.label.size for image in train.images)
        self.epoch_steps = max(area / CROP**2, len(train.images)) / self.size / (1 - self._also_share)

    @property
    def _also_share(self) -> float:
        return self.config.also_share if len(self.fields) > 1 else 0.0

    def batch(self, step: int) -> dict[str, Tensor]:
        """Crops of step ``step``, each with a generator of its own."""
        crops = []
        for k in range(self.size):
            random = np.random.default_rng((self.config.seed, step, k))
            fields = self.fields[int(random.random() < self._also_share)]
            area = np.array([field.label.size for field in fields], np.float64)
            chosen = fields[random.choice(len(fields), p=area / area.sum())]
            crops.append(crop(chosen, random, STRENGTH))
        return {key: torch.stack([c[key] for c in crops]) for key in crops[0]}

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The recipe's losses, and the distance from the parent."""
        batch = {key: value.to(self.device) for key, value in batch.items()}
        found = answer(self.network, batch, amp=self.bf16)
        parts = {name: share * found.losses[name] for name, share in SHARES.items()}
        if self.config.keep:
            images = batch["image"].contiguous(memory_format=torch.channels_last)
            with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                before = self.parent.encode(images)
            with torch.no_grad():
                described = self.parent.describe_masks(
                    before, found.tile, found.masks.origin_xy, found.masks.logits.detach()
                )
            pairs = (
                (found.embeddings.high, before.high),
                (found.embeddings.low, before.low),
                (found.masks.descriptors, described),
            )
            features = torch.stack([(1 - (a * b.float()).sum(1)).mean() for a, b in pairs]).sum()
            maps = F.binary_cross_entropy_with_logits(
                found.embeddings.extra["maps"], before.extra["maps"].float().sigmoid()
            )
            floor = F.binary_cross_entropy_with_logits(
                before.extra["maps"].float(), before.extra["maps"].float().sigmoid()
            )
            parts["keep"] = self.config.keep * (features + maps - floor)
        return parts

    def ready(self) -> NucleiCompact:
        """The network as it is now, prepared for inference."""
        return copy.deepcopy(self.network).ready(self.device, bf16=False)

    def validate(self) -> dict[str, float]:
        """Mean AJI, PQ and Dice without points, as `wsiseg run` outlines cells."""
        found = self._found()
        self._drawn = [(image.image, image.label, ids) for image, ids in found[:PICTURES]]
        rows = [score(image.label, ids) for image, ids in found]
        if not rows:
            return {}
        means = {name: float(np.mean([row[name] for row in rows])) for name in ("aji", "pq", "dice")}
        return {"score": means["aji"]} | means

    def draw(self, path: Path) -> None:
        """Validation images with annotated and found borders, as of the last validation."""
        draw_outlines(path, self._drawn)

    def _found(self) -> list[tuple[LabelledImage, NDArray[np.int32]]]:
        """Label images found on the validation images, without cells that lie where nothing is known."""
        network, out = self.ready(), []
        for image in self.valid.images:
            side_um = min(max(image.label.shape), LARGEST_TILE_PX) * network.mpp
            config = RunConfig(tiling=TilingConfig(tile_um=max(side_um, 16.0), halo_um=0.0))  # most images are one tile
            cells, _ = segment_image(image.image, mpp=network.mpp, config=config, model=network)
            found = rasterise(cells.polygons, image.label.shape)
            out.append((image, _where_known(found, image.known)))
        return out

    def tensors(self) -> dict[str, Tensor]:
        """Weights to save."""
        return {k: v.detach().cpu().contiguous() for k, v in self.network.state_dict().items()}


def _where_known(found: NDArray[np.int32], known: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Instances of which at least half lies where the labels are known."""
    if known.all():
        return found
    size, seen = np.bincount(found.ravel()), np.bincount(found.ravel(), known.ravel())
    return np.where((seen * 2 >= size)[found], found, 0).astype(np.int32)


def _field(image: LabelledImage) -> Field:
    field = make_field(image.name, "new", image.image, image.label, image.types)
    field.weight = image.known.astype(np.float32)
    return field
