"""From phrases to the types that a detector is asked for: each phrase is encoded once for a run, not for each tile."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from wsiseg.errors import ConfigError, SeedsError
from wsiseg.models.contract import detector_of
from wsiseg.records import DescribedType

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from wsiseg.config import RunConfig
    from wsiseg.models.contract import ConceptDetector, PromptableModel
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
        The model has no detector, or reads no text.
    SeedsError
        A phrase has more tokens than the model reads.
    """
    detector = require_detector(model, config)
    if seeds is not None:
        places = [
            (kind.name, kind.color, kind.text, f"{seeds.source}: types[{t}]") for t, kind in enumerate(seeds.types)
        ]
    else:
        places = [(of.name, of.color, (), "") for of in (bank.types if bank is not None else ())]
    types = []
    for name, color, phrases, place in places:
        for number, phrase in enumerate(phrases):
            tokens = detector.count_tokens(phrase)
            if tokens > detector.max_tokens:
                raise SeedsError(
                    f"{place}.text[{number}]: the phrase has {tokens} tokens with its ends; the model reads {detector.max_tokens}; shorten it"
                )
        encoded = tuple(_encode(detector, phrase) for phrase in phrases or (BOXES_ONLY,))
        types.append(DescribedType(name=name, color=color, phrases=phrases, tokens=encoded))
    return tuple(types)


def require_detector(model: PromptableModel, config: RunConfig) -> ConceptDetector:
    """The model's detector.

    Raises
    ------
    ConfigError
        It has none, or one without a tokenizer.
    """
    detector = detector_of(model)
    need = f"--method {config.method}: {config.model}"
    if detector is None:
        kind = "reads no text" if config.method == "text" else "takes no example boxes"
        raise ConfigError(f"{need} {kind}; pass --model with an imported SAM 3, or use another --method")
    if not detector.reads_text:
        raise ConfigError(f"{need} was imported without its tokenizer; import the folder with tokenizer.json again")
    return detector


@torch.inference_mode()
def _encode(detector: ConceptDetector, phrase: str) -> NDArray[np.float32]:
    tokens: NDArray[np.float32] = detector.encode_text(phrase).float().cpu().numpy()
    return tokens
