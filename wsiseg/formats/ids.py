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


def cell_ids(slide_key: str, cells: Cells) -> list[str]:
    """One UUID per cell, the same in every file and on every machine.

    Parameters
    ----------
    slide_key
        What distinguishes the slide; the writers pass ``provenance.slide``.
    cells
        Level-0 px. Twins (equal prompt and equal polygon bounds) are told apart by their order.

    Returns
    -------
    list of str
        Lower-case UUIDs, unique within the table, in the order of the cells.
    """
    numbers = np.concatenate([cells.points_xy, shapely.bounds(cells.polygons).reshape(-1, 4)], axis=1)
    keys = np.rint(np.nan_to_num(numbers, posinf=0, neginf=0) * 100).astype("<i8")
    namespace = uuid.uuid5(uuid.NAMESPACE_URL, f"wsiseg:{slide_key}").bytes
    ids = [_uuid5(namespace, key) for key in _rows(keys)]
    if len(set(ids)) == len(ids):
        return ids
    seen: dict[str, int] = {}
    for index, key in enumerate(_rows(keys)):
        first = ids[index]
        occurrence = seen.get(first, 0)
        seen[first] = occurrence + 1
        if occurrence:
            ids[index] = _uuid5(namespace, key + occurrence.to_bytes(8, "little"))
    return ids


def _rows(keys: NDArray[np.int64]) -> list[bytes]:
    text, width = np.ascontiguousarray(keys).tobytes(), keys.shape[1] * 8
    return [text[start : start + width] for start in range(0, len(text), width)]


def _uuid5(namespace: bytes, name: bytes) -> str:
    digest = sha1(namespace + name, usedforsecurity=False).hexdigest()  # uuid.uuid5 in a quarter of its time
    variant = "89ab"[int(digest[16], 16) & 3]
    return f"{digest[:8]}-{digest[8:12]}-5{digest[13:16]}-{variant}{digest[17:20]}-{digest[20:32]}"
