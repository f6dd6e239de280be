"""Atomic files, complete or absent: temporary name in the same folder, fsync, rename, fsync of the folder."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import orjson

from wsiseg.errors import RunError, WsisegError
from wsiseg.runtime import machine
from wsiseg.runtime.paths import kind_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# What the user can repair; anything else keeps its own exception.
REPAIRABLE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EIO,
    errno.ENOTCONN,
    errno.ESTALE,
}


PARTIAL_PATTERN = ".*.partial"  #: temporary names, wherever a process was killed while writing
_DAY = 86_400  # seconds
_NO_FILE = "a pipe, a device or a socket; a file is written here; give another name"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Temporary name that becomes ``path`` when the block succeeds.

    Parameters
    ----------
    path
        The final file; its folder is made when missing. A file that is there stays as it is until the new one is complete.

    Yields
    ------
    Path
        ``.<name>.<machine>.<pid>.<random>.partial`` in the same folder, not yet existing; the block must write it and close it.

    Raises
    ------
    RunError
        The disk is full or the folder cannot be written; or a device or a pipe has this name.
        The temporary file is removed after any exception.
    """
    partial = path.parent / partial_name(path.name)
    try:
        if kind_of(path, RunError) == "special":
            raise RunError(f"{path}: {_NO_FILE}")
        with translate_os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            _replace(path, partial, _sync(partial, os.O_RDWR))
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # some network file systems, and Windows, cannot sync a folder
        _sync(path.parent, os.O_RDONLY)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Temporary name of a folder that becomes ``path`` when the block succeeds.

    Parameters
    ----------
    path
        The final folder. One that is there is removed when the new one is complete.

    Yields
    ------
    Path
        A name in the same folder, not yet existing; the block must make it.

    Raises
    ------
    RunError
        As of :func:`atomic_path`. After any exception the temporary folder is removed, and the one that was there is there.
    """
    partial, old = (path.parent / partial_name(path.name) for _ in range(2))
    try:
        with translate_os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            if path.exists():  # a folder with something in it cannot be replaced in one step
                path.rename(old)
            try:
                partial.rename(path)
            except BaseException:
                if old.exists():
                    old.rename(path)
                raise
    finally:
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)


def partial_name(name: str) -> str:
    """A temporary name for ``name`` that says whose it is, for :func:`is_abandoned`."""
    return f".{name}.{machine.label()}.{os.getpid()}.{secrets.token_hex(4)}.partial"


@contextmanager
def translate_os_errors(path: Path) -> Iterator[None]:
    """Turn errors of the file system while ``path`` is written into one line.

    Parameters
    ----------
    path
        Named in the message.

    Raises
    ------
    RunError
        Instead of an OSError that the user can repair; any other is left as it is.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, WsisegError) or error.errno not in REPAIRABLE:
            raise
        reason = error.strerror or str(error)
        raise RunError(
            f"{path}: cannot be written ({reason}); make room, or choose a folder you may write with --out"
        ) from error


def require_free(path: Path, error: type[WsisegError], *, overwrite: bool) -> None:
    """Refuse to replace a file without ``overwrite``.

    Parameters
    ----------
    path
        File that will be written.
    error
        The class to raise.
    overwrite
        A file may be replaced; a folder never.
    """
    found = kind_of(path, error)
    if found == "folder":
        raise error(f"{path}: is a folder; a file is written here; give a file name")
    if found == "special":  # which a new file would replace
        raise error(f"{path}: {_NO_FILE}")
    if found == "file" and not overwrite:
        raise error(f"{path}: the file exists; give another name, or pass --overwrite")


def is_abandoned(partial: Path) -> bool:
    """Tell whether the writer of a temporary file is gone: its process here has ended, or the file is of another machine and a day old.

    Another container is another machine, and so is one of which a name tells the host alone, as wsiseg once wrote them.
    """
    fields = partial.name.split(".")
    if len(fields) < 6 or fields[-4] != machine.label() or not fields[-3].isdecimal() or int(fields[-3]) < 1:
        try:
            return time.time() - partial.stat().st_mtime > _DAY
        except OSError:  # its writer, or another process that cleans up, was quicker
            return False
    return machine.is_gone(int(fields[-3]), None)


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically: UTF-8, keys sorted, indented by two spaces, newline at the end.

    Parameters
    ----------
    path
        The file to write.
    value
        dicts, lists, strings, numbers, numpy numbers and arrays; non-finite numbers become ``null``.
    """
    options = orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
    text = orjson.dumps(value, option=options)
    with atomic_path(path) as partial:
        partial.write_bytes(text)


def _replace(path: Path, partial: Path, written: os.stat_result) -> None:
    """Rename. A request repeated after a lost reply finds nothing to rename, so the file at the target decides, not the error."""
    try:
        partial.replace(path)
    except OSError:
        if not _is_in_place(path, written):
            raise


def _is_in_place(path: Path, written: os.stat_result) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)  # opened, not looked up: network file systems ask the server then
    except OSError:
        return False
    try:
        found = os.fstat(descriptor)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return (found.st_ino, found.st_size) == (written.st_ino, written.st_size)


def _sync(path: Path, flags: int) -> os.stat_result:
    """Flush a file or folder to the disk, and return its identity."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
        return os.fstat(descriptor)
    finally:
        os.close(descriptor)
