"""``clockwork models`` against a small server of the repository API; ``key``, ``config``."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from clockwork_serve.cli.screen import show_table
from clockwork_serve.config import SETTINGS
from clockwork_serve.serve.gateway.access import KeyRing, Right
from tests.cli.commands import Cli

# ``clockwork models`` against a small server that speaks the repository API.


INDEX = [
    {"name": "cat", "version": "1", "state": "READY", "reason": ""},
    {"name": "dog", "version": "", "state": "UNAVAILABLE", "reason": "unloaded"},
]


class Repository(BaseHTTPRequestHandler):
    """Knows ``a/cat``; remembers what it was asked."""

    asked: list[tuple[str, object]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, body))
        if self.path == "/v2/repository/index":
            self._answer(200, json.dumps(INDEX).encode())
        elif "/a%2Fcat/" in self.path:
            self._answer(200, b"")
        elif "/evil/" in self.path:
            self._answer(500, rb'{"error": "\u001b[2J\u202enever\nmind"}')
        elif "/half/" in self.path:
            self._answer(500, rb'{"error": "\ud800"}')
        elif "/nopath/" in self.path:
            self._answer(404, b'{"error": "Not Found"}')
        elif "/html/" in self.path:
            self._answer(502, b"<html>")
        else:
            self._answer(404, b'{"error": "unknown model"}')

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Quiet."""


