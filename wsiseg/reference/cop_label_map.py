"""Chain-of-Prompts' last step on one image: masks into a label map, the first click first.   Source: arXiv:2605.29429 [1]_ (project page).

Symbol  here        meaning
m, s    mask, score a decoded mask and its predicted IoU
e       labels      masks accepted before

Guard:   a mask that lies on two or more accepted ones joins what is apart, and is refused
NMS:     a mask whose IoU with an accepted one exceeds 0.5 is that one again, and is refused
Paint:   an accepted mask takes the pixels where its score is higher than what is there

On slides this is not used: overlaps are resolved among polygons, best score first, so that the order of tiles does not matter (stitching/resolve.py).

References
----------
.. [1] Jo et al.: Chain-of-Prompts, One Click per Cell Type Suffices: Training-free Group Interaction for Cell Instance Segmentation,
   MICCAI 2026, arXiv:2605.29429.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

SAME = 0.5  #: IoU above which two masks are one cell


@dataclass
class Canvas:
    """A label map that is being painted.

    Attributes
    ----------
    labels
        int32 of shape (H, W): 0, or the number of the accepted mask, from 1.
    scores
        float32 of shape (H, W): score of what is painted there, -1 where nothing is.
    areas
        Pixels of each accepted mask when it was accepted; never changed afterwards.
    """

    labels: NDArray[np.int32]
    scores: NDArray[np.float32]
    areas: list[int] = field(default_factory=list)

    @staticmethod
    def blank(height: int, width: int) -> Canvas:
        """An empty canvas."""
        return Canvas(np.zeros((height, width), np.int32), np.full((height, width), -1, np.float32))

    def insert(self, mask: NDArray[np.bool_], score: float, x0: int, y0: int) -> bool:
        """Accept or refuse one mask.

        Parameters
        ----------
        mask
            (h, w): its window; may hang over the edge of the canvas.
        score
            Predicted IoU.
        x0, y0
            Outer corner of the window on the canvas.

        Returns
        -------
        bool
            True if it was accepted; its number is then ``len(areas)``.
        """
        height, width = self.labels.shape
        left, top = max(-x0, 0), max(-y0, 0)
        mask = mask[top : max(height - y0, 0), left : max(width - x0, 0)]
        area = int(mask.sum())
        if not area:
            return False
        window = np.s_[y0 + top : y0 + top + mask.shape[0], x0 + left : x0 + left + mask.shape[1]]
        below = self.labels[window][mask]
        ids = np.unique(below[below > 0])
        if len(ids) > 1:
            return False
        if len(ids) == 1:
            shared = int((below == ids[0]).sum())
            if shared / (area + self.areas[ids[0] - 1] - shared) > SAME:
                return False
        better = mask & (self.scores[window] < score)
        if not better.any():
            return False  # it would have a number, and no pixel
        self.areas.append(area)
        self.labels[window][better] = len(self.areas)
        self.scores[window][better] = score
        return True
