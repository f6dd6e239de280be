"""Recipe of a model of the library transformers: all that its weights do not say. Kept in the file of the weights, as its metadata."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

from wsiseg.models.cards import foreign_note, read_note

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to build a network and what to feed it.

    Attributes
    ----------
    config
        Content of ``config.json``.
    pixel_mean, pixel_sd
        Of the training images' red, green and blue, 0 to 255.
    tokenizer
        Content of ``tokenizer.json``; ``None`` for a model without text.
    """

    config: dict[str, Any]
    pixel_mean: tuple[float, ...]
    pixel_sd: tuple[float, ...]
    tokenizer: str | None = None

    def note(self) -> dict[str, Any]:
        """As metadata of a file."""
        return asdict(self)

    @classmethod
    def of(cls, path: Path) -> Self:
        """Read the recipe in a file of `wsiseg models import`."""
        note = read_note(path) or {}
        try:
            return cls(
                config=dict(note["config"]),
                pixel_mean=tuple(note["pixel_mean"]),
                pixel_sd=tuple(note["pixel_sd"]),
                tokenizer=note["tokenizer"],
            )
        except (KeyError, TypeError, ValueError):
            raise foreign_note(path, str(note)) from None
