"""For who operates a server: ``clockwork models``, ``key``, ``config`` and ``live``."""

from __future__ import annotations

import hashlib
import math
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import quote, urlsplit

import click
import msgspec

from clockwork_serve.cli.options import (
    Command,
    all_but,
    json_flag,
    repository_argument,
    setting_options,
    settings_from,
)
from clockwork_serve.cli.screen import (
    say,
    show_json,
    show_table,
)
from clockwork_serve.config import SETTINGS, Setting
from clockwork_serve.errors import ClockworkError, ConfigError

if TYPE_CHECKING:
    import ssl


# ------------------------------------------------------------
# ``clockwork models``: lists, loads and unloads the models of a running server, by its public protocol.


_TIMEOUT_S = 600.0  # loading may compile first
HTTP_PORT: Final = 8000
METRICS_PORT: Final = 8002
_PORTS: Final = {HTTP_PORT: "http_port", METRICS_PORT: "metrics_port"}
"""The usual ports that commands ask, and the setting of each."""


class Target(NamedTuple):
    """A running server's address and credentials. ``ca`` is a file, None for the system's authorities."""

    url: str
    ca: str | None = None
    key: str = ""

    @classmethod
    def keyed(cls, url: str, ca: str | None) -> Target:
        """With the API key that the environment has. Raises :class:`ConfigError`."""
        key = os.environ.get("CLOCKWORK_API_KEY", "")
        if key and not (key.isascii() and key.isprintable()):
            raise ConfigError(
                "CLOCKWORK_API_KEY: expected visible ASCII characters, found others; correct it"
            )
        return cls(url, ca, key)

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """Those that show the key."""
        return (("Authorization", f"Bearer {self.key}"),) if self.key else ()


@click.group()
@click.option(
    "--url", envvar="CLOCKWORK_URL", default="http://127.0.0.1:8000", show_default=True, metavar="URL",
    help="Address of the server.",
)  # fmt: skip
@click.option(
    "--ca", envvar="CLOCKWORK_CA", metavar="FILE",
    help="PEM file of authorities for an https server; else those that the system trusts.",
)  # fmt: skip
@click.pass_context
def models(context: click.Context, url: str, ca: str | None) -> None:
    """List, load or unload the models of a running server.

    If the server requires an API key, it is read from the environment variable CLOCKWORK_API_KEY.
    """
    context.obj = Target.keyed(url, ca)


