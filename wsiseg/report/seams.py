"""Seams between tiles, and tiles that are missing: what shows that a slide was cut and put together again without a fault.

A cell that two tiles found, or that neither did, lies at the border of tiles. So the cells are counted by their distance from the nearest
border, against the number that would be there if each tile's cells were spread evenly over it. Tissue lies anywhere relative to the grid, so
its own structure averages out over the tiles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from wsiseg.errors import FormatError
from wsiseg.formats.geoparquet import as_format_error, read_header
from wsiseg.formats.parts import open_part, part_is_current
from wsiseg.report.pictures import png, shades
from wsiseg.slide.tiling import TileGrid

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsiseg.report.pictures import Picture
    from wsiseg.report.summary import FinishedRun
    from wsiseg.runs.manifest import Manifest

NEAR_UM = 8.0  #: a nucleus whose centre is closer than this reaches the seam, or nearly
BAND_UM = 4.0  #: width of the bars
BANDS = 10  #: number of bars; beyond is the tile's interior
MAP_PX = 600  #: longest side of the map of tiles, at most ..
TILE_PX = 24  #: .. with tiles of this side
_MISSING = (217, 95, 2)  # orange: apart from the blues of the ramp for every kind of sight


@dataclass(frozen=True, kw_only=True)
class BorderProfile:
    """Cells by their distance from the nearest seam.

    Attributes
    ----------
    ratios
        (BANDS,): cells per area, relative to their tiles' average; NaN where no tile has such a place.
    near, error
        The same for all cells within ``NEAR_UM``, and the standard deviation that chance gives it.
    near_cells
        Their number.
    """

    ratios: NDArray[np.float64]
    near: float
    error: float
    near_cells: int

    @property
    def conspicuous(self) -> bool:
        """Whether chance hardly explains the ratio (three standard deviations), and it is more than 5 %."""
        return abs(self.near - 1) > max(3 * self.error, 0.05)


@dataclass(frozen=True, kw_only=True)
class SeamFacts:
    """What the page says of tiles and seams.

    Attributes
    ----------
    picture, highest
        Map of the tiles: cells per mm2 of a tile's core, and the highest. Missing tiles are orange with a cross.
    tiles, failed, missing_blocks
        Number of tiles that were planned; of them failed; blocks that are absent.
    crossing
        Cells whose outline reaches over a seam; ``None`` without seams.
    profile
        ``None`` without seams or cells.
    dropped
        Outlines found and cells kept, within ``NEAR_UM`` of a seam and elsewhere; ``None`` without the parts.
    """

    picture: Picture
    highest: float
    tiles: int
    failed: int
    missing_blocks: int
    crossing: int | None
    profile: BorderProfile | None
    dropped: tuple[tuple[int, int], tuple[int, int]] | None


def seam_facts(run: FinishedRun, xy: NDArray[np.float64]) -> SeamFacts | None:
    """Measure the seams of a run from its folder alone.

    Parameters
    ----------
    run
        The run.
    xy
        Centroids (N, 2) of its cells, level-0 px.

    Returns
    -------
    SeamFacts or None
        ``None`` for runs of earlier versions, which did not note where their tiles were, and for runs without a tile.

    Raises
    ------
    FormatError
        The table is damaged.
    """
    grid = _grid(run.manifest)
    if grid is None:
        return None
    size, mpp = run.info.size_px0, run.info.mpp
    profile, crossing, dropped = None, None, None
    if len(xy) and np.isfinite(seam_distance(xy, grid, size)).any():
        profile = border_profile(xy, grid, size, mpp)
        prompts, bounds = _places(run)
        if bounds is not None:
            first, last = _tile_of(bounds[:, :2], grid, size), _tile_of(bounds[:, 2:], grid, size)
            crossing = int((first != last).any(axis=1).sum())
        if prompts is not None:
            dropped = _dropped(run, prompts, grid)
    picture, highest = _tile_map(run.manifest, xy, grid, size, mpp)
    counts, tiles = run.manifest.counts, run.manifest.tiles
    return SeamFacts(
        picture=picture,
        highest=highest,
        tiles=int(counts.get("tiles", 0)),
        failed=int(counts.get("tiles_failed", 0)),
        missing_blocks=len(tiles.get("missing_blocks", ())),
        crossing=crossing,
        profile=profile,
        dropped=dropped,
    )


def seam_distance(xy: NDArray[np.float64], grid: TileGrid, size_px0: tuple[int, int]) -> NDArray[np.float64]:
    """Distance (N,) of places (N, 2) from the nearest border between two tiles, level-0 px; infinite without one.

    The border of the slide does not count as a seam.

    Examples
    --------
    >>> grid = TileGrid(side_px0=100.0, origin_px0=(0.0, 0.0), block_tiles=4)
    >>> seam_distance(np.array([[95.0, 20.0], [110.0, 20.0], [2.0, 2.0]]), grid, (200, 100))
    array([ 5., 10., 98.])
    """
    nearest = np.full(len(xy), np.inf)
    for axis in (0, 1):
        tile = _tile_of(xy, grid, size_px0)[:, axis]
        start = grid.origin_px0[axis] + tile * grid.side_px0
        before, after = xy[:, axis] - start, start + grid.side_px0 - xy[:, axis]
        nearest = np.minimum(nearest, np.where(start > 0, np.abs(before), np.inf))
        nearest = np.minimum(nearest, np.where(start + grid.side_px0 < size_px0[axis], np.abs(after), np.inf))
    return nearest


def border_profile(
    xy: NDArray[np.float64], grid: TileGrid, size_px0: tuple[int, int], mpp: float
) -> BorderProfile | None:
    """Compare the cells near the seams with those in the tiles' interior.

    Parameters
    ----------
    xy
        Centroids (N, 2), level-0 px.
    grid, size_px0, mpp
        Tiles, and the slide.

    Returns
    -------
    BorderProfile or None
        ``None`` where no place is near a seam.
    """
    columns, rows = _shape(grid, size_px0)
    at = _tile_of(xy, grid, size_px0)
    tile = at[:, 1] * columns + at[:, 0]
    cells = np.bincount(tile, minlength=columns * rows)
    far = seam_distance(xy, grid, size_px0) * mpp
    ends = np.arange(BANDS + 1) * BAND_UM
    inner = np.stack([_inner_areas(end / mpp, grid, size_px0).ravel() for end in ends])
    share = (inner[:-1] - inner[1:]) / inner[0]  # of a tile's area in each band (BANDS, tiles)
    expected = share @ cells
    found = np.histogram(far, ends)[0]
    bands = round(NEAR_UM / BAND_UM)
    hoped = share[:bands].sum(0) * cells  # cells near the seams, by tile
    if not hoped.sum():
        return None
    there = np.bincount(tile[far < NEAR_UM], minlength=len(cells))
    near = there.sum() / hoped.sum()
    # of a ratio of sums over tiles; nuclei lie in groups, so that counting error alone would be too small
    spread = math.sqrt(max(float(((there - near * hoped) ** 2).sum()), float(hoped.sum()))) / float(hoped.sum())
    return BorderProfile(
        ratios=np.divide(found, expected, out=np.full(BANDS, math.nan), where=expected > 0),
        near=float(near),
        error=spread,
        near_cells=int(there.sum()),
    )


def _grid(manifest: Manifest) -> TileGrid | None:
    """The grid as the manifest has it; ``None`` where it has none, or something else."""
    try:
        held = manifest.tiles
        x, y = held["origin_px0"]
        grid = TileGrid(float(held["side_px0"]), (float(x), float(y)), int(held["block_tiles"]))
    except (KeyError, TypeError, ValueError):
        return None
    return grid if grid.side_px0 > 0 and grid.block_tiles > 0 else None


def _shape(grid: TileGrid, size_px0: tuple[int, int]) -> tuple[int, int]:
    """Columns and rows of tiles."""
    columns, rows = (
        max(math.ceil((side - start) / grid.side_px0 - 1e-9), 1)
        for side, start in zip(size_px0, grid.origin_px0, strict=True)
    )
    return columns, rows


def _tile_of(xy: NDArray[np.float64], grid: TileGrid, size_px0: tuple[int, int]) -> NDArray[np.intp]:
    """Column and row (N, 2) of the tile that holds each place."""
    place = np.floor((xy - np.array(grid.origin_px0)) / grid.side_px0).astype(np.intp)
    clipped: NDArray[np.intp] = np.clip(place, 0, np.array(_shape(grid, size_px0)) - 1)
    return clipped


def _inner_areas(distance_px: float, grid: TileGrid, size_px0: tuple[int, int]) -> NDArray[np.float64]:
    """Area (rows, columns) of each tile that lies on the slide and at least ``distance_px`` from its seams."""
    lengths = []
    for count, start, side in zip(_shape(grid, size_px0), grid.origin_px0, size_px0, strict=True):
        first = start + np.arange(count) * grid.side_px0
        last = first + grid.side_px0
        low = np.where(first > 0, first + distance_px, np.maximum(first, 0))
        high = np.where(last < side, last - distance_px, np.minimum(last, side))
        lengths.append(np.maximum(high - low, 0))
    return np.outer(lengths[1], lengths[0])


def _places(run: FinishedRun) -> tuple[NDArray[np.float64] | None, NDArray[np.float64] | None]:
    """Prompts (N, 2) and boxes (N, 4) of the cells; ``None`` where the table has none."""
    with as_format_error(run.table):
        _, schema, _, _ = read_header(run.table)
        wanted = [name for name in ("prompt_x", "prompt_y", "bbox") if name in schema.names]
        table = pq.read_table(run.table, columns=wanted, partitioning=None)
        prompts, bounds = None, None
        if {"prompt_x", "prompt_y"} <= set(wanted):
            prompts = np.stack([table[name].to_numpy() for name in ("prompt_x", "prompt_y")], axis=1)
        if "bbox" in wanted:
            box = table["bbox"].combine_chunks()
            bounds = np.stack([box.field(name).to_numpy() for name in ("xmin", "ymin", "xmax", "ymax")], axis=1)
    return prompts, bounds


def _dropped(
    run: FinishedRun, kept: NDArray[np.float64], grid: TileGrid
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Outlines that the tiles found, and cells that were kept of them, near the seams and elsewhere."""
    found = []
    for path in sorted(run.folder.parts.glob("*.parquet")):
        try:
            if part_is_current(path, run.manifest.parts_hash):
                found.append(open_part(path, ("prompt_x", "prompt_y")).points_xy)
        except FormatError:
            return None
    outlines = np.concatenate(found) if found else np.empty((0, 2))
    counts = run.manifest.counts
    if "outlines" not in counts or len(outlines) != counts["outlines"] - counts.get("from_clicks", 0):
        return None
    reach = NEAR_UM / run.info.mpp
    near = [int((seam_distance(of, grid, run.info.size_px0) < reach).sum()) for of in (outlines, kept)]
    return (near[0], near[1]), (len(outlines) - near[0], len(kept) - near[1])


