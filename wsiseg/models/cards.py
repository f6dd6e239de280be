"""Model cards: what a model is, where its weights are, and their licence."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from wsiseg.errors import WeightsError
from wsiseg.runtime.text import first_line

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class TextCard:
    """How a model whose decoder reads phrases reads them.

    Attributes
    ----------
    encoder, sha256
        The text encoder that it was trained with (`wsiseg.models.text_encoder`), and its sha256.
    width
        Length of a phrase's vector.
    phrases
        Those that it was trained with: they are read without the encoder.
    types
        What they mean, besides all nuclei.
    tissue
        Tissue that the types were learned on, where that is known.
    """

    encoder: str
    sha256: str
    width: int
    phrases: tuple[str, ...]
    types: tuple[str, ...]
    tissue: str = ""


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """Card of a model.

    Attributes
    ----------
    name
        What ``--model`` takes.
    network
        ``module:class`` of the network that the weights belong to.
    weights
        The safetensors file.
    sha256
        sha256 of that file, hexadecimal.
    licence, source
        Licence and source of the weights.
    mpp
        Microns per model px.
    normalise
        ``none``, or ``tile-minmax``: each channel of a tile is stretched to 0 .. 255 first.
    architecture
        In words: ``ViT-B``.
    instance_decoder
        The weights hold a decoder of instance maps too.
    prompts
        What it can be asked with: ``points``, ``boxes``, ``text``, ``exemplars``.
    input_px
        Side of the only tile that it takes, model px; 0: any.
    parameters
        Number of weights; 0: not counted.
    text
        How it reads phrases, where that is part of the weights; ``None`` for models that bring a text encoder of their own.
    phrases, phrases_sha256
        Weights of its decoder of phrases, where they are a file of their own, which says how it reads them; sha256 of that file.
    """

    name: str
    network: str
    weights: Path
    sha256: str
    licence: str
    source: str
    mpp: float
    normalise: str = "none"
    architecture: str = ""
    instance_decoder: bool = False
    prompts: tuple[str, ...] = ("points", "boxes")
    input_px: int = 0
    parameters: int = 0
    text: TextCard | None = None
    phrases: Path | None = None
    phrases_sha256: str = ""

    def reading(self) -> TextCard | None:
        """How it reads phrases, from wherever that is stated.

        Raises
        ------
        WeightsError
            The decoder's file is damaged.
        """
        if self.phrases is None:
            return self.text
        note = read_note(self.phrases) or {}
        return text_card(note.get("text"), self.phrases)


def text_card(stated: Any, path: Path) -> TextCard:  # noqa: ANN401
    """What the metadata of a weight file say of phrases, checked.

    Raises
    ------
    WeightsError
        They are not of this version.
    """
    kinds = {"encoder": str, "sha256": str, "width": int, "phrases": list, "types": list, "tissue": str}
    sound = isinstance(stated, dict) and stated.keys() | {"tissue"} == kinds.keys()
    sound = sound and all(isinstance(value, kinds[key]) for key, value in stated.items())
    if not sound or not all(isinstance(entry, str) for key in ("phrases", "types") for entry in stated[key]):
        raise foreign_note(path, json.dumps(stated, sort_keys=True))
    return TextCard(**{**stated, "phrases": tuple(stated["phrases"]), "types": tuple(stated["types"])})


def read_note(path: Path) -> dict[str, Any] | None:
    """What `wsiseg models import` wrote into a safetensors file beside the tensors; ``None`` when it did not make the file.

    Raises
    ------
    WeightsError
        Not safetensors, or the note is not one of wsiseg's.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get("wsiseg")
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(
            f"{path}: not a readable safetensors file ({first_line(error)}); pass an undamaged weight file"
        ) from error
    if text is None:
        return None
    try:
        note = json.loads(text)
    except ValueError:
        note = None
    if not isinstance(note, dict):
        raise foreign_note(path, text)
    return note


def foreign_note(path: Path, text: str) -> WeightsError:
    """Make the error for a note in a weight file that this version cannot use."""
    shown = " ".join(text.split())[:80]
    return WeightsError(
        f"{path}: its metadata (wsiseg: {shown}) belong to another version; import the checkpoint again"
    )


def file_hash(path: Path) -> str:
    """sha256 of a file, hexadecimal; of a file that has not changed since, without reading it again."""
    facts = path.stat()
    return _digest(path, facts.st_size, facts.st_mtime_ns)


@lru_cache(maxsize=16)
def _digest(path: Path, size: int, changed: int) -> str:  # noqa: ARG001
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def require_same(
    wanted: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]], network: str, path: Path
) -> None:
    """Refuse a file whose tensors (name -> shape) are not those of a network.

    Raises
    ------
    WeightsError
        Tensors are missing, unexpected or misshapen; the message has their number and the first of each.
    """
    shapes = [k for k in wanted.keys() & found.keys() if tuple(wanted[k]) != tuple(found[k])]
    wrong = (
        (wanted.keys() - found.keys(), "missing"),
        (found.keys() - wanted.keys(), "unexpected"),
        (shapes, "misshapen"),
    )
    parts = [f"{len(names)} {what} (first: {min(names)})" for names, what in wrong if names]
    if parts:
        raise WeightsError(
            f"{path}: not weights of {network}: {', '.join(parts)} tensors; pass a file made for this network"
        )
