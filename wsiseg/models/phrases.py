"""What phrases mean, on the features of ``nuclei-compact``: a phrase in, a map of every nucleus that is meant out.

::

    phrase -> vector (`wsiseg.models.text_encoder`, frozen) -> query
    tile's p2, p4, p8 -> mixed features at stride 4
    query -> two generated 1x1 convolutions (conditional convolutions [1]_) over the mixed features and their similarity to the query -> logits

One pass over a tile serves any number of phrases. Nothing is taken over the whole tile, so that two tiles that share pixels agree.

References
----------
.. [1] Tian, Shen, Chen: Conditional Convolutions for Instance Segmentation, ECCV 2020, arXiv:2003.05664.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsiseg.errors import ConfigError
from wsiseg.models.morphology import windows
from wsiseg.models.text_encoder import WORDLLAMA, open_text_encoder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from wsiseg.models.cards import TextCard
    from wsiseg.records import Embeddings, WindowMasks

PLACE = "WSISEG_TEXT_ENCODER"  #: variable of the environment: where the text encoder is now
PREFIX = "phrases."  #: of the decoder's tensors in a weight file
FEATURES = ("reduce", "mix", "project")  #: parts that read the tile, whatever reads the phrase

STRIDE_PX = 4  #: model px per cell of a map: a small nucleus (16 px) has 4 of them
WIDTHS = {"p2": 32, "p4": 64, "p8": 96}  #: channels of the pyramid
WIDTH = 48  #: channels of the mixed features
SIMILAR = 32  #: channels in which features and queries are compared
_HIDDEN, _READ = 16, 128
_TOGETHER = 4  #: phrases that are answered at once: on a tile of 1072 px each holds 14 MB
_SHAPES = ((_HIDDEN, WIDTH + 1), (1, _HIDDEN))  # of the generated convolutions: outputs, inputs
_PARAMETERS = sum(o * i + o for o, i in _SHAPES)


def pyramid_of(embeddings: Embeddings) -> dict[str, Tensor]:
    """The features that are read: p2 pooled to stride 4, p4, p8."""
    extra = embeddings.extra
    return {"p2": F.avg_pool2d(extra["p2"], 2), "p4": extra["p4"], "p8": extra["p8"]}


class MixedPyramid(nn.Module):
    """The pyramid of a tile, mixed to features at stride 4."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce = nn.ModuleDict({name: nn.Conv2d(width, WIDTH, 1) for name, width in WIDTHS.items()})
        self.mix = nn.Sequential(
            nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 3, 1, 1), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 3, 1, 1), nn.ReLU()
        )
        self.project = nn.Conv2d(WIDTH, SIMILAR, 1)

    def features(self, pyramid: Mapping[str, Tensor]) -> Tensor:
        """Mix :func:`pyramid_of` a tile -> (B, 48, H/4, W/4)."""
        size = pyramid["p4"].shape[2:]
        coarse = F.interpolate(self.reduce["p8"](pyramid["p8"]), size=size, mode="bilinear", align_corners=False)
        mixed: Tensor = self.mix(self.reduce["p2"](pyramid["p2"]) + self.reduce["p4"](pyramid["p4"]) + coarse)
        return mixed


class PhraseDecoder(MixedPyramid):
    """Maps of what phrases mean.

    Parameters
    ----------
    width
        Length C of a phrase's vector.
    known
        Number P of phrases that it was trained with.
    """

    def __init__(self, width: int, known: int = 0) -> None:
        super().__init__()
        self.known: Tensor
        self.register_buffer("known", torch.zeros(known, width))  # their vectors
        self.read = nn.Sequential(nn.Linear(width, _READ), nn.ReLU(), nn.Linear(_READ, _READ), nn.ReLU())
        self.anchor = nn.Linear(_READ, SIMILAR)
        self.query = nn.Linear(_READ, _PARAMETERS)
        self.sharpness = nn.Parameter(torch.tensor(8.0))

    def forward(self, features: Tensor, phrases: Tensor) -> Tensor:
        """Maps of K phrases on one tile.

        Parameters
        ----------
        features
            Result of :meth:`features`, (1, 48, h, w).
        phrases
            (K, C), their vectors.

        Returns
        -------
        Tensor
            (K, h, w), logits: positive where a nucleus is meant.
        """
        read = self.read(phrases)
        unit = F.normalize(self.project(features), dim=1).flatten(2)[0]
        similar = F.normalize(self.anchor(read), dim=1) @ unit  # (K, h * w)
        x = torch.cat([features.flatten(2).expand(len(read), -1, -1), similar[:, None]], 1)
        parameters = self.query(read)
        x = F.relu(generated(x, parameters, _SHAPES, 0))
        logits = generated(x, parameters, _SHAPES, 1)[:, 0] + similar * self.sharpness
        return logits.view(len(read), *features.shape[2:])

    def maps(self, embeddings: Embeddings, tile: int, phrases: Tensor) -> Tensor:
        """Maps of K phrases (K, C) on the ``tile``-th of the tiles that were encoded together -> (K, h, w), in [0, 1]."""
        features = self.features({name: level[tile : tile + 1] for name, level in pyramid_of(embeddings).items()})
        return torch.cat([self(features, some).sigmoid() for some in phrases.split(_TOGETHER)])


