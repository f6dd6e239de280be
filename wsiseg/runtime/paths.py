"""Kind of file at a path, checked before it is opened, and identity of names.

Files that people name are opened through here, so that every error of the file system is one message, and a pipe or a device, which may never
end, is not waited for.
"""

from __future__ import annotations

import os
import stat
import sys
import unicodedata
from contextlib import contextmanager
from errno import EINVAL
from typing import TYPE_CHECKING, Literal

from wsiseg.errors import WsisegError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Kind = Literal["nothing", "file", "folder", "special"]
_SPECIAL = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def kind_of(path: Path, error: type[WsisegError]) -> Kind:
    """Kind of file, symbolic links followed; ``special`` is a pipe, a device or a socket.

    Raises
    ------
    WsisegError
        An ``error``: the file system does not say.
    """
    with readable(path, error):
        mode = _mode(path)
    if mode is None:
        return "nothing"
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "special"


def names_in(folder: Path, error: type[WsisegError]) -> list[str]:
    """The names in a folder, sorted; none where there is no folder.

    Raises
    ------
    WsisegError
        An ``error``: the folder cannot be listed.
    """
    with readable(folder, error):
        mode = _mode(folder)
        return [] if mode is None or not stat.S_ISDIR(mode) else sorted(os.listdir(folder))  # noqa: PTH208 - names are what is asked for


@contextmanager
def readable(path: Path, error: type[WsisegError]) -> Iterator[None]:
    """Turn errors of the file system while ``path`` is examined or read into one line.

    Raises
    ------
    WsisegError
        An ``error`` in place of OSError.
    """
    try:
        yield
    except OSError as problem:
        if isinstance(problem, WsisegError):
            raise
        raise error(f"{path}: {refusal(problem)}") from problem


def refusal(problem: OSError) -> str:
    """Message for an error of the file system, with the remedy, without the path."""
    if isinstance(problem, PermissionError):
        return "no permission to read it; change the file's permissions or run as a user who may"
    return f"cannot be read ({problem.strerror or problem}); check the disk and the path"


def require_regular(path: Path) -> None:
    """Refuse what is not a file, before it is opened: a pipe without a writer never answers, and ``/dev/zero`` never ends.

    Raises
    ------
    OSError
        As opening it would, or with the kind of what there is.
    """
    mode = _mode(path)
    if mode is not None and (what := next((what for test, what in _SPECIAL if test(mode)), None)):
        raise OSError(EINVAL, f"{what}, not a file", str(path))


def read_bytes(path: Path) -> bytes:
    """The content of a regular file.

    Raises
    ------
    OSError
        It cannot be read, or is not a file.
    """
    require_regular(path)
    return path.read_bytes()


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """The text of a regular file.

    Raises
    ------
    OSError
        It cannot be read, or is not a file.
    UnicodeDecodeError
        It is in another encoding.
    """
    require_regular(path)
    return path.read_text(encoding=encoding)


def require_text(path: str | Path, error: type[WsisegError]) -> None:
    """Refuse a name that cannot be written into a result: JSON and Parquet hold text, and a file's name may be any bytes.

    Raises
    ------
    WsisegError
        An ``error``: the name is not text in the encoding of this system, or holds a NUL character.
    """
    name = os.fspath(path)
    if "\0" in name:
        raise error(f"{shown(name)!r}: a NUL character, which no name of a file has; correct the name")
    try:
        name.encode()
    except UnicodeEncodeError as problem:
        encoding = sys.getfilesystemencoding().upper()
        advice = "rename it, or make a symbolic link to it with a name that is"
        raise error(f"{shown(name)}: the name of the file or a folder is not {encoding} text; {advice}") from problem


def shown(name: str) -> str:
    r"""A name that can be printed and encoded anywhere: bytes that are not text as ``\udcff``."""
    return name.encode("utf-8", "backslashreplace").decode()


def normal(name: str) -> str:
    """The one form of a name: ``é`` is one character on most systems (NFC), two from a Mac (NFD)."""
    return unicodedata.normalize("NFC", name)


def target(slide: str) -> str:
    """Identity of a slide by its name: the absolute path with symbolic links followed, or the URL; in one form."""
    return slide if "://" in slide else normal(os.path.realpath(slide))


def _mode(path: Path) -> int | None:
    """``st_mode``; ``None`` where there is nothing."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as problem:
        raise OSError(EINVAL, "a name that no file can have", str(path)) from problem
