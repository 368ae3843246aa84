"""Collectors of traces that do anything but take spans."""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


def never_answers(sock: socket.socket) -> None:
    time.sleep(30)


def never_reads(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    time.sleep(30)


def answers_garbage(sock: socket.socket) -> None:
    sock.recv(1 << 20)
    sock.sendall(bytes(range(256)) * 4096)


def answers_garbage_in_http(sock: socket.socket) -> None:
    sock.recv(1 << 20)
    sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff")


def answers_a_byte_at_a_time(sock: socket.socket) -> None:
    sock.recv(1 << 20)
    for byte in b"HTTP/1.1 200 OK\r\n" + b"X-More: more\r\n" * 10_000:
        sock.sendall(bytes([byte]))
        time.sleep(0.02)


def answers_without_end(sock: socket.socket) -> None:
    sock.recv(1 << 20)
    sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n")
    while True:
        sock.sendall(bytes(1 << 16))


def has_heads_without_end(sock: socket.socket) -> None:
    sock.recv(1 << 20)
    sock.sendall(b"HTTP/1.1 200 OK\r\nX-Long: ")
    while True:
        sock.sendall(b"x" * (1 << 16))


def hangs_up(sock: socket.socket) -> None:
    sock.recv(10)


@contextmanager
def hostile(behave: Callable[[socket.socket], None]) -> Iterator[str]:
    """The URL of a collector that treats each connection so."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with suppress(OSError):
                behave(self.request)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads, block_on_close = True, False

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
