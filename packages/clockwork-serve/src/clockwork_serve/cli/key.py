"""``clockwork key``: makes an API key and its entry for the file of keys. It stores neither."""

from __future__ import annotations

import hashlib
import secrets

import click

from clockwork_serve.cli.screen import show_json

_BYTES = 32
_RIGHTS = ("infer", "metrics", "admin")


@click.command(epilog="Who may do what: clockwork docs security")
@click.argument("name", metavar="NAME")
@click.option(
    "--may", multiple=True, default=("infer",), show_default=True, type=click.Choice(_RIGHTS),
    help="What the key permits; may be given several times.",
)  # fmt: skip
@click.option("--tenant", metavar="TENANT", help="Whose quota it uses; by default NAME's own.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
def key(name: str, may: tuple[str, ...], tenant: str | None, as_json: bool) -> None:  # noqa: FBT001
    """Make an API key for NAME.

    The key is printed once, on standard error, to be handed to NAME. Its entry, with only the key's SHA-256,
    goes to standard output: clockwork key team-a >> keys.toml
    """
    from clockwork_serve.errors import ConfigError
    from clockwork_serve.serve.gateway.access import NAME

    for field, given in (("name", name), ("tenant", tenant)):
        if given is not None and not NAME.fullmatch(given):
            raise ConfigError(f"{field}: expected 1 to 64 letters, digits or any of ._:@/-, found {given!r}")
    made = secrets.token_urlsafe(_BYTES)
    digest = hashlib.sha256(made.encode()).hexdigest()
    if as_json:
        of_tenant = {} if tenant is None else {"tenant": tenant}
        show_json({"name": name, "key": made, "sha256": digest, "may": list(may), **of_tenant})
        return
    rights = ", ".join(f'"{right}"' for right in may)
    whose = "" if tenant is None else f'tenant = "{tenant}"\n'
    click.echo(f'[[keys]]\nname = "{name}"\nsha256 = "{digest}"\nmay = [{rights}]\n{whose}')
    click.echo(f"key of {name}: {made}", err=True)