def _server_options(command: Command) -> Command:
    """``--url`` and ``--ca`` after the subcommand, where they count before those of ``models``."""

    def replace(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
        if value is not None:
            context.obj = context.obj._replace(**{str(parameter.name): value})

    known = ("--ca", "FILE", "PEM file of authorities."), ("--url", "URL", "Address of the server.")
    for name, metavar, shown in known:
        option = click.option(name, expose_value=False, callback=replace, metavar=metavar, help=shown)
        command = option(command)
    return command


@models.command("list")
@click.option("--ready", is_flag=True, help="Only models that are ready.")
@_server_options
@json_flag
@click.pass_obj
def list_(target: Target, ready: bool, as_json: bool) -> None:  # noqa: FBT001
    """List every model and version that the server has, and its state."""
    found = ask(target, "/v2/repository/index", {"ready": True} if ready else {})
    index = found if isinstance(found, list) else []
    if as_json:
        show_json(index)
        return
    rows = [[str(each.get(key, "")) for key in ("name", "version", "state", "reason")] for each in index]
    if rows:
        show_table(["model", "version", "state", "reason"], rows)
    usable = sum(each.get("state") == "READY" for each in index)
    say(f"{usable} of {len(rows)} model versions ready")


@models.command()
@click.argument("name", metavar="MODEL")
@_server_options
@json_flag
@click.pass_obj
def load(target: Target, name: str, as_json: bool) -> None:  # noqa: FBT001
    """Serve MODEL from the repository, reading its folder again; a model in quarantine is released."""
    ask(target, f"/v2/repository/models/{quote(name, safe='', errors='surrogateescape')}/load", {})
    _done(name, "loaded", as_json=as_json)


@models.command()
@click.argument("name", metavar="MODEL")
@_server_options
@json_flag
@click.pass_obj
def unload(target: Target, name: str, as_json: bool) -> None:  # noqa: FBT001
    """Stop serving MODEL; its files stay where they are."""
    ask(target, f"/v2/repository/models/{quote(name, safe='', errors='surrogateescape')}/unload", {})
    _done(name, "unloaded", as_json=as_json)


def _done(name: str, what: str, *, as_json: bool) -> None:
    if as_json:
        show_json({"model": name, "state": what})
    else:
        say(f"{name}: {what}")


def ask(target: Target, path: str, body: dict[str, object]) -> Any:
    """POST to a server; its JSON response. Raises ``ClockworkError`` with the server's error message."""
    status, phrase, data = exchange(target, "POST", path, HTTP_PORT, msgspec.json.encode(body))
    wrong = error_in(data, phrase).startswith(("no such path", "Not Found"))  # not an unknown model
    if status == 404 and wrong:
        raise another_port(target.url, HTTP_PORT, f"{status}: {error_in(data, phrase)}")
    if status != 200:
        raise ClockworkError(f"the server answered {status}: {error_in(data, phrase)}")
    return _decoded(data)


def error_in(data: bytes, phrase: str) -> str:
    """The error message in a response's body, else the phrase of its status."""
    body = _decoded(data)
    return str((body.get("error") if isinstance(body, dict) else None) or phrase)


def _decoded(data: bytes) -> Any:
    try:
        return msgspec.json.decode(data) if data else None
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None


def another_port(url: str, usual_port: int, found: str) -> ClockworkError:
    """The error of an address that is not of the port that a command asks."""
    name = _PORTS[usual_port]
    return ClockworkError(
        f"url: expected the port {name} of a server at {url}, found {found}; name that port with --url "
        f"({usual_port}, unless its setting {name} is another)"
    )


def exchange(
    target: Target, method: str, path: str, usual_port: int, body: bytes | None = None
) -> tuple[int, str, bytes]:
    """Status, phrase and body of a server's response. Raises ``ClockworkError`` where there is no server."""
    import http.client

    url = target.url
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        host, port = parts.hostname, parts.port or usual_port
    except ValueError:
        parts, host, port = urlsplit(""), None, 0
    if parts.scheme not in ("http", "https") or not host or not host.isprintable():
        raise ConfigError(
            f"url: expected http://HOST:PORT or https://HOST:PORT, found {url!r}; "
            "name a running server with --url"
        )
    headers = dict(target.headers) | ({} if body is None else {"Content-Type": "application/json"})
    connection = (
        http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)
        if parts.scheme == "http"
        else http.client.HTTPSConnection(host, port, timeout=_TIMEOUT_S, context=_trusting(target.ca))
    )
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.reason, response.read()
    except (http.client.BadStatusLine, http.client.LineTooLong):
        raise another_port(url, usual_port, "an answer that is not HTTP") from None
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        raise ClockworkError(
            f"url: expected a running server at {url}, found {str(error) or type(error).__name__}; "
            "start one with clockwork serve REPO, or name another with --url"
        ) from None
    finally:
        connection.close()


def _trusting(ca: str | None) -> ssl.SSLContext:
    import ssl

    try:
        return ssl.create_default_context(cafile=ca)
    except OSError as error:
        raise ConfigError(
            f"ca: expected a PEM file of certificates, found {error.strerror or error} in {ca}; "
            "name another with --ca"
        ) from None


# ------------------------------------------------------------
# ``clockwork key``: makes an API key and its entry for the file of keys. It stores neither.


_BYTES = 32
_RIGHTS = ("infer", "metrics", "admin")


