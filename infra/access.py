"""The verb `keys`: who may use the API, and what for; the file of keys is read and written by serving/keys.py.

Knows nothing about HTTP.
"""

from __future__ import annotations

from typing import Annotated

import typer

from infra.settings import Settings
from infra.terminal import PROCESS, Data, Json, console, fail, show_json

keys = typer.Typer(help="Who may use the API: keys with scopes and rates; none: loopback only.", no_args_is_help=True)


@keys.command("add")
def keys_add(
    name: Annotated[str, typer.Argument(help="What to call it: shop, mobile, ops.")],
    scope: Annotated[
        list[str], typer.Option(help="publish (events), read (lookups), admin (everything); repeat for more.")
    ],
    rate: Annotated[
        float, typer.Option(help="Objects a second (a lookup is one, so is an event) in each API process; 0: no limit.")
    ] = 0.0,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Make a key and print it, once: only its hash is kept. A running API takes it within a second.

      freshet keys add shop --scope publish --scope read --rate 500
      freshet keys add ops --scope admin
    """  # fmt: skip
    from serving.keys import add_key

    path = Settings.load(data).keys_path
    first = not path.exists()
    text = add_key(path, name, scope, rate)
    if as_json:
        show_json({"name": name, "key": text, "scopes": scope, "rate": rate, "file": str(path)})
        return
    typer.echo(text)
    screen = console(err=True)
    screen.print(f"This is the only time it is shown; {path} holds its hash. Use it as  Authorization: Bearer KEY")
    if first:
        screen.print("The first key: from now on every route but /health asks for one, on loopback too.")


@keys.command("list")
def keys_list(data: Data = None, as_json: Json = False) -> None:
    """List the keys: name, scopes, rate, and how the hash begins."""
    from serving.keys import read_keys

    path = Settings.load(data).keys_path
    found = read_keys(path) if path.exists() else ()
    rows = [{"name": k.name, "scopes": list(k.scopes), "rate": k.rate, "sha256": k.sha256[:12]} for k in found]
    if as_json:
        show_json(rows)
    elif not rows:
        console().print("No keys: the API answers on loopback only. `freshet keys add NAME --scope read` makes one.")
    else:
        from rich.table import Table

        table = Table("name", "scopes", "rate", "sha256", box=None, header_style="bold", pad_edge=False)
        for key in found:
            rate = f"{key.rate:g}/s" if key.rate else "no limit"
            table.add_row(key.name, ", ".join(key.scopes), rate, key.sha256[:12] + "...")
        console().print(table)


@keys.command("revoke")
def keys_revoke(
    name: Annotated[str, typer.Argument(help="As `freshet keys list` shows it.")], data: Data = None
) -> None:
    """Take a key away; a running API refuses it within a second."""
    from serving.keys import revoke_key

    path = Settings.load(data).keys_path
    if not path.exists():
        fail(f"no keys: {path} is not there.")
    revoke_key(path, name)
    console(err=True).print(f"{name} is revoked.")


def add(app: typer.Typer) -> None:
    """Add this verb to the console command."""
    app.add_typer(keys, name="keys", rich_help_panel=PROCESS)
