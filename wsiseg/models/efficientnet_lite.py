"""EfficientNet-Lite, the encoder of ``nuclei-compact``, up to stride 16.

EfficientNet [1]_ without squeeze-and-excitation and with ReLU6 in place of swish [2]_: no statistic is taken over the image, so that a
feature depends on its receptive field alone and tiles that share pixels agree.

::

    image -> stem (stride 2) -> stages at strides 2, 4, 8, 16 of inverted residual blocks [3]_

The last two stages of the published network (stride 32) are left out: on images larger than the training crops a network that had them was
worse than one that had not, because its receptive field is larger than the crops.

References
----------
.. [1] Tan, Le: EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks, ICML 2019, arXiv:1905.11946.
.. [2] https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite
.. [3] Sandler et al.: MobileNetV2: Inverted Residuals and Linear Bottlenecks, CVPR 2018, arXiv:1801.04381.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEM_WIDTH = 32  #: the same in all variants
#: Width and depth of the variants, as multiples of EfficientNet-B0's.
VARIANTS = {"lite0": (1.0, 1.0), "lite1": (1.0, 1.1), "lite2": (1.1, 1.2)}
_STRIP_BYTES = 4 << 20  #: of expanded channels, on a CPU: 2 and 4 MB are quickest, 1 and 8 take a tenth longer
PIXEL_MEAN, PIXEL_SD = 127 / 255, 128 / 255  #: standardisation that the ImageNet weights expect, of pixels in [0, 1]


class _Blocks(NamedTuple):
    """A row of table 1 of the paper: blocks of one width."""

    kernel: int
    stride: int  #: of the first block
    expansion: int
    width: int
    repeats: int


#: By stage; the last has two rows at one stride.
_STAGES = (
    (_Blocks(3, 1, 1, 16, 1),),
    (_Blocks(3, 2, 6, 24, 2),),
    (_Blocks(5, 2, 6, 40, 2),),
    (_Blocks(3, 2, 6, 80, 3), _Blocks(5, 1, 6, 112, 3)),
)


class PointwiseConv2d(nn.Conv2d):
    """1 x 1 convolution as a matrix product over channels.

    oneDNN's convolution sums 240 and more channels in an order that depends on the number of threads, so that processes with one and with two
    threads gave other bits; the product does not, and takes as long.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H, W); no copy where ``x`` is channels-last."""
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class InvertedResidual(nn.Module):
    """Expand by a 1 x 1 convolution, filter depthwise, project back; a shortcut where input and output have one shape."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = _convolution(inputs, hidden, 1) if expansion > 1 else []
        filtered = _convolution(hidden, hidden, kernel, stride, groups=hidden)
        project = PointwiseConv2d(hidden, outputs, 1, bias=False)  # no activation follows
        self.body = nn.Sequential(*expand, *filtered, project, _batch_norm(outputs))
        self.has_shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        in_strips = x.device.type == "cpu" and not torch.is_grad_enabled()
        y: Tensor = self._in_strips(x) if in_strips else self.body(x)
        return x + y if self.has_shortcut else y

    def _in_strips(self, x: Tensor) -> Tensor:
        """The body in strips of rows whose expanded channels stay in the processor's cache; the same bits."""
        expand, filtered, project = self.body[:-5], cast("nn.Conv2d", self.body[-5]), self.body[-4:]
        kernel, stride = filtered.kernel_size[0], filtered.stride[0]
        pad = kernel // 2
        height = x.shape[2]
        rows_out = (height + 2 * pad - kernel) // stride + 1
        bytes_per_row = x.shape[0] * x.shape[3] * filtered.in_channels * x.element_size()
        step = max(_STRIP_BYTES // (bytes_per_row * stride), 1)
        strips = []
        for start in range(0, rows_out, step):
            first = start * stride - pad
            last = (min(start + step, rows_out) - 1) * stride - pad + kernel
            y = expand(x[:, :, max(first, 0) : min(last, height)])
            above, below = max(-first, 0), max(last - height, 0)
            if above or below:
                y = F.pad(y, (0, 0, above, below))
            y = F.conv2d(y, filtered.weight, filtered.bias, stride, (0, pad), 1, filtered.groups)
            strips.append(project(y))
        return torch.cat(strips, 2)


class EfficientNetLite(nn.Module):
    """The encoder: (B, 3, H, W) -> features at strides 2, 4, 8 and 16, of ``widths`` channels.

    Parameters
    ----------
    variant
        Key of ``VARIANTS``.

    Examples
    --------
    >>> EfficientNetLite("lite2").widths
    (16, 24, 48, 120)
    """

    def __init__(self, variant: str = "lite2") -> None:
        super().__init__()
        width_scale, depth_scale = VARIANTS[variant]
        self.stem = nn.Sequential(*_convolution(3, STEM_WIDTH, 3, 2))
        stages, widths, inputs = [], [], STEM_WIDTH
        for rows in _STAGES:
            blocks: list[nn.Module] = []
            for row in rows:
                outputs = _scaled_width(row.width, width_scale)
                # The first stage keeps its depth in every variant of Lite.
                repeats = math.ceil(row.repeats * depth_scale) if row.expansion > 1 else row.repeats
                for i in range(repeats):
                    blocks.append(InvertedResidual(inputs, outputs, row.kernel, 1 if i else row.stride, row.expansion))
                    inputs = outputs
            stages.append(nn.Sequential(*blocks))
            widths.append(inputs)
        self.stages = nn.ModuleList(stages)
        self.widths = tuple(widths)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Run the encoder on standardised images."""
        x = self.stem(x)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return tuple(features)


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Convolution, batch norm, ReLU6."""
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        _batch_norm(outputs),
        nn.ReLU6(inplace=True),
    ]


def _batch_norm(width: int) -> nn.BatchNorm2d:
    """TensorFlow's momentum and epsilon: the ImageNet weights were trained with them."""
    return nn.BatchNorm2d(width, eps=1e-3, momentum=0.01)


def _scaled_width(width: int, scale: float) -> int:
    """Nearest multiple of 8, and at most a tenth below."""
    scaled = width * scale
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded
