"""Pools of workers: processes of this machine, an existing Dask scheduler, or the jobs of a batch system."""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import signal
import tempfile
import time
import warnings
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsiseg.config import ClusterConfig
from wsiseg.errors import ConfigError, RunError
from wsiseg.runtime import machine
from wsiseg.runtime.text import did_you_mean
from wsiseg.workers.monitor import Pool
from wsiseg.workers.tasks import describe

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

DEATHS = 4  #: a task that has cost this many workers is not tried again
CONNECT_S = 30.0  #: for a scheduler that is started at the same moment
CLOSE_S = 10.0  #: to say good-bye to workers that may be gone

#: Batch systems: cluster class of dask-jobqueue, command that submits a job, and its keyword for who pays.
_BATCH = {
    "slurm": ("SLURMCluster", "sbatch", "account"),
    "pbs": ("PBSCluster", "qsub", "account"),
    "lsf": ("LSFCluster", "bsub", "project"),
    "sge": ("SGECluster", "qsub", "project"),
}
#: For every process of Dask that is started here.
_SETTINGS = {
    "distributed.worker.use-file-locking": False,  # the folder is ours alone, and locks on network file systems may hang
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "500ms",  # 20 ms, Dask's own, costs every process 2 % of a core
}
#: Loggers of Dask and its dependencies; what matters of theirs is reported here.
_NOISY = (
    "distributed",
    "distributed.client",
    "distributed.core",
    "distributed.gc",
    "tornado",
    "tornado.application",
    "asyncio",
)


def is_batch(scheduler: str | None) -> bool:
    """Tell whether this is the name of a batch system."""
    return scheduler in _BATCH


def check_scheduler(scheduler: str | None, cluster: ClusterConfig | None = None) -> None:
    """Find what is wrong with ``--scheduler`` before any work: nothing is connected to, nothing submitted.

    Raises
    ------
    ConfigError
        It is neither an address nor a batch system; or that system's commands, its Python package or a valid memory size are missing.
    """
    if scheduler is None or scheduler.startswith(("tcp://", "tls://", "ucx://", "ws://", "wss://", "inproc://")):
        return
    if scheduler not in _BATCH:
        allowed = f"pass tcp://host:port, or one of {', '.join(_BATCH)}"
        raise ConfigError(
            f"--scheduler {scheduler}: is neither an address nor a batch system; {did_you_mean(scheduler, _BATCH)}{allowed}"
        )
    command = _BATCH[scheduler][1]
    if shutil.which(command) is None:
        remedy = "run wsiseg where jobs are submitted, or pass --workers alone"
        raise ConfigError(f"--scheduler {scheduler}: the command {command} is not on PATH; {remedy}")
    _import_jobqueue(scheduler)
    from dask.utils import parse_bytes

    memory = (cluster or ClusterConfig()).memory
    try:
        parse_bytes(memory)
    except ValueError as error:
        raise ConfigError(f"cluster.memory is {memory!r}; it must be a size such as 8GB") from error


@contextmanager
def open_pool(workers: int, scheduler: str | None, settings: ClusterConfig, scratch: Path) -> Iterator[Pool]:
    """Open the requested pool; workers started for it end with it.

    Raises
    ------
    WsisegError
        They cannot be had.
    """
    check_scheduler(scheduler, settings)
    import dask
    import distributed  # noqa: F401 - its defaults

    before_spawn = dict(dask.config.get("distributed.nanny.pre-spawn-environ"))
    if not logger.isEnabledFor(logging.DEBUG):
        before_spawn["DASK_LOGGING"] = str(dict.fromkeys(_NOISY, "critical"))
    config = {
        **_SETTINGS,
        "temporary-directory": str(scratch),
        "distributed.scheduler.active-memory-manager.start": False,  # there is nothing to balance: results are counts
        "distributed.scheduler.allowed-failures": DEATHS - 1,
        "distributed.scheduler.http.routes": [],
        "distributed.worker.http.routes": [],
        "distributed.nanny.pre-spawn-environ": before_spawn,
    }
    with dask.config.set(config):
        if scheduler is None:
            pool = _processes(workers, before_spawn)
        elif is_batch(scheduler):
            pool = _jobs(workers, scheduler, settings, scratch)
        else:
            pool = _connection(scheduler)
        with pool as ready:
            yield ready


