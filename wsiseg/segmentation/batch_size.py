"""Batch sizes: as many tiles and prompts as fit into memory, fewer when memory runs out."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from wsiseg.errors import RunError
from wsiseg.runtime.profiling import peak_bytes_lately

if TYPE_CHECKING:
    from wsiseg.config import RunConfig

logger = logging.getLogger(__name__)

MOST_TILES = 32  #: beyond, an encoder is not faster on any device, while its memory keeps growing
FEWEST_PROMPTS = 8  #: below, decoding is nothing but calls; memory is then the tile's
READ_BYTES = (
    64 << 20
)  #: tiles read ahead: 18 of 1072 px, some seconds of work on a CPU; a GPU gets four times as many, two full batches
GB = 1 << 30


class Batch:
    """Tiles encoded together and prompts decoded together on one device.

    Parameters
    ----------
    config
        ``batch_size`` (``None``: found here), ``masks.prompts_per_batch``, ``max_ram_gb``, ``max_vram_gb``.
    device
        Device of the model.

    Notes
    -----
    On a CPU a batch is one tile: its activations just fit the cache, and results do not depend on the batch then. On a GPU the first tile is
    worked on alone, and what it took decides how many fit.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.tiles = config.batch_size or 1
        self.prompts = config.masks.prompts_per_batch
        self.max_ram = config.max_ram_gb and config.max_ram_gb * GB
        self.max_vram = config.max_vram_gb and config.max_vram_gb * GB
        self._device = device
        self._measure = config.batch_size is None and device.type == "cuda"
        self._weights = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        self._warned = False
        if self.max_ram:
            peak_bytes_lately()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def read_ahead(self, tile_bytes: int) -> int:
        """Number of tiles that may be read ahead."""
        budget: float = READ_BYTES * (4 if self._device.type == "cuda" else 1)
        budget = min(budget, self.max_ram / 16) if self.max_ram else budget
        return int(min(max(budget // tile_bytes, 2), 2 * MOST_TILES)) + self.tiles

    def learn(self) -> None:
        """Adapt to the memory of a finished batch: keeps it within what is allowed."""
        if self._measure:
            self._measure = False
            free, _ = torch.cuda.mem_get_info(self._device)
            used = torch.cuda.max_memory_allocated(self._device)
            room = 0.8 * (free + torch.cuda.memory_reserved(self._device))
            room = min(room, self.max_vram) if self.max_vram else room
            self.tiles = int(min(max((room - self._weights) / max(used - self._weights, 1), 1), MOST_TILES))
            logger.info("batches of %d tiles", self.tiles, extra={"event": "batch", "facts": {"tiles": self.tiles}})
        if self.max_ram and peak_bytes_lately() > self.max_ram and not self._warned and not self._smaller():
            self._warned = True
            logger.warning(
                "--max-ram %g: more is needed with tiles of this size; pass a smaller --tile-size", self.max_ram / GB
            )
        if (
            self.max_vram
            and self._device.type == "cuda"
            and torch.cuda.max_memory_allocated(self._device) > self.max_vram
            and self._smaller()
        ):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)

    def halve(self, place: str, error: Exception) -> None:
        """Halve the batch after memory ran out.

        Raises
        ------
        RunError
            It is the least already.
        """
        if not self._smaller():
            raise RunError(
                f"{place}: out of memory with one tile and {self.prompts} prompts at a time; pass a smaller --tile-size, or --device cpu"
            ) from error
        logger.warning(
            "%s: out of memory; continuing with batches of %d tiles and %d prompts", place, self.tiles, self.prompts
        )
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _smaller(self) -> bool:
        """Halve the tiles, else the prompts; False when there was nothing to halve."""
        if self.tiles > 1:
            self.tiles //= 2
        elif self.prompts > FEWEST_PROMPTS:
            self.prompts = max(self.prompts // 2, FEWEST_PROMPTS)
        else:
            return False
        return True


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception means that memory ran out, on a GPU or here."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in ("DefaultCPUAllocator", "out of memory", "alloc_cpu")
    )
