"""Label images and density maps as tiled OME-TIFF.

A label image is painted strip by strip, from the row groups that meet the strip; its pyramid is made on the way, each level from every second
px of the one above (labels cannot be averaged). In memory are a strip of tiles per level, the outlines of the row groups that it meets, and the
compressed tiles of the lower levels, a third of the file.
"""

from __future__ import annotations

import math
import uuid
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
import shapely
from skimage.draw import polygon as fill
from tifffile import TiffWriter

from wsiseg.errors import ConfigError
from wsiseg.models.cards import file_hash
from wsiseg.runtime.atomic import atomic_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from numpy.typing import DTypeLike, NDArray

    from wsiseg.export.source import Chunk, ExportSettings, RunCells

TILE = 512  #: px; what QuPath and napari read at once
SMALLEST_LEVEL = 1024  #: px; the pyramid ends with a level that a viewer shows whole
COMPRESSION_LEVEL = 3  #: of Deflate; labels are mostly runs: 6 makes files 5 % smaller in 1.5 times the time
LONGEST_SIDE = 2**31 - 1
MEMBERS = "wsiseg/types"  #: namespace of the annotation that names the values


def write_labels(path: Path, run: RunCells, settings: ExportSettings) -> None:
    """Write a label image: uint32, the number of the cell's row in cells.parquet, counted from 1; 0 is background."""
    _write_label_image(path, run, settings, np.uint32, lambda chunk: chunk.rows + 1, {})


def write_types(path: Path, run: RunCells, settings: ExportSettings) -> None:
    """Write an image of types: 0 is background, 1 unassigned, then the types in the order of the run; the file names them in its metadata."""
    names = {str(value): name for value, name in enumerate(("background", *run.names))}
    dtype = np.uint8 if len(run.names) < 256 else np.uint16
    _write_label_image(path, run, settings, dtype, lambda chunk: run.codes(chunk) + 1, names)


def write_density(path: Path, run: RunCells, settings: ExportSettings) -> None:
    """Write density maps: float32, cells per mm2 of squares; channel 0 is all cells, the others the types in the order of the run."""
    left, top, right, bottom = run.box
    side = settings.square_um / run.mpp
    width, height = (max(math.ceil(length / side), 1) for length in (right - left, bottom - top))
    counts = np.zeros((1 + len(run.names), height * width))
    for chunk in run.chunks(["x", "y", "cell_type"]):
        x, y = (chunk.chosen[name].to_numpy() for name in ("x", "y"))
        column = np.clip((x - left) / side, 0, width - 1).astype(np.intp)
        square = np.clip((y - top) / side, 0, height - 1).astype(np.intp) * width + column
        counts[0] += np.bincount(square, minlength=height * width)
        np.add.at(counts, (1 + run.codes(chunk), square), 1)
    across, down = (
        np.minimum(side, length - side * np.arange(n)) for length, n in ((right - left, width), (bottom - top, height))
    )
    area_mm2 = np.outer(down, across).ravel() * (run.mpp / 1000) ** 2  # the last squares are cut by the border
    maps = (counts / area_mm2).reshape(-1, height, width).astype(np.float32)
    channels = [f"{name}, cells per mm2" for name in ("all", *run.names)]
    metadata = {"axes": "CYX", "Name": run.slide, **_scale(settings.square_um), "Channel": {"Name": channels}}
    metadata["UUID"] = _identity(path, run, settings)
    with atomic_path(path) as partial, TiffWriter(partial, ome=True) as writer:
        writer.write(maps, photometric="minisblack", metadata=metadata, **_resolution(settings.square_um))


# --------------------------------------------------------------------------------------------------------------------- label images


@dataclass(frozen=True)
class _Outlines:
    """Outlines of a row group in px of the image: all vertices (V, 2), where each outline's begin (n + 1,), boxes (n, 4), values (n,)."""

    xy: NDArray[np.float64]
    starts: NDArray[np.intp]
    boxes: NDArray[np.float64]
    values: NDArray[np.integer]


def _write_label_image(
    path: Path,
    run: RunCells,
    settings: ExportSettings,
    dtype: DTypeLike,
    values: Callable[[Chunk], NDArray[np.integer]],
    names: dict[str, str],
) -> None:
    mpp = run.mpp if settings.mpp is None else settings.mpp
    scale = run.mpp / mpp
    left, top, right, bottom = run.box
    width, height = (max(round(length * scale), 1) for length in (right - left, bottom - top))
    if max(width, height) > LONGEST_SIDE:
        raise ConfigError(
            f"--mpp {mpp:g}: an image of {width} x {height} px is larger than a TIFF file; pass a larger --mpp"
        )
    metadata = {"axes": "YX", "Name": run.slide, "UUID": _identity(path, run, settings), **_scale(mpp)}
    if (left, top) != (0, 0):  # where the part lies on the slide
        metadata["Plane"] = {
            "PositionX": [left * run.mpp], "PositionXUnit": ["µm"], "PositionY": [top * run.mpp], "PositionYUnit": ["µm"]
        }  # fmt: skip
    if names:
        metadata["MapAnnotation"] = {"Namespace": MEMBERS, **names}
    lower = list(_lower_levels(height, width, np.dtype(dtype)))
    strips = _paint(run, values, (left, top), scale, (height, width), np.dtype(dtype))
    with atomic_path(path) as partial, TiffWriter(partial, ome=True, bigtiff=True) as writer:
        options: dict[str, Any] = {
            "dtype": dtype, "tile": (TILE, TILE), "compression": "zlib", "photometric": "minisblack"
        }  # fmt: skip
        writer.write(
            _encoded(strips, lower, height),
            shape=(height, width),
            subifds=len(lower),
            metadata=metadata,
            **_resolution(mpp),
            **options,
        )
        for number, level in enumerate(lower, 1):
            shape = (level.height, level.width)
            writer.write(iter(level.tiles), shape=shape, subfiletype=1, **_resolution(mpp * 2**number), **options)


