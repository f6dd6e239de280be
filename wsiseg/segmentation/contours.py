"""Marching squares on many small images at once: the zero line of each, as closed rings.

scikit-image and contourpy trace one image per call, 75 us for a nucleus, most of it in assembling segments one by one. Here the segments of all
images are made, linked and put in order together.

Every crossing of the zero line with an edge of the grid has one segment that leaves it, so the crossings are a permutation and its cycles are the
rings::

    corners of a cell, clockwise   a b c d         edge k lies between corner k and corner k + 1
    a segment runs                 from the edge where the walk round the cell goes out of the inside, back to the edge where it came in
    order in a ring                list ranking by pointer jumping [1]_: log2(longest ring) passes over all crossings

Where a cell has two opposite corners inside, they are apart (scikit-image's ``fully_connected="low"``).

References
----------
.. [1] Wyllie: The Complexity of Parallel Computations, Cornell, 1979.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_STEPS = np.array([(0, 0), (0, 1), (1, 1), (1, 0)])  # row, column of the corners a, b, c, d


@dataclass(frozen=True, kw_only=True)
class Rings:
    """R rings of all images, image by image.

    Attributes
    ----------
    xy
        float64 of shape (V, 2): vertices, ring after ring, in pixels with pixel centres at whole numbers; the first is not repeated. Holes
        run the other way.
    first
        int of shape (R,): each ring's first vertex; its last is the one before the next ring's first.
    image
        int of shape (R,): the image that each ring is from.
    area
        float64 of shape (R,): positive; what the ring encloses.
    """

    xy: NDArray[np.float64]
    first: NDArray[np.intp]
    image: NDArray[np.intp]
    area: NDArray[np.float64]

    @property
    def count(self) -> NDArray[np.intp]:
        """(R,): vertices of each ring."""
        count: NDArray[np.intp] = np.diff(np.r_[self.first, len(self.xy)])
        return count

    def enclose(self, points_xy: NDArray[np.floating]) -> NDArray[np.bool_]:
        """Test which rings enclose their image's point (N, 2), by the even-odd rule -> bool (R,)."""
        ring = np.repeat(np.arange(len(self.first)), self.count)
        x, y = (self.xy - points_xy[self.image[ring]]).T
        following = self.following()
        xn, yn = x[following], y[following]
        crosses = np.flatnonzero((y > 0) != (yn > 0))
        right = x[crosses] - y[crosses] * (xn[crosses] - x[crosses]) / (yn[crosses] - y[crosses]) > 0
        odd: NDArray[np.bool_] = np.bincount(ring[crosses[right]], minlength=len(self.first)) % 2 == 1
        return odd

    def following(self) -> NDArray[np.intp]:
        """(V,): the vertex after each."""
        following = np.arange(1, len(self.xy) + 1)
        following[self.first + self.count - 1] = self.first
        return following


def zero_rings(images: NDArray[np.float32]) -> Rings:
    """Trace the zero line of N images.

    Parameters
    ----------
    images
        Images of shape (N, h, w); > 0 is inside. Their outermost rows and columns must be outside, so that every ring closes.

    Returns
    -------
    Rings
        In order of the images, and in reading order of their first crossings.
    """
    height, width = images.shape[1:]
    inside = (images > 0).ravel()
    flat = images.ravel()
    size = inside.size
    # Crossed edges: "across" from a pixel to its right neighbour, "down" to the one below. No edge leaves an image, for its rim is outside.
    across = np.flatnonzero(inside[:-1] != inside[1:])
    down = np.flatnonzero(inside[:-width] != inside[width:])
    edge = np.concatenate([across, down + size])
    start, step = np.concatenate([across, down]), np.repeat([1, width], [len(across), len(down)])
    if not len(edge):
        return Rings(xy=np.empty((0, 2)), first=np.empty(0, np.intp), image=np.empty(0, np.intp), area=np.empty(0))
    out = inside[start]
    # The cell in which the walk round it goes out over this edge, by its corner a, and which edge of the cell it is.
    is_across = np.arange(len(edge)) < len(across)
    cell = np.where(is_across, np.where(out, start, start - width), np.where(out, start - 1, start))
    k = np.where(is_across, np.where(out, 0, 2), np.where(out, 1, 3))
    corner = _STEPS @ (width, 1)  # offsets of the corners from a
    before = [inside[cell + corner[(k - back) % 4]] for back in (1, 2)]
    came_in = (k - np.where(~before[0], 1, np.where(~before[1], 2, 3))) % 4
    place = np.array([0, 1, width, 0])[came_in] + cell + np.where(came_in % 2 == 1, size, 0)
    slot = np.empty(2 * size, np.int32)
    slot[edge] = np.arange(len(edge), dtype=np.int32)
    label, position = _order(slot[place])
    order = np.argsort(label.astype(np.int64) * (len(edge) + 1) + position)
    z0, z1 = flat[start].astype(np.float64), flat[start + step].astype(np.float64)
    along = z0 / (z0 - z1)
    pixel = start % (height * width)
    xy = np.stack([pixel % width + np.where(is_across, along, 0), pixel // width + np.where(is_across, 0, along)], 1)[
        order
    ]
    first = np.flatnonzero(np.diff(label[order], prepend=-1))
    # A ring's label is its first "across" crossing, and these are in order of the images: so are the rings.
    rings = Rings(xy=xy, first=first, image=start[order[first]] // (height * width), area=np.empty(0))
    following = xy[rings.following()]
    twice = np.add.reduceat(xy[:, 0] * following[:, 1] - following[:, 0] * xy[:, 1], first)
    return replace(rings, area=np.abs(twice) / 2)


def ragged(first: NDArray[np.intp], count: NDArray[np.intp]) -> NDArray[np.intp]:
    """``first[0], first[0] + 1, ... (count[0] of them), first[1], ...``."""
    start = np.cumsum(count) - count
    index: NDArray[np.intp] = np.arange(count.sum()) + np.repeat(first - start, count)
    return index


def _order(following: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The smallest member of each element's cycle, and how many steps it takes from there to the element."""
    label = np.arange(len(following), dtype=np.int32)
    jump = following
    while True:
        smaller = np.minimum(label, label[jump])
        if (smaller == label).all() and (label == label[following]).all():
            break
        label, jump = smaller, jump[jump]
    root = label == np.arange(len(label))
    jump, to_root = np.where(root, np.arange(len(label), dtype=np.int32), following), (~root).astype(np.int32)
    while not root[jump].all():
        to_root, jump = to_root + to_root[jump], jump[jump]
    length = np.bincount(label, minlength=len(label))[label]
    return label, np.where(root, 0, length - to_root).astype(np.int32)
