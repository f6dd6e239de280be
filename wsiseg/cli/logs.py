"""Logging: what people see on stderr, and ``--log-json``, events as JSON lines for machines to read."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click
import orjson

from wsiseg.errors import RunError

if TYPE_CHECKING:
    from pathlib import Path


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", "message"),
            **getattr(record, "facts", {}),
            "message": " ".join(record.getMessage().split()),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return orjson.dumps(line, option=orjson.OPT_SERIALIZE_NUMPY, default=str).decode()


def _once(path: Path, handler: logging.Handler) -> None:
    """Warn once that the log cannot be written; the run continues."""
    said: list[bool] = []

    def complain(_: logging.LogRecord) -> None:
        if not said:
            said.append(True)
            click.echo(
                f"Warning: --log-json {path}: cannot be written ({sys.exc_info()[1]}); the run continues without it",
                err=True,
            )

    handler.handleError = complain  # type: ignore[method-assign, assignment]


def set_verbosity(verbose: int, quiet: bool) -> None:
    """Log to stderr: warnings by default, more with each ``-v``, errors only with ``-q``."""
    level = logging.ERROR if quiet else max(logging.DEBUG, logging.WARNING - 10 * verbose)
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)


def log_json(path: Path) -> None:
    """Append the events of this call to ``path``; ``-`` is stderr.

    Raises
    ------
    RunError
        It cannot be written.
    """
    try:
        if str(path) != "-":
            # A pipe without a reader would be waited for. Text that is not: what a name holds that no encoding does.
            os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0), 0o666))
            handler: logging.Handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
        else:
            handler = logging.StreamHandler(sys.stderr)
    except OSError as error:
        raise RunError(
            f"--log-json {path}: cannot be written ({error.strerror}); pass a file in a folder that you may write to"
        ) from error
    handler.setFormatter(_Lines())
    handler.setLevel(logging.INFO)
    _once(path, handler)
    logger = logging.getLogger("wsiseg")
    logger.addHandler(handler)
    # The handlers of the root logger keep their level; this one wants more than they show.
    root = logging.getLogger()
    for other in root.handlers:
        other.setLevel(max(other.level, root.level))
    logger.setLevel(min(logging.INFO, root.level))
    click.get_current_context().call_on_close(lambda: _close(logger, handler))


def _close(logger: logging.Logger, handler: logging.Handler) -> None:
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)
    with contextlib.suppress(OSError):  # said already
        handler.close()