def share_inside(maps: Tensor, masks: WindowMasks) -> Tensor:
    """How much of each cell maps cover.

    Parameters
    ----------
    maps
        (K, h, w), of the cells' tile, in [0, 1].
    masks
        N masks of the packaged network, on the same device.

    Returns
    -------
    Tensor
        float (N, K): mean of each map inside each mask, in [0, 1].
    """
    cells = round(STRIDE_PX / masks.mask_stride_px)  # of a mask, per cell of a map
    share = F.avg_pool2d((masks.logits > 0).float()[:, None], cells)
    first = torch.zeros(len(share), dtype=torch.long, device=share.device)
    origin = torch.div(masks.origin_xy, STRIDE_PX, rounding_mode="floor")
    inside = windows(maps[None], first, origin, share.shape[-1])
    mean: Tensor = (inside * share).sum((2, 3)) / share.sum((2, 3)).clamp_min(1e-6)
    return mean


class Vocabulary:
    """The phrases that a decoder can read: those that it was trained with, and with the text encoder all others.

    Parameters
    ----------
    decoder
        The decoder.
    text
        How it reads.
    name
        Of the model, in messages.
    """

    reads_text = True
    max_tokens = 1  # a phrase of any length is one vector

    def __init__(self, decoder: PhraseDecoder, text: TextCard, name: str) -> None:
        self.decoder, self.text, self.name = decoder, text, name

    def count_tokens(self, phrase: str) -> int:  # noqa: ARG002
        """Vectors that a phrase is read as."""
        return 1

    def encode_text(self, phrase: str) -> Tensor:
        """Encode a phrase -> float (1, C).

        Raises
        ------
        ConfigError
            It was not trained with the phrase, and its text encoder is not here.
        """
        plain = plain_phrase(phrase)
        if plain in self.text.phrases:
            return self.decoder.known[self.text.phrases.index(plain)][None]
        moved = os.environ.get(PLACE)
        try:
            encoder = open_text_encoder(moved or self.text.encoder)
        except ConfigError as error:
            known = ", ".join(repr(p) for p in sorted(self.text.phrases, key=len)[:4])
            where = "" if self.text.encoder == WORDLLAMA else f"; if it has moved, set {PLACE} to its folder"
            raise ConfigError(
                f"{phrase!r}: not among the {len(self.text.phrases)} phrases that {self.name} learned ({known}, ...); "
                f"others need its text encoder: {error}{where}"
            ) from error
        if encoder.sha256 != self.text.sha256:
            raise ConfigError(
                f"text encoder {encoder.name}: not the one that {self.name} was trained with ({self.text.encoder}, sha256 "
                f"{self.text.sha256[:12]}; this one has {encoder.sha256[:12]}); use that one, or a phrase that {self.name} learned"
            )
        return torch.from_numpy(encoder.encode(plain))[None]

    def doubts(self, phrases: Sequence[str], stain: str, types: int) -> list[str]:
        """Warn of phrases that it was not trained with, of a stain that is not H&E, and of ``types`` that words alone tell apart."""
        doubts = []
        if new := [repr(phrase) for phrase in phrases if plain_phrase(phrase) not in self.text.phrases]:
            learned = ", ".join(self.text.types)
            words = f"{len(self.text.phrases)} phrases for all nuclei{f' and those of {learned}' if learned else ''}"
            doubts.append(
                f"{self.name} was trained with {words}, not with {', '.join(new)}: what new words mean is guessed from similar ones; "
                "look at the result on the slide before you use it"
            )
        if stain != "he":
            doubts.append(
                f"{self.name} learned phrases on H&E, and the slide's stain is {stain}: phrases for types mislead there; use clicks"
            )
        elif types > 1 and self.text.tissue:
            doubts.append(
                f"{self.name} tells types apart by words as it learned them on {self.text.tissue}: check them on other tissue, or click one cell "
                "per type"
            )
        return doubts


def plain_phrase(phrase: str) -> str:
    """A phrase in the form in which phrases are compared and read: lower case, single spaces, ``plasma_cell`` in two words."""
    return " ".join(phrase.lower().replace("_", " ").split())


def generated(x: Tensor, parameters: Tensor, shapes: Sequence[tuple[int, int]], layer: int) -> Tensor:
    """One of the generated 1x1 convolutions of these ``shapes`` (outputs, inputs): (Q, inputs, n) -> (Q, outputs, n)."""
    start = sum(o * i + o for o, i in shapes[:layer])
    outputs, inputs = shapes[layer]
    weight = parameters[:, start : start + outputs * inputs].view(-1, outputs, inputs)
    bias = parameters[:, start + outputs * inputs : start + outputs * inputs + outputs].view(-1, outputs, 1)
    return torch.baddbmm(bias, weight, x)
