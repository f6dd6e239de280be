"""The user's models: imported once, kept as safetensors with a card beside each.

::

    $WSISEG_MODELS, or the user's data folder /wsiseg/models
      NAME.safetensors    tensors sam.* and decoder.*, fp32; its metadata hold network, mpp and normalise
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
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

from wsiseg.errors import ConfigError, RunError, WeightsError
from wsiseg.models.cards import ModelCard, file_hash, require_same
from wsiseg.models.registry import MODELS, SAM_NETWORK
from wsiseg.runtime.atomic import atomic_path, is_abandoned
from wsiseg.runtime.paths import kind_of, names_in, read_text, readable
from wsiseg.runtime.text import did_you_mean, first_line

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
    sound = (
        isinstance(content, dict)
        and content.keys() == _CARD_KEYS.keys()
        and all(isinstance(content[k], t) for k, t in _CARD_KEYS.items())
    )
    # Paths and network are code and files of ours, never of a card's choice.
    if (
        not sound
        or content["name"] != name
        or content["weights"] != f"{name}.safetensors"
        or content["network"] != SAM_NETWORK
    ):
        raise WeightsError(f"{path}: not a card that wsiseg wrote; import or download the model again with --overwrite")
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
        A file of `import_model`, which states what it is; or weights of the bundled network, which do not.

    Raises
    ------
    WeightsError
        Not safetensors, or a SAM checkpoint that has not been imported.
    """
    from safetensors import SafetensorError, safe_open

    for card in MODELS.values():
        with readable(path, WeightsError):
            if kind_of(card.weights, WeightsError) == "file" and path.samefile(card.weights):
                return card
    try:
        with safe_open(path, framework="numpy") as file:
            metadata, keys = file.metadata() or {}, list(file.keys())
    except (SafetensorError, OSError, ValueError) as error:
        reason = first_line(error)
        raise WeightsError(
            f"{path}: not a readable safetensors file ({reason}); pass an undamaged weight file"
        ) from error
    if "wsiseg" in metadata:
        mpp, normalise = _stated(metadata["wsiseg"], path)
        decoder = any(key.startswith("decoder.") for key in keys)
        return ModelCard(
            name=path.stem,
            network=SAM_NETWORK,
            weights=path,
            sha256="",
            licence="unknown",
            source=str(path),
            mpp=mpp,
            normalise=normalise,
            instance_decoder=decoder,
        )
    if any("image_encoder." in key for key in keys):
        raise WeightsError(
            f"{path}: a SAM checkpoint that does not say its scale; convert it: wsiseg models import {path} --name NAME --mpp UM"
        )
    return replace(MODELS["nuclei-compact"], weights=path, sha256="", licence="unknown", source=str(path))


def _stated(text: str, path: Path) -> tuple[float, str]:
    """Scale and normalisation in the metadata of a file."""
    try:
        content = json.loads(text)
        network, mpp, normalise = content["network"], float(content["mpp"]), content["normalise"]
    except (ValueError, TypeError, KeyError):
        network, mpp, normalise = "", math.nan, ""
    if network != "sam" or not MPP_RANGE[0] <= mpp <= MPP_RANGE[1] or normalise not in NORMALISE:
        raise WeightsError(
            f"{path}: its metadata (wsiseg: {' '.join(text.split())[:80]}) belong to another version; import the checkpoint again"
        )
    return mpp, normalise


def import_model(
    file: Path,
    name: str,
    *,
    decoder: Path | None = None,
    mpp: float = 0.25,
    licence: str = "unknown",
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
        The checkpoint (see `wsiseg.models.sam.checkpoints`).
    name
        What ``--model`` will take.
    decoder
        File of the instance decoder, where that is apart.
    mpp
        Microns per px of the images that the model takes, as it was trained.
    licence, source
        Licence and source of the weights; kept in the card.
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

    from wsiseg.models.sam.checkpoints import read_checkpoint, recognise
    from wsiseg.models.sam.model import SamModel

    checkpoint = read_checkpoint(file, decoder)
    found = {f"sam.{k}": v.shape for k, v in checkpoint.sam.items()} | {
        f"decoder.{k}": v.shape for k, v in checkpoint.decoder.items()
    }
    require_same(
        SamModel.tensors_of(checkpoint.sam, checkpoint.decoder),
        found,
        "SAM" + " with an instance decoder" * bool(checkpoint.decoder),
        file,
    )
    if on_note:
        for note in checkpoint.notes:
            on_note(note)
    tensors = {f"sam.{key}": value for key, value in checkpoint.sam.items()} | {
        f"decoder.{key}": value for key, value in checkpoint.decoder.items()
    }
    weights, card_path = folder / f"{name}.safetensors", folder / f"{name}.json"
    with _temporary(weights) as partial:
        _save(tensors, partial, {"network": "sam", "mpp": mpp, "normalise": normalise})
        card = ModelCard(
            name=name,
            network=SAM_NETWORK,
            weights=weights,
            sha256=file_hash(partial),
            licence=licence,
            source=source,
            mpp=float(mpp),
            normalise=normalise,
            architecture=recognise(checkpoint.sam).name,
            instance_decoder=bool(checkpoint.decoder),
        )
        card_path.unlink(missing_ok=True)  # an old card must never be paired with new weights
    with _temporary(card_path) as partial:
        content = {key: getattr(card, key) for key in _CARD_KEYS} | {"weights": weights.name}
        partial.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    return card


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

    # copies: tensors of a checkpoint may share their numbers
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