@click.command(epilog="Who may do what: clockwork docs security (docs/operate/security.md)")
@click.argument("name", metavar="NAME")
@click.option(
    "--may", multiple=True, default=("infer",), show_default=True, type=click.Choice(_RIGHTS),
    help="What the key permits; may be given several times.",
)  # fmt: skip
@click.option("--tenant", metavar="TENANT", help="Whose quota it uses; by default NAME's own.")
@json_flag
def key(name: str, may: tuple[str, ...], tenant: str | None, as_json: bool) -> None:  # noqa: FBT001
    """Make an API key for NAME.

    The key is printed once, on standard error, to be handed to NAME. Its entry, with only the key's SHA-256,
    goes to standard output: clockwork key team-a >> keys.toml
    """
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


# ------------------------------------------------------------
# ``clockwork config``: what settings a server would have, and why. No setting is a secret: passwords and keys
# are in files, of which the settings are names.


@click.group()
def config() -> None:
    """Show the settings that a server would have."""


@config.command()
@repository_argument
@setting_options(hidden=all_but())
@json_flag
def show(repository: str | None, config: str | None, as_json: bool, **flags: Any) -> None:  # noqa: FBT001
    """Show every setting, and where it comes from: the command line, the environment, a file, or its default.

    Takes what `clockwork serve` takes, and reads what that reads. The names of files of keys and certificates
    are shown, never what is in them.
    """
    settings = settings_from(repository, config, flags, needs_repository=False)
    if as_json:
        show_json({
            entry.name: {
                "value": entry.written(getattr(settings, entry.name)), "source": _kind(entry, source),
                "from": source,
            }
            for entry in SETTINGS for source in (settings.sources.get(entry.name),)
        })  # fmt: skip
        return
    show_table(("setting", "value", "from"), settings.rows())


def _kind(entry: Setting, source: str | None) -> str:
    """Which of the four places a source is."""
    if source in {None, entry.variable}:
        return "environment" if source else "default"
    return "flag" if source in {entry.flag, "command line"} else "file"


# ------------------------------------------------------------
# ``clockwork live``: a journal on a page that follows it.


_KEEP_MOST_S = 86_400


@click.command(epilog="How to read it: clockwork docs live (docs/operate/live.md)")
@click.argument("journal", metavar="JOURNAL")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=0, metavar="PORT",
    help="Port on 127.0.0.1; 0 lets the system choose. [default: 0]",
)  # fmt: skip
@click.option(
    "--keep", type=float, default=600.0, metavar="SECONDS",
    help="How much of the journal can be scrolled back to, from its end. [default: 600]",
)  # fmt: skip
@click.option(
    "--speed", type=float, metavar="N",
    help="Play it from its beginning, N times as fast as it happened. [default: go to its end]",
)  # fmt: skip
def live(journal: str, port: int, keep: float, speed: float | None) -> int:
    """Show JOURNAL, the --journal of a server or a simulation, on a page in the browser.

    The page follows a journal that grows. It shows what each device executes and what was predicted, refusals
    by reason, queues, latency and memory, and leads from a bar to its requests. Only who knows the address
    that is printed, on this machine, can open it. Ctrl-C ends it.
    """
    import asyncio
    import signal

    from clockwork_serve.apps.live import show as show_page
    from clockwork_serve.telemetry.live import LiveLimits

    if not 1 <= keep <= _KEEP_MOST_S or not (speed is None or 0 < speed < math.inf):
        raise ConfigError(
            f"keep, speed: expected 1 to {_KEEP_MOST_S} seconds and a number above 0, found {keep:g} and "
            f"{'none' if speed is None else f'{speed:g}'}; correct them"
        )

    async def run() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await show_page(
            Path(journal), port=port, limits=LiveLimits(keep_s=keep), speed=speed, stop=stop,
            tell=lambda address: click.echo(f"open {address}"),
        )  # fmt: skip

    asyncio.run(run())
    return 0
