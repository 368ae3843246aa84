"""A controller's state forked, saved and restored: what continues from there is the same, byte for byte."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from enum import Enum
from random import Random

import msgspec
import pytest

from clockwork_serve.controller import POLICIES, Controller, state
from clockwork_serve.controller.record import Record
from clockwork_serve.errors import StateError
from clockwork_serve.messages import (
    ControllerEffect,
    ControllerEvent,
    Drain,
    WorkerCrashed,
    WorkerJoined,
    WorkerLost,
    WorkerSilent,
)
from clockwork_serve.sim.simulation import Simulation
from clockwork_serve.units import ms
from clockwork_serve.version import VERSION
from harness.seeds import PLAYED, Digest, play_seed, random_scenario, run_through, simulation_of
from tests.controller.honest import serving
from tests.pure import NEEDS_PURE

pytestmark = NEEDS_PURE

SEEDS = (*range(20), 133, 349)
"""In the last ones a promised request was planned on a device that has gone and shares sets with its
successor, and a controller takes over a worker that runs an action."""
PLAYS: list[tuple[int, str | None]] = [
    *[(seed, None) for seed in SEEDS], *[(0, policy) for policy in POLICIES if policy not in PLAYED],
]  # fmt: skip
"""Seeds, and the policies that none of them draws."""
REQUESTS = 150
EVERY = 40
"""About one instant in so many sees its controller copied."""

RARE = (WorkerCrashed, WorkerJoined, WorkerLost, WorkerSilent)
"""After these as well: they leave records that are gone soon."""

ENCODER = msgspec.msgpack.Encoder()
BASES = {"Measured"}
"""Classes that only others are made of."""


def mutable(controller: Controller) -> list[object]:
    """Everything in a controller's state that can change."""
    saving = state.Saving()
    saving.save(controller)
    return [
        one for one in saving.found
        if not isinstance(one, msgspec.Struct | Enum | tuple | frozenset) and type(one) not in state.VALUES
    ]  # fmt: skip


class Copies:
    """A watcher: copies of the controller decide what it decides, though they are copied again and again."""

    def __init__(self, seed: int) -> None:
        self.simulation: Simulation | None = None
        self.kinds: set[str] = set()
        """Names of the classes of all records that were copied."""
        self.compared = 0
        self._dice = Random(seed)
        self._of: Controller | None = None
        self._follower: Controller | None = None

    def on_step(
        self, now_ns: int, events: Sequence[ControllerEvent], effects: Sequence[ControllerEffect]
    ) -> None:
        """Have the copy do the same, and compare."""
        if self.simulation is None:
            return
        controller = self.simulation.controller
        if controller is not self._of:  # the first one, or the successor of one that died
            self._of = controller
            self._follower = self._copy(controller, now_ns)
            return
        follower = self._follower
        assert follower is not None
        for event in events:
            follower.observe(event, now_ns)
        rare = any(isinstance(event, RARE) for event in events)
        if rare or self._dice.randrange(EVERY) == 0:  # in the middle of an instant
            follower = self._follower = self._copy(follower, now_ns)
        assert ENCODER.encode(follower.decide(now_ns)) == ENCODER.encode(effects)
        assert follower.next_wakeup_ns() == controller.next_wakeup_ns()
        self.compared += 1

    def _copy(self, original: Controller, now_ns: int) -> Controller:
        """A copy, when another copy has gone its own way to the end."""
        saved = original.save()
        copy, lost = original.fork(), original.fork()
        assert copy.save() == saved, "a field or a shared object is missing in the fork"
        assert not {id(one) for one in mutable(copy)} & {id(one) for one in mutable(original)}
        self.kinds |= {type(one).__name__ for one in mutable(original)}
        restored = Controller.restore(saved)
        assert restored.save() == saved, "a field or a shared object is missing in what was restored"
        self._disturb(lost, now_ns)
        assert original.save() == saved, "what a fork does shows in its original"
        return copy if self._dice.random() < 0.5 else restored

    def _disturb(self, controller: Controller, now_ns: int) -> None:
        """All its workers die, its gateways go on asking, and it is to end: that changes everything in it."""
        snapshot = controller.snapshot()
        devices: list[dict[str, str]] = snapshot["devices"]
        for at, worker in enumerate(dict.fromkeys(one["worker"] for one in devices)):
            controller.observe(WorkerLost(worker=worker, running=(1,)), now_ns + at)
            controller.decide(now_ns + at)
        controller.observe(Drain(), now_ns + ms(1))
        for _ in range(1000):
            at_ns = controller.next_wakeup_ns()
            if at_ns is None:
                break
            now_ns = max(at_ns, now_ns + ms(1))
            controller.decide(now_ns)


def played(seed: int, policy: str | None) -> tuple[Copies, str]:
    """A seed whose controller is copied; the hash of its journal."""
    chance = random_scenario(seed, REQUESTS, policy)
    copies, digest = Copies(seed), Digest()
    simulation = simulation_of(chance, watchers=(copies, digest))
    copies.simulation = simulation
    run_through(simulation, chance.scenario.faults)
    return copies, digest.hex()


