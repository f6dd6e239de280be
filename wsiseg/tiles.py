"""The tile plan: pure arithmetic in model px.

::

    core    what a tile owns; cores tile the plane without gap or overlap
    outer   core + halo: what is read and encoded
    block   block_tiles x block_tiles tiles: unit of work, part file and resume

A core starts on a multiple of the model's stride, wherever the grid's origin lies, so that every plan samples the network on one lattice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from wsiseg.geometry import Box, Lattice, round_up
from wsiseg.records import Block, Tile

if TYPE_CHECKING:
    from collections.abc import Callable

    from wsiseg.config import TilingConfig


def plan_blocks(
    size_px0: tuple[int, int],
    lattice: Lattice,
    config: TilingConfig,
    *,
    stride_px: int,
    reach_px: int,
    wanted: Callable[[float, float, float, float], bool],
) -> list[Block]:
    """Cut a slide into blocks of tiles, in reading order.

    Parameters
    ----------
    size_px0
        Width and height of the slide, level-0 px.
    lattice
        Between model px and level-0 px.
    config
        Sizes in microns.
    stride_px
        The model's deepest stride; cores and halos are its multiples.
    reach_px
        The halo is at least this (half of the model's mask window).
    wanted
        Called with a core's box in level-0 px ``(x0, y0, x1, y1)``; tiles for which it is false are left out.

    Returns
    -------
    list of Block
        Without empty blocks; possibly empty.
    """
    tile = round_up(config.tile_um / lattice.model_mpp, stride_px)
    halo = round_up(max(config.halo_um / lattice.model_mpp, reach_px), stride_px)
    origin = -(round(config.origin_um / lattice.model_mpp / stride_px) * stride_px % tile)
    width, height = lattice.model_size(size_px0)
    columns, rows = -(-(width - origin) // tile), -(-(height - origin) // tile)
    step = config.block_tiles
    blocks = []
    for block_row in range(0, rows, step):
        for block_column in range(0, columns, step):
            tiles = []
            for row in range(block_row, min(block_row + step, rows)):
                for column in range(block_column, min(block_column + step, columns)):
                    x, y = origin + column * tile, origin + row * tile
                    core = Box(x, y, x + tile, y + tile)
                    if wanted(*(edge * lattice.scale for edge in core)):
                        tiles.append(Tile(core, core.grow(halo)))
            if tiles:
                blocks.append(Block(f"{block_row // step:04d}-{block_column // step:04d}", tuple(tiles)))
    return blocks
