"""A port is free, and none that a connection or who listens on port 0 may be given."""

from __future__ import annotations

import socket

import pytest

from harness import ports


def test_it_is_free_and_the_system_gives_it_to_nobody() -> None:
    first, last = map(int, ports.GIVEN.read_text().split())
    port = ports.free_port()
    assert not first <= port <= last
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_one_that_somebody_has_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        free = ports.free_port()
        monkeypatch.setattr(ports, "_ports", iter([held.getsockname()[1], free]))
        assert ports.free_port() == free
        with pytest.raises(OSError, match="is left"):
            ports.free_port()
