"""Types of cells that a detector, or a decoder of phrases, found as what was described: the type with the best score, if it leads by enough."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from wsiseg.celltypes.assignment import GREY
from wsiseg.records import UNASSIGNED, Typing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from wsiseg.config import TypingConfig
    from wsiseg.records import DescribedType


def assign_described(scores: NDArray[np.float32], types: Sequence[DescribedType], config: TypingConfig) -> Typing:
    """Type every cell.

    Parameters
    ----------
    scores
        (N, T), in [0, 1]; of several phrases of a type the best.
    types
        The T types.
    config
        ``min_margin``: a cell that two types claim alike stays unassigned. ``min_score`` is meant for probabilities and does not count here:
        what was found at all has reached ``detection.min_score``.

    Returns
    -------
    Typing
        Scores and margins are those given, 0 to 1; they are not probabilities.
    """
    ranked = np.sort(scores, 1)
    best = scores.argmax(1)
    top = ranked[:, -1]
    margins = top - ranked[:, -2] if len(types) > 1 else top
    codes = np.where((top > 0) & (margins >= config.min_margin), best + 1, 0).astype(np.int32)
    return Typing(
        names=(UNASSIGNED, *(of.name for of in types)),
        colors=(GREY, *(of.color for of in types)),
        codes=codes,
        scores=top.astype(np.float32),
        margins=margins.astype(np.float32),
        prototypes=np.full(len(scores), -1, np.int32),
    )
