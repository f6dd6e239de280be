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
    work: Callable[[Tools, Item], Summary], blocks: Sequence[Item], setup: Callable[[], Tools], *, workers: int = 1, tools: Tools | None = None
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
    tools
        This process's own, when it has them already.
    """
    workers = min(workers, len(blocks))
    if workers > 1:
        yield from _map_in_processes(work, blocks, setup, workers)
    elif blocks:
        tools = setup() if tools is None else tools
        for block in blocks:
            yield work(tools, block)


def _map_in_processes(
    work: Callable[[Tools, Item], Summary], blocks: Sequence[Item], setup: Callable[[], Tools], workers: int
) -> Iterator[Summary]:
    import distributed

    logging.getLogger("distributed").setLevel(logging.ERROR)
    # No fixed port (0: any free one, this machine only) and no file outside a temporary folder: two runs on one machine never meet.
    with (
        distributed.LocalCluster(
            n_workers=workers, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0", silence_logs=logging.ERROR, memory_limit=0
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        threads = max(len(os.sched_getaffinity(0)) // workers, 1)
        recipe = client.scatter(setup, broadcast=True, hash=False)  # once per worker, not with every block
        futures = [client.submit(_run, work, recipe, threads, block, pure=False, retries=1) for block in blocks]
        for future in distributed.as_completed(futures):
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
