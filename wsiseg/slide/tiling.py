"""The tile plan: pure arithmetic in model px.

::

    core    what a tile owns; cores tile the plane without gap or overlap
    outer   core + halo: what is read and encoded
    block   block_tiles x block_tiles tiles: unit of work, part file and resume

A core starts on a multiple of the model's stride, wherever the grid's origin lies, so that every plan samples the network on one lattice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from wsiseg.config import HALO_UM, TILE_UM
from wsiseg.errors import ConfigError
from wsiseg.geometry import Box, Lattice, round_up
from wsiseg.records import Block, Tile

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from wsiseg.config import TilingConfig
    from wsiseg.models.contract import PromptableModel
    from wsiseg.records import SlideInfo


@dataclass(frozen=True)
class TileGrid:
    """Where the cores of a plan lie.

    Attributes
    ----------
    side_px0
        Side of a core, level-0 px.
    origin_px0
        Corner of the first core; not right of or below the slide's.
    block_tiles
        A block is this many cores squared.
    """

    side_px0: float
    origin_px0: tuple[float, float]
    block_tiles: int

    @classmethod
    def of(cls, blocks: Sequence[Block], lattice: Lattice, config: TilingConfig) -> TileGrid | None:
        """Grid of the cores of a plan; ``None`` for one without blocks."""
        if not blocks:
            return None
        core = blocks[0].tiles[0].core
        x, y = (edge % core.width - (core.width if edge % core.width else 0) for edge in (core.x0, core.y0))
        return cls(core.width * lattice.scale, (x * lattice.scale, y * lattice.scale), config.block_tiles)


def plan_blocks(
    size_px0: tuple[int, int],
    lattice: Lattice,
    config: TilingConfig,
    *,
    stride_px: int,
    reach_px: int,
    input_px: int | None = None,
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
    input_px
        Input size of a model with a fixed one: a core is this less the halo.
    wanted
        Called with a core's box in level-0 px ``(x0, y0, x1, y1)``; tiles for which it is false are left out.

    Returns
    -------
    list of Block
        Without empty blocks; possibly empty.

    Raises
    ------
    ConfigError
        Core and halo do not fit into the model's input.
    """
    tile, halo = _sizes(lattice.model_mpp, config, stride_px, reach_px, input_px)
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


def plan_for_model(
    info: SlideInfo, model: PromptableModel, config: TilingConfig, wanted: Callable[[float, float, float, float], bool]
) -> list[Block]:
    """Plan the blocks of a slide for a model: :func:`plan_blocks` on its lattice, with its stride, reach and input size.

    Parameters
    ----------
    info
        Size and scale of the slide.
    model
        The network that will read the tiles.
    config, wanted
        As for :func:`plan_blocks`.

    Returns
    -------
    list of Block
        As of :func:`plan_blocks`.
    """
    return plan_blocks(
        info.size_px0,
        Lattice(info.mpp, model.mpp),
        config,
        stride_px=model.stride_px,
        reach_px=model.reach_px,
        input_px=model.input_px,
        wanted=wanted,
    )


def _sizes(mpp: float, config: TilingConfig, stride_px: int, reach_px: int, input_px: int | None) -> tuple[int, int]:
    """Side of a core and width of its halo, model px."""
    if input_px is None:
        halo_um = HALO_UM if config.halo_um is None else config.halo_um
        return round_up((config.tile_um or TILE_UM) / mpp, stride_px), round_up(max(halo_um / mpp, reach_px), stride_px)
    halo = round_up(max((config.halo_um or 0) / mpp, reach_px), stride_px)
    tile = round_up(config.tile_um / mpp, stride_px) if config.tile_um else input_px - 2 * halo
    tile += (input_px - tile) // stride_px % 2 * stride_px  # an even rest, in strides, makes two halos
    if tile < stride_px or tile + 2 * halo > input_px:
        room = f"{input_px * mpp:g} um with a halo of {halo * mpp:g} um or more on each side"
        raise ConfigError(
            f"--tile-size, --halo: the model takes tiles of {room}; leave --tile-size out, or make it smaller"
        )
    return tile, (input_px - tile) // 2
