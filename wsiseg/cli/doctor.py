"""``wsiseg doctor``."""

from __future__ import annotations

import click

from wsiseg.cli.arguments import Command


@click.command(cls=Command, short_help="Check what works on this machine.")
@click.pass_context
def command(ctx: click.Context) -> None:
    """Check readers, model, GPU and disk, with a remedy for each failure. Exit status 1 when something required is missing."""
    from wsiseg.doctor import examine

    checks = examine()
    width = max(len(c.what) for c in checks)
    for c in checks:
        click.echo(f"{'ok  ' if c.ok else 'FAIL' if c.needed else 'none'}  {c.what:<{width}}  {c.found}")
        if c.remedy:
            click.echo(f"      {'':<{width}}  -> {c.remedy}")
    if any(c.needed and not c.ok for c in checks):
        ctx.exit(1)
