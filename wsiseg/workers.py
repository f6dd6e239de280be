"""Run a function over blocks: here, or in processes of Dask. The only module that knows Dask.

``work(tools, block)`` returns a small summary; ``setup()`` builds the tools (slide, model) once per process. Blocks travel as plans and come
back as counts: no pixel, mask or polygon passes the scheduler.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Tools = TypeVar("Tools")
Item = TypeVar("Item")
Summary = TypeVar("Summary")

_TOOLS = "wsiseg_tools"


def map_blocks(
    work: Callable[[Tools, Item], Summary], blocks: Sequence[Item], setup: Callable[[], Tools], *, workers: int = 1
) -> Iterator[Summary]:
    """Yield ``work(tools, block)`` of every block as it finishes.

    Parameters
    ----------
    work, setup
        Picklable functions; ``setup`` runs once per process.
    blocks
        What to work on; order of the results is not promised.
    workers
        1: in this process. More: that many local processes.
    """
    if workers == 1 or len(blocks) <= 1:
        tools = setup()
        for block in blocks:
            yield work(tools, block)
        return
    yield from _map_in_processes(work, blocks, setup, min(workers, len(blocks)))


def _map_in_processes(
    work: Callable[[Tools, Item], Summary], blocks: Sequence[Item], setup: Callable[[], Tools], workers: int
) -> Iterator[Summary]:
    import dask
    from distributed import Client, LocalCluster, as_completed

    # No dashboard, no fixed port, no file outside a temporary folder that Dask removes: two runs on one machine never meet.
    settings = {"distributed.worker.daemon": False, "distributed.admin.tick.limit": "1h", "distributed.logging.distributed": "error"}
    with (
        dask.config.set(settings),
        LocalCluster(
            n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=logging.ERROR, memory_limit=0
        ) as cluster,
        Client(cluster) as client,
    ):
        threads = max((os.cpu_count() or 1) // workers, 1)
        futures = [client.submit(_run, work, setup, threads, block, pure=False, retries=1) for block in blocks]
        for future in as_completed(futures):
            yield future.result()
            future.release()


def _run(work: Callable[[Any, Item], Summary], setup: Callable[[], Any], threads: int, block: Item) -> Summary:
    """One block in a worker; the tools are built on the first and kept on the worker object."""
    from distributed import get_worker

    worker = get_worker()
    if not hasattr(worker, _TOOLS):
        import torch

        torch.set_num_threads(threads)
        setattr(worker, _TOOLS, setup())
    return work(getattr(worker, _TOOLS), block)
