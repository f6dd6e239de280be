"""Catalogue of all models: the package's, the user's, and those that can be fetched; looked up, listed and verified by name."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wsiseg.errors import WeightsError
from wsiseg.models.cards import file_hash
from wsiseg.models.registry import BY_HAND, DOWNLOADS, MODELS
from wsiseg.models.store import find_card, stored_cards, stored_names

if TYPE_CHECKING:
    from pathlib import Path

    from wsiseg.models.cards import ModelCard


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A model that is available here or for download."""

    name: str
    architecture: str
    mpp: float
    licence: str
    where: str


def known_card(name: str, folder: Path | None = None) -> ModelCard:
    """The card of a model of the package or of the user.

    Raises
    ------
    WeightsError
        There is none of that name, or it cannot be read.
    """
    card = MODELS.get(name) or find_card(name, folder)
    if card is None:
        raise WeightsError(f"{name}: {explain_missing(name, 'no such model here', folder)}; see `wsiseg models list`")
    return card


def explain_missing(name: str, what: str, folder: Path | None = None) -> str:
    """Explain why a model is missing, and how to get it or what was probably meant: for an error that begins with ``what``."""
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
    stored = stored_cards(folder)
    here = {card.name for card in stored}
    rows = [
        Listing(name=c.name, architecture=c.architecture, mpp=c.mpp, licence=c.licence, where="in the package")
        for c in MODELS.values()
    ]
    rows += [
        Listing(name=c.name, architecture=c.architecture, mpp=c.mpp, licence=c.licence, where="imported")
        for c in stored
    ]
    rows += [
        Listing(name=name, architecture=d.architecture, mpp=d.mpp, licence=d.licence, where="to download")
        for name, d in DOWNLOADS.items()
        if name not in here
    ]
    rows += [
        Listing(name=name, architecture=b.architecture, mpp=b.mpp, licence="see its authors", where="to get by hand")
        for name, b in BY_HAND.items()
        if name not in here
    ]
    return rows
