"""TCP ports for the gateways: chosen or checked, and held for them. Nothing is ever accepted here."""

from __future__ import annotations

import errno
import socket
from collections.abc import Mapping

from clockwork_serve.errors import ConfigError
from clockwork_serve.serve.health import reachable


def addresses(host: str, number_by_name: Mapping[str, int], *, tls: bool) -> dict[str, str]:
    """Where clients of this host find ``http``, ``grpc`` and ``metrics``; empty where one is off.

    As ``host:port``, with a scheme where it is HTTP.
    """
    reached = reachable(host)
    reached = f"[{reached}]" if ":" in reached else reached
    at = {name: f"{reached}:{number}" for name, number in number_by_name.items()}
    scheme = "https" if tls else "http"
    metrics = at.get("metrics_port")
    return {
        "http": f"{scheme}://{at['http_port']}",
        "grpc": at.get("grpc_port", ""),
        "metrics": f"{scheme}://{metrics}/metrics" if metrics else "",
    }


class Ports:
    """Ports held for our gateways, which bind them as well (all sockets allow that to one user's processes).

    ``wanted`` maps the setting's name to its port: 0 to have one chosen, None for off.
    """

    def __init__(self, host: str, wanted: dict[str, int | None]) -> None:
        """Raises :class:`ConfigError` naming the setting if a port is taken or may not be used."""
        self.host = host
        self.number_by_name: dict[str, int] = {}
        self._held: list[socket.socket] = []
        try:
            for name, port in wanted.items():
                if port is not None:
                    self.number_by_name[name] = self._hold(name, port)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of all of them."""
        for held in self._held:
            held.close()
        self._held.clear()

    def _hold(self, name: str, port: int) -> int:
        try:
            # Without SO_REUSEPORT first: else another server's port would be shared without a word.
            if port:
                self._bind(port, shared=False).close()
            held = self._bind(port, shared=True)
        except OSError as error:
            raise ConfigError(_refusal(name, self.host, port, error)) from None
        self._held.append(held)
        number: int = held.getsockname()[1]
        return number

    def _bind(self, port: int, *, shared: bool) -> socket.socket:
        family, kind, protocol, _, address = socket.getaddrinfo(
            self.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            # Connections of a server that just ended may still linger.
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shared:
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
        return bound


def _refusal(name: str, host: str, port: int, error: OSError) -> str:
    flag = "--" + name.replace("_", "-")
    if error.errno == errno.EADDRINUSE:
        return (
            f"{name}: expected a free port; found {port} on {host} taken by another program; "
            f"stop that one, or choose another port with {flag} (0 lets the system choose)"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{name}: port {port} needs privileges ({error.strerror}); choose one above 1023 with {flag}"
    return f"{name}: cannot listen on {host}, port {port}: {error.strerror or error}; see --host and {flag}"
