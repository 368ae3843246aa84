"""Delays and noise of the simulated world, from ``constants.toml``, draws of them, and the cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from hashlib import blake2b
from importlib.resources import files
from itertools import pairwise
from typing import Final

import msgspec
import numpy as np
from msgspec import Struct

from clockwork_serve.messages import Action, DeviceSpec, Infer, Load, Result, Unload
from clockwork_serve.units import GIB, MIB, NS_PER_US
from clockwork_serve.workload.tables import DeviceGroup

# ------------------------------------------------------------
# Delays and noise of the simulated world, read from ``constants.toml``; figures print them.


Quantiles = tuple[tuple[float, float], ...]
"""A distribution: (share of draws, value) by ascending share from 0 to 1; linear in between."""


class Network(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Delays of messages, each way, in ns.

    Between controller and worker up to ``jitter_ns`` is added, or what is drawn from ``jitter_us`` (us) if it
    is not empty. ``reserve_ns``: of each request's time gateways keep so much for themselves, at most half.
    """

    gateway_ns: int
    worker_ns: int
    jitter_ns: int
    jitter_us: Quantiles = ()
    reserve_ns: int = 0

    @property
    def jitter(self) -> Quantiles:
        """What is added to a message between controller and worker, in us."""
        return self.jitter_us or ((0.0, 0.0), (1.0, self.jitter_ns / NS_PER_US))