def _tile_map(
    manifest: Manifest, xy: NDArray[np.float64], grid: TileGrid, size_px0: tuple[int, int], mpp: float
) -> tuple[Picture, float]:
    columns, rows = _shape(grid, size_px0)
    at = _tile_of(xy, grid, size_px0)
    cells = np.bincount(at[:, 1] * columns + at[:, 0], minlength=columns * rows).reshape(rows, columns)
    density = cells / (_inner_areas(0, grid, size_px0) * (mpp / 1000) ** 2)
    highest = float(density.max(initial=0))
    pixels = shades(density / highest if highest else density)
    missing = _missing_tiles(manifest, grid, (columns, rows))
    pixels[missing] = _MISSING
    side = min(max(MAP_PX // max(columns, rows), 1), TILE_PX)
    image = Image.fromarray(pixels.repeat(side, 0).repeat(side, 1))
    if side >= 4:
        pen = ImageDraw.Draw(image)
        for k in range(1, columns):
            pen.line([(k * side, 0), (k * side, rows * side)], (200, 200, 200))
        for k in range(1, rows):
            pen.line([(0, k * side), (columns * side, k * side)], (200, 200, 200))
        for row, column in np.argwhere(missing).tolist():
            x, y = column * side, row * side
            pen.line([(x, y), (x + side, y + side)], (0, 0, 0))
            pen.line([(x, y + side), (x + side, y)], (0, 0, 0))
    return png(image), highest


def _missing_tiles(manifest: Manifest, grid: TileGrid, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Which tiles (rows, columns) could not be read, or are in a block that is absent."""
    missing = np.zeros(shape[::-1], bool)
    try:
        for x, y in manifest.tiles.get("failed_px0", ()):
            column, row = (round((v - start) / grid.side_px0) for v, start in zip((x, y), grid.origin_px0, strict=True))
            missing[row, column] = True
        for name in manifest.tiles.get("missing_blocks", ()):
            row, column = (int(part) * grid.block_tiles for part in name.split("-"))
            missing[row : row + grid.block_tiles, column : column + grid.block_tiles] = True
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise FormatError(f"manifest.json: tiles is damaged ({error!r}); run the slide again") from error
    return missing
