"""Download of published checkpoints: fetched, resumed where a connection broke, checked by sha256, and imported."""

from __future__ import annotations

import contextlib
import ssl
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import TYPE_CHECKING

from wsiseg.errors import WeightsError
from wsiseg.models.cards import file_hash
from wsiseg.models.registry import BY_HAND, DOWNLOADS, ON_HUB
from wsiseg.models.store import import_model, models_folder, require_free_name, unwritable

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from wsiseg.models.cards import ModelCard
    from wsiseg.models.registry import Download

_CHUNK = 1 << 20  # bytes
_TIMEOUT = 30  # seconds without an answer
_BY_ANOTHER_WAY = "try again later, or get the file on another machine and use `wsiseg models import`"


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
        One of `DOWNLOADS` (registry.py); the model is kept under it.
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
    require_free_name(name, folder, overwrite=overwrite)
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
        raise unwritable(part, error) from error
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
    by_hand = BY_HAND.get(name)
    if by_hand:
        raise WeightsError(
            f"{name}: no sha256 of it is published, so it is not downloaded; get {by_hand.model} and {by_hand.decoder} by hand, then "
            f"`wsiseg models import MODEL --decoder DECODER --name {name} --mpp {by_hand.mpp}`"
        )
    on_hub = ON_HUB.get(name)
    if on_hub:
        first = (
            f"accept its licence at https://huggingface.co/{on_hub.repository}, `hf auth login`, then " * on_hub.gated
        )
        raise WeightsError(
            f"{name}: is fetched with the hub's own tool, which comes with the extra `transformers`; {first}"
            f"`hf download {on_hub.repository} --exclude '*.pt' --local-dir {name}`, then "
            f"`wsiseg models import {name} --name {name} --mpp {on_hub.mpp}`"
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
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:  # noqa: S310 - addresses are ours, and https
            resumed = answer.status == 206
            done = done if resumed else 0
            length = int(answer.headers.get("Content-Length") or 0)
            total = length and done + length
            with part.open("ab" if resumed else "wb") as stream:
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
