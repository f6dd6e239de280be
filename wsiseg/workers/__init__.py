"""Execution of blocks: in this process, in processes of this machine, or on a cluster. The only package that knows Dask.

``work(tools, blocks, stopped)`` yields a small summary per block; ``setup(number)`` builds the tools (slide, model) once per worker. Plans go out
and counts come back: no pixel, mask or polygon passes the scheduler. A worker that dies is replaced and its blocks are given out again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from wsiseg.config import ClusterConfig
from wsiseg.workers.clusters import check_scheduler, is_batch, open_pool, quiet, scratch_folder
from wsiseg.workers.dispatcher import Dispatcher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

__all__ = ["check_scheduler", "map_blocks"]

Worker = TypeVar("Worker")
Item = TypeVar("Item")
Summary = TypeVar("Summary")


def map_blocks(
    work: Callable[[Worker, Sequence[Item], Callable[[], bool]], Iterator[Summary]],
    blocks: Sequence[Item],
    setup: Callable[[int], Worker],
    *,
    workers: int = 1,
    scheduler: str | None = None,
    cluster: ClusterConfig | None = None,
    scratch: Path | None = None,
    weight: Callable[[Item], int] | None = None,
    context: Worker | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Summary]:
    """Yield the summaries of all blocks, as they are finished.

    Parameters
    ----------
    work
        Works through some blocks and yields a summary for each; ends after the current block when its third argument turns true. Blocks come
        again when a worker died: one that is finished already should be cheap.
    blocks
        Blocks to process; neighbours stay together, the order of the summaries is not guaranteed.
    setup
        Builds a worker's tools, once; its argument counts the workers of one machine from 0. Tools that have a ``close`` are closed when workers
        outlive the run. With more than one worker, ``work`` and ``setup`` are pickled.
    workers
        1: in this process, unless there is a scheduler. More: that many processes here, or jobs of a batch system.
    scheduler
        ``tcp://host:port`` of a Dask scheduler, whose workers are used as they are; or ``slurm``, ``pbs``, ``lsf``, ``sge``.
    cluster
        The jobs of a batch system.
    scratch
        Parent of a temporary folder for Dask's files, removed at the end; jobs must see it. It is made and removed itself when it is not there.
        After an error the folder of jobs stays, for their logs. ``None``: with other temporary files.
    weight
        Tiles in a block; without it every block is a task of its own.
    context
        This process's own, when it has them already.
    stopped
        Polled some times a second: when true, no block is started, and the summaries of those in progress are the last.

    Raises
    ------
    ConfigError
        ``scheduler`` or ``cluster`` cannot be used as they are.
    RunError
        Scheduler or workers cannot be had, were lost, or died of the same blocks again and again.
    WsisegError
        What ``work`` raised. Any other exception of a worker arrives as a RunError; the cause of either is the worker's traceback.
    """
    workers = min(workers, len(blocks))
    if scheduler is None and workers <= 1:
        if blocks:
            yield from work(setup(0) if context is None else context, blocks, stopped)
    elif blocks:
        with (
            quiet(),
            scratch_folder(scratch, keep=is_batch(scheduler)) as folder,
            open_pool(workers, scheduler, cluster or ClusterConfig(), folder) as pool,
        ):
            yield from Dispatcher(pool, work, setup).summaries(blocks, weight, stopped)
