"""The controller against anything: requests, slow workers, crashes; with an oracle of its own."""

from __future__ import annotations

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from clockwork_lab import released
from clockwork_serve.controller import POLICIES, ControllerConfig
from clockwork_serve.messages import (
    Cancel,
    GatewayLost,
    Infer,
    Load,
    Outcome,
    Quota,
    QuotasSet,
    Reason,
    ReleaseFromQuarantine,
    Unload,
)
from clockwork_serve.units import MIB, ms
from tests.controller.honest import CODE, World, device, model, profile

NAMES = ("a", "b", "c", "d", "e")


class ControllerMachine(RuleBasedStateMachine):
    """Whatever happens: one answer each, windows that leave room, pages conserved, one action per lane."""

    @initialize(
        reject=st.booleans(),
        max_batch=st.sampled_from([1, 4, 8]),
        pages=st.integers(4, 14),
        devices=st.integers(1, 3),
        policy=st.sampled_from([*POLICIES, "released"]),
        after=st.integers(0, 3),
    )
    def start(self, reject: bool, max_batch: int, pages: int, devices: int, policy: str, after: int) -> None:
        if policy in POLICIES:
            config = ControllerConfig(
                policy=policy, reject_infeasible=reject, max_batch=max_batch, quarantine_after=after
            )
        else:
            config = released.settings(max_batch=max_batch)
        self.reject = config.reject_infeasible
        self.world = World(config)
        self.pages = pages
        self.world.serve(*[model(name, mib=2 + at % 3) for at, name in enumerate(NAMES[:4])])
        slow = msgspec.structs.replace(CODE, code_id="slow")
        self.world.serve(model("e", code_id="slow"), code=slow, times=profile("slow", b1_ms=60, step_ms=50))
        self.devices = [f"d{at}" for at in range(devices)]
        self.up = set(self.devices)
        for name in self.devices:
            self.world.join(device(name, pages), worker=f"w-{name}")
        self.asked: dict[str, int] = {}
        self.looked_at = 0
        self.held: dict[str, bool] = {}

    @rule(
        name=st.sampled_from(NAMES),
        slo_ms=st.floats(1, 400),
        rows=st.sampled_from([1, 1, 1, 2, 5]),
        tenant=st.sampled_from(["", "t", "u"]),
        priority=st.sampled_from([0, 0, 0, 1, 8, 15]),
    )
    def ask(self, name: str, slo_ms: float, rows: int, tenant: str = "", priority: int = 0) -> None:
        request_id = self.world.request(name, slo_ms, rows=rows, tenant=tenant, priority=priority)
        self.asked[request_id] = self.world.now_ns + ms(slo_ms)

    @rule(name=st.sampled_from(NAMES), slo_ms=st.floats(5, 400), count=st.integers(2, 12))
    def burst(self, name: str, slo_ms: float, count: int) -> None:
        for _ in range(count):
            self.ask(name, slo_ms, 1)

    @rule(
        tenants=st.sets(st.sampled_from(["t", "u"])),
        device_ns=st.sampled_from([None, ms(50), ms(500)]),
        loaded=st.sampled_from([None, 4 * MIB, 40 * MIB]),
        burst_ms=st.sampled_from([10, 1000]),
    )
    def quotas(self, tenants: set[str], device_ns: int | None, loaded: int | None, burst_ms: int) -> None:
        quotas = [
            Quota(tenant=tenant, burst_ns=ms(burst_ms), device_ns_per_s=device_ns, loaded_bytes_per_s=loaded)
            for tenant in sorted(tenants)
        ]
        self.world.tell(QuotasSet(quotas=tuple(quotas)))

    @rule(delay_ms=st.floats(0.05, 50))
    def wait(self, delay_ms: float) -> None:
        self.world.run(until_ms=delay_ms)

    @rule(slower=st.sampled_from([0.8, 1.0, 1.0, 1.3, 4.0]))
    def drift(self, slower: float) -> None:
        self.world.slower = slower

    @rule(pick=st.randoms(use_true_random=False))
    def cancel(self, pick) -> None:  # type: ignore[no-untyped-def]
        waiting = sorted(self.asked.keys() - self.world.answers.keys())
        if waiting:
            self.world.tell(Cancel(request_id=pick.choice(waiting)))

    @rule(pick=st.randoms(use_true_random=False), known=st.booleans(), prepares=st.booleans())
    def crash(self, pick, known: bool, prepares: bool) -> None:  # type: ignore[no-untyped-def]
        if self.up:
            name = pick.choice(sorted(self.up))
            self.up.discard(name)
            self.world.kill(f"w-{name}", name, known=known, preparing=("slow",) if prepares else ())

    @rule(name=st.sampled_from(NAMES))
    def pardon(self, name: str) -> None:
        self.world.tell(ReleaseFromQuarantine(model=name))

    @rule()
    def restart(self) -> None:
        for name in sorted(set(self.devices) - self.up):
            self.world.join(device(name, self.pages), worker=f"w-{name}")
            self.up.add(name)

    @rule()
    def lose_gateway(self) -> None:
        self.world.tell(GatewayLost(gateway="g0"))
        assert self.asked.keys() <= self.world.answers.keys()

    @invariant()
    def windows_leave_room_for_every_member(self) -> None:
        for action in self.world.actions:
            if isinstance(action, Infer) and self.reject:
                for call in action.calls:
                    end_ns = action.window.latest_ns + action.expected_ns
                    assert end_ns <= self.asked[call.request_id], f"{call.request_id} could be late by plan"

    @invariant()
    def extents_never_overlap(self) -> None:
        held: dict[str, dict[str, tuple[int, int]]] = {name: {} for name in self.devices}
        for action in self.world.actions:
            mine = held[action.device]
            if isinstance(action, Unload):
                mine.pop(action.model, None)
            elif isinstance(action, Load):
                first, count = action.extent.first, action.extent.count
                assert first + count <= self.pages
                mine[action.model] = (first, count)

    @invariant()
    def nothing_of_a_model_in_quarantine_is_sent(self) -> None:
        if not hasattr(self, "world"):
            return
        held = {one.model: bool(one.why) for one in self.world.quarantined}
        sent = self.world.actions[self.looked_at :]
        self.looked_at = len(self.world.actions)
        assert not [
            one
            for one in sent
            if held.get(one.model) and self.held.get(one.model) and not isinstance(one, Unload)
        ]
        self.held = held

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        self.world.run(until_ms=5_000)
        assert self.world.answers.keys() == self.asked.keys(), "every request has exactly one answer"
        unreleased = {one for one, answer in self.world.answers.items() if not answer.release}
        assert unreleased == set(self.world.releases), "tensors are released exactly once"
        for request_id, answer in self.world.answers.items():
            assert answer.reason is not Reason.QUARANTINED or self.world.quarantined
            in_time = self.world.answered_ns[request_id] <= self.asked[request_id]
            assert in_time or answer.outcome is not Outcome.OK, f"{request_id} was late and called OK"


ControllerMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestControllerMachine = ControllerMachine.TestCase