class Clients(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How closed-loop clients behave."""

    retry_ns: int


class WorkerTimes(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long a worker takes to prepare a code, in ns."""

    prepare_ns: int


class FaultTimes(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long detection of faults and recovery take, in ns; only scenarios with faults use them."""

    restart_ns: int
    controller_ns: int
    kill_ns: int
    end_delay_ns: int = msgspec.field(name="end_ns")
    silent_ns: int
    notice_ns: int
    rejoin_ns: int


class Noise(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """By how much durations differ from the profile, in us (paper, Fig 10)."""

    infer_us: Quantiles
    load_us: Quantiles

    @property
    def load_over_least_us(self) -> float:
        """By how much an average LOAD is longer than the shortest one or the profile, whichever is less."""
        mean = sum(
            (share - before) * (value + least) / 2
            for (before, least), (share, value) in pairwise(self.load_us)
        )
        return mean - min(0.0, self.load_us[0][1])


class Constants(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All constants of ``constants.toml``."""

    network: Network
    clients: Clients
    worker: WorkerTimes
    faults: FaultTimes
    noise: Noise

    def lines(self) -> tuple[str, ...]:
        """The constants in words, for the foot of a figure."""
        network, us = self.network, NS_PER_US
        worker = f"{network.worker_ns / us:g} us plus up to {network.jitter[-1][1]:g} us of jitter"
        if network.jitter_us:
            worker = f"{network.worker_ns / us:g} us plus jitter (share: us): {_words(network.jitter_us)}"
        kept = (
            f"; gateways keep {network.reserve_ns / us:g} us of a request's time"
            if network.reserve_ns
            else ""
        )
        return (
            f"network, each way: gateway {network.gateway_ns / us:g} us, worker {worker}{kept}",
            f"clients: told no, they wait {self.clients.retry_ns / us:g} us if the scenario says nothing",
            f"noise of INFER (share: us): {_words(self.noise.infer_us)}",
            f"noise of LOAD (share: us): {_words(self.noise.load_us)}",
        )


def read_constants() -> Constants:
    """The constants that come with the package."""
    text = files("clockwork_serve.sim").joinpath("constants.toml").read_bytes()
    return msgspec.toml.decode(text, type=Constants)


def _words(quantiles: Quantiles) -> str:
    return ", ".join(f"{share:g}: {value:g}" for share, value in quantiles)


# ------------------------------------------------------------
# Random durations: numbered streams of one seed, drawn in blocks for speed.


BLOCK: Final = 1 << 14


class Draws:
    """An endless sequence of ints; the same (seed, stream) gives the same sequence in any process.

    ``next()`` is one draw, in ns. It is bound to a generator, which costs half of a method.
    """

    __slots__ = ("next",)

    def __init__(self, seed: int, stream: int, quantiles_us: Quantiles) -> None:
        self.next: Callable[[], int] = _drawn(seed, stream, quantiles_us).__next__


def _drawn(seed: int, stream: int, quantiles_us: Quantiles) -> Iterator[int]:
    generator = np.random.Generator(np.random.PCG64([seed, stream]))
    shares = np.array([share for share, _ in quantiles_us])
    values = np.array([value * NS_PER_US for _, value in quantiles_us])
    while True:
        yield from np.rint(np.interp(generator.random(BLOCK), shares, values)).astype(np.int64).tolist()


class KeyedDraws:
    """Noise that follows from the seed and from what draws it, however many others draw.

    An INFER is known by its device, batch and first request, a LOAD by its device, its model and when it was
    sent, a message by what it is about. ``drawn``: the keys of all that drew.
    """

    def __init__(self, seed: int, constants: Constants) -> None:
        self.drawn: set[str] = set()
        self._seed = self._other_seed = seed
        self._known: frozenset[str] = frozenset()
        self._infer_us, self._load_us = constants.noise.infer_us, constants.noise.load_us
        self._jitter_us = constants.network.jitter

    def reroll(self, seed: int, known: frozenset[str]) -> None:
        """From now on, what is not ``known`` draws by another seed."""
        self._other_seed, self._known = seed, known

    def extra_ns(self, action: Action) -> int:
        """By how much an action takes longer than the profile says."""
        if isinstance(action, Infer):
            return self._draw(self._infer_us, _key(action))
        return self._draw(self._load_us, _key(action)) if isinstance(action, Load) else 0

    def delay_ns(self, message: object) -> int:
        """By how much a message takes longer than the least."""
        return self._draw(self._jitter_us, _key(message))

    def _draw(self, quantiles_us: Quantiles, key: str) -> int:
        self.drawn.add(key)
        seed = self._seed if key in self._known else self._other_seed
        digest = blake2b(f"{seed} {key}".encode(), digest_size=8).digest()
        share = int.from_bytes(digest, "little") / 2**64
        low, high = next((low, high) for low, high in pairwise(quantiles_us) if share <= high[0])
        part = (share - low[0]) / (high[0] - low[0])
        return round((low[1] + part * (high[1] - low[1])) * NS_PER_US)


def _key(message: object) -> str:
    """What makes a message the same in two runs: ids of actions may differ."""
    if isinstance(message, Infer):
        return f"infer {message.device} {message.batch} {message.calls[0].request_id}"
    if isinstance(message, Load | Unload):
        return f"{type(message).__name__} {message.device} {message.model} {message.window.earliest_ns}"
    if isinstance(message, Result):
        return f"result {message.device} {message.started_ns} {message.ended_ns}"
    return f"{type(message).__name__} {message}"


def uniform_us(least_ns: int, most_ns: int) -> Quantiles:
    """Quantiles of a uniform distribution, for bounds in ns."""
    return ((0.0, least_ns / NS_PER_US), (1.0, most_ns / NS_PER_US))


# ------------------------------------------------------------
# What is simulated: how many devices, of what size and speed, on how many workers.


class Cluster(Struct, frozen=True, kw_only=True):
    """Devices to simulate: those of the paper, with 1376 pages of 16 MiB for weights, all alike.

    Or, with ``groups``, unlike: ``devices`` is their sum, and a group without ``memory_mib`` has ``pages``.
    Where ``lanes_share``, they are like a CPU of one core: a LOAD and an INFER are not done at once.
    """

    devices: int = 1
    devices_per_worker: int = 1
    pages: int = 1376
    page_bytes: int = 16 * MIB
    lanes_share: bool = False
    groups: tuple[DeviceGroup, ...] = ()

    def each(self) -> Iterator[DeviceGroup]:
        """The group of each device, in order."""
        for group in self.groups or (DeviceGroup(devices=self.devices),):
            for _ in range(group.devices):
                yield group

    def slower(self) -> dict[str, float]:
        """By device, of those that are not as fast as the zoo's: how many times as long everything takes."""
        return {f"gpu{at}": group.slower for at, group in enumerate(self.each()) if group.slower != 1}

    def kinds(self, kind: str) -> dict[str, float]:
        """The kinds of devices that are profiled, and how many times as long as in the zoo they take."""
        kinds = {kind: 1.0}
        kinds.update((_kind_of(kind, group), group.slower) for group in self.groups if group.profiled)
        return kinds

    def pages_of(self, group: DeviceGroup) -> int:
        """The pages for weights of each device of a group."""
        return self.pages if group.memory_mib is None else group.memory_mib * MIB // self.page_bytes

    def specs(self, kind: str) -> list[tuple[DeviceSpec, ...]]:
        """The devices of each worker."""
        specs = [
            DeviceSpec(
                device=f"gpu{at}", kind=_kind_of(kind, group), pages=self.pages_of(group),
                page_bytes=self.page_bytes, workspace_bytes=GIB, io_bytes=GIB, lanes_share=self.lanes_share,
            )
            for at, group in enumerate(self.each())
        ]  # fmt: skip
        step = self.devices_per_worker
        return [tuple(specs[at : at + step]) for at in range(0, len(specs), step)]


def _kind_of(kind: str, group: DeviceGroup) -> str:
    return f"{kind}/{group.slower:g}" if group.profiled and group.slower != 1 else kind
