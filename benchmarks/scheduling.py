"""What Dask costs: giving tasks out that do nothing, and how long workers wait between tasks that sleep for 20 ms per tile.

    python -m benchmarks.scheduling [--workers 2 8]

Blocks are those of a real plan, of 16 tiles; a task is 4 of them. Client, scheduler and all workers share this machine. `cpu ms per task` is that of
the process that has client and scheduler in it, `sent kB per task` the pickled blocks. `waiting` is the share of the time between a worker's first
block and its last in which it had none.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import cloudpickle

from benchmarks.common import write_results
from wsiseg.config import TilingConfig
from wsiseg.geometry import Lattice
from wsiseg.slide.tiling import plan_blocks
from wsiseg.workers import map_blocks
from wsiseg.workers.tasks import group

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from wsiseg.records import Block

SIDE = 80 * 4096  #: px of a square slide: 80 blocks of 16 tiles of 1024 px in a row


def setup(number: int) -> int:
    return number


def nothing(number: int, blocks: Sequence[Block], stopped: Callable[[], bool]) -> Iterator[tuple]:  # noqa: ARG001
    for block in blocks:
        begun = time.monotonic()
        yield (
            block.name,
            os.getpid(),
            begun,
            time.monotonic(),
            dict.fromkeys(("tiles", "tiles_failed", "prompts", "outlines"), 1),
        )


def sleep(number: int, blocks: Sequence[Block], stopped: Callable[[], bool]) -> Iterator[tuple]:
    for block, summary in zip(blocks, nothing(number, blocks, stopped), strict=True):
        time.sleep(0.02 * len(block.tiles))
        yield (*summary[:3], time.monotonic(), summary[4])


def measure(title: str, work: Callable, blocks: Sequence[Block], workers: int) -> dict[str, object]:
    tasks = group(blocks, tiles, workers)
    back = []
    with tempfile.TemporaryDirectory() as folder:
        for summary in map_blocks(work, blocks, setup, workers=workers, scratch=Path(folder), weight=tiles):
            if not back:
                wall, cpu = time.monotonic(), time.process_time()
            back.append(summary)
            last = time.monotonic(), time.process_time()
    by_worker = defaultdict(list)
    for _, pid, begun, ended, _ in back:
        by_worker[pid].append((begun, ended))
    spans = [max(e for _, e in times) - min(b for b, _ in times) for times in by_worker.values()]
    busy = sum(e - b for times in by_worker.values() for b, e in times)
    assert len(back) == len(blocks)
    return {
        "tasks": title,
        "workers": workers,
        "number": len(tasks),
        "ms per task": 1000 * (last[0] - wall) / len(tasks),
        "cpu ms per task": 1000 * (last[1] - cpu) / len(tasks),
        "sent kB per task": sum(len(cloudpickle.dumps(t)) for t in tasks) / len(tasks) / 1000,
        "waiting": 1 - busy / sum(spans),
    }


def tiles(block: Block) -> int:
    return len(block.tiles)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="*", default=[2, 8])
    options = parser.parse_args()
    lattice = Lattice(0.25, 0.25)
    plan = plan_blocks((SIDE, SIDE), lattice, TilingConfig(), stride_px=16, reach_px=0, wanted=lambda *_: True)[:4000]
    rows = []
    for workers in options.workers:
        rows.append(measure("empty", nothing, plan, workers))
        rows.append(measure("64 tiles x 20 ms", sleep, plan[: 4 * 20 * workers], workers))
        print(rows[-2:], flush=True)
    write_results("scheduling", rows, __doc__.split("\n\n", 2)[2].strip())


if __name__ == "__main__":
    main()
