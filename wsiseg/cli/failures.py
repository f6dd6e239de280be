"""Errors of a command that takes several inputs: one failed input does not end the others."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from wsiseg.cli.streams import one_line
from wsiseg.errors import InterruptedRunError, WsisegError

if TYPE_CHECKING:
    from collections.abc import Iterator


class Failures:
    """Errors of some of ``inputs`` inputs; the error of a single one is raised as it is.

    Parameters
    ----------
    inputs
        Number of inputs of the command.

    Examples
    --------
    >>> from wsiseg.errors import RunError
    >>> failures = Failures(2)
    >>> for name in ("a", "b"):
    ...     with failures.collect():
    ...         if name == "b":
    ...             raise RunError("b: not a run folder")
    >>> failures.messages, failures.exit_status
    (['b: not a run folder'], 3)
    """

    def __init__(self, inputs: int) -> None:
        self.inputs = inputs
        self.messages: list[str] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Keep an error of the work on one input for the end; a signal is obeyed at once."""
        try:
            yield
        except InterruptedRunError:
            raise
        except WsisegError as error:
            if self.inputs == 1:
                raise
            self.messages.append(one_line(str(error)))

    @property
    def exit_status(self) -> int:
        """0 without errors, 1 when every input failed, 3 when some did."""
        return 0 if not self.messages else 1 if len(self.messages) == self.inputs else 3

    def report(self) -> int:
        """Print the errors, and return the exit status."""
        for message in self.messages:
            click.echo(f"Error: {message}", err=True)
        return self.exit_status
