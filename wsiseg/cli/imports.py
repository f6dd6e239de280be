"""Imports at the start of a command."""

from __future__ import annotations

import contextlib
import gc
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Import torch and all that comes with it without collecting garbage, and leave these objects out of later collections.

    Modules stay, so going through their million objects again and again finds nothing; it takes a seventh of a command's start.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
