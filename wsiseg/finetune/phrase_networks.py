"""Networks that answer phrases with maps, as their training sees them: SAM 3's detector, and the decoder of phrases of ``nuclei-compact``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsiseg.errors import ConfigError
from wsiseg.finetune.lora import add_adapters, plain_state
from wsiseg.models import read_tensors
from wsiseg.models.cards import TextCard
from wsiseg.models.nuclei_compact import NucleiCompact
from wsiseg.models.phrases import FEATURES, PREFIX, PhraseDecoder, plain_phrase, pyramid_of
from wsiseg.models.registry import MODELS
from wsiseg.models.text_encoder import open_text_encoder
from wsiseg.models.transformers.detector import Sam3Detector

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from wsiseg.finetune.config import FinetuneConfig
    from wsiseg.models.cards import ModelCard
    from wsiseg.models.transformers.sam3 import Sam3

#: Words that mean nothing here: their most weight beside a phrase, how often there are any, and how many. Without them phrases that were not trained
#: with are misread (Dice of all nuclei on tnbc/dev 0.70 instead of 0.80); with more, so are new names of types (training/README.md).
STRAY, STRAY_SHARE, STRAY_WORDS = 0.6, 0.5, 6
MIN_SCORE, MOST_QUERIES = 0.3, 100  #: queries in a phrase's map: as the library keeps instances; at least the best one


class PhraseNetwork(Protocol):
    """A network that answers phrases with maps.

    Attributes
    ----------
    network
        Parameters that require a gradient are trained.
    side
        Side of a window, px.
    rate, size
        Largest learning rate, and windows per step, where the settings say none.
    intents
        Intents that are asked for in a window, at most.
    """

    side: int
    rate: float
    size: int
    intents: int

    @property
    def network(self) -> nn.Module: ...  # noqa: D102

    def encode(self, phrase: str) -> Tensor:
        """Encode a phrase, without gradient.

        Raises
        ------
        ConfigError
            It is too long.
        """
        ...

    def vary(self, phrases: Sequence[Tensor], random: np.random.Generator) -> list[Tensor]:
        """Encoded phrases as a step of the training sees them."""
        ...

    def look(self, image: NDArray[Any]) -> Any:  # noqa: ANN401
        """What the network sees in a window, uint8 (side, side, 3), once for all phrases."""
        ...

    def answer(self, seen: Any, phrases: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:  # noqa: ANN401
        """Maps (K, h, w), logits, and whether what is meant is there at all (K,), logits, where the network says that."""
        ...

    def tensors(self, phrases: Sequence[str]) -> dict[str, Tensor]:
        """Weights to save, of a training with these phrases."""
        ...


class Sam3Phrases:
    """SAM 3: a pass of its detector per phrase; the map is the pixelwise largest logit of the queries that say there is an instance.

    Everything that answers phrases is trained, whole (as published) or by adapters; the text encoder stays as it is. The tracker, which answers
    points, is not trained, but sees the same trunk: adapt a model for phrases or for points, not one for both.

    Parameters
    ----------
    network
        With a detector, filled.
    config
        ``lora_rank``, ``precision``.
    device
        Where to train.
    """

    rate, size, intents = 1e-4, 1, 1  # the paper's

    def __init__(self, network: Sam3, config: FinetuneConfig, device: torch.device) -> None:
        self.network: nn.Module = network.to(device).eval().requires_grad_(requires_grad=False)
        self.model: Any = network.detector_model
        self.detector = Sam3Detector(self.model, network.recipe.tokenizer)
        self.standardised, self.side, self.device = network.standardised, network.input_px, device
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
        names = ("vision_encoder", "detr_encoder", "detr_decoder", "mask_decoder", "dot_product_scoring")
        parts = [getattr(self.model, name) for name in names]
        if config.lora_rank:
            add_adapters(parts, config.lora_rank)
        else:
            for part in parts:
                part.requires_grad_(requires_grad=True)

    @torch.no_grad()
    def encode(self, phrase: str) -> Tensor:
        """Tokens (L, C)."""
        if (count := self.detector.count_tokens(phrase)) > self.detector.max_tokens:
            raise ConfigError(
                f"--prompts: {phrase!r} has {count} tokens, and the model reads {self.detector.max_tokens}; make it shorter"
            )
        return self.detector.encode_text(phrase).detach()

    def vary(self, phrases: Sequence[Tensor], random: np.random.Generator) -> list[Tensor]:  # noqa: ARG002
        """As they are: the text encoder has seen words enough."""
        return list(phrases)

    def look(self, image: NDArray[Any]) -> tuple[Tensor, ...]:
        """The detector's pyramid."""
        pixels = self.standardised(torch.from_numpy(image).permute(2, 0, 1)[None].to(self.device))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            seen = self.model.get_vision_features(pixels, return_dict=True).fpn_hidden_states
        return self.detector.levels([level.float() for level in seen])

    def answer(self, seen: tuple[Tensor, ...], phrases: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Maps and presence."""
        answers = [self._answer(seen, tokens) for tokens in phrases]
        return torch.stack([logits for logits, _ in answers]), torch.stack([presence for _, presence in answers])

    def _answer(self, seen: tuple[Tensor, ...], tokens: Tensor) -> tuple[Tensor, Tensor]:
        answer = self.detector.answer(seen, tokens)
        kept = answer.scores.detach() > MIN_SCORE
        order = answer.scores.detach().argsort(descending=True)[: max(1, min(int(kept.sum()), MOST_QUERIES))]
        masks = self.model.mask_decoder(
            decoder_queries=answer.queries[None, order],
            backbone_features=list(seen),
            encoder_hidden_states=answer.encoded,
            prompt_features=answer.prompt,
            prompt_mask=None,
        ).pred_masks[0]
        return masks.float().amax(0), answer.presence

    def tensors(self, phrases: Sequence[str]) -> dict[str, Tensor]:  # noqa: ARG002
        """Weights, adapters merged."""
        return plain_state(self.network)


class CompactPhrases:
    """``nuclei-compact`` with a decoder of phrases on its features, which stay as they are: points, outlines and types are those of the parent.

    Parameters
    ----------
    tensors
        Weights of the parent. Training begins with their decoder of phrases, or the package's: with all of it when the text encoder is the same, else
        with its features.
    card
        Of the parent.
    config
        ``text_encoder``, ``seed``.
    device
        Where to train.

    Raises
    ------
    ConfigError
        The text encoder is not there.
    """

    side = 320  # 80 um, some 60 nuclei
    rate, size, intents = 1e-3, 4, 4  # as in training/train_phrases.py; encoding takes most of the time

    def __init__(
        self, tensors: Mapping[str, Tensor], card: ModelCard, config: FinetuneConfig, device: torch.device
    ) -> None:
        self.encoder = open_text_encoder(config.text_encoder)
        self.parent = {name: value for name, value in tensors.items() if not name.startswith(PREFIX)}
        backbone = NucleiCompact()
        backbone.load_state_dict({name: value.float() for name, value in self.parent.items()})
        self.backbone = backbone.ready(device, bf16=False)
        torch.manual_seed(config.seed)
        self.network = PhraseDecoder(self.encoder.width).to(device)
        if card.reading() is None:  # the features of other outlines are near those that the package's decoder reads
            card = MODELS["nuclei-compact"]
            tensors = read_tensors(card.phrases) if card.phrases is not None else {}
        before = card.reading()
        same = before is not None and before.sha256 == self.encoder.sha256
        learned = {name.removeprefix(PREFIX): value for name, value in tensors.items() if name.startswith(PREFIX)}
        kept = {k: v.float() for k, v in learned.items() if same or k.split(".")[0] in FEATURES}
        self.network.load_state_dict(self.network.state_dict() | kept | {"known": self.network.known})
        self.device = device

    def encode(self, phrase: str) -> Tensor:
        """Its vector (C,)."""
        return torch.from_numpy(self.encoder.encode(plain_phrase(phrase))).to(self.device)

    def vary(self, phrases: Sequence[Tensor], random: np.random.Generator) -> list[Tensor]:
        """Some with further words that mean nothing."""
        return list(with_stray_words(torch.stack(list(phrases)), self.encoder.vectors, random))

    @torch.no_grad()
    def look(self, image: NDArray[Any]) -> dict[str, Tensor]:
        """The frozen pyramid."""
        return pyramid_of(self.backbone.encode(torch.from_numpy(image).permute(2, 0, 1)[None].to(self.device)))

    def answer(self, seen: dict[str, Tensor], phrases: Sequence[Tensor]) -> tuple[Tensor, None]:
        """Maps; an absent type is an empty map."""
        return self.network(self.network.features(seen), torch.stack(list(phrases))), None

    @torch.no_grad()
    def tensors(self, phrases: Sequence[str]) -> dict[str, Tensor]:
        """The parent's weights, and the decoder's with the phrases that it knows."""
        known = torch.stack([self.encode(phrase) for phrase in dict.fromkeys(map(plain_phrase, phrases))])
        own = self.network.state_dict() | {"known": known}
        return dict(self.parent) | {PREFIX + name: value.cpu().contiguous() for name, value in own.items()}

    def card(self, phrases: Sequence[str], types: Sequence[str]) -> TextCard:
        """How the result reads phrases."""
        return TextCard(
            encoder=self.encoder.name,
            sha256=self.encoder.sha256,
            width=self.encoder.width,
            phrases=tuple(dict.fromkeys(plain_phrase(phrase) for phrase in phrases)),
            types=tuple(types),
        )


def with_stray_words(phrases: Tensor, words: NDArray[np.floating], random: np.random.Generator) -> Tensor:
    """Phrases (K, C) as if some had further words that mean nothing here: random ones of a text encoder's ``words`` (V, C)."""
    drawn = words[random.integers(len(words), size=(len(phrases), STRAY_WORDS))].astype(np.float32).mean(1)
    drawn /= np.maximum(np.linalg.norm(drawn, axis=1, keepdims=True), 1e-6)
    weight = random.uniform(0, STRAY, (len(phrases), 1)) * (random.random((len(phrases), 1)) < STRAY_SHARE)
    return F.normalize(phrases + torch.from_numpy((weight * drawn).astype(np.float32)).to(phrases), dim=1)


def on_grid(planes: Tensor, shape: tuple[int, int]) -> Tensor:
    """Planes (N, S, S) of 0 and 1 on the coarser grid of a map: 1 where most of a cell is."""
    return (F.adaptive_avg_pool2d(planes[None], shape)[0] >= 0.5).float()