def test_copies_decide_what_the_original_decides_and_disturb_it_in_nothing():
    kinds: set[str] = set()
    compared = 0
    for seed, policy in PLAYS:
        plain = Digest()
        play_seed(seed, REQUESTS, (plain,), policy)

        copies, found = played(seed, policy)

        assert found == plain.hex(), f"seed {seed}, {policy}: copying its controller changes what it decides"
        compared += copies.compared
        kinds |= copies.kinds
    assert compared > len(PLAYS) * REQUESTS
    # Policies, takeovers, workers that hang, quarantine and tenants are among them.
    ours = {kind.__name__ for kind in state.records() if kind.__module__.startswith("clockwork_")}
    assert ours - kinds == BASES


@pytest.fixture
def saved() -> bytes:
    """What a controller saves that has a model, a device and requests that wait."""
    world = serving("a")
    world.request("a", slo_ms=100)
    return world.controller.save()


def kinds_of(saved: bytes) -> list[list[object]]:
    """The name and the fields of each kind of object in a saved state."""
    kinds, _ = msgspec.msgpack.decode(msgspec.msgpack.decode(saved)[2])
    return kinds


def with_kinds(saved: bytes, kinds: list[list[object]], version: str = VERSION) -> bytes:
    """The same state as another version would have saved it."""
    body = msgspec.msgpack.encode((kinds, msgspec.msgpack.decode(msgspec.msgpack.decode(saved)[2])[1]))
    return msgspec.msgpack.encode((version, hashlib.sha256(body).digest(), body))


def kind_of(kinds: list[list[object]], name: str) -> list[object]:
    """The name and the fields of one of them."""
    return next(kind for kind in kinds if str(kind[0]).endswith(f".{name}"))


def test_what_a_controller_saved_is_restored(saved: bytes):
    assert Controller.restore(with_kinds(saved, kinds_of(saved))).save() == saved


def test_what_another_version_saved_is_refused(saved: bytes):
    with pytest.raises(StateError, match=r"found one of version 0\.1\.9: start a"):
        Controller.restore(with_kinds(saved, kinds_of(saved), "0.1.9"))


@pytest.mark.parametrize("name", ["Queue", "Request", "Cause"])  # a record, a message, an enumeration
def test_objects_of_other_fields_are_refused(saved: bytes, name: str):
    kinds = kinds_of(saved)
    kind = kind_of(kinds, name)
    names = kind[1]
    assert isinstance(names, list)
    kind[1] = ["flavour", *names[1:]]

    with pytest.raises(
        StateError, match=rf"expected a .*{name} with {names[0]}; found one with flavour: anot"
    ):
        Controller.restore(with_kinds(saved, kinds))


def test_records_of_other_classes_are_refused(saved: bytes):
    kinds = kinds_of(saved)
    kind_of(kinds, "Queue")[0] = "subprocess.Popen"

    with pytest.raises(StateError, match=r"found a subprocess\.Popen"):
        Controller.restore(with_kinds(saved, kinds))


class Plain(Record):
    """Fields without types, in a dict."""

    def __init__(self) -> None:
        self.held: list[Record] = [self]
        self.said = "again"


class Typed(Plain):
    """One field has a type."""

    __slots__ = ("also",)

    also: list[Plain] | None

    def __init__(self, also: list[Plain] | None) -> None:
        super().__init__()
        self.also = also


def test_what_no_field_declares_is_copied_as_well():
    plain = Plain()
    one = Typed([plain])

    two = state.fork(one)

    assert two.also is not None
    (other,) = two.also
    assert other is not plain
    assert (other.held, other.said) == ([other], "again")
    assert two.held == [two]


def test_a_chain_of_records_may_be_long():
    one = None
    for _ in range(20_000):
        one = Linked(one)

    two: Linked | None = state.fork(one)

    count = 0
    while two is not None:
        count, two = count + 1, two.next
    assert count == 20_000


class Linked(Record):
    """One of a chain."""

    __slots__ = ("next",)

    next: Linked | None

    def __init__(self, following: Linked | None) -> None:
        self.next = following


def test_what_changes_and_is_no_record_is_refused():
    plain = Plain()
    plain.said = bytearray()  # type: ignore[assignment]

    with pytest.raises(TypeError, match="expected a Record or a value that never changes"):
        state.fork(plain)


@pytest.mark.parametrize("other", [b"", b"GIF89a", b"\x90", b"\xc0", msgspec.msgpack.encode((1, 2))])
def test_other_bytes_are_refused(other: bytes):
    with pytest.raises(StateError, match="expected what a controller saved"):
        Controller.restore(other)


def test_damage_is_found(saved: bytes):
    dice = Random(1)
    for _ in range(100):
        damaged = bytearray(saved)
        damaged[dice.randrange(len(damaged))] ^= 1 << dice.randrange(8)
        with pytest.raises(StateError, match="state: expected"):
            Controller.restore(bytes(damaged))
