"""``nuclei-compact``: a small promptable network for nuclei in H&E, the bundled model.

One pass over the tile gives a feature pyramid; every prompt after that costs a few small matrix products::

    image -> EfficientNet-Lite2 (strides 2, 4, 8, 16) -> top-down pyramid p8, p4, p2
    p2  -> instance maps (foreground, centre distance, boundary distance) and 16 mask features
    p4  -> F_h, p8 -> F_l (unit norm), for Chain-of-Prompts
    point -> pyramid sampled at the point -> weights of three 1x1 convolutions (conditional convolutions [1]_)
          -> mask logits on a window of 64 x 64 cells of 2 px around the point
    mask  -> predicted IoU, and a descriptor (F_l pooled in the mask, plus size, elongation and stain)
    phrase -> a map of all nuclei that are meant, where the weights have a decoder of phrases (`wsiseg.models.phrases`)

Everything is local: no layer sees further than its receptive field and no statistic is taken over the tile (batch norm is frozen), so
that two tiles that share pixels give the same cells. The lattice is ``STRIDE_PX``: tiles must start on its multiples.

References
----------
.. [1] Tian, Shen, Chen: Conditional Convolutions for Instance Segmentation, ECCV 2020, arXiv:2003.05664.
.. [2] Lin et al.: Feature Pyramid Networks for Object Detection, CVPR 2017, arXiv:1612.03144.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from wsiseg.models.efficientnet_lite import PIXEL_MEAN, PIXEL_SD, EfficientNetLite
from wsiseg.models.morphology import MEASUREMENTS, measure, optical_density, windows
from wsiseg.models.phrases import PhraseDecoder, Vocabulary
from wsiseg.records import Embeddings, PromptExtras, TypeSpace, WindowMasks

if TYPE_CHECKING:
    from wsiseg.models.cards import ModelCard

STRIDE_PX = 16  #: deepest stride of the pyramid: tiles that start on its multiples see the same lattice
MASK_STRIDE_PX = 2  #: one mask logit covers 2 x 2 model pixels
WINDOW_SIZE = 64  #: 128 px = 32 um at 0.25 mpp: the largest nuclei (30 um) fit
CPU_PROMPTS = 32  #: decoded at a time on a CPU: their windows stay in its cache; 128 take 1.4 times as long
SNAP_CELLS = 4  #: windows start on the 8-px lattice of F_l, so that masks pool F_l without resampling
MPP = 0.25

MASK_FEATURES = 16
HEAD_WIDTH = 16
LEARNED = 64  #: length of the descriptor's learned half
MEASURED_SHARE = 0.3  #: weight of the measurements in the cosine of two descriptors; the learned half has the rest
DESCRIPTOR_SIZE = LEARNED + MEASUREMENTS
REFERENCE_CLASSES = (
    "lymphocyte",
    "tumour or epithelial",
    "stromal",
)  #: classes of cell whose distribution among the descriptors is part of the weights

# The three generated 1x1 convolutions: (inputs + relative x, y) -> HEAD_WIDTH -> HEAD_WIDTH -> 1.
_HEAD_SHAPES = ((HEAD_WIDTH, MASK_FEATURES + 2), (HEAD_WIDTH, HEAD_WIDTH), (1, HEAD_WIDTH))
_HEAD_PARAMETERS = sum(o * i + o for o, i in _HEAD_SHAPES)
MASKS = 3  #: answers to one ambiguous prompt, as SAM gives; the first is the one that is given alone
_POINT_WIDTH = 32 + 64 + 96  #: p2, p4 and p8 at a point
_SIGNS = 8  #: what a mask says of its own quality: stability, certainty, each instance map inside and on the ring
_DISTANCE_PX = 32.0  #: distances from the point enter the network in units of this (8 um, a nucleus)


def conv_block(inputs: int, outputs: int) -> nn.Sequential:
    """3 x 3 convolution, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class FeaturePyramid(nn.Module):
    """Encoder with a top-down path [2]_: (B, 3, H, W) -> p2 (32), p4 (64), p8 (96) at strides 2, 4, 8."""

    def __init__(self, encoder: EfficientNetLite) -> None:
        super().__init__()
        c2, c4, c8, c16 = encoder.widths
        self.encoder = encoder
        self.lateral16 = nn.Conv2d(c16, 96, 1)
        self.smooth16 = conv_block(96, 96)
        self.lateral8 = nn.Conv2d(c8, 96, 1)
        self.smooth8 = conv_block(96, 96)
        self.down8 = nn.Conv2d(96, 64, 1)
        self.lateral4 = nn.Conv2d(c4, 64, 1)
        self.smooth4 = conv_block(64, 64)
        self.down4 = nn.Conv2d(64, 32, 1)
        self.lateral2 = nn.Conv2d(c2, 32, 1)
        self.smooth2 = nn.Sequential(conv_block(32, 32), conv_block(32, 32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run the encoder and the top-down path: standardised images in, p2, p4, p8 out."""
        c2, c4, c8, c16 = self.encoder(x)
        p16 = self.smooth16(self.lateral16(c16))
        p8 = self.smooth8(self.lateral8(c8) + _double(p16))
        p4 = self.smooth4(self.lateral4(c4) + _double(self.down8(p8)))
        p2 = self.smooth2(self.lateral2(c2) + _double(self.down4(p4)))
        return p2, p4, p8


class NucleiCompact(nn.Module):
    """The network. Shapes below: B tiles of H x W model pixels, N prompts.

    ``H`` and ``W`` must be multiples of ``STRIDE_PX``.
    """

    stride_px = STRIDE_PX
    mpp = MPP
    input_px = None
    supports_full_tile = False
    has_maps = True
    box_replaces_point = False
    prompts_multiple = 32
    reach_px = (WINDOW_SIZE // 2 + SNAP_CELLS // 2) * MASK_STRIDE_PX
    descriptor_size = DESCRIPTOR_SIZE
    mask_stride_px, window_size = MASK_STRIDE_PX, WINDOW_SIZE
    _bf16 = False

    def __init__(self) -> None:
        super().__init__()
        self.pyramid = FeaturePyramid(EfficientNetLite())
        self.maps = nn.Conv2d(32, 3, 1)
        self.mask_features = nn.Conv2d(32, MASK_FEATURES, 1)
        self.high = nn.Conv2d(64, 32, 1)
        self.low = nn.Conv2d(96, 64, 1)
        self.controller = nn.Sequential(
            nn.Linear(_POINT_WIDTH, 192), nn.ReLU(inplace=True), nn.Linear(192, _HEAD_PARAMETERS)
        )
        self.alternatives = nn.Linear(192, (MASKS - 1) * (HEAD_WIDTH + 1))
        self.point_hint = _silent(_POINT_WIDTH + 3, 128, bias=False)
        self.box_hint = _silent(4, 64, bias=True)
        self.quality = nn.Sequential(
            nn.Linear(_POINT_WIDTH + 64 + MASK_FEATURES + MEASUREMENTS + _SIGNS, 128),
            nn.ReLU(inplace=True),
            nn.Linear(128, 1),
        )
        self.describe = nn.Sequential(
            nn.LayerNorm(64 + MEASUREMENTS),
            nn.Linear(64 + MEASUREMENTS, 128),
            nn.ReLU(inplace=True),
            nn.Linear(128, LEARNED),
        )
        self.standardise = nn.BatchNorm1d(MEASUREMENTS, affine=False)
        self.phrases: PhraseDecoder | None = None
        self.vocabulary: Vocabulary | None = None
        self.pixel_mean: Tensor
        self.pixel_sd: Tensor
        self.register_buffer("pixel_mean", torch.full((1, 3, 1, 1), PIXEL_MEAN))
        self.register_buffer("pixel_sd", torch.full((1, 3, 1, 1), PIXEL_SD))
        # Distribution of types in the descriptors (`TypeSpace`); filled in after training (training/fit_types.py).
        self.register_buffer("type_transform", torch.eye(DESCRIPTOR_SIZE))
        self.register_buffer("type_kinds", torch.zeros(len(REFERENCE_CLASSES), DESCRIPTOR_SIZE))
        self.register_buffer("type_middle", torch.zeros(DESCRIPTOR_SIZE))
        for name in ("type_spread", "type_kind_spread", "type_shift"):
            self.register_buffer(name, torch.ones(DESCRIPTOR_SIZE))

    @classmethod
    def of(cls, card: ModelCard, tensors: dict[str, Tensor]) -> Self:  # noqa: ARG003
        """Build the network for a weight file: with a decoder of phrases, where it has one."""
        network = cls()
        if text := card.reading():
            network.phrases = PhraseDecoder(text.width, len(text.phrases))
            network.vocabulary = Vocabulary(network.phrases, text, card.name)
        return network

    @property
    def prompts(self) -> tuple[str, ...]:
        """What it can be asked with."""
        return ("points", "boxes") if self.phrases is None else ("points", "boxes", "text")

    def ready(self, device: torch.device, *, bf16: bool) -> Self:
        """Prepare for inference: batch norms folded into their convolutions, frozen, on ``device``."""
        self.eval().requires_grad_(requires_grad=False)
        for module in list(self.modules()):
            if isinstance(module, nn.Sequential):
                _fold(module)
        self._bf16 = bf16
        for parameter in self.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        return self.to(device)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.pixel_mean.device

    @property
    def types(self) -> TypeSpace:
        """Type space of the descriptors."""
        part = {
            k.removeprefix("type_"): v.cpu().double().numpy() for k, v in self.named_buffers() if k.startswith("type_")
        }
        return TypeSpace(
            transform=part["transform"].astype(np.float32),
            mean=part["middle"],
            between_variance=part["spread"],
            reference_classes=part["kinds"],
            class_variance=part["kind_spread"],
            slide_variance=part["shift"],
            class_names=REFERENCE_CLASSES,
        )

    def encode(self, images: Tensor) -> Embeddings:
        """Encode tiles.

        Parameters
        ----------
        images
            uint8 RGB of shape (B, 3, H, W), model pixels (0.25 um).

        Returns
        -------
        Embeddings
            ``high`` (B, 32, H/4, W/4) and ``low`` (B, 64, H/8, W/8), unit norm along channels; ``maps`` (B, 3, H/2, W/2), logits of
            foreground, centre distance and boundary distance.
        """
        unit = images.float() / 255
        standard = ((unit - self.pixel_mean) / self.pixel_sd).contiguous(memory_format=torch.channels_last)
        kind = images.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=self._bf16 or torch.is_autocast_enabled(kind)):
            p2, p4, p8 = self.pyramid(standard)
        p2, p4, p8 = p2.float(), p4.float(), p8.float()
        # One product for both heads: on its own, the three-channel one rounds differently with the number of threads.
        weight, bias = (torch.cat([getattr(self.maps, k), getattr(self.mask_features, k)]) for k in ("weight", "bias"))
        maps, mask = F.conv2d(p2, weight, bias).split([3, MASK_FEATURES], 1)
        density = optical_density(unit, MASK_STRIDE_PX)
        return Embeddings(
            high=F.normalize(self.high(p4), dim=1),
            low=F.normalize(self.low(p8), dim=1),
            maps=maps,
            extra={"mask": mask, "maps": maps, "p2": p2, "p4": p4, "p8": p8, "density": density},
        )

    def decode(
        self,
        embeddings: Embeddings,
        batch_index: Tensor,
        points_xy: Tensor,
        *,
        extras: PromptExtras | None = None,
        multimask: bool = False,
        full_tile: bool = False,  # noqa: ARG002
    ) -> WindowMasks:
        """Masks of N prompts.

        Parameters
        ----------
        embeddings
            Result of :meth:`encode`.
        batch_index
            int64 of shape (N,): which of the B tiles each point lies in.
        points_xy
            float32 of shape (N, 2): model pixels of the tile, corner frame. The window lies around this point; for a box alone it is the
            box's centre.
        extras
            More points and boxes.
        multimask
            Give ``MASKS`` answers for every prompt instead of one: 3N masks, prompt by prompt. ``predicted_iou`` says which is best.
        full_tile
            Ignored: this network sees the window only.

        Returns
        -------
        WindowMasks
            ``logits`` (N, 64, 64) on cells of 2 px; ``origin_xy`` (N, 2) the outer corner of each window in model pixels;
            ``predicted_iou`` (N,) predicted IoU in [0, 1]; ``descriptors`` (N, 75) unit norm: a learned half and standardised measurements.
            With ``multimask`` 3N of each.
        """
        few = extras is not None or len(points_xy) <= CPU_PROMPTS
        if not few and points_xy.device.type == "cpu" and not torch.is_grad_enabled():
            parts = zip(batch_index.split(CPU_PROMPTS), points_xy.split(CPU_PROMPTS), strict=True)
            return WindowMasks.concatenate([self.decode(embeddings, *part, multimask=multimask) for part in parts])
        extra = embeddings.extra
        at_point = _at_points(extra, batch_index, points_xy)
        hidden = self.controller[0](at_point)
        if extras is not None:
            hidden = hidden + self._embed_extras(extra, batch_index, points_xy, extras)
        hidden = F.relu(hidden)
        parameters = self.controller[2](hidden)
        origin = self.window_origin(points_xy) // MASK_STRIDE_PX  # cells
        features = windows(extra["mask"], batch_index, origin, WINDOW_SIZE)
        cells = torch.arange(WINDOW_SIZE, device=points_xy.device, dtype=points_xy.dtype) + 0.5
        relative_x = (origin[:, :1] + cells) * MASK_STRIDE_PX - points_xy[:, :1]
        relative_y = (origin[:, 1:] + cells) * MASK_STRIDE_PX - points_xy[:, 1:]
        n = len(points_xy)
        grid = torch.stack(
            [
                relative_x[:, None, :].expand(n, WINDOW_SIZE, WINDOW_SIZE),
                relative_y[:, :, None].expand(n, WINDOW_SIZE, WINDOW_SIZE),
            ],
            1,
        )
        body = _generated_body(torch.cat([features, grid / _DISTANCE_PX], 1), parameters)
        last = parameters[:, -(HEAD_WIDTH + 1) :].view(n, 1, HEAD_WIDTH + 1)
        if multimask:
            last = torch.cat([last, last + self.alternatives(hidden).view(n, MASKS - 1, HEAD_WIDTH + 1)], 1)
            batch_index, origin, points_xy, at_point, features = (
                v.repeat_interleave(MASKS, 0) for v in (batch_index, origin, points_xy, at_point, features)
            )
        logits = torch.baddbmm(last[..., -1:], last[..., :-1], body).view(-1, WINDOW_SIZE, WINDOW_SIZE)
        pooled, measured, signs = self._inside(embeddings, batch_index, origin, features, logits)
        quality = self.quality(torch.cat([at_point.detach(), pooled, measured, signs], 1))
        return WindowMasks(
            logits=logits,
            origin_xy=origin * MASK_STRIDE_PX,
            mask_stride_px=MASK_STRIDE_PX,
            predicted_iou=torch.sigmoid(quality[:, 0]),
            stability=signs[:, 0],
            descriptors=self._descriptors(pooled, measured),
            points_xy=points_xy,
        )

    def window_origin(self, points_xy: Tensor) -> Tensor:
        """Outer corner (N, 2), int64 model px, of the window around each point (N, 2)."""
        snap_px = SNAP_CELLS * MASK_STRIDE_PX
        cells = torch.floor(points_xy / snap_px).long() * SNAP_CELLS - (WINDOW_SIZE // 2 - SNAP_CELLS // 2)
        return cells * MASK_STRIDE_PX

    def describe_masks(self, embeddings: Embeddings, batch_index: Tensor, origin_xy: Tensor, logits: Tensor) -> Tensor:
        """Descriptors (N, 75) of masks that come from elsewhere: positive ``logits`` (N, 64, 64) on windows of :meth:`window_origin`."""
        origin = origin_xy // MASK_STRIDE_PX
        features = windows(embeddings.extra["mask"], batch_index, origin, WINDOW_SIZE)
        pooled, measured, _ = self._inside(embeddings, batch_index, origin, features, logits)
        return self._descriptors(pooled, measured)

    def _descriptors(self, pooled: Tensor, measured: Tensor) -> Tensor:
        """Descriptors (N, 75), unit norm, of what :meth:`_inside` finds: a learned part and the measurements."""
        learned = F.normalize(self.describe(torch.cat([pooled[:, :64], measured], 1)), dim=1)
        return torch.cat(
            [learned * (1 - MEASURED_SHARE) ** 0.5, F.normalize(measured.clamp(-4, 4), dim=1) * MEASURED_SHARE**0.5], 1
        )

    def _embed_extras(
        self, extra: dict[str, Tensor], batch_index: Tensor, points_xy: Tensor, extras: PromptExtras
    ) -> Tensor:
        """Contribution of further points and boxes to the controller's hidden layer (N, 192): a sum over points, so their order does not matter."""
        n, k = extras.labels.shape
        relative = (extras.points_xy - points_xy[:, None]) / _DISTANCE_PX
        at = _at_points(extra, batch_index.repeat_interleave(k), extras.points_xy.reshape(-1, 2)).view(
            n, k, _POINT_WIDTH
        )
        given = (extras.labels >= 0)[..., None]  # -1 is padding
        sign = torch.where(
            given, 2 * extras.labels[..., None] - 1, 0
        )  # the weights were trained with 1 inside and -1 outside
        point_hints = self.point_hint(torch.cat([at, relative, sign], 2)) * given
        has_box = extras.boxes.isfinite().all(1, keepdim=True)
        box = torch.where(has_box, (extras.boxes - points_xy.repeat(1, 2)) / _DISTANCE_PX, 0)
        hidden: Tensor = point_hints.sum(1) + self.box_hint(box) * has_box
        return hidden

    def _inside(
        self, embeddings: Embeddings, batch_index: Tensor, origin: Tensor, features: Tensor, logits: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Features inside each mask: pooled F_l and mask features (N, 80), standardised measurements (N, 11), signs of quality (N, 8)."""
        hard = (logits.detach() > 0).to(logits.dtype)
        area = hard.sum((1, 2)).clamp_min(1)
        coarse = F.avg_pool2d(hard[:, None], SNAP_CELLS)
        low = windows(embeddings.low, batch_index, origin // SNAP_CELLS, WINDOW_SIZE // SNAP_CELLS)
        pooled_low = (low * coarse).sum((2, 3)) / coarse.sum((2, 3)).clamp_min(1e-3)
        pooled_mask = (features.detach() * hard[:, None]).sum((2, 3)) / area[:, None]
        density = windows(embeddings.extra["density"], batch_index, origin, WINDOW_SIZE)
        measured, ring = measure(hard, density, MASK_STRIDE_PX * MPP)
        strict, loose = (logits.detach() > 1).sum((1, 2)), (logits.detach() > -1).sum((1, 2))
        certainty = ((logits.detach() / 2).tanh().abs() * hard).sum((1, 2)) / area
        maps = windows(embeddings.extra["maps"].detach().sigmoid(), batch_index, origin, WINDOW_SIZE)
        signs = torch.cat(
            [
                (strict / loose.clamp_min(1))[:, None],
                certainty[:, None],
                (maps * hard[:, None]).sum((2, 3)) / area[:, None],
                (maps * ring).sum((2, 3)) / ring.sum((2, 3)).clamp_min(1),
            ],
            1,
        )
        return torch.cat([pooled_low, pooled_mask], 1), self.standardise(measured), signs


def _silent(inputs: int, hidden: int, *, bias: bool) -> nn.Sequential:
    """Two layers into the controller's hidden layer, initialised to contribute nothing."""
    last = nn.Linear(hidden, 192, bias=bias)
    nn.init.zeros_(last.weight)
    if bias:
        nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(inplace=True), last)


def _fold(stack: nn.Sequential) -> None:
    """Merge each batch norm of ``stack`` into the convolution before it (exact in evaluation mode)."""
    for i, (first, second) in enumerate(zip(stack, list(stack)[1:], strict=False)):
        if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
            stack[i], stack[i + 1] = fuse_conv_bn_eval(first, second), nn.Identity()


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def sample_bilinear(feature: Tensor, batch_index: Tensor, points_xy: Tensor, stride: int) -> Tensor:
    """Bilinear value of ``feature`` (B, C, h, w) at points in model pixels -> (N, C); clamped at the border."""
    height, width = feature.shape[2:]
    xy = points_xy / stride - 0.5
    x, y = xy[:, 0].clamp(0, width - 1), xy[:, 1].clamp(0, height - 1)
    x0, y0 = x.floor().long().clamp(max=width - 2), y.floor().long().clamp(max=height - 2)
    fx, fy = (x - x0)[:, None].to(feature.dtype), (y - y0)[:, None].to(feature.dtype)
    top = feature[batch_index, :, y0, x0] * (1 - fx) + feature[batch_index, :, y0, x0 + 1] * fx
    bottom = feature[batch_index, :, y0 + 1, x0] * (1 - fx) + feature[batch_index, :, y0 + 1, x0 + 1] * fx
    return top * (1 - fy) + bottom * fy


def _at_points(extra: dict[str, Tensor], batch_index: Tensor, points_xy: Tensor) -> Tensor:
    """The pyramid at N points -> (N, 192)."""
    return torch.cat(
        [sample_bilinear(extra[k], batch_index, points_xy, s) for k, s in (("p2", 2), ("p4", 4), ("p8", 8))], 1
    )


def _generated_body(x: Tensor, parameters: Tensor) -> Tensor:
    """All but the last of the generated 1x1 convolutions: (N, 18, h, w) -> (N, 16, h * w)."""
    n = len(x)
    x = x.flatten(2)
    start = 0
    for outputs, inputs in _HEAD_SHAPES[:-1]:
        weight = parameters[:, start : start + outputs * inputs].view(n, outputs, inputs)
        start += outputs * inputs
        bias = parameters[:, start : start + outputs].view(n, outputs, 1)
        start += outputs
        x = F.relu(torch.baddbmm(bias, weight, x))
    return x
