"""The user's models: imported or downloaded once, kept as safetensors with a card beside each.

::

    $WSISEG_MODELS, or the user's data folder /wsiseg/models
      NAME.safetensors    tensors sam.* and decoder.*, fp32; its metadata hold network, mpp and normalise
      NAME.json           the card: sha256, licence, source, ...; without it the weights are not there
      NAME.part           a download that is not complete yet

Nothing is downloaded but by `download`.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import json
import logging
import math
import os
import re
import secrets
import ssl
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

from wsiseg.errors import ConfigError, WeightsError
from wsiseg.models.cards import ModelCard, file_hash, require_same
from wsiseg.runtime.paths import kind_of, names_in, read_text, readable
from wsiseg.runtime.text import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

logger = logging.getLogger(__name__)

SAM_NETWORK = "wsiseg.models.sam:SamModel"
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
_CHUNK = 1 << 20  # bytes
_PATIENCE = 30  # seconds without an answer
_DAY = 86_400  # seconds


@dataclass(frozen=True)
class Download:
    """A file that its authors publish, and its sha256."""

    address: str
    sha256: str
    architecture: str
    licence: str = "Apache-2.0"
    mpp: float = 0.25


_SAM = "https://dl.fbaipublicfiles.com/segment_anything"
DOWNLOADS = {
    "sam-vit-b": Download(
        f"{_SAM}/sam_vit_b_01ec64.pth", "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912", "ViT-B"
    ),
    "sam-vit-l": Download(
        f"{_SAM}/sam_vit_l_0b3195.pth", "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622", "ViT-L"
    ),
    "sam-vit-h": Download(
        f"{_SAM}/sam_vit_h_4b8939.pth", "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e", "ViT-H"
    ),
}
# PathoSAM: model and instance decoder, as the authors' program fetches them (micro-sam, micro_sam/util.py). No sha256 is published, and whoever owns
# such an address can change what is behind it: the user gets them by hand. Trained on tiles of 512 px, enlarged to 1024.
_SHARE = "https://owncloud.gwdg.de/index.php/s"
BY_HAND = {
    "vit-b-histopathology": (f"{_SHARE}/sBB4H8CTmIoBZsQ/download", f"{_SHARE}/KO9AWqynI7SFOBj/download"),
    "vit-l-histopathology": (f"{_SHARE}/IZgnn1cpBq2PHod/download", f"{_SHARE}/oIs6VSmkOp7XrKF/download"),
    "vit-h-histopathology": (f"{_SHARE}/L7AcvVz7DoWJ2RZ/download", f"{_SHARE}/1qAKxy5H0jgwZvM/download"),
}
_BY_HAND_MPP = 0.125


@dataclass(frozen=True)
class Listing:
    """A model that is available here or for download."""

    name: str
    architecture: str
    mpp: float
    licence: str
    where: str


def models_folder() -> Path:
    """Folder of the user's models: ``$WSISEG_MODELS``, or below the user's data folder."""
    chosen = os.environ.get("WSISEG_MODELS")
    return Path(chosen) if chosen else platformdirs.user_data_path("wsiseg") / "models"


# Cards


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

    from wsiseg.models import MODELS

    for card in MODELS.values():
        with readable(path, WeightsError):
            if kind_of(card.weights, WeightsError) == "file" and path.samefile(card.weights):
                return card
    try:
        with safe_open(path, framework="numpy") as file:
            metadata, keys = file.metadata() or {}, list(file.keys())
    except (SafetensorError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"{path}: not a readable safetensors file ({reason}); pass an undamaged weight file"
        ) from error
    if "wsiseg" in metadata:
        mpp, normalise = _stated(metadata["wsiseg"], path)
        decoder = any(key.startswith("decoder.") for key in keys)
        return ModelCard(
            path.stem, SAM_NETWORK, path, "", "unknown", str(path), mpp, normalise, instance_decoder=decoder
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


def known_card(name: str, folder: Path | None = None) -> ModelCard:
    """The card of a model of the package or of the user.

    Raises
    ------
    WeightsError
        There is none of that name, or it cannot be read.
    """
    from wsiseg.models import MODELS

    card = MODELS.get(name) or find_card(name, folder)
    if card is None:
        raise WeightsError(f"{name}: {explain_missing(name, 'no such model here', folder)}; see `wsiseg models list`")
    return card


def explain_missing(name: str, what: str, folder: Path | None = None) -> str:
    """Explain why a model is missing, and how to get it or what was probably meant: for an error that begins with ``what``."""
    from wsiseg.models import MODELS

    if name in DOWNLOADS or name in BY_HAND:
        how = "fetch it once with" if name in DOWNLOADS else "its authors' files are listed by"
        return f"not downloaded yet; {how} `wsiseg models download {name}`"
    here = [*MODELS, *stored_names(folder)]
    near = difflib.get_close_matches(name.lower(), [*here, *DOWNLOADS, *BY_HAND], n=1)
    return f"{what}; {f'did you mean {near[0]}? ' if near else ''}models here: {', '.join(here)}"


def verify(card: ModelCard) -> None:
    """Compare a model's weights with its card.

    Raises
    ------
    WeightsError
        They differ, or the file cannot be read.
    """
    try:
        found = file_hash(card.weights)
    except OSError as error:
        raise WeightsError(
            f"{card.weights}: cannot be read ({error.strerror or error}); import or download {card.name} again"
        ) from error
    if found != card.sha256:
        raise WeightsError(
            f"{card.weights}: sha256 differs from the card of {card.name}; the file is damaged: import or download it again"
        )


def verify_all(names: tuple[str, ...] = (), folder: Path | None = None) -> dict[str, str]:
    """Verify models of the package and of the user.

    Parameters
    ----------
    names
        Which; all when empty.
    folder
        Folder of the user's models.

    Returns
    -------
    dict
        Name -> what is wrong with it, or an empty string.
    """
    from wsiseg.models import MODELS

    problems = {}
    for name in names or [*MODELS, *stored_names(folder)]:
        try:
            verify(known_card(name, folder))
        except WeightsError as error:
            problems[name] = str(error)
        else:
            problems[name] = ""
    return problems


def catalogue(folder: Path | None = None) -> list[Listing]:
    """Every model that is in the package, was imported, or can be fetched; in this order."""
    from wsiseg.models import MODELS

    stored = stored_cards(folder)
    here = {card.name for card in stored}
    rows = [Listing(c.name, c.architecture, c.mpp, c.licence, "in the package") for c in MODELS.values()]
    rows += [Listing(c.name, c.architecture, c.mpp, c.licence, "imported") for c in stored]
    rows += [
        Listing(name, d.architecture, d.mpp, d.licence, "to download")
        for name, d in DOWNLOADS.items()
        if name not in here
    ]
    rows += [
        Listing(name, f"ViT-{name[4].upper()}", _BY_HAND_MPP, "see its authors", "to get by hand")
        for name in BY_HAND
        if name not in here
    ]
    return rows


# Importing


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
    _require_free(name, folder, overwrite=overwrite)
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
        architecture, hashed = recognise(checkpoint.sam).name, file_hash(partial)
        card = ModelCard(
            name,
            SAM_NETWORK,
            weights,
            hashed,
            licence,
            source,
            float(mpp),
            normalise,
            architecture,
            bool(checkpoint.decoder),
        )
        card_path.unlink(missing_ok=True)  # an old card must never be paired with new weights
    with _temporary(card_path) as partial:
        content = {key: getattr(card, key) for key in _CARD_KEYS} | {"weights": weights.name}
        partial.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    return card


def _require_free(name: str, folder: Path, *, overwrite: bool) -> None:
    from wsiseg.models import MODELS

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
    partial = path.parent / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{path.name}.*.partial"):
            if time.time() - left.stat().st_mtime > _DAY:  # of a process that was killed
                left.unlink()
        yield partial
        with partial.open("rb+") as stream:
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _unwritable(path: Path, error: OSError) -> WeightsError:
    reason = " ".join((error.strerror or str(error)).split())
    return WeightsError(
        f"{path}: cannot be written ({reason}); make room, or name a folder you may write in the environment variable WSISEG_MODELS"
    )


# Downloading


def download(
    name: str,
    *,
    folder: Path | None = None,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    on_note: Callable[[str], None] | None = None,
    entry: Download | None = None,
) -> ModelCard:
    """Fetch a published checkpoint, check it, and import it.

    A partial download is kept, and the next call resumes it.

    Parameters
    ----------
    name
        One of `DOWNLOADS`; the model is kept under it.
    folder
        Folder to store into; the user's by default.
    overwrite
        Replace a model of this name.
    on_progress
        Called with bytes done and bytes in all (0: unknown).
    on_note
        As in `import_model`.
    entry
        Download to use instead of ``DOWNLOADS[name]``.

    Returns
    -------
    ModelCard
        Card of the model, ready for ``--model``.

    Raises
    ------
    ConfigError
        The name is not allowed.
    WeightsError
        There is no such download, it cannot be reached, or its sha256 differs; or as in `import_model`.
    """
    folder = folder or models_folder()
    entry = entry or _entry(name)
    _require_free(name, folder, overwrite=overwrite)
    part = folder / f"{name}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _fetch(entry.address, part, on_progress)
        if file_hash(part) != entry.sha256:
            part.unlink()
            raise WeightsError(
                f"{entry.address}: the download's sha256 differs from the published one, and the file was removed; run the command again"
            )
    except OSError as error:
        raise _unwritable(part, error) from error
    card = import_model(
        part,
        name,
        mpp=entry.mpp,
        licence=entry.licence,
        source=entry.address,
        overwrite=overwrite,
        folder=folder,
        on_note=on_note,
    )
    with contextlib.suppress(OSError):
        part.unlink()
    return card


def _entry(name: str) -> Download:
    if name in DOWNLOADS:
        return DOWNLOADS[name]
    if name in BY_HAND:
        raise WeightsError(
            f"{name}: no sha256 of it is published, so it is not downloaded; get {BY_HAND[name][0]} and {BY_HAND[name][1]} by hand, then "
            f"`wsiseg models import MODEL --decoder DECODER --name {name} --mpp {_BY_HAND_MPP}`"
        )
    there = ", ".join(DOWNLOADS)
    raise WeightsError(
        f"{name}: no download of this name; available are {there}; get others by hand, then `wsiseg models import`"
    )


def _fetch(address: str, part: Path, on_progress: Callable[[int, int], None] | None) -> None:
    """Fetch the bytes that ``part`` does not have yet."""
    done = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "wsiseg"} | ({"Range": f"bytes={done}-"} if done else {})
    request = urllib.request.Request(address, headers=headers)  # noqa: S310 - addresses are ours, and https
    total = 0
    try:
        with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:  # noqa: S310 - addresses are ours, and https
            goes_on = answer.status == 206
            done = done if goes_on else 0
            length = int(answer.headers.get("Content-Length") or 0)
            total = length and done + length
            with part.open("ab" if goes_on else "wb") as stream:
                while chunk := answer.read(_CHUNK):
                    stream.write(chunk)
                    done += len(chunk)
                    if on_progress:
                        on_progress(done, total)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # there is nothing after what we have: the sha256 decides
            return
        raise WeightsError(f"{address}: the server answered {error.code} {error.reason}; {_BY_ANOTHER_WAY}") from error
    except (urllib.error.URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
        reason = " ".join(str(getattr(error, "reason", "") or error).split()) or type(error).__name__
        raise WeightsError(f"{address}: cannot be reached ({reason}); {_BY_ANOTHER_WAY}") from error
    if done < total:
        raise WeightsError(
            f"{address}: the connection ended after {done} of {total} bytes; run the command again to resume"
        )


_BY_ANOTHER_WAY = "try again later, or get the file on another machine and use `wsiseg models import`"
