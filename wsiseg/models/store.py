"""The user's models: imported once, kept as safetensors with a card beside each.

::

    $WSISEG_MODELS, or the user's data folder /wsiseg/models
      NAME.safetensors    the tensors; its metadata hold network, mpp, normalise and, of models from the hub, their configuration
      NAME.json           the card: sha256, licence, source, ...; without it the weights are not there
      NAME.part           a download that is not complete yet (download.py)
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

from wsiseg.errors import ConfigError, RunError, WeightsError
from wsiseg.models.cards import ModelCard, file_hash, foreign_note, read_note, require_same, text_card
from wsiseg.models.registry import MODELS, NETWORKS
from wsiseg.runtime.atomic import atomic_path, is_abandoned
from wsiseg.runtime.paths import kind_of, names_in, read_text, readable
from wsiseg.runtime.text import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

logger = logging.getLogger(__name__)

NORMALISE = ("none", "tile-minmax")
MPP_RANGE = (0.05, 2.0)
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_CARD_KEYS = {
    "name": str,
    "network": str,
    "weights": str,
    "sha256": str,
    "licence": str,
    "source": str,
    "mpp": float,
    "normalise": str,
    "architecture": str,
    "instance_decoder": bool,
}
_LATER_KEYS = {"prompts": list, "input_px": int, "parameters": int}  # cards of earlier versions lack them


def models_folder() -> Path:
    """Folder of the user's models: ``$WSISEG_MODELS``, or below the user's data folder."""
    chosen = os.environ.get("WSISEG_MODELS")
    return Path(chosen) if chosen else platformdirs.user_data_path("wsiseg") / "models"


def stored_names(folder: Path | None = None) -> list[str]:
    """Names that have a card in the folder, readable or not; sorted."""
    folder = folder or models_folder()
    stems = (name.removesuffix(".json") for name in names_in(folder, WeightsError) if name.endswith(".json"))
    return sorted(stem for stem in stems if _NAME.fullmatch(stem))


def stored_cards(folder: Path | None = None) -> list[ModelCard]:
    """Cards of the user's models, by name. A card that cannot be read is left out with a warning."""
    cards = []
    for name in stored_names(folder):
        try:
            card = find_card(name, folder)
        except WeightsError as error:
            logger.warning("%s", error)
            continue
        if card:
            cards.append(card)
    return cards


