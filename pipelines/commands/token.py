"""`liveedit token`: a bearer token for a tenant, and the lines that let it in."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from infra.runtime.errors import UserError


def token(
    name: Annotated[str, typer.Argument(help="The tenant: letters, digits, . _ and -.")],
    sessions: Annotated[int | None, typer.Option(help="At once, at most.", min=1)] = None,
    opens: Annotated[int | None, typer.Option(help="A minute, at most.", min=1)] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Of all its sessions a day, at most.", min=0.1)
    ] = None,
) -> None:
    """Make a token. What the server's token_file takes goes to standard output, the token itself
    to standard error: it is shown this once and kept nowhere.
    """
    from serve.tenants import NAME, hash_token, new_token

    if not NAME.fullmatch(name):
        raise UserError(f"{name!r} is no tenant's name; letters, digits, . _ and - are")
    made = new_token()
    limits = {"max_sessions": sessions, "opens_per_minute": opens, "minutes_per_day": minutes}
    lines = [f'["{name}"]', f'tokens = ["{hash_token(made)}"]']
    lines += [f"{key} = {value}" for key, value in limits.items() if value is not None]
    typer.echo("\n".join(lines) + "\n")
    Console(stderr=True, highlight=False).print(f"token of {name}: [bold]{made}[/]")
