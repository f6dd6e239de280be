"""Base classes of the commands: an argument that is empty or not a valid file name is refused before any work starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from wsiseg.cli.streams import OUTPUT
from wsiseg.errors import ConfigError
from wsiseg.runtime.paths import require_text

if TYPE_CHECKING:
    from collections.abc import Iterator


class Command(click.Command):
    """A command that prints its result."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse empty arguments, as from ``--seeds "$SEEDS"`` with an unset variable, and names that are not text.

        Raises
        ------
        click.UsageError
            An argument is empty.
        ConfigError
            An argument is not text in the encoding of this system.
        """
        given, _, _ = self.make_parser(ctx).parse_args(
            list(args)
        )  # as typed: of an empty path `click.Path` makes the current folder
        for param in self.params:
            for text in _texts(given.get(param.name or "")):
                if not text.strip():
                    label = param.opts[-1] if isinstance(param, click.Option) else param.make_metavar(ctx).strip("[].")
                    raise click.UsageError(f"{label}: empty; a variable that is not set?", ctx)
                require_text(text, ConfigError)
        return super().parse_args(ctx, args)


class Working(Command):
    """A command whose result is the files it writes, not what it prints."""

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401
        """Run the command."""
        OUTPUT.extra = True
        return super().invoke(ctx)


class Group(click.Group):
    """A group of such commands."""

    command_class = Command


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
