"""Catalogue of all models: the package's, the user's, and those that can be fetched; looked up, listed and verified by name."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wsiseg.errors import WeightsError
from wsiseg.models.cards import file_hash
from wsiseg.models.registry import BY_HAND, DOWNLOADS, MODELS, ON_HUB, SAM_NETWORK
from wsiseg.models.store import find_card, stored_cards, stored_names

if TYPE_CHECKING:
    from pathlib import Path

    from wsiseg.models.cards import ModelCard


SAM_INPUT_PX = 1024  #: of every published SAM; cards of earlier versions do not state it
#: Expected memory of a run on the CPU, one tile at a time: measured on whole runs and tiles (benchmarks/results/memory.md, models.md, models_hub.md).
_PROCESS_GB, _TILE_GB, _UNETR_GB = 0.5, 0.5, 2.0


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A model that is available here or for download. ``takes``: what it can be asked with; ``tile_um``: side of its tile, 0 for any."""

    name: str
    architecture: str
    takes: str
    tile_um: float
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
    if name in DOWNLOADS or name in BY_HAND or name in ON_HUB:
        how = "fetch it once with" if name in DOWNLOADS else "how to get it is said by"
        return f"not downloaded yet; {how} `wsiseg models download {name}`"
    here = [*MODELS, *stored_names(folder)]
    near = difflib.get_close_matches(name.lower(), [*here, *DOWNLOADS, *BY_HAND, *ON_HUB], n=1)
    return f"{what}; {f'did you mean {near[0]}? ' if near else ''}models here: {', '.join(here)}"


def verify(card: ModelCard) -> None:
    """Compare a model's weights with its card.

    Raises
    ------
    WeightsError
        They differ, or the file cannot be read.
    """
    for file, stated in ((card.weights, card.sha256), (card.phrases, card.phrases_sha256)):
        if file is None:
            continue
        try:
            found = file_hash(file)
        except OSError as error:
            raise WeightsError(
                f"{file}: cannot be read ({error.strerror or error}); import or download {card.name} again"
            ) from error
        if found != stated:
            raise WeightsError(
                f"{file}: sha256 differs from the card of {card.name}; the file is damaged: import or download it again"
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
    rows = [_listing(card, "in the package") for card in MODELS.values()]
    rows += [_listing(card, "imported") for card in stored]
    points = ("points", "boxes")
    rows += [
        Listing(
            name=name,
            architecture=d.architecture,
            takes=", ".join(points),
            tile_um=SAM_INPUT_PX * d.mpp,
            mpp=d.mpp,
            licence=d.licence,
            where="to download",
        )
        for name, d in DOWNLOADS.items()
        if name not in here
    ]
    rows += [
        Listing(
            name=name,
            architecture=b.architecture,
            takes=", ".join((*points, "maps")),
            tile_um=SAM_INPUT_PX * b.mpp,
            mpp=b.mpp,
            licence="see its authors",
            where="to get by hand",
        )
        for name, b in BY_HAND.items()
        if name not in here
    ]
    rows += [
        Listing(
            name=name,
            architecture=h.architecture,
            takes=", ".join(h.takes),
            tile_um=h.input_px * h.mpp,
            mpp=h.mpp,
            licence=h.licence,
            where="to get from the hub",
        )
        for name, h in ON_HUB.items()
        if name not in here
    ]
    return rows


def abilities(card: ModelCard) -> str:
    """What a model takes and gives, in words: points, boxes, text, exemplars; maps."""
    return ", ".join((*card.prompts, *(("maps",) if card.instance_decoder else ())))


def tile_px(card: ModelCard) -> int:
    """Side of the only tile that a model takes, model px; 0: any."""
    return card.input_px or (SAM_INPUT_PX if card.network == SAM_NETWORK else 0)


def expected_memory_gb(card: ModelCard) -> float:
    """GB that a run on the CPU is expected to take, in fp32 and one tile at a time."""
    weights = (card.parameters or card.weights.stat().st_size / 4) * 4 / 1e9
    tile = (tile_px(card) or SAM_INPUT_PX) ** 2 / SAM_INPUT_PX**2
    unetr = _UNETR_GB if card.instance_decoder and card.network == SAM_NETWORK else 0.0
    return _PROCESS_GB + weights + tile * (_TILE_GB + unetr)


def _listing(card: ModelCard, where: str) -> Listing:
    return Listing(
        name=card.name,
        architecture=card.architecture,
        takes=abilities(card),
        tile_um=tile_px(card) * card.mpp,
        mpp=card.mpp,
        licence=card.licence,
        where=where,
    )
