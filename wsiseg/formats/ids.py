"""UUIDs of cells: RFC 9562 version 5, from the slide and the cell's coordinates, so that every file of a run agrees on them.

- namespace: ``uuid5(NAMESPACE_URL, "wsiseg:" + slide key)``
- name: six little-endian int64 in 1/100 px (prompt x, y; polygon xmin, ymin, xmax, ymax); for the k-th exact twin also k, from 1
"""

from __future__ import annotations

import uuid
from hashlib import sha1
from typing import TYPE_CHECKING

import numpy as np
import shapely

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsiseg.records import Cells

ID_BYTES = 36  #: of a UUID as text
_PROMPT_BYTES = 16  #: of a name: prompt x and y
_HEX_PLACES = [k for k in range(ID_BYTES) if k not in (8, 13, 18, 23)]  #: the rest are hyphens


class CellIds:
    """The ids of a slide's cells, called with some of them after the others.

    Twins (equal prompt and equal polygon bounds) are told apart by their order through all calls. For that, cells of the same prompt must be
    neighbours, as they are in the order of the files: only those at the end of a call are remembered.

    Parameters
    ----------
    slide_key
        Identity of the slide; the writers pass ``provenance.slide``.
    """

    def __init__(self, slide_key: str) -> None:
        self._namespace = uuid.uuid5(uuid.NAMESPACE_URL, f"wsiseg:{slide_key}").bytes
        self._last: list[bytes] = []

    def __call__(self, cells: Cells) -> NDArray[np.bytes_]:
        """Lower-case UUIDs of the next cells, ASCII of shape (N,)."""
        before = len(self._last)
        names = self._last + _names(cells)
        self._last = _run_at_end(names)
        digests = [sha1(self._namespace + name, usedforsecurity=False).digest() for name in _numbered(names)[before:]]
        return _uuid_texts(b"".join(digests))


def cell_ids(slide_key: str, cells: Cells) -> list[str]:
    """One UUID per cell, the same in every file and on every machine.

    Parameters
    ----------
    slide_key
        Identity of the slide; the writers pass ``provenance.slide``.
    cells
        Level-0 px, all of them. Twins (equal prompt and equal polygon bounds) are told apart by their order.

    Returns
    -------
    list of str
        Lower-case UUIDs, unique within the table, in the order of the cells.
    """
    ids: list[str] = CellIds(slide_key)(cells).astype(str).tolist()
    return ids


def _names(cells: Cells) -> list[bytes]:
    numbers = np.concatenate([cells.points_xy, shapely.bounds(cells.polygons).reshape(-1, 4)], axis=1)
    text = np.rint(np.nan_to_num(numbers, posinf=0, neginf=0) * 100).astype("<i8").tobytes()
    width = 6 * 8
    return [text[start : start + width] for start in range(0, len(text), width)]


def _numbered(names: list[bytes]) -> list[bytes]:
    """Number the names that occurred before."""
    if len(set(names)) == len(names):
        return names
    seen: dict[bytes, int] = {}
    numbered = []
    for name in names:
        occurrence = seen.get(name, 0)
        seen[name] = occurrence + 1
        numbered.append(name + occurrence.to_bytes(8, "little") if occurrence else name)
    return numbered


def _run_at_end(names: list[bytes]) -> list[bytes]:
    """Trailing names that share one prompt."""
    start = len(names)
    while start and names[start - 1][:_PROMPT_BYTES] == names[-1][:_PROMPT_BYTES]:
        start -= 1
    return names[start:]


def _uuid_texts(digests: bytes) -> NDArray[np.bytes_]:
    """Format SHA-1 digests as version-5 UUIDs, all at once in a fifth of the time of uuid.uuid5."""
    numbers = np.frombuffer(digests, np.uint8).reshape(-1, 20)[:, :16].copy()
    numbers[:, 6] = numbers[:, 6] & 0x0F | 0x50
    numbers[:, 8] = numbers[:, 8] & 0x3F | 0x80
    text = np.full((len(numbers), ID_BYTES), ord("-"), np.uint8)
    text[:, _HEX_PLACES] = np.frombuffer(numbers.tobytes().hex().encode(), np.uint8).reshape(-1, 32)
    return text.view(f"S{ID_BYTES}").reshape(-1)
