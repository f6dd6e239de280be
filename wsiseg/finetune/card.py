"""The result: a model file, and the card beside it.

The file is safetensors that ``wsiseg run --model FILE`` takes; its metadata say what network it is, what it was made from and under which licence.
The card repeats that as JSON, with the images, the settings, and the scores before and after.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from safetensors.torch import save

from wsiseg.runtime.atomic import atomic_path, write_json
from wsiseg.runtime.version import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from wsiseg.finetune.data import Dataset


def card_path(out: Path) -> Path:
    """The card that belongs to a model file."""
    return out.with_suffix(".card.json")


def describe_data(data: Dataset | None) -> dict[str, Any] | None:
    """What a card says of a set of images."""
    if data is None or not data.images:
        return None
    return {
        "images": len(data.images),
        "nuclei": data.nuclei,
        "groups": sorted({image.group for image in data.images}),
        "types": list(data.type_names),
        "sha256": data.digest(),
        "files": {image.name: image.digest for image in data.images},
    }


def write_model(out: Path, tensors: Mapping[str, Tensor], note: Mapping[str, Any], card: Mapping[str, Any]) -> None:
    """Write model and card, each whole or not at all.

    Parameters
    ----------
    out
        The model file.
    tensors
        Weights, under the names of the network.
    note
        What ``run --model`` needs to know: network, mpp, licence, source, and what else the network is built from.
    card
        The rest.
    """
    shown = {key: value for key, value in note.items() if key not in {"config", "tokenizer"}}  # pages of the parent's
    content = save(dict(tensors), metadata={"wsiseg": json.dumps(dict(note), sort_keys=True)})
    write_json(card_path(out), {"wsiseg": __version__, "model": shown, **card})
    with atomic_path(out) as partial:
        partial.write_bytes(content)
