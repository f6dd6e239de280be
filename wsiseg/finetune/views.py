"""Views of labelled images for networks with a fixed input: windows of one size, and what may be meant in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from wsiseg.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from wsiseg.finetune.config import Intent
    from wsiseg.finetune.data import Dataset, LabelledImage

ALL = 0  #: intent: all nuclei; k: those of type k
_TRIES = 20  #: windows that are looked at for one with what is meant
_MIN_PX = 30  #: of a target: less is a sliver at the border
_WHITE = 255
CHECKED = 24  #: windows that validate, at most


@dataclass(frozen=True, kw_only=True)
class View:
    """A window of an image.

    Attributes
    ----------
    image
        uint8 RGB of shape (S, S, 3).
    label
        int32 of shape (S, S): ids as in the image.
    types
        Type of each id.
    known
        bool of shape (S, S).
    """

    image: NDArray[np.uint8]
    label: NDArray[np.int32]
    types: NDArray[np.int64]
    known: NDArray[np.bool_]

    def meant(self, intent: int) -> NDArray[np.bool_]:
        """Where the nuclei are that ``intent`` means."""
        if intent == ALL:
            return self.label > 0
        found: NDArray[np.bool_] = self.types[self.label] == intent
        return found


def intents_of(data: Dataset, intent: Intent) -> tuple[tuple[int, ...], ...]:
    """What prompts may mean in these images, in turn.

    Parameters
    ----------
    data
        Images to learn from.
    intent
        As in the settings.

    Returns
    -------
    tuple of tuple of int
        Groups of intents, ``ALL`` or numbers of types, that are taken in turn; within a group by chance.

    Raises
    ------
    ConfigError
        Types are wanted, and there are none, or only one.
    """
    present = sorted({int(t) for image in data.images for t in image.types[1:] if t})
    if intent in ("type", "both"):
        if not present:
            raise ConfigError(
                f"{data.place}: --intent {intent} needs types, and no nucleus has one; add type/, or use --intent all"
            )
        if len(present) == 1:
            name = data.type_names[present[0] - 1]
            raise ConfigError(
                f"{data.place}: --intent {intent} needs at least two types, and there is only {name!r}; label others too, or use --intent all"
            )
    if intent == "all" or len(present) < 2:
        return ((ALL,),)
    return (tuple(present),) if intent == "type" else ((ALL,), tuple(present))


def draw_view(images: Sequence[LabelledImage], intent: int, side: int, random: np.random.Generator) -> View | None:
    """A random window, turned and mirrored, that shows something of what is meant.

    Parameters
    ----------
    images
        Larger ones are drawn more often.
    intent
        ``ALL`` or a type.
    side
        S, model px; smaller images are padded with white, which is unknown.
    random
        Of this view.

    Returns
    -------
    View or None
        ``None`` when no image has what is meant.
    """
    having = [i for i in images if (len(i.types) > 1 if intent == ALL else (i.types == intent).any())]
    if not having:
        return None
    area = np.array([image.label.size for image in having], np.float64)
    for _ in range(_TRIES):
        image = having[random.choice(len(having), p=area / area.sum())]
        ids = np.flatnonzero(image.types == intent) if intent != ALL else np.arange(1, len(image.types))
        rows, columns = np.nonzero(image.label == random.choice(ids))
        corner = [int(c.mean()) - int(random.integers(side // 4, 3 * side // 4)) for c in (rows, columns)]
        y, x = (max(min(c, n - side), 0) for c, n in zip(corner, image.label.shape, strict=True))
        view = _turned(window(image, x, y, side), int(random.integers(4)), bool(random.integers(2)))
        if (view.meant(intent) & view.known).sum() >= _MIN_PX:
            return view
    return None


def tiles(image: LabelledImage, side: int) -> Iterator[View]:
    """Windows that cover an image once, in reading order."""
    height, width = image.label.shape
    for y in range(0, height, side):
        for x in range(0, width, side):
            yield window(image, x, y, side)


def window(image: LabelledImage, x: int, y: int, side: int) -> View:
    """The window with this corner, padded with white where the image ends."""
    part = (slice(y, y + side), slice(x, x + side))
    height, width = image.label[part].shape
    pad = ((0, side - height), (0, side - width))
    return View(
        image=np.pad(image.image[part], (*pad, (0, 0)), constant_values=_WHITE),
        label=np.pad(image.label[part], pad),
        known=np.pad(image.known[part], pad),
        types=image.types,
    )


def _turned(view: View, quarters: int, mirrored: bool) -> View:
    def turn(plane: NDArray[np.generic]) -> NDArray[np.generic]:
        out = np.rot90(plane, quarters)
        return np.ascontiguousarray(out[:, ::-1] if mirrored else out)

    return View(image=turn(view.image), label=turn(view.label), known=turn(view.known), types=view.types)  # type: ignore[arg-type]


def checked_views(valid: Dataset, intents: tuple[tuple[int, ...], ...], side: int) -> list[tuple[View, int]]:
    """Windows that validate, with what is meant in each; spread over the images."""
    wanted = [intent for group in intents for intent in group]
    every = [
        (view, intent)
        for image in valid.images
        for view in tiles(image, side)
        for intent in wanted
        if _shows(view, intent)
    ]
    step = max(len(every) / CHECKED, 1.0)
    return [every[int(k * step)] for k in range(min(CHECKED, len(every)))]


def _shows(view: View, intent: int) -> bool:
    """The window has several nuclei that are meant."""
    ids = np.unique(view.label[view.meant(intent) & view.known])
    return len(ids) > (1 if intent == ALL else 0)