@pytest.fixture
def server() -> Iterator[tuple[str, list[tuple[str, object]]]]:
    asked: list[tuple[str, object]] = []
    handler = type("Handler", (Repository,), {"asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}", asked
        http.shutdown()
        thread.join()


def test_list_shows_state_and_reason(server: tuple[str, list[tuple[str, object]]], cli: Cli) -> None:
    url, asked = server

    shown = cli("models", "--url", url, "list", "--ready").out
    assert "unloaded" in shown
    assert "1 of 2 model versions ready" in shown
    assert asked == [("/v2/repository/index", {"ready": True})]


def test_list_for_machines(server: tuple[str, list[tuple[str, object]]], cli: Cli) -> None:
    assert cli("models", "--url", server[0], "list", "--json").json == INDEX


@pytest.mark.parametrize(("command", "done"), [("load", "loaded"), ("unload", "unloaded")])
def test_load_and_unload_quote_the_name(
    server: tuple[str, list[tuple[str, object]]], command: str, done: str, cli: Cli
) -> None:
    url, asked = server

    assert cli("models", "--url", url, command, "a/cat").out == f"a/cat: {done}\n"
    assert asked == [(f"/v2/repository/models/a%2Fcat/{command}", {})]
    assert cli("models", "--url", url, command, "a/cat", "--json").json == {"model": "a/cat", "state": done}


def test_a_refusal_is_told_in_the_server_s_words(
    server: tuple[str, list[tuple[str, object]]], cli: Cli
) -> None:
    wrote = cli("models", "--url", server[0], "load", "cow", code=1)
    assert wrote.err == "error: the server answered 404: unknown model\n"
    wrote = cli("models", "--url", server[0], "load", "html", code=1)
    assert wrote.err == "error: the server answered 502: Bad Gateway\n"


def test_what_a_server_says_does_not_move_the_cursor(
    server: tuple[str, list[tuple[str, object]]], cli: Cli
) -> None:
    wrote = cli("models", "--url", server[0], "load", "evil", code=1)
    assert wrote.err == "error: the server answered 500: \\x1b[2J\\u202enever mind\n"
    wrote = cli("models", "--url", server[0], "load", "half", code=1)
    assert wrote.err == "error: the server answered 500: Internal Server Error\n"


def test_tables_do_not_move_the_cursor_either(capsys: pytest.CaptureFixture[str]) -> None:
    show_table(["model"], [["\x1b[2J\ud800 5\u00a0%"]])
    assert "\\x1b[2J\\ud800 5\u00a0%" in capsys.readouterr().out


@pytest.mark.parametrize(
    "url", ["ftp://x", "http://", "http://x:port", "http://x:99999", "http://[x", "http://a\x01b"]
)
def test_an_address_that_is_none(url: str, cli: Cli) -> None:
    assert "url: expected http://HOST:PORT" in cli("models", "--url", url, "list", code=2).err


def test_a_name_that_is_no_text_is_sent_as_it_is(
    server: tuple[str, list[tuple[str, object]]], cli: Cli
) -> None:
    wrote = cli("models", "--url", server[0], "load", "\udcff", code=1)
    assert wrote.err == "error: the server answered 404: unknown model\n"
    assert server[1] == [("/v2/repository/models/%FF/load", {})]


def test_a_key_that_would_be_two_headers_is_refused_and_not_shown(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOCKWORK_API_KEY", "secret\nX-Other: b")
    said = cli("models", "list", code=2).err
    assert "CLOCKWORK_API_KEY: expected visible ASCII" in said
    assert "secret" not in said


def test_the_address_may_stand_after_the_subcommand(
    server: tuple[str, list[tuple[str, object]]], cli: Cli
) -> None:
    assert cli("models", "list", "--url", server[0], "--json").json == INDEX
    assert "name another with --url" in cli("models", "list", "--url", "127.0.0.1:1", code=1).err


def test_another_port_of_a_server_is_told_as_such(
    server: tuple[str, list[tuple[str, object]]], cli: Cli
) -> None:
    said = cli("models", "--url", f"{server[0]}", "load", "nopath", code=1).err
    assert "expected the port http_port of a server" in said
    assert "found 404: Not Found; name that port with --url (8000, unless" in said
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=_settings_of_http2, args=(listener,))
        thread.start()
        said = cli("models", "--url", f"127.0.0.1:{listener.getsockname()[1]}", "list", code=1).err
        thread.join()
    assert "found an answer that is not HTTP; name that port with --url (8000, unless" in said


def _settings_of_http2(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.recv(1 << 16)
        connection.sendall(b"\0\0\6\4\0\0\0\0\0\0\5\0\0\x40\0")


def test_no_server_there(cli: Cli) -> None:
    wrote = cli("models", "--url", "127.0.0.1:1", "list", code=1)
    assert "start one with clockwork serve REPO" in wrote.err


def test_the_api_key_comes_from_the_environment(
    server: tuple[str, list[tuple[str, object]]], monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    seen: list[str | None] = []
    plain = Repository.do_POST
    monkeypatch.setattr(
        Repository, "do_POST", lambda self: (seen.append(self.headers["Authorization"]), plain(self))
    )
    cli("models", "--url", server[0], "list")
    monkeypatch.setenv("CLOCKWORK_API_KEY", "secret")
    cli("models", "--url", server[0], "list")
    assert seen == [None, "Bearer secret"]


def test_a_file_of_authorities_that_is_none(tmp_path: Path, cli: Cli) -> None:
    wrote = cli("models", "--url", "https://127.0.0.1:1", "--ca", tmp_path / "none", "list", code=2)
    assert "ca: expected a PEM file of certificates, found No such file" in wrote.err


# ``clockwork key``: what it prints is what a server reads.


def test_the_entry_is_one_that_a_server_reads_and_the_key_opens_it(tmp_path: Path, cli: Cli) -> None:
    shown = cli("key", "team-a"), cli("key", "ops", "--may", "admin", "--may", "metrics")
    path = tmp_path / "keys.toml"
    path.write_text("".join(one.out for one in shown))
    path.chmod(0o600)
    first, second = (one.err.split()[-1] for one in shown)
    assert first not in shown[0].out
    assert len({first, second}) == 2
    assert len(first) >= 43
    ring = KeyRing(str(path))
    assert ring.authorize(Right.INFER, None, first.encode()).rights == {Right.INFER}
    assert ring.authorize(Right.ADMIN, None, second.encode()).rights == {Right.ADMIN, Right.METRICS}


def test_a_key_may_be_of_a_tenant(tmp_path: Path, cli: Cli) -> None:
    shown = cli("key", "web", "--tenant", "shop")
    path = tmp_path / "keys.toml"
    path.write_text(f'[[tenants]]\nname = "shop"\n\n{shown.out}')
    path.chmod(0o600)
    key = shown.err.split()[-1].encode()
    assert KeyRing(str(path)).authorize(Right.INFER, None, key).tenant == "shop"
    wrote = cli("key", "web", "--tenant", "a shop", "--json", code=2)
    assert "tenant: expected 1 to 64 letters" in wrote.err
    assert cli("key", "web", "--tenant", "shop", "--json").json["tenant"] == "shop"


def test_for_machines(cli: Cli) -> None:
    found = cli("key", "a", "--json").json
    assert found["sha256"] == hashlib.sha256(found["key"].encode()).hexdigest()
    assert (found["name"], found["may"]) == ("a", ["infer"])


@pytest.mark.parametrize("name", ["", "a b", 'a"', "é", "a" * 65])
def test_a_name_that_is_none(name: str, cli: Cli) -> None:
    assert "name: expected 1 to 64 letters" in cli("key", name, code=2).err


# ``clockwork config``.


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options of a server whose settings come from all four places."""
    for name in os.environ:
        if name.startswith("CLOCKWORK_"):
            monkeypatch.delenv(name)
    keys = tmp_path / "keys.toml"
    keys.write_text("a secret")
    (tmp_path / "clockwork.toml").write_text(
        f'api_keys = "{keys}"\nslo_ms = 50\nlive_page = false\ndevice_memory = "80%"'
    )
    monkeypatch.setenv("CLOCKWORK_SLO_MS", "20")
    monkeypatch.setenv("CLOCKWORK_GRPC_PORT", "off")
    monkeypatch.setenv("CLOCKWORK_API_KEY", "another secret")
    return [str(tmp_path), "--http-port", "0", "--device", "cpu", "--device", "emulated:v100"]


def test_settings_are_shown_with_where_they_come_from(sources: list[str], tmp_path: Path, cli: Cli) -> None:
    said = cli("config", "show", *sources, "--json").out
    found = json.loads(said)

    file = str(tmp_path / "clockwork.toml")
    assert list(found) == [entry.name for entry in SETTINGS]
    assert {name: tuple(found[name].values()) for name in found if found[name]["source"] != "default"} == {
        "repository": (str(tmp_path), "flag", "command line"),
        "http_port": (0, "flag", "--http-port"),
        "device": (["cpu:0", "emulated:v100"], "flag", "--device"),
        "slo_ms": (20, "environment", "CLOCKWORK_SLO_MS"),
        "grpc_port": (None, "environment", "CLOCKWORK_GRPC_PORT"),
        "api_keys": (str(tmp_path / "keys.toml"), "file", file),
        "live_page": (False, "file", file),
        "device_memory": ("80%", "file", file),
    }
    assert tuple(found["max_body"].values()) == (64 << 20, "default", None)
    assert "secret" not in said


def test_settings_are_shown_as_they_are_written(sources: list[str], cli: Cli) -> None:
    said = cli("config", "show", *sources).out
    shown = {line.split()[0]: " ".join(line.split()[1:]) for line in said.splitlines() if line.strip()}

    assert shown["http_port"] == "0 --http-port"
    assert shown["grpc_port"] == "off CLOCKWORK_GRPC_PORT"
    assert shown["max_body"] == "8MiB over gRPC, else 64MiB default"
    assert shown["tls_key"] == "not set default"
    assert shown["device"] == "cpu:0, emulated:v100 --device"
    assert shown["live_page"].startswith("false /")
    assert "secret" not in said


def test_a_setting_that_will_not_do_is_told_as_serve_tells_it(cli: Cli) -> None:
    wrote = cli("config", "show", "--http-port", "x", code=2)
    assert wrote.err.startswith("error: http_port (from --http-port): expected a port")


def test_help_on_keys_names_the_page_on_security(cli: Cli) -> None:
    said = " ".join(cli("key", "--help").out.split())
    assert "clockwork docs security (docs/operate/security.md)" in said
