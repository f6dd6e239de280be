"""Who works on which block, and who writes the result, among all processes on one run folder."""

from __future__ import annotations

import contextlib
import time
from functools import partial
from typing import TYPE_CHECKING

from wsiseg.errors import InterruptedRunError, RunError
from wsiseg.runs.statistics import interrupt_shard
from wsiseg.runtime.atomic import partial_name
from wsiseg.segmentation.blocks import finished_block, segment_blocks
from wsiseg.segmentation.worker import open_worker_context
from wsiseg.workers import map_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from wsiseg.records import Block
    from wsiseg.runs.folder import RunFolder
    from wsiseg.runs.plan import PreparedRun
    from wsiseg.runs.plan_file import RunPlan
    from wsiseg.runs.statistics import RunStatistics
    from wsiseg.runtime.claims import Claims
    from wsiseg.runtime.shards import Shard
    from wsiseg.segmentation.blocks import BlockReport

_POLL_S = 1.0  #: between looks at what other processes on the same folder do
_IDLE_ROUNDS = 5  #: through blocks that others had claimed, without one being finished
_END = "end"  #: the claim on stitching and writing


def segment_all(
    prepared: PreparedRun,
    blocks: Sequence[Block],
    claims: Claims,
    statistics: RunStatistics,
    *,
    on_progress: Callable[[int, int, int], None] | None,
    stopped: Callable[[], bool],
) -> None:
    """Segment blocks until the part of each is there, made here or by another process on the same folder.

    Raises
    ------
    InterruptedRunError
        ``stopped`` turned true.
    RunError
        A worker failed, or every process that claims these blocks dies.
    """
    spec, total = prepared.context.spec, sum(len(b.tiles) for b in blocks)

    def show() -> None:
        if on_progress:
            on_progress(statistics.tiles, total, statistics.outlines)

    def add(report: BlockReport) -> None:
        statistics.add(report)
        show()

    tried: set[str] = set()
    idle = 0
    with statistics.clock("tiles"):
        while True:
            known = len(statistics.blocks)
            for block in blocks:
                if block.name not in statistics.blocks:
                    report = finished_block(spec, block, failed=block.name in tried)
                    if report:
                        statistics.add(report)
            if not tried or len(statistics.blocks) > known:
                show()  # the total, and what others have done
            todo = [b for b in blocks if b.name not in statistics.blocks]
            if not todo:
                return
            if stopped():
                raise statistics.interrupted(len(blocks))
            busy = set(claims.busy(b.name for b in todo))
            if len(busy) == len(todo):  # other processes are working on all of them
                time.sleep(_POLL_S)
                continue
            if idle > _IDLE_ROUNDS:  # every process that claims them dies
                names = ", ".join(b.name for b in todo[:8])
                raise RunError(
                    f"{statistics.slide}: {len(todo)} blocks are claimed again and again, never finished ({names}); see the logs of workers"
                )
            claims.drop_stale()
            done = len(statistics.blocks)
            for report in map_blocks(
                segment_blocks,
                [b for b in todo if b.name not in busy],
                partial(open_worker_context, spec),
                workers=spec.config.workers,
                scheduler=spec.config.scheduler,
                cluster=spec.config.cluster,
                context=prepared.context,
                scratch=spec.parts / partial_name("dask"),
                weight=lambda block: len(block.tiles),
                stopped=stopped,
            ):
                add(report)
            tried |= {b.name for b in todo}
            idle = idle + 1 if len(statistics.blocks) == done else 0


@contextlib.contextmanager
def recorded_interruption(
    folder: RunFolder, plan: RunPlan, claims: Claims, shard: Shard | None = None
) -> Iterator[None]:
    """Record an orderly stop: the manifest then says ``interrupted``, unless another process is at work on the folder."""
    try:
        yield
    except InterruptedRunError:
        with contextlib.suppress(RunError):  # that the run was stopped is what there is to say
            if shard:
                interrupt_shard(folder, shard, plan.run_hash)
            if not claims.busy(plan.tiles) and claims.take(_END):
                try:
                    folder.interrupt(plan.run_hash)
                finally:
                    claims.release(_END)
        raise


@contextlib.contextmanager
def sole_writer(claims: Claims, stopped: Callable[[], bool], statistics: RunStatistics) -> Iterator[None]:
    """Let only one process stitch and write; the others wait, and find it done."""
    while not claims.take(_END):
        if stopped():
            raise statistics.interrupted()
        time.sleep(_POLL_S)
    try:
        claims.drop_stale()
        yield
    finally:
        claims.release(_END)