def _paint(
    run: RunCells,
    values: Callable[[Chunk], NDArray[np.integer]],
    origin: tuple[int, int],
    scale: float,
    shape: tuple[int, int],
    dtype: np.dtype[Any],
) -> Iterator[NDArray[Any]]:
    """Paint the image from the top, ``TILE`` rows at a time. A px belongs to the cell that holds its centre."""
    height, width = shape
    reach = _vertical_reach(run, origin[1], scale)
    held: dict[int, _Outlines] = {}
    columns = ["geometry", "cell_type"]
    for top in range(0, height, TILE):
        rows = min(TILE, height - top)
        strip = np.zeros((rows, width), dtype)
        needed = np.flatnonzero((reach[:, 0] < top + rows) & (reach[:, 1] > top)).tolist()
        held = {group: held[group] for group in needed if group in held}
        for group in needed:
            if group not in held:
                chunk = run.chunk(group, columns)
                held[group] = _outlines(chunk.polygons(), values(chunk), origin, scale)
            _paint_group(strip, held[group], top)
        yield strip


def _paint_group(strip: NDArray[Any], group: _Outlines, top: int) -> None:
    met = np.flatnonzero((group.boxes[:, 1] < top + len(strip)) & (group.boxes[:, 3] > top))
    for k in met.tolist():
        ring = group.xy[group.starts[k] : group.starts[k + 1]]
        inside = fill(ring[:, 1] - (top + 0.5), ring[:, 0] - 0.5, strip.shape)
        strip[inside] = group.values[k]


def _outlines(
    polygons: NDArray[np.object_], values: NDArray[np.integer], origin: tuple[int, int], scale: float
) -> _Outlines:
    xy, index = shapely.get_coordinates(shapely.get_exterior_ring(polygons), return_index=True)
    moved = (xy - origin) * scale
    starts = np.searchsorted(index, np.arange(len(polygons) + 1))
    corners = shapely.bounds(polygons).reshape(-1, 2, 2)
    return _Outlines(moved, starts, ((corners - origin) * scale).reshape(-1, 4), values)


def _vertical_reach(run: RunCells, top: int, scale: float) -> NDArray[np.float64]:
    """First and last row (G, 2) of the image that the cells of each row group reach."""
    reach = np.full((run.groups, 2), (np.inf, -np.inf))
    for group in range(run.groups):
        box = run.chunk(group, ["bbox"]).chosen["bbox"].combine_chunks()
        if len(box):
            low, high = pc.min(box.field("ymin")).as_py(), pc.max(box.field("ymax")).as_py()
            reach[group] = (low - top) * scale, (high - top) * scale
    return reach


@dataclass
class _Level:
    """A lower level of a pyramid while it grows: rows that do not fill a tile yet, and the tiles that are complete."""

    height: int
    width: int
    dtype: np.dtype[Any]
    rows: list[NDArray[Any]] = field(default_factory=list)
    tiles: list[bytes] = field(default_factory=list)

    def add(self, rows: NDArray[Any], *, last: bool) -> NDArray[Any] | None:
        """Add rows; the strip that they complete, if any."""
        self.rows.append(rows)
        if not last and sum(map(len, self.rows)) < TILE:
            return None
        strip, self.rows = np.concatenate(self.rows), []
        self.tiles += _tiles(strip)
        return strip


def _lower_levels(height: int, width: int, dtype: np.dtype[Any]) -> Iterator[_Level]:
    while max(height, width) > SMALLEST_LEVEL:
        height, width = -(-height // 2), -(-width // 2)
        yield _Level(height, width, dtype)


def _encoded(strips: Iterable[NDArray[Any]], lower: list[_Level], height: int) -> Iterator[bytes]:
    """Yield the compressed tiles of the full image, and give every second px to the lower levels."""
    done = 0
    for strip in strips:
        done += len(strip)
        above: NDArray[Any] | None = strip
        for level in lower:  # before the tiles are handed out: after the last of them nobody asks again
            if above is None:
                break
            above = level.add(above[::2, ::2], last=done == height)
        yield from _tiles(strip)


def _tiles(strip: NDArray[Any]) -> Iterator[bytes]:
    """Compressed tiles of a strip, from the left; those at the border are filled up with background."""
    rows, width = strip.shape
    empty = b""
    for x in range(0, width, TILE):
        part = strip[:, x : x + TILE]
        if not part.any():
            empty = empty or zlib.compress(bytes(TILE * TILE * strip.itemsize), COMPRESSION_LEVEL)
            yield empty
            continue
        tile = np.zeros((TILE, TILE), strip.dtype.newbyteorder("<"))
        tile[:rows, : part.shape[1]] = part
        yield zlib.compress(tile.tobytes(), COMPRESSION_LEVEL)


def _identity(path: Path, run: RunCells, settings: ExportSettings) -> str:
    """UUID that depends on nothing but the content: same cells and settings, same bytes."""
    facts = (file_hash(run.file), path.name, run.box, None if run.region is None else run.region.wkt, settings)
    return str(uuid.uuid5(uuid.NAMESPACE_OID, repr(facts)))


def _scale(mpp: float) -> dict[str, object]:
    return {"PhysicalSizeX": mpp, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": mpp, "PhysicalSizeYUnit": "µm"}


def _resolution(mpp: float) -> dict[str, Any]:
    return {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