def find_card(name: str, folder: Path | None = None) -> ModelCard | None:
    """The card of one of the user's models; ``None`` when there is none of that name.

    Raises
    ------
    WeightsError
        The card cannot be read, or its weights are gone.
    """
    if not _NAME.fullmatch(name):
        return None
    path = (folder or models_folder()) / f"{name}.json"
    try:
        content = json.loads(read_text(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{path}: the card cannot be read ({error}); import or download the model again with --overwrite"
        ) from error
    known = _CARD_KEYS | _LATER_KEYS
    sound = (
        isinstance(content, dict)
        and _CARD_KEYS.keys() <= content.keys() <= known.keys()
        and all(isinstance(value, known[key]) for key, value in content.items())
        and all(isinstance(prompt, str) for prompt in content.get("prompts", ()))
    )
    # Paths and network are code and files of ours, never of a card's choice.
    if (
        not sound
        or content["name"] != name
        or content["weights"] != f"{name}.safetensors"
        or content["network"] not in NETWORKS.values()
    ):
        raise WeightsError(f"{path}: not a card that wsiseg wrote; import or download the model again with --overwrite")
    if "prompts" in content:
        content["prompts"] = tuple(content["prompts"])
    card = ModelCard(**{**content, "weights": path.parent / content["weights"]})
    if kind_of(card.weights, WeightsError) != "file":
        raise WeightsError(
            f"{card.weights}: the weights of {name} are missing; import or download the model again with --overwrite"
        )
    return card


def card_of_file(path: Path) -> ModelCard:
    """The card of a safetensors file that is given by its path; its sha256 is empty, since none is stated.

    Parameters
    ----------
    path
        A file of `import_model` or of `wsiseg finetune`, which states what it is; or weights of the bundled network, which do not.

    Raises
    ------
    WeightsError
        Not safetensors, or a SAM checkpoint that has not been imported.
    """
    from safetensors import safe_open

    for card in MODELS.values():
        with readable(path, WeightsError):
            if kind_of(card.weights, WeightsError) == "file" and path.samefile(card.weights):
                return card
    note = read_note(path)
    with safe_open(path, framework="numpy") as file:
        keys = list(file.keys())
    if note is not None:
        return ModelCard(
            name=path.stem,
            weights=path,
            sha256="",
            licence=str(note.get("licence", "unknown")),
            source=str(note.get("source", path)),
            instance_decoder=note.get("network") == "nuclei-compact" or any(key.startswith("decoder.") for key in keys),
            **_stated(note, path),
        )
    if any("image_encoder." in key for key in keys):
        raise WeightsError(
            f"{path}: a SAM checkpoint that does not say its scale; convert it: wsiseg models import {path} --name NAME --mpp UM"
        )
    own = replace(MODELS["nuclei-compact"], weights=path, sha256="", licence="unknown", source=str(path))
    return replace(
        own, phrases=None, phrases_sha256="", prompts=("points", "boxes")
    )  # those were learned on other features


def _stated(note: dict[str, Any], path: Path) -> dict[str, Any]:
    """Fields of the card in the metadata of a file."""
    try:
        networks = NETWORKS | {name: card.network for name, card in MODELS.items()}
        fields = {"network": networks[note["network"]], "mpp": float(note["mpp"]), "normalise": note["normalise"]}
        fields |= {"prompts": tuple(note["prompts"])} if "prompts" in note else {}
        fields |= {key: note[key] for key in ("architecture", "input_px", "parameters") if key in note}
        fields |= {"text": text_card(note["text"], path)} if "text" in note else {}
        sound = MPP_RANGE[0] <= fields["mpp"] <= MPP_RANGE[1] and fields["normalise"] in NORMALISE
    except (ValueError, TypeError, KeyError):
        sound = False
    if not sound:
        raise foreign_note(path, json.dumps(note, sort_keys=True))
    return fields


def import_model(
    file: Path,
    name: str,
    *,
    decoder: Path | None = None,
    mpp: float = 0.25,
    licence: str = "",
    source: str = "",
    normalise: str = "none",
    overwrite: bool = False,
    folder: Path | None = None,
    on_note: Callable[[str], None] | None = None,
) -> ModelCard:
    """Convert a checkpoint of the SAM family and keep it under a name.

    Parameters
    ----------
    file
        The checkpoint (see `wsiseg.models.sam.checkpoints`), or a folder from the Hugging Face hub (`wsiseg.models.transformers.folders`).
    name
        What ``--model`` will take.
    decoder
        File of the instance decoder, where that is apart.
    mpp
        Microns per px of the images that the model takes, as it was trained.
    licence, source
        Licence and source of the weights, kept in the card; empty: what the folder states, or ``unknown`` and the path.
    normalise
        ``none`` or ``tile-minmax``: what the model expects to be done to a tile.
    overwrite
        Replace a model of this name.
    folder
        Folder to store into; the user's by default.
    on_note
        Called with each remark on what was left out of the checkpoint.

    Returns
    -------
    ModelCard
        Card of the model, ready for ``--model``.

    Raises
    ------
    ConfigError
        Name, mpp or normalise are not allowed.
    WeightsError
        The checkpoint cannot be used, the name is taken, or the folder cannot be written.
    """
    folder = folder or models_folder()
    require_free_name(name, folder, overwrite=overwrite)
    if not math.isfinite(mpp) or not MPP_RANGE[0] <= mpp <= MPP_RANGE[1]:
        raise ConfigError(
            f"mpp {mpp:g}: must lie between {MPP_RANGE[0]:g} and {MPP_RANGE[1]:g}, in microns per pixel; 40x is about 0.25"
        )
    if normalise not in NORMALISE:
        raise ConfigError(
            f"normalise {normalise}: unknown; {did_you_mean(normalise, NORMALISE)}choose from {', '.join(NORMALISE)}"
        )

    read = _from_folder if kind_of(file, WeightsError) == "folder" else _from_checkpoint
    converted = read(file, decoder)
    for note in converted.notes:
        if on_note:
            on_note(note)
    weights, card_path = folder / f"{name}.safetensors", folder / f"{name}.json"
    facts = {**converted.facts, "parameters": sum(value.numel() for value in converted.tensors.values())}
    stated = {"network": converted.network, "mpp": mpp, "normalise": normalise}
    if (
        converted.recipe
    ):  # a SAM tells the rest by its tensors, and its file keeps the hash that earlier versions gave it
        stated |= {**facts, **converted.recipe}
    with _temporary(weights) as partial:
        _save(converted.tensors, partial, stated)
        card = ModelCard(
            name=name,
            network=NETWORKS[converted.network],
            weights=weights,
            sha256=file_hash(partial),
            licence=licence or converted.licence or "unknown",
            source=source or converted.source or str(file),
            mpp=float(mpp),
            normalise=normalise,
            instance_decoder=converted.instance_decoder,
            **facts,
        )
        card_path.unlink(missing_ok=True)  # an old card must never be paired with new weights
    with _temporary(card_path) as partial:
        content = {key: getattr(card, key) for key in (*_CARD_KEYS, *_LATER_KEYS)} | {"weights": weights.name}
        partial.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    return card


@dataclass(frozen=True, kw_only=True)
class _Converted:
    """A checked model on its way into the store. ``facts``: fields of its card; ``recipe``: what its network needs besides tensors."""

    network: str
    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    notes: tuple[str, ...]
    recipe: dict[str, Any] = field(default_factory=dict)
    instance_decoder: bool = False
    licence: str = ""
    source: str = ""


def _from_checkpoint(file: Path, decoder: Path | None) -> _Converted:
    from wsiseg.models.sam.checkpoints import read_checkpoint

    checkpoint = read_checkpoint(file, decoder)
    return _from_sam(checkpoint.sam, checkpoint.decoder, checkpoint.notes, file)


def _from_folder(folder: Path, decoder: Path | None) -> _Converted:
    from wsiseg.models.transformers.folders import read_folder

    if decoder is not None:
        raise ConfigError(
            f"--decoder: belongs to a SAM checkpoint that is one file; {folder} is a folder: leave it out"
        )
    found = read_folder(folder)
    if found.recipe is None:
        converted = _from_sam(found.tensors, {}, found.notes, folder)
        return replace(converted, licence=found.licence, source=found.source)
    return _Converted(
        network=found.kind,
        tensors=found.tensors,
        facts=found.facts,
        notes=found.notes,
        recipe=found.recipe.note(),
        licence=found.licence,
        source=found.source,
    )


def _from_sam(sam: dict[str, Tensor], decoder: dict[str, Tensor], notes: tuple[str, ...], file: Path) -> _Converted:
    """A SAM, and its instance decoder if it has one, with all their tensors."""
    from wsiseg.models.sam.checkpoints import recognise
    from wsiseg.models.sam.model import SamModel

    tensors = {f"sam.{key}": value for key, value in sam.items()} | {
        f"decoder.{key}": value for key, value in decoder.items()
    }
    try:
        architecture = recognise(sam)
    except WeightsError as error:
        raise WeightsError(f"{file}: {error}") from error
    require_same(
        SamModel.tensors_of(sam, decoder),
        {key: value.shape for key, value in tensors.items()},
        "SAM" + " with an instance decoder" * bool(decoder),
        file,
    )
    return _Converted(
        network="sam",
        tensors=tensors,
        facts={
            "architecture": architecture.name,
            "prompts": ("points", "boxes"),
            "input_px": architecture.grid * architecture.patch,
        },
        notes=notes,
        instance_decoder=bool(decoder),
    )


def require_free_name(name: str, folder: Path, *, overwrite: bool) -> None:
    """Refuse a name that is not allowed, or that another model has.

    Raises
    ------
    ConfigError
        The name is not allowed, or belongs to a model of the package.
    WeightsError
        The user has a model of this name, and ``overwrite`` is not set.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"name {name!r}: not allowed; use a-z, 0-9, dots, hyphens and underscores, and begin with a letter or digit"
        )
    if name in MODELS:
        raise ConfigError(f"name {name}: belongs to a model of the package; choose another")
    if kind_of(folder / f"{name}.json", WeightsError) != "nothing" and not overwrite:
        raise WeightsError(f"{name}: a model of this name already exists; choose another name, or pass --overwrite")


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, Any]) -> None:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = tensors
    if metadata["network"] == "sam":  # copies: tensors of a checkpoint may share their numbers
        plain = {
            key: value.to(torch.float32 if value.is_floating_point() else value.dtype, copy=True).contiguous()
            for key, value in tensors.items()
        }
    path.touch()
    mode = path.stat().st_mode  # safetensors writes for the owner only
    try:
        save_file(plain, path, metadata={"wsiseg": json.dumps(metadata, sort_keys=True)})
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error)) from error
    path.chmod(mode)


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Temporary name that becomes ``path`` when the block succeeds, so that ``path`` is complete or absent."""
    try:
        for left in path.parent.glob(f".{path.name}.*.partial"):
            if is_abandoned(left):
                left.unlink(missing_ok=True)
        with atomic_path(path) as partial:
            yield partial
    except RunError as error:
        if isinstance(error.__cause__, OSError):
            raise unwritable(path, error.__cause__) from error
        raise WeightsError(str(error)) from error
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> WeightsError:
    """Make the error for a file of the store that cannot be written."""
    reason = " ".join((error.strerror or str(error)).split())
    return WeightsError(
        f"{path}: cannot be written ({reason}); make room, or name a folder you may write in the environment variable WSISEG_MODELS"
    )
