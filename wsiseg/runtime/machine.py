"""Identity of this process, valid on other nodes too, and whether a process of this machine still runs."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import secrets
import sys
import uuid
from pathlib import Path

_PROC = Path("/proc")


def host() -> str:
    """Host name, for messages; never compared alone."""
    return platform.node() or "host"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def space() -> str:
    """Scope of process ids: host, boot, pid namespace and time namespace, in one line.

    Two containers may share a host's name, two machines a container image, and pid 7 is another process in each of them. Where this machine
    does not tell, every process gets a space of its own: nothing is compared then.
    """
    try:
        if (
            sys.platform != "linux"
        ):  # no such namespaces; without the boot, a pid that lives again merely counts as alive
            return f"{host()}/{uuid.getnode():012x}"
        namespaces = _PROC / "self" / "ns"
        clock = namespaces / "time"  # start times are counted from its boot; before Linux 5.6 there is only one
        boot = (_PROC / "sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{host()}/{boot}/{(namespaces / 'pid').readlink()}/{clock.readlink() if clock.is_symlink() else ''}"
    except OSError:
        return f"{host()}/{secrets.token_hex(8)}"


def label() -> str:
    """Host and space for file names: letters, digits, hyphens."""
    name = "".join(c if c.isalnum() else "-" for c in host())
    return f"{name}-{hashlib.sha256(space().encode()).hexdigest()[:8]}"


def started(pid: int) -> int | None:
    """Start time of a process of this space, in the kernel's ticks; ``None`` where it is unavailable (macOS)."""
    found = _state(pid)
    return found[1] if found else None


def is_gone(pid: int, start: int | None) -> bool:
    """Tell whether a process of this space has certainly ended.

    Parameters
    ----------
    pid
        Its number, greater than 0.
    start
        Result of :func:`started`: the id may belong to another process by now.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        pass
    except (OSError, OverflowError):
        return False
    found = _state(pid)
    if found is None:
        return False
    state, began = found
    return state in "ZX" or (
        start is not None and began != start
    )  # a zombie runs no more, whenever its parent asks for it


def _state(pid: int) -> tuple[str, int] | None:
    """State letter and start time (fields 3 and 22 of ``/proc/<pid>/stat``)."""
    try:
        if os.readlink(_PROC / "self") != str(os.getpid()):  # noqa: PTH115 -- the /proc of another pid namespace: its numbers are not ours
            return None
        fields = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, ValueError, IndexError):
        return None
