"""Sends messages to a timed gateway, and breeds those that hold its loop longest."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Final

import grpc

from benchmarks.heaviest.gateway import Measured
from benchmarks.heaviest.messages import (
    PROTOCOLS,
    Recipe,
    grpc_message,
    http_message,
    mutated,
    other_message,
    random_recipe,
)
from clockwork_serve.oip.protobuf import INFERENCE_SERVICE

WAIT_S: Final = 20.0
KEPT: Final = 12
"""Recipes of a protocol that others are made of."""
FRESH: Final = 0.3
"""The share of recipes that are made of none."""
AGAIN: Final = 5


@dataclass(slots=True)
class Found:
    """A message and what it did: the longest turn of the loop, the least of several tries."""

    recipe: Recipe
    loop_ms: float
    answer: str = ""
    lock_ms: float = 0.0
    nbytes: int = 0


@dataclass(slots=True)
class Search:
    """What was tried of one protocol; ``best`` are the worst, the worst first."""

    protocol: str
    tried: int = 0
    best: list[Found] = field(default_factory=list)

    def next(self, dice: Random) -> Recipe:
        """What to try."""
        if not self.best or dice.random() < FRESH:
            return random_recipe(self.protocol, dice)
        # The worst ones more often.
        return mutated(self.best[int(len(self.best) * dice.random() ** 2)].recipe, dice)

    def add(self, found: Found) -> None:
        """Keep it if it is among the worst."""
        self.tried += 1
        self.best.append(found)
        self.best.sort(key=lambda one: -one.loop_ms)
        del self.best[KEPT:]


class Sender:
    """Sends a recipe's message to a server and waits for its end."""

    def __init__(self, http_port: int, grpc_port: int) -> None:
        self._http_port = http_port
        self._channel = grpc.insecure_channel(
            f"127.0.0.1:{grpc_port}",
            [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)],
        )

    def close(self) -> None:
        """Give the connection up."""
        self._channel.close()

    def prepared(self, recipe: Recipe) -> tuple[int, Callable[[], str]]:
        """The message's length, and what sends it and tells how it ended."""
        protocol = recipe["protocol"]
        if protocol.startswith("http"):
            sent = http_message(recipe)
            return len(sent), lambda: self._http(sent)
        if protocol == "grpc_other":
            message, path, count = other_message(recipe), f"/{INFERENCE_SERVICE}/{recipe['rpc']}", 0
        else:
            message, count = grpc_message(recipe), recipe["stream"]
            path = f"/{INFERENCE_SERVICE}/{'ModelStreamInfer' if count else 'ModelInfer'}"
        return len(message), lambda: self._grpc(path, message, count)

    def _http(self, sent: bytes) -> str:
        found = b""
        with socket.create_connection(("127.0.0.1", self._http_port), timeout=WAIT_S) as client:
            with suppress(OSError):  # it was answered before all of it was there
                client.sendall(sent)
            with suppress(OSError):
                while part := client.recv(1 << 20):
                    found = found or part[:300]
        head, _, body = found.partition(b"\r\n\r\n")
        return f"{head[9:12].decode('latin-1')} {body[:150].decode('latin-1')}"

    def _grpc(self, path: str, message: bytes, count: int) -> str:
        try:
            if count:
                call: Any = self._channel.stream_stream(path)
                for _ in call(iter([message] * count), timeout=WAIT_S):
                    pass
            else:
                self._channel.unary_unary(path)(message, timeout=WAIT_S)
        except grpc.RpcError as error:
            return f"{error.code().name} {error.details()[:150]}"
        return "OK"


def measure(
    measured: Measured, sender: Sender, recipe: Recipe, times: int = 1, *, lock: bool = False
) -> Found:
    """Send it ``times`` and take the least: what else the machine does only adds."""
    nbytes, send = sender.prepared(recipe)
    found = Found(recipe, float("inf"), lock_ms=float("inf"), nbytes=nbytes)
    for _ in range(times):
        measured.taken(probe=lock)
        found.answer = send()
        time.sleep(0.005)  # what follows an answer belongs to it
        shot = measured.taken()
        found.loop_ms = min(found.loop_ms, shot["loop_ms"])
        found.lock_ms = min(found.lock_ms, shot["lock_ms"])
    return found


def search(measured: Measured, seconds: float, dice: Random, corpus: list[Recipe]) -> dict[str, Search]:
    """Breed messages of all protocols, in turns; ``corpus`` are tried first."""
    searches = {protocol: Search(protocol) for protocol in PROTOCOLS}
    sender = Sender(measured.ports["http_port"], measured.ports["grpc_port"])
    try:
        for recipe in corpus:
            searches[recipe["protocol"]].add(measure(measured, sender, recipe))
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for one in searches.values():
                found = measure(measured, sender, one.next(dice))
                if len(one.best) < KEPT or found.loop_ms > one.best[-1].loop_ms:
                    found = min(
                        (found, measure(measured, sender, found.recipe, 2)), key=lambda each: each.loop_ms
                    )
                one.add(found)
        for one in searches.values():
            one.best = [measure(measured, sender, each.recipe, AGAIN, lock=True) for each in one.best]
            one.best.sort(key=lambda each: -each.loop_ms)
    finally:
        sender.close()
    return searches


def keep(folder: Path, searches: dict[str, Search]) -> None:
    """Write the worst recipes, to be tried first the next time."""
    folder.mkdir(parents=True, exist_ok=True)
    for protocol, one in searches.items():
        (folder / f"{protocol}.json").write_text(
            json.dumps([each.recipe for each in one.best], indent=1) + "\n"
        )


def kept(folder: Path | None) -> list[Recipe]:
    """What :func:`keep` wrote there."""
    if folder is None or not folder.is_dir():
        return []
    return [recipe for file in sorted(folder.glob("*.json")) for recipe in json.loads(file.read_text())]