@contextmanager
def _processes(workers: int, before_spawn: dict[str, str]) -> Iterator[Pool]:
    """Start processes of this machine. They listen on 127.0.0.1 only, on ports that the system chooses: two runs never meet."""
    import distributed

    with ExitStack() as stack:
        stack.enter_context(
            _environment("PYTHONHASHSEED", *before_spawn)
        )  # Dask's nannies set them in this process, too
        try:
            with _environment(
                PYTHONWARNINGS="ignore:resource_tracker"
            ):  # of what it clears away when this process is killed
                before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
                resource_tracker.ensure_running()  # before the others are held back, since it lets them through
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            with _signals_held_back(), _without_warnings():
                cluster = distributed.LocalCluster(
                    n_workers=workers,
                    threads_per_worker=1,
                    memory_limit=0,
                    silence_logs=False,
                    scheduler_kwargs={"dashboard": False},
                    # without an address, Dask takes port 8787, and an older one listens to the world
                    dashboard_address="127.0.0.1:0",
                    worker_dashboard_address="127.0.0.1:0",
                )
                stack.callback(_close, cluster)
                client = distributed.Client(cluster, set_as_default=False)
                stack.callback(_close, client)
        except (OSError, RuntimeError) as error:
            remedy = "in a script of yours, call wsiseg below `if __name__ == '__main__':`; or pass --workers 1"
            raise RunError(
                f"--workers {workers}: the processes cannot be started ({describe(error)}); {remedy}"
            ) from error
        yield Pool(
            client=client,
            name=f"--workers {workers}",
            threads=max(machine.cores() // workers, 1),
            workers=workers,
            when_none="they are started again and again; run with -vv to see why they end",
            when_dead="pass fewer --workers or a smaller --tile-size",
            replace_lost_workers=partial(cluster.scale, workers),
        )


@contextmanager
def _connection(address: str) -> Iterator[Pool]:
    """Connect to the workers of an existing scheduler."""
    import distributed

    with ExitStack() as stack:
        try:
            with _without_warnings():
                client = distributed.Client(address, timeout=CONNECT_S, set_as_default=False)
                stack.callback(_close, client)
        except OSError as error:
            remedy = "start `dask scheduler` there, and see that this machine reaches it"
            raise RunError(f"--scheduler {address}: no answer within {CONNECT_S:.0f} s; {remedy}") from error
        except (ValueError, RuntimeError, ImportError) as error:
            remedy = "pass tcp://host:port of a scheduler of the same Dask"
            raise RunError(f"--scheduler {address}: cannot be used ({describe(error)}); {remedy}") from error
        yield Pool(
            client=client,
            name=f"--scheduler {address}",
            threads=None,
            workers=0,
            when_none=f"start some: `dask worker {address} --nthreads 1`",
            when_dead="give the workers more memory, or pass a smaller --tile-size",
        )


@contextmanager
def _jobs(workers: int, system: str, settings: ClusterConfig, scratch: Path) -> Iterator[Pool]:
    """Submit jobs of a batch system, of one worker each; the scheduler is in this process."""
    import dask
    import distributed

    jobqueue = _import_jobqueue(system)
    kind, command, payer = _BATCH[system]
    dask.config.update_defaults(
        {"jobqueue": {system: {"walltime": None}}}
    )  # the queue's own, not half an hour; a site's file still counts
    # Batch systems want folders without spaces; otherwise the logs are where the system puts them.
    logs = str(scratch) if re.fullmatch(r"[\w./+,:=@-]+", str(scratch)) else None
    seen = f"the logs of the jobs are in {logs}" if logs else "see the logs of the jobs"
    exports = [
        f"export DASK_{key.upper().replace('.', '__').replace('-', '_')}={value}" for key, value in _SETTINGS.items()
    ]
    with ExitStack() as stack:
        try:
            with _without_warnings():
                cluster = getattr(jobqueue, kind)(
                    cores=settings.cores,
                    memory=settings.memory,
                    processes=1,
                    queue=settings.queue,
                    walltime=settings.walltime,
                    interface=settings.interface,
                    log_directory=logs,
                    local_directory=shlex.quote(str(scratch)),
                    job_extra_directives=list(settings.directives),
                    job_script_prologue=[*exports, *settings.prologue],
                    # one task at a time, with all cores; and it is for the batch system to watch the memory
                    worker_extra_args=["--nthreads", "1", "--memory-limit", "0", "--no-dashboard"],
                    scheduler_options={"dashboard": False, "dashboard_address": "127.0.0.1:0", "port": 0},
                    **{payer: settings.account},
                )
                stack.callback(_close, cluster)
                client = distributed.Client(cluster, set_as_default=False)
                stack.callback(_close, client)
        except (OSError, RuntimeError, ValueError) as error:
            raise RunError(
                f"--scheduler {system}: cannot be prepared ({describe(error)}); see the section cluster of the configuration"
            ) from error
        try:
            cluster.sync(_submit, cluster, workers)
        except RuntimeError as error:
            what = f"{command} refuses the job ({_last_words(error)})"
            raise RunError(f"--scheduler {system}: {what}; see the section cluster of the configuration") from error

        def replace_lost_workers() -> None:
            try:
                cluster.sync(_submit, cluster, workers)
            except RuntimeError as error:
                logger.warning(
                    "--scheduler %s: %s does not replace lost jobs (%s)", system, command, _last_words(error)
                )

        yield Pool(
            client=client,
            name=f"--scheduler {system}",
            threads=settings.cores,
            workers=workers,
            when_none=f"the jobs wait in the queue, or cannot start: {seen}",
            when_dead=f"raise cluster.memory, {seen}",
            replace_lost_workers=replace_lost_workers,
        )


async def _submit(cluster: Any, jobs: int) -> None:  # noqa: ANN401
    """Submit the jobs that are missing; raises a RuntimeError with what the system's command said."""
    cluster.scale(jobs=jobs)
    try:
        await cluster._correct_state()  # scale() leaves this to the event loop, where a refusal is not reported
    finally:
        for name, job in list(cluster.workers.items()):
            if job.job_id is None:
                del cluster.workers[name]


def _last_words(error: RuntimeError) -> str:
    """Output of a batch system's command, from the error of dask-jobqueue."""
    return " ".join(str(error).split("stderr:")[-1].split()) or describe(error)


def _import_jobqueue(system: str) -> Any:  # noqa: ANN401
    import dask

    before, dask.config.PATH = (
        dask.config.PATH,
        __file__,
    )  # it would leave a file of settings in a folder of this name, but this is none
    try:
        import dask_jobqueue
    except ImportError as error:
        raise ConfigError(
            f'--scheduler {system}: needs dask-jobqueue; in the checkout, pip install ".[hpc]"'
        ) from error
    finally:
        dask.config.PATH = before
    return dask_jobqueue


def _close(what: Any) -> None:  # noqa: ANN401
    """Close a client or cluster, which may have lost what it was connected to."""
    with suppress(Exception):
        what.close(timeout=CLOSE_S)


@contextmanager
def scratch_folder(parent: Path | None, *, keep: bool) -> Iterator[Path]:
    """Create a folder for Dask's files, in another that is created and removed as needed; with ``keep`` they stay after an error."""
    parent = Path(tempfile.gettempdir()) if parent is None else parent.absolute()
    there = parent.exists()
    parent.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix="dask-", dir=parent))
    well = False
    try:
        yield path
        well = True
    finally:
        if well or not keep:
            deadline = time.monotonic() + CLOSE_S
            while path.exists() and time.monotonic() < deadline:  # workers may be about to write their last
                shutil.rmtree(path, ignore_errors=True)
                time.sleep(0.01)
            if not there:
                with suppress(OSError):  # in use by another process
                    parent.rmdir()


@contextmanager
def quiet() -> Iterator[None]:
    """Show Dask's own log with -vv only."""
    import distributed  # noqa: F401 - it sets its loggers up when it is imported

    loggers = [] if logger.isEnabledFor(logging.DEBUG) else [logging.getLogger(name) for name in _NOISY]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence Dask's warnings about versions, which are checked here, and about ports and addresses, of which any will do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _environment(*names: str, **changes: str) -> Iterator[None]:
    """Set variables of the environment, and restore them at the end."""
    before = {name: os.environ.get(name) for name in (*names, *changes)}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Block SIGINT, SIGTERM and SIGUSR1 in threads and processes started now: the signals may reach all of them, but one decides."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
