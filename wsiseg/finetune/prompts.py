"""Prompts that mean the same and are not equally good: sets of points, and phrases.

Points, for SAMPO [1]_, which leaves the numbers open: one to three inside, none to three outside. Of the points inside, half lie in the core of a
nucleus and half within ``BORDER_PX`` of its border; one in ten lies just outside, as from a hasty hand. Points outside lie on other nuclei where
there are any that are not meant, else on background.

Phrases, for prompt groups [2]_, are data: ``prompts.json`` beside this file, and what users add to it::

    {"version": 1,
     "all":      {"low": ["segment nuclei"], "medium": [...], "high": [...]},
     "category": {"low": ["segment {type} nuclei"], "medium": [...], "high": [...]},
     "names":    {"lymphocyte": ["immune", "lymphoid"]},
     "types":    {"lymphocyte": {"low": [...], "high": [...]}}}

``names`` are further words for a type, which the phrases of ``category`` take too; ``types`` are whole phrases for one type.

References
----------
.. [1] Wu et al.: SAMPO, arXiv:2508.02464v2, section 3.2.1.
.. [2] Wu et al.: Prompt Group-Aware Training, arXiv:2603.06384, table 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import ndimage

from wsiseg.errors import ConfigError
from wsiseg.runtime.text import parse_json, read_text, show

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

INSIDE, OUTSIDE, PADDING = 1, 0, -1  #: labels of points, as SAM has them
MOST = 3  #: points inside, and points outside; SAMPO's
BORDER_PX = 2.0  #: within which a point is near the border
CORE, AMBIGUOUS = 0.5, 0.1  #: share of points in the core; share of those just outside
LEVELS = ("low", "medium", "high")  #: of detail of a phrase
_PLACE = "{type}"


@dataclass(frozen=True, kw_only=True)
class PointSets:
    """K sets of points. ``xy``: float32 (K, P, 2), px, corner frame; ``labels``: int64 (K, P), 1 inside, 0 outside, -1 padding."""

    xy: NDArray[np.float32]
    labels: NDArray[np.int64]


def draw_point_sets(
    target: NDArray[np.bool_],
    label: NDArray[np.integer],
    known: NDArray[np.bool_],
    count: int,
    random: np.random.Generator,
    quality: str = "mixed",
) -> PointSets:
    """Sets of points that mean ``target``.

    Parameters
    ----------
    target
        bool of shape (H, W): the nuclei that are meant; not empty.
    label
        ids of all nuclei, of the same shape.
    known
        Where it is known what is a nucleus.
    count
        K.
    random
        Of these sets.
    quality
        ``mixed``, or all points inside of one kind: ``core``, ``border`` or ``outside`` (just outside).

    Returns
    -------
    PointSets
        P = 2 ``MOST``.
    """
    places = _Places.of(target, label, known)
    xy = np.zeros((count, 2 * MOST, 2), np.float32)
    labels = np.full((count, 2 * MOST), PADDING, np.int64)
    for k in range(count):
        inside, outside = int(random.integers(1, MOST + 1)), int(random.integers(0, MOST + 1))
        for j in range(inside):
            xy[k, j], labels[k, j] = places.inside(random, quality), INSIDE
        for j in range(MOST, MOST + outside):
            if (point := places.outside(random)) is not None:
                xy[k, j], labels[k, j] = point, OUTSIDE
    return PointSets(xy=xy, labels=labels)


@dataclass(frozen=True, kw_only=True)
class _Places:
    """Pixels by what they are: rows and columns (N, 2) each."""

    core: NDArray[np.intp]
    border: NDArray[np.intp]
    just_outside: NDArray[np.intp]
    others: NDArray[np.intp]
    background: NDArray[np.intp]

    @classmethod
    def of(cls, target: NDArray[np.bool_], label: NDArray[np.integer], known: NDArray[np.bool_]) -> _Places:
        depth, distance = ndimage.distance_transform_edt(target), ndimage.distance_transform_edt(~target)
        masks = {
            "core": depth > max(BORDER_PX, 0.5 * float(depth.max())),
            "border": target & (depth <= BORDER_PX),
            "just_outside": ~target & (distance <= BORDER_PX),
            "others": (label > 0) & ~target,
            "background": (label == 0) & (distance > BORDER_PX),
        }
        found = {name: np.argwhere(mask & known) for name, mask in masks.items()}
        found["core"] = found["core"] if len(found["core"]) else np.argwhere(target & known)
        return cls(**found)

    def inside(self, random: np.random.Generator, quality: str) -> NDArray[np.float32]:
        """A point that should be inside."""
        if quality == "mixed":
            chance = random.random()
            quality = "outside" if chance < AMBIGUOUS else "core" if random.random() < CORE else "border"
        rows = {"core": self.core, "border": self.border, "outside": self.just_outside}[quality]
        return _pick(rows if len(rows) else self.core, random)

    def outside(self, random: np.random.Generator) -> NDArray[np.float32] | None:
        """A point on something else; ``None`` where there is nothing else."""
        rows = self.others if len(self.others) else self.background
        return _pick(rows, random) if len(rows) else None


def _pick(rows: NDArray[np.intp], random: np.random.Generator) -> NDArray[np.float32]:
    """A point, x and y, in one of the pixels."""
    row, column = rows[random.integers(len(rows))]
    return np.array([column + random.random(), row + random.random()], np.float32)


@dataclass(frozen=True, kw_only=True)
class PromptBank:
    """Phrases by level of detail: for all nuclei, for those of a type (``{type}`` is one of its ``names``), and for single types."""

    every: dict[str, tuple[str, ...]]
    category: dict[str, tuple[str, ...]]
    names: dict[str, tuple[str, ...]]
    types: dict[str, dict[str, tuple[str, ...]]]

    def phrases(self, type_name: str | None, level: str | None = None) -> tuple[str, ...]:
        """Phrases that mean all nuclei (``None``) or those of a type, of one level or of all, without repetition."""
        levels = LEVELS if level is None else (level,)
        if type_name is None:
            found = [p for k in levels for p in self.every.get(k, ())]
        else:
            words = (type_name.replace("_", " "), *self.names.get(type_name, ()))
            found = [p.replace(_PLACE, word) for k in levels for p in self.category.get(k, ()) for word in words]
            found += [p for k in levels for p in self.types.get(type_name, {}).get(k, ())]
        return tuple(dict.fromkeys(found))


def read_prompt_bank(path: Path | None = None) -> PromptBank:
    """The package's phrases, and those of a file in addition.

    Parameters
    ----------
    path
        JSON of the form above; any of its parts may be missing.

    Raises
    ------
    ConfigError
        It is not of that form.

    Examples
    --------
    >>> bank = read_prompt_bank()
    >>> bank.phrases(None, "low")[0]
    'segment nuclei'
    >>> "segment lymphocyte nuclei" in bank.phrases("lymphocyte")
    True
    """
    own = resources.files("wsiseg.finetune").joinpath("prompts.json").read_text(encoding="utf-8")
    parts = [parse_json(own, "prompts.json", ConfigError)]
    if path is not None:
        parts.append(_checked(parse_json(read_text(path, ConfigError), str(path), ConfigError), path))
    kinds = sorted({kind for part in parts for kind in part.get("types", {})})
    return PromptBank(
        every=_joined([part.get("all", {}) for part in parts]),
        category=_joined([part.get("category", {}) for part in parts]),
        names=_names([part.get("names", {}) for part in parts]),
        types={kind: _joined([part.get("types", {}).get(kind, {}) for part in parts]) for kind in kinds},
    )


def _joined(parts: list[dict[str, list[str]]]) -> dict[str, tuple[str, ...]]:
    return {level: tuple(dict.fromkeys(p for part in parts for p in part.get(level, ()))) for level in LEVELS}


def _names(parts: list[dict[str, list[str]]]) -> dict[str, tuple[str, ...]]:
    kinds = sorted({kind for part in parts for kind in part})
    return {kind: tuple(dict.fromkeys(name for part in parts for name in part.get(kind, ()))) for kind in kinds}


def _checked(content: Any, path: Path) -> dict[str, Any]:  # noqa: ANN401 - whatever JSON holds
    """The content of a user's file."""
    if not isinstance(content, dict) or content.keys() - {"version", "all", "category", "names", "types"}:
        raise ConfigError(f"{path}: an object with all, category, names or types is needed; found {show(content)}")
    names = content.get("names", {})
    if not isinstance(names, dict):
        raise ConfigError(f"{path}: names is {show(names)}; an object of types and lists of further names is needed")
    for name, words in names.items():
        if not isinstance(words, list) or not all(isinstance(word, str) and word.strip() for word in words):
            raise ConfigError(f"{path}: names, {name} is {show(words)}; a list of names is needed")
    types = content.get("types", {})
    if not isinstance(types, dict):
        raise ConfigError(f"{path}: types is {show(types)}; an object of names and their phrases is needed")
    for name, part in [("all", content.get("all", {})), ("category", content.get("category", {})), *types.items()]:
        if not isinstance(part, dict) or part.keys() - set(LEVELS):
            raise ConfigError(f"{path}: {name} is {show(part)}; lists of phrases under {', '.join(LEVELS)} are needed")
        for level, phrases in part.items():
            if not isinstance(phrases, list) or not all(isinstance(p, str) and p.strip() for p in phrases):
                raise ConfigError(f"{path}: {name}, {level} is {show(phrases)}; a list of phrases is needed")
    return content
