"""Errors of unreadable pixels: whether the file is damaged, and if not, which reader can read it."""

from __future__ import annotations

import re
import threading
from typing import TYPE_CHECKING

from wsiseg.errors import SlideError

if TYPE_CHECKING:
    from wsiseg.geometry import Box
    from wsiseg.records import SlideInfo

_UNSUPPORTED = re.compile(
    r"not supported|unsupported|can ?not handle|not implemented|requires the .* package", re.IGNORECASE
)
_asking = threading.local()  # a reader that is asked for a second opinion must not ask for one itself


def unreadable(info: SlideInfo, level: int, box: Box, error: BaseException) -> SlideError:
    """The error of a read: slide, level, box, cause, remedy.

    Parameters
    ----------
    info
        Metadata of the slide as its reader opened it.
    level, box
        Requested level and box.
    error
        Error of its library.
    """
    cause = " ".join(str(error).replace(f"{info.path}: ", "").split())[:200] or type(error).__name__
    what = f"cannot read level {level}, x {box.x0} to {box.x1}, y {box.y0} to {box.y1} px ({cause})"
    other = _another_reader(info, level, box)
    if other:
        return SlideError(f"{info.path}: {info.reader} {what}, but {other} can; pass --reader {other}")
    if isinstance(error, NotImplementedError) or _UNSUPPORTED.search(cause):
        return SlideError(f"{info.path}: {what}; it is stored in a way that is not supported: convert the file")
    return SlideError(f"{info.path}: {what}; the file is damaged or truncated: copy it again")


def closed(info: SlideInfo) -> SlideError:
    """The error of reading a slide after ``close``."""
    return SlideError(f"{info.path}: the slide is closed; open it again")


def _another_reader(info: SlideInfo, level: int, box: Box) -> str | None:
    """A reader that sees the same level and can read the box."""
    from wsiseg.slide import READERS, first_that_decodes

    if getattr(_asking, "now", False):
        return None
    _asking.now = True
    try:
        for name in READERS:
            if name == info.reader:
                continue
            try:
                with first_that_decodes(info.path, None, [name], hidden_damage=True) as slide:
                    if slide.info.level_sizes[level : level + 1] == info.level_sizes[level : level + 1]:
                        slide.read(level, box)
                        return name
            except SlideError:
                continue
    finally:
        _asking.now = False
    return None
