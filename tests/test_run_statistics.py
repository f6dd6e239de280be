"""What the reports of blocks add up to, and the sentences about what is missing."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from wsiseg.errors import RunError
from wsiseg.formats.parts import write_part
from wsiseg.records import Cells
from wsiseg.runs.statistics import RunStatistics, interrupt_shard
from wsiseg.runtime.claims import Claims
from wsiseg.runtime.profiling import BusyClock, Clock
from wsiseg.runtime.shards import Shard
from wsiseg.segmentation.blocks import BLOCK_COUNTS, BlockReport
from wsiseg.slide.tiling import TileGrid

if TYPE_CHECKING:
    from pathlib import Path


def counts(**some: int) -> dict[str, int]:
    return dict.fromkeys(BLOCK_COUNTS, 0) | some


GRID = TileGrid(100.0, (0.0, -20.0), 2)


def plan(**tiles: int) -> Any:
    return SimpleNamespace(grid=GRID, tiles=tiles, tissue_mm2=2.0, run_hash="run", parts_hash="parts")


def test_counts_seconds_and_peaks_of_blocks_add_up() -> None:
    statistics = RunStatistics("a.svs")
    statistics.add(BlockReport("a", counts(tiles=4, outlines=7), [], {"encode": 1.5}, 5 << 40, 3 << 20, process="p"))
    statistics.add(BlockReport("b", counts(tiles=2, outlines=1), [], {"encode": 0.5}, 1, 1, resumed=True, process="p"))
    account = statistics.account(plan(a=4, b=2))
    assert (statistics.tiles, statistics.outlines) == (6, 8)
    assert account["status"] == "complete"
    assert account["counts"] == counts(tiles=6, outlines=8) | {"blocks": 2, "blocks_missing": 0, "blocks_resumed": 1}
    assert account["seconds"]["encode"] == 2.0
    assert (account["peak_ram_mb"], account["peak_vram_mb"]) == (5 << 20, 3.0)


def test_a_gpu_is_measured_by_its_own_events() -> None:
    """Events that are reached later, as of work that is still queued, count when they are reached."""

    class Event:
        reached = True
        now = 0.0

        def __init__(self) -> None:
            Event.now += 250.0
            self.at, self.done = Event.now, Event.reached

        def query(self) -> bool:
            return self.done

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    clock = Clock()
    busy = BusyClock(clock, torch.device("cpu"), Event)  # type: ignore[arg-type]
    with busy():
        pass
    assert clock.seconds == {"busy": 0.25}
    Event.reached = False
    with pytest.raises(ValueError, match="work"), busy():
        raise ValueError("work")
    assert clock.seconds == {"busy": 0.25}
    busy._pending[0][1].done = True
    Event.reached = True
    with busy():
        pass
    assert clock.seconds == {"busy": 0.75}


def test_the_share_of_a_model_is_of_each_process() -> None:
    statistics = RunStatistics("a.svs")
    for process in "pq":
        seconds = {"busy": 3.0, "encode": 1.0}
        statistics.add(BlockReport(process, counts(tiles=1), [], seconds, process=process))
    statistics.clock.add({"tiles": 4.0})
    account = statistics.account(plan(p=1, q=1))
    assert account["model_share"] == 0.75
    assert "busy" not in account["seconds"]


def test_a_tile_that_failed_and_a_block_that_is_missing_make_a_run_incomplete() -> None:
    statistics = RunStatistics("a.svs")
    failed = BlockReport(
        "a", counts(tiles=4, tiles_failed=1), ["a: tile 3 cannot be read"], {}, failed_px0=((100.0, 80.0),)
    )
    statistics.add(failed)
    account = statistics.account(plan(a=4, b=5))
    where = {"side_px0": 100.0, "origin_px0": (0.0, -20.0), "block_tiles": 2}
    assert account["tiles"] == where | {"failed_px0": [(100.0, 80.0)], "missing_blocks": ["b"]}
    assert account["status"] == "incomplete"
    assert account["failures"] == ["a: tile 3 cannot be read", "block b: none of its tiles was worked on (5)"]
    assert (account["counts"]["tiles"], account["counts"]["tiles_failed"]) == (9, 6)


def test_a_block_that_is_done_again_replaces_its_failures() -> None:
    statistics = RunStatistics("a.svs")
    statistics.add(BlockReport("a", counts(tiles=4, tiles_failed=1), ["a: tile 3 cannot be read"], {}))
    statistics.add(BlockReport("a", counts(tiles=4), [], {}))
    assert statistics.account(plan(a=4))["failures"] == []
    assert statistics.account(plan(a=4))["tiles"]["failed_px0"] == []


def part(folder: Path, name: str, config_hash: str = "parts", **some: int) -> Path:
    path = folder / f"{name}.parquet"
    failures = [f"{name}: a tile cannot be read"] * some.get("tiles_failed", 0)
    write_part(path, Cells.empty(2), config_hash, counts(**some), failures, [(100.0, 80.0)] * len(failures))
    return path


def test_parts_of_another_run_and_damaged_ones_are_missing(tmp_path: Path) -> None:
    part(tmp_path, "whole", tiles=1, outlines=3)
    part(tmp_path, "failed", tiles=2, tiles_failed=1)
    part(tmp_path, "other", config_hash="others", tiles=1)
    part(tmp_path, "cut", tiles=1).write_bytes(b"PAR1")
    statistics, folder = RunStatistics("a.svs"), SimpleNamespace(parts=tmp_path)
    missing = statistics.collect(folder, plan(whole=1, failed=2, other=1, cut=1, never=1))
    assert missing == ["failed", "other", "cut", "never"]
    tiles = statistics.account(plan(whole=1, failed=2, other=1))["tiles"]
    assert (tiles["failed_px0"], tiles["missing_blocks"]) == ([(100.0, 80.0)], ["other"])
    with Claims(tmp_path) as claims:
        said = statistics.describe_missing(folder, missing, plan(whole=1, failed=2, other=1, cut=1, never=1), claims)
    assert said == (
        "3 of 5 blocks are missing (other, cut, never); 1 tile could not be read (first: failed: a tile cannot be read)"
    )


def test_a_part_that_another_run_replaced_is_refused(tmp_path: Path) -> None:
    paths = [part(tmp_path, "a", tiles=1), part(tmp_path, "b", config_hash="others", tiles=1)]
    RunStatistics("a.svs").require_current(paths[:1], "parts")
    with pytest.raises(RunError, match=r"b\.parquet: was changed by another run"):
        RunStatistics("a.svs").require_current(paths, "parts")


def test_a_shard_that_was_stopped_says_so_and_one_that_ended_is_left_alone(tmp_path: Path) -> None:
    folder, shard = SimpleNamespace(parts=tmp_path, path=tmp_path), Shard(1, 2)
    record = tmp_path / "shard-1-of-2.json"
    statistics = RunStatistics("a.svs")
    statistics.begin(torch.device("cpu"), folder, plan(a=1), shard)
    assert json.loads(record.read_text())["status"] == "running"
    interrupt_shard(folder, shard, "run")
    assert json.loads(record.read_text())["status"] == "interrupted"
    statistics.add(BlockReport("a", counts(tiles=1), [], {}, process="p"))
    assert statistics.end_shard(folder, shard).counts["tiles"] == 1
    interrupt_shard(folder, shard, "run")
    assert json.loads(record.read_text())["status"] == "shard"
