"""The command line: one file per command. Commands parse, call one library function, and report."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any

import click

from wsiseg.cli.streams import OUTPUT, one_line
from wsiseg.runtime.version import __version__

# name -> module below wsiseg.cli, and the line shown by `wsiseg --help` (so that help imports nothing else)
COMMANDS = {
    "run": "Segment and type slides: the whole path.",
    "merge": "Merge the shards of a run.",
    "summarise": "Tabulate counts, densities and areas of runs.",
    "report": "Write the report of a run as one HTML page.",
    "type": "Re-type a finished run with other clicks.",
    "info": "Show a slide's metadata and a run estimate.",
    "view": "Click cells of a slide in the browser.",
    "seeds": "Check, convert and preview files of clicks.",
    "models": "List, check, import and download models.",
    "export": "Write a run's cells for other programs.",
    "check": "Check files of cells before QuPath reads them.",
    "evaluate": "Score outlines and types against the truth.",
    "finetune": "Adapt a model to labelled images.",
    "demo": "Write a small real slide with clicks, ready to run.",
    "doctor": "Check what works on this machine.",
}


class _Interrupted(click.ClickException):
    """A run stopped on request: the same command resumes it."""

    exit_code = 3


class _Commands(click.Group):
    """A group that imports a command when it is called, and turns errors that a user can fix into one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"wsiseg.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401
        from wsiseg.errors import InterruptedRunError, WsisegError

        # tifffile logs what it thinks of damaged files; our own sentence says it once.
        logging.getLogger("tifffile").setLevel(logging.CRITICAL)
        try:
            Path.cwd()
        except OSError as error:  # torch and others would end the process
            raise click.ClickException(
                f"the current folder is gone ({error.strerror}); change to another one with cd"
            ) from error
        try:
            return super().invoke(ctx)
        except WsisegError as error:
            exception = _Interrupted if isinstance(error, InterruptedRunError) else click.ClickException
            raise exception(one_line(str(error))) from error
        except MemoryError as error:
            raise click.ClickException(
                "out of memory; pass --max-ram, a smaller --tile-size or fewer --workers"
            ) from error

    def main(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Run a command; a failing output stream does not change the exit status of its work."""
        OUTPUT.begin()
        try:
            return super().main(*args, **kwargs)
        except SystemExit as end:
            if not end.code and (reason := OUTPUT.lost()):
                click.echo(
                    f"Error: standard output: cannot be written ({reason}); make room, or write it elsewhere", err=True
                )
                raise SystemExit(1) from None
            raise


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="wsiseg")
def main() -> None:
    """Click one cell per type, get every cell of a whole-slide image outlined and typed.

    \b
    wsiseg demo ihc                                   writes a small slide and clicks
    wsiseg run slide.svs --seeds seeds.json           segments and types a slide
    wsiseg COMMAND --help                             shows all options

    Exit status: 0 done, 1 wrong input or data, 2 wrong usage, 3 incomplete: run the same command again.
    """  # noqa: D301 - click's mark for lines that stay as they are
