"""Opening the page in the user's browser without showing its secret to other users of the machine."""

from __future__ import annotations

import contextlib
import html
import os
import threading
import webbrowser
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAME = "view.html"
_PAGE = '<!doctype html>\n<title>wsiseg view</title>\n<meta http-equiv="refresh" content="0; url={0}">\n<a href="{0}">the slide</a>\n'


@contextlib.contextmanager
def opened(folder: Path, address: str) -> Iterator[None]:
    """Open an address in the browser; within the context a file that leads there is in ``folder``.

    The browser gets the name of the file, which only this user can read: a command line, which the address would be on, is seen by everybody on
    the machine.

    Raises
    ------
    OSError
        The file cannot be written.
    """
    path = folder / NAME
    path.unlink(missing_ok=True)  # of a page that was killed: its address leads nowhere
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:  # noqa: PTH123
        file.write(_PAGE.format(html.escape(address)))
    try:
        # Some browsers are waited for, and the page is served meanwhile.
        threading.Thread(
            target=webbrowser.open, args=(path.absolute().as_uri(),), name="wsiseg-browser", daemon=True
        ).start()
        yield
    finally:
        path.unlink(missing_ok=True)
