"""``pilaf-ray console`` for the command line."""

import json
from pathlib import Path
from typing import Annotated

import typer

from pilaf_ray.console.access import AccessBook, AccessRole
from pilaf_ray.console.address import require_free_port
from pilaf_ray.errors import RunFolderError

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8321


def console(
    run: Annotated[Path, typer.Argument(help="Run folder, e.g. runs/quickstart; the run may be under way.")],
    host: Annotated[
        str | None, typer.Option(help="Address to bind to; off loopback, everyone needs a token. Loopback if left out.")
    ] = None,
    port: Annotated[int | None, typer.Option(help=f"Port; {DEFAULT_PORT} if left out.")] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Further host names under which browsers reach the console.")
    ] = None,
    invite: Annotated[str | None, typer.Option(help="Issue a token for this name, print the link and end.")] = None,
    role: Annotated[AccessRole, typer.Option(help="What the invited may do.")] = AccessRole.VIEWER,
    revoke: Annotated[str | None, typer.Option(help="End the token of this name, and end.")] = None,
) -> None:
    """Show a run in the browser, live; read-only."""
    if not (run / "config.json").is_file():
        raise RunFolderError(f"{run} is not a run folder: it has no config.json; give e.g. runs/quickstart")
    book = AccessBook(run / "access.json")
    if revoke is not None:
        book.revoke(revoke)
        typer.echo(f"{revoke}'s token no longer opens anything")
    if invite is not None:
        secret = book.issue(invite, role)
        # The link leads to the console that the run itself serves, unless another place is named.
        served = json.loads((run / "config.json").read_text()).get("console") or {}
        place = f"{host or served.get('host', DEFAULT_HOST)}:{port or served.get('port', DEFAULT_PORT)}"
        typer.echo(f"for {invite} ({role}), shown this once: http://{place}/enter#{secret}")
    if revoke is not None or invite is not None:
        return
    host, port = host or DEFAULT_HOST, port or DEFAULT_PORT
    require_free_port(host, port, settings="--host, --port")
    from pilaf_ray.console.app import create_app
    from pilaf_ray.console.serving import serve

    app = create_app(run, host=host, allowed_hosts=allow_host or [])
    typer.echo(f"console: http://{host}:{port}  (Ctrl-C ends it; the run goes on)")
    serve(app, host=host, port=port)


def status(
    run: Annotated[Path, typer.Argument(help="Run folder, e.g. runs/quickstart.")],
    once: Annotated[bool, typer.Option("--once", help="Print once and end.")] = False,
) -> None:
    """Show a run on one terminal screen, live."""
    from rich.console import Console

    from pilaf_ray.console.terminal import show

    show(run, once=once, console=Console())


def add_commands(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command()(console)
    app.command()(status)
