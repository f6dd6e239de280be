"""How much is worked on at once: halved in the right order, never below the least, and told apart from other errors."""

from __future__ import annotations

import logging

import pytest
import torch

from wsiseg.config import from_mapping
from wsiseg.errors import RunError
from wsiseg.segmentation import batch_size
from wsiseg.segmentation.batch_size import Batch, is_out_of_memory

CPU = torch.device("cpu")


def test_tiles_are_halved_before_prompts_and_the_least_is_an_error() -> None:
    batch = Batch(from_mapping({"batch_size": 4, "masks": {"prompts_per_batch": 20}}, "test"), CPU)
    seen = []
    for _ in range(4):
        batch.halve("tile 3", MemoryError())
        seen.append((batch.tiles, batch.prompts))
    assert seen == [(2, 20), (1, 20), (1, 10), (1, 8)]
    with pytest.raises(RunError, match=r"^tile 3: out of memory with one tile and 8 prompts at a time; pass a smaller"):
        batch.halve("tile 3", MemoryError())


def test_one_tile_at_a_time_on_a_cpu_unless_said_otherwise() -> None:
    assert Batch(from_mapping({}, "test"), CPU).tiles == 1
    assert Batch(from_mapping({"batch_size": 5}, "test"), CPU).tiles == 5


def test_tiles_read_ahead_are_bounded_by_bytes_number_and_max_ram() -> None:
    batch = Batch(from_mapping({}, "test"), CPU)
    tile = 1072 * 1072 * 3
    assert batch.read_ahead(tile) == batch_size.READ_BYTES // tile + 1
    assert batch.read_ahead(1) == 2 * batch_size.MOST_TILES + 1
    assert batch.read_ahead(1 << 40) == 2 + 1
    assert Batch(from_mapping({"max_ram_gb": 0.5}, "test"), CPU).read_ahead(tile) < batch.read_ahead(tile)


def test_above_max_ram_batches_shrink_and_one_warning_follows(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(batch_size, "peak_bytes_lately", lambda: 2 << 30)
    batch = Batch(from_mapping({"max_ram_gb": 1, "batch_size": 2, "masks": {"prompts_per_batch": 8}}, "test"), CPU)
    with caplog.at_level(logging.WARNING):
        batch.learn()
        assert (batch.tiles, caplog.messages) == (1, [])
        batch.learn()
        batch.learn()
    assert caplog.messages == ["--max-ram 1: more is needed with tiles of this size; pass a smaller --tile-size"]


def test_a_gpus_batch_is_what_fits_after_the_first_tile_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """With numbers of a card that is not here: 1 GB of weights, 2 GB at the peak of one tile, 10 GB free."""
    gb, peak, emptied = 1 << 30, [2 << 30], []
    fake = {
        "memory_allocated": lambda _: gb,
        "reset_peak_memory_stats": lambda _: None,
        "mem_get_info": lambda _: (10 * gb, 80 * gb),
        "max_memory_allocated": lambda _: peak[0],
        "memory_reserved": lambda _: gb,
        "empty_cache": lambda: emptied.append(True),
    }
    for name, function in fake.items():
        monkeypatch.setattr(torch.cuda, name, function)
    gpu = torch.device("cuda")
    batch = Batch(from_mapping({}, "test"), gpu)
    batch.learn()
    assert batch.tiles == 7  # 0.8 x 11 GB less the weights, of 1 GB a tile
    batch.learn()
    assert batch.tiles == 7  # measured once
    batch = Batch(from_mapping({"max_vram_gb": 4}, "test"), gpu)
    batch.learn()
    assert (batch.tiles, emptied) == (3, [])
    peak[0] = 5 << 30
    batch.learn()
    assert (batch.tiles, emptied) == (1, [True])
    batch.halve("tile 1", MemoryError())
    assert len(emptied) == 2


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_only_lack_of_memory_is_taken_for_lack_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
