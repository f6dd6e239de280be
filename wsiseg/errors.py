"""Errors a user can cause. Each message is one line: where, what was found, what is allowed, what to do."""

from __future__ import annotations


def counted(number: int, thing: str) -> str:
    """Count with a noun, for messages: ``1 block``, ``2 blocks``."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


class WsisegError(Exception):
    """Base of every error that wsiseg raises on purpose; the command line shows it as one line and exits 1.

    Examples
    --------
    >>> import wsiseg
    >>> try:
    ...     wsiseg.segment_image("slide.svs")
    ... except wsiseg.WsisegError as error:
    ...     print(str(error).split(", or")[0])
    image: "slide.svs" is a path; use wsiseg.segment_slide for a file
    """


class SlideError(WsisegError, OSError):
    """A slide cannot be opened, read, or placed in microns."""


class ConfigError(WsisegError, ValueError):
    """An option or a configuration file holds a value that is not allowed."""


class SeedsError(WsisegError, ValueError):
    """A seeds file cannot be used on this slide."""


class WeightsError(WsisegError, ValueError):
    """A model or a weight file is unknown, incomplete or corrupt."""


class FormatError(WsisegError, ValueError):
    """A file that wsiseg reads or writes breaks its format."""


class RunError(WsisegError, OSError):
    """An output folder cannot be used, or the run in it does not match."""


class InterruptedRunError(RunError):
    """A run was asked to stop and did, after the current block; the same command resumes it."""
