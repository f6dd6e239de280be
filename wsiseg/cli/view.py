"""``wsiseg view``."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import click

from wsiseg.cli.arguments import Working
from wsiseg.cli.imports import without_collection
from wsiseg.cli.options import device_option, model_option, mpp_options, reader_option

if TYPE_CHECKING:
    from wsiseg.viewer.server import PageServer


@click.command(cls=Working, short_help="Click cells of a slide in the browser.")
@click.argument("target", metavar="SLIDE|RUN")
@click.option(
    "--seeds",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Clicks to begin with: seeds.json, or points exported from QuPath.  [default: those of the last time]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("wsiseg-out"),
    metavar="DIR",
    show_default=True,
    help="For a SLIDE: folder of all runs.",
)
@click.option(
    "--slide", type=click.Path(path_type=Path), metavar="FILE", help="Where RUN's slide is now, if it was moved."
)
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port on 127.0.0.1.  [default: any free one]")
@click.option("--no-browser", is_flag=True, help="Only print the address.")
@mpp_options
@model_option
@device_option
@reader_option
def command(
    target: str,
    seeds: Path | None,
    out: Path,
    slide: Path | None,
    port: int,
    no_browser: bool,
    mpp: float | None,
    force_mpp: bool,
    model: str | None,
    device: str | None,
    reader: str | None,
) -> None:
    """Open a slide or a finished run in the browser: click one cell per type, see all cells in view typed, correct, save, apply.

    The page is served on this machine only, under a secret address. Every click is kept in RUN/view.json at once; Save writes RUN/seeds.json;
    Apply does what `wsiseg type RUN --seeds RUN/seeds.json` does. Of a SLIDE without a run the blocks in view are segmented, into the folder
    where `wsiseg run` completes them.

    \b
    wsiseg view wsiseg-out/slide
    wsiseg view slide.svs --seeds seeds.json
    wsiseg view slide.svs --port 8765 --no-browser    then, at your desk: ssh -L 8765:127.0.0.1:8765 server
    """  # noqa: D301 - click's mark for lines that stay as they are
    import contextlib

    from wsiseg.config import RunConfig, from_mapping
    from wsiseg.errors import ConfigError
    from wsiseg.viewer.browser import opened

    with without_collection():
        from wsiseg.viewer.opening import open_page
        from wsiseg.viewer.server import PageServer

    given = {"mpp": mpp, "force_mpp": force_mpp or None, "model": model, "device": device, "reader": reader}
    config = from_mapping({k: v for k, v in given.items() if v is not None}, "command line", RunConfig())
    page = open_page(
        target,
        config,
        out,
        seeds=seeds,
        slide=slide,
        on_warning=lambda warning: click.echo(f"Warning: {warning}", err=True),
    )
    try:
        try:
            server = PageServer(page, port)
        except OSError as error:
            raise ConfigError(
                f"--port {port}: cannot be used ({error.strerror}); pass another one, or 0 for any"
            ) from error
        with server:
            click.echo(server.address)
            click.echo(
                f"{page.slide}: clicks are kept in {page.folder.path / 'view.json'}; Ctrl-C ends the page", err=True
            )
            click.echo(
                f"from another machine: ssh -L {server.server_port}:127.0.0.1:{server.server_port} HOST, then open the address there",
                err=True,
            )
            with contextlib.nullcontext() if no_browser else opened(page.folder.path, server.address):
                _serve(server)
    finally:
        page.close()


def _serve(server: PageServer) -> None:
    """Serve until Ctrl-C or a termination signal; a second one ends the process at once, and nothing of it is lost either."""

    def stop(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        threading.Thread(target=server.shutdown, daemon=True).start()  # it waits for the loop below

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    server.serve_forever(poll_interval=0.2)
    click.echo("the page is closed; your clicks are kept", err=True)
