"""From phrases to the types that a detector is asked for: each phrase is encoded once for a run, not for each tile."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from wsiseg.errors import ConfigError, SeedsError
from wsiseg.models.contract import detector_of, unable, vocabulary_of
from wsiseg.records import DescribedType

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from wsiseg.config import RunConfig
    from wsiseg.models.contract import PromptableModel, TextReader
    from wsiseg.records import Bank, Seeds

BOXES_ONLY = "visual"  #: the phrase that SAM 3 was trained to see beside boxes without a phrase

#: Sources: means of appendix C and table 1 of the first; tables of July 2026 by the authors of the second (CoNIC, CoNSeP, PanNuke). docs/methods.md.
UNRELIABLE = (
    'phrases find nuclei unreliably in a model that was not tuned for them: "cell" reached a mean mSA of 0.33 on nine histology sets, '
    'automatic prompts 0.40, and "nucleus" was not understood (arXiv:2603.17845); by type, AJI was 0.45, 0.00 and 0.56 on three sets '
    "(authors of arXiv:2605.29429); look at the result on the slide before you use it"
)


def describe_types(
    model: PromptableModel, config: RunConfig, seeds: Seeds | None, bank: Bank | None
) -> tuple[DescribedType, ...]:
    """Encode the phrases of the types.

    Parameters
    ----------
    model
        The network.
    config
        ``method`` (``text`` or ``exemplar``) and ``model``.
    seeds, bank
        The types; ``seeds`` where there are any.

    Returns
    -------
    tuple of DescribedType
        In the order of the seeds. A type without phrases has the one that stands for boxes alone.

    Raises
    ------
    ConfigError
        The model has no detector, or cannot read a phrase.
    SeedsError
        A phrase has more tokens than the model reads.
    """
    reader = require_reader(model, config)
    if seeds is not None:
        places = [
            (kind.name, kind.color, kind.text, f"{seeds.source}: types[{t}]") for t, kind in enumerate(seeds.types)
        ]
    else:
        places = [(of.name, of.color, (), "") for of in (bank.types if bank is not None else ())]
    types = []
    for name, color, phrases, place in places:
        for number, phrase in enumerate(phrases):
            tokens = reader.count_tokens(phrase)
            if tokens > reader.max_tokens:
                raise SeedsError(
                    f"{place}.text[{number}]: the phrase has {tokens} tokens with its ends; the model reads {reader.max_tokens}; shorten it"
                )
        encoded = tuple(_encode(reader, phrase) for phrase in phrases or (BOXES_ONLY,))
        types.append(DescribedType(name=name, color=color, phrases=phrases, tokens=encoded))
    return tuple(types)


def require_reader(model: PromptableModel, config: RunConfig) -> TextReader:
    """What reads the phrases: the model's detector, or for ``--method text`` the vocabulary of its decoder of phrases.

    Raises
    ------
    ConfigError
        It has none, or one without a tokenizer.
    """
    vocabulary = vocabulary_of(model) if config.method == "text" else None
    reader = detector_of(model) or vocabulary
    if reader is None:
        raise unable(config.method, config.model)
    if not reader.reads_text:
        raise ConfigError(
            f"--method {config.method}: {config.model} was imported without its tokenizer; import the folder with tokenizer.json again"
        )
    return reader


def doubts_of(model: PromptableModel, types: Sequence[DescribedType], stain: str) -> list[str]:
    """Warnings about the answers to the phrases of the types, on a slide of this stain."""
    phrases = [phrase for of in types for phrase in of.phrases]
    if not phrases:
        return []
    vocabulary = vocabulary_of(model)
    return [UNRELIABLE] if vocabulary is None else vocabulary.doubts(phrases, stain, len(types))


@torch.inference_mode()
def _encode(reader: TextReader, phrase: str) -> NDArray[np.float32]:
    tokens: NDArray[np.float32] = reader.encode_text(phrase).float().cpu().numpy()
    return tokens
