"""Credit for requests, and heartbeats."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, cast

from clockwork_serve.messages import (
    Beat,
    Cancel,
    Frame,
    Hello,
    Request,
    RequestCredit,
    Role,
    SoonestEnd,
    SoonestEnds,
    WorkerHeard,
    WorkerHung,
    WorkerSilent,
)
from clockwork_serve.serve.flow_control import (
    BEATS_MISSED,
    BUSY_NS,
    DELAY_NS,
    FIRST,
    LEAST,
    MOST,
    PEER_BEATS_MISSED,
    REJECTING_NS,
    SUMMARY_MODELS_MAX,
    SUMMARY_NS,
    SUMMARY_PART,
    TRUSTED_NS,
    BusyClock,
    CreditIssuer,
    KnownEnds,
    PeerHeartbeat,
    SummaryIssuer,
    WorkerHeartbeats,
)
from clockwork_serve.serve.transport import Link
from clockwork_serve.units import ms
from tests.serve.links import until

# The credit that the controller grants gateways: how many requests may be in transit.


class Peer:
    """A link that keeps the credit granted over it."""

    def __init__(self) -> None:
        self.granted: list[RequestCredit] = []
        self.flushed = 0

    def flush(self) -> None:
        self.flushed = len(self.granted)

    def send(self, frame: Frame) -> None:
        assert isinstance(frame, RequestCredit)
        self.granted.append(frame)

    @property
    def link(self) -> Link:
        return cast("Link", self)


class World:
    """Gateways of a controller that is busy with each request for a while, and then idle."""

    def __init__(self, peers: int = 1) -> None:
        self.now_ns = self.busy_ns = 0
        self.busy: list[int] = []  # when the controller was told that it is
        self.issuer = CreditIssuer(
            lambda event: self.busy.append(self.now_ns), lambda: self.now_ns, lambda: self.busy_ns
        )
        self.peers = [Peer() for _ in range(peers)]
        for peer in self.peers:
            self.issuer.add_gateway(peer.link)

    def receive(self, count: int, gap_ns: int, idle_ns: int = 0) -> None:
        """Receive ``count`` requests from every gateway, one by one."""
        request = Request(request_id="r", gateway="g", model="m", arrival_ns=0, deadline_ns=1)
        for _ in range(count):
            self.now_ns += gap_ns + idle_ns
            self.busy_ns += gap_ns
            for peer in self.peers:
                self.issuer.received(peer.link, [request])

    def turns(self, count: int, each_ns: int, turn_ns: int) -> float:
        """One gateway always sends what it may, in turns; the part of the time in which we are not idle."""
        request = Request(request_id="r", gateway="g", model="m", arrival_ns=0, deadline_ns=1)
        (peer,) = self.peers
        heard = sum(each.heard for each in peer.granted)
        began_ns, began_busy_ns = self.now_ns, self.busy_ns
        for _ in range(count):
            self.issuer.blocked(peer.link)
            may = sum(each.heard for each in peer.granted) + peer.granted[-1].most - heard
            heard += may
            next_ns = self.now_ns + turn_ns
            for _ in range(may):
                self.now_ns += each_ns
                self.busy_ns += each_ns
                self.issuer.received(peer.link, [request])
            self.now_ns = max(self.now_ns, next_ns)
        return (self.busy_ns - began_busy_ns) / (self.now_ns - began_ns)


def test_a_new_gateway_is_granted_credit_at_once() -> None:
    assert World().peers[0].granted == [RequestCredit(heard=0, most=FIRST)]


def test_every_request_is_acknowledged_once_and_many_at_a_time() -> None:
    world = World()
    world.receive(10_000, gap_ns=20_000)
    granted = world.peers[0].granted
    assert 10_000 - sum(each.heard for each in granted) < granted[-1].most / 4
    assert len(granted) < 10_000 / 8


def test_credit_is_what_is_received_within_the_delay() -> None:
    world = World()
    world.receive(20_000, gap_ns=20_000)
    assert abs(world.peers[0].granted[-1].most - DELAY_NS // 20_000) <= 4


def test_time_in_which_nothing_was_asked_for_takes_no_credit() -> None:
    world = World()
    world.receive(20_000, gap_ns=20_000, idle_ns=ms(1))
    assert abs(world.peers[0].granted[-1].most - DELAY_NS // 20_000) <= 4


def test_a_controller_without_time_to_spare_is_told_so_while_requests_are_held_back() -> None:
    world = World()
    for _ in range(20_000):
        world.issuer.blocked(world.peers[0].link)
        world.receive(1, gap_ns=60_000)
    told = [*world.busy, world.now_ns]
    gaps_ns = [after - before for before, after in pairwise(told)]
    assert len(told) > 10
    assert max(gaps_ns) < BUSY_NS, "before it would count no longer"
    assert min(gaps_ns[:-1]) >= BUSY_NS // 2, "each time costs a turn"


def test_a_controller_that_idles_or_holds_nothing_back_is_not_busy() -> None:
    idles = World()
    for _ in range(2_000):
        idles.issuer.blocked(idles.peers[0].link)
        idles.receive(1, gap_ns=60_000, idle_ns=10_000)
    heard = World()
    heard.receive(20_000, gap_ns=60_000)
    assert idles.busy == heard.busy == []


def test_a_gateway_that_holds_requests_back_gets_more_until_the_controller_is_busy() -> None:
    world = World()
    assert world.turns(100, each_ns=60_000, turn_ns=ms(5)) > 0.9  # the delay alone: 1 of 5 ms
    slow = world.peers[0].granted[-1].most
    assert slow * 60_000 < ms(9)
    world.receive(2_000, gap_ns=60_000, idle_ns=ms(1))  # it holds nothing back any more
    assert world.peers[0].granted[-1].most <= max(LEAST, DELAY_NS // 60_000) + 4 < slow


def test_a_busy_controller_grants_what_it_works_through_in_time() -> None:
    world = World()
    world.turns(100, each_ns=20_000, turn_ns=ms(0.1))
    assert world.peers[0].granted[-1].most <= DELAY_NS // 20_000 + 4


def test_only_a_gateway_that_waits_is_sent_its_credit_at_once() -> None:
    world = World()
    (peer,) = world.peers
    world.receive(200, gap_ns=20_000)
    assert len(peer.granted) > 1
    assert peer.flushed == 0
    world.issuer.blocked(peer.link)
    world.receive(100, gap_ns=20_000)
    assert 1 < peer.flushed < len(peer.granted)


def test_a_thread_is_busy_while_it_runs_and_idle_while_it_sleeps() -> None:
    clock = BusyClock()
    began_ns, began_cpu_ns = clock(), time.thread_time_ns()
    while time.thread_time_ns() < began_cpu_ns + ms(20):
        pass
    ran_ns = clock() - began_ns
    time.sleep(2.0)
    slept_ns = clock() - began_ns - ran_ns
    assert ran_ns >= ms(19)
    assert slept_ns < ms(1500), "but for waiting for a core then"


def test_a_thread_that_waits_for_one_that_computes_is_not_idle() -> None:
    def compute() -> None:
        began_ns = time.thread_time_ns()
        while time.thread_time_ns() < began_ns + ms(50):
            pass

    clock = BusyClock()
    began_ns = clock()
    other = threading.Thread(target=compute)
    other.start()
    other.join()
    assert clock() - began_ns >= ms(49)


def test_without_statistics_of_the_kernel_a_thread_is_never_idle() -> None:
    clock = BusyClock("/proc/thread-self/none")
    began_ns = clock()
    time.sleep(0.02)
    assert clock() - began_ns >= ms(20)


def test_credit_has_a_lower_and_an_upper_bound() -> None:
    slow, fast = World(), World()
    slow.receive(2_000, gap_ns=1_000_000)
    fast.receive(100_000, gap_ns=1)
    assert slow.peers[0].granted[-1].most == LEAST
    assert fast.peers[0].granted[-1].most == MOST


def test_gateways_share_the_lower_bound() -> None:
    world = World(peers=2)
    world.receive(2_000, gap_ns=1_000_000)
    assert [peer.granted[-1].most for peer in world.peers] == [LEAST // 2] * 2


def test_only_requests_of_connected_gateways_count() -> None:
    world = World()
    (peer,) = world.peers
    world.issuer.received(peer.link, [Cancel(request_id="r")] * 1000)
    world.issuer.remove_gateway(peer.link)
    world.receive(1000, gap_ns=1000)
    assert len(peer.granted) == 1


# Summaries of the soonest ends: when the controller makes them, and what a gateway concludes from them.


def end(
    due_ms: float = 100, end_ms: float = 110, each_ms: float = 2, other_end_ms: float = 1e6
) -> SoonestEnd:
    return SoonestEnd(
        due_ns=ms(due_ms), end_ns=ms(end_ms), each_ns=ms(each_ms), other_end_ns=ms(other_end_ms)
    )


class Summaries:
    """An issuer, the models that it computed, and what it published."""

    def __init__(self, cost_ns: int = 0) -> None:
        self.ends: dict[str, SoonestEnd] = {}
        self.computed: list[list[str]] = []
        self.published: list[SoonestEnds] = []
        self.cost_ns = cost_ns
        self.cpu_ns = 0
        self.issuer = SummaryIssuer(self._compute, self.published.append, lambda: self.cpu_ns)

    def _compute(self, keys: Iterable[str], now_ns: int) -> dict[str, SoonestEnd]:
        self.computed.append(list(keys))
        self.cpu_ns += self.cost_ns
        return {key: self.ends[key] for key in self.computed[-1] if key in self.ends}

    def step(self, now_ns: int, *asked: str) -> None:
        """A step of the brain, after requests for these models."""
        if self.issuer.active:
            for model in asked:
                self.issuer.asked_for(model)
            self.issuer.publish(now_ns)


def test_summaries_are_made_only_while_requests_are_rejected() -> None:
    made = Summaries()
    made.step(0, "a")
    assert not made.published
    made.issuer.rejected(0)
    made.step(0, "a")
    made.step(REJECTING_NS, "a")
    assert not made.issuer.active
    made.step(REJECTING_NS + SUMMARY_NS, "a")
    assert [one.until_ns for one in made.published] == [TRUSTED_NS, REJECTING_NS + TRUSTED_NS]


def test_summaries_go_on_while_they_tell_something() -> None:
    made = Summaries()
    made.ends["a"] = end(end_ms=5000)
    made.issuer.rejected(0)
    for at in range(4):
        made.step(at * REJECTING_NS, *(["a"] if not at else []))
    assert [[*one.ends] for one in made.published] == [["a"]] * 4
    assert made.computed == [["a"]] * 4, "nobody asks any more, for gateways refuse all"


def test_ends_that_are_over_before_the_next_summary_are_left_out() -> None:
    made = Summaries()
    made.ends = {"a": end(end_ms=4), "b": end(other_end_ms=4), "c": end(end_ms=6)}
    made.issuer.rejected(0)
    made.step(0, "a", "b", "c", "d")
    assert [*made.published[0].ends] == ["c"]


def test_summaries_take_a_small_part_of_the_time_and_of_the_models() -> None:
    made = Summaries(cost_ns=ms(1))
    made.issuer.rejected(0)
    made.step(0, *[f"m{at}" for at in range(2 * SUMMARY_MODELS_MAX)])
    assert len(made.computed[0]) == SUMMARY_MODELS_MAX
    for now_ms in range(1, 4 * SUMMARY_PART):
        made.step(ms(now_ms), "a")
    assert len(made.published) == 4


def test_a_gateway_refuses_what_is_due_last_and_ends_too_late() -> None:
    known = KnownEnds()
    known.update(SoonestEnds(ends={"a": end()}, until_ns=ms(25)))
    assert known.shortage_ns("a", ms(108), 0) == ms(2)
    assert known.shortage_ns("a", ms(99), 0) == 0, "it is due before others, and may go first"
    assert known.shortage_ns("b", ms(1), 0) == 0


def test_what_a_gateway_passes_on_is_before_what_comes_later() -> None:
    known = KnownEnds()
    known.update(SoonestEnds(ends={"a": end(other_end_ms=115)}, until_ns=ms(25)))
    assert known.shortage_ns("a", ms(110), 0, count=False) == 0
    assert known.shortage_ns("a", ms(110), 0) == 0
    assert known.shortage_ns("a", ms(111), 0) == ms(1)
    assert known.shortage_ns("a", ms(109), 0) == 0, "it is due before the one passed on"
    for _ in range(9):
        assert known.shortage_ns("a", ms(115), 0) == 0, "another device may serve it"
    assert known.shortage_ns("a", ms(114), 0) == 0
    assert known.shortage_ns("a", ms(115) - 1, 0) == 0


def test_each_that_is_refused_is_advised_to_retry_at_a_time_of_its_own() -> None:
    known = KnownEnds()
    known.update(SoonestEnds(ends={"a": end()}, until_ns=ms(25)))
    assert [known.retry_after_ns("a", ms(5), 0) for _ in range(3)] == [ms(5), ms(7), ms(9)]
    known.update(SoonestEnds(ends={"a": end()}, until_ns=ms(25)))
    assert known.retry_after_ns("a", ms(5), ms(1)) == ms(10)
    assert known.retry_after_ns("a", ms(50), ms(1)) == ms(50)
    known.update(SoonestEnds(ends={"b": end()}, until_ns=ms(25)))
    known.update(SoonestEnds(ends={"a": end()}, until_ns=ms(25)))
    assert known.retry_after_ns("a", ms(5), ms(1)) == ms(5)


def test_a_summary_is_trusted_for_a_while_and_until_the_link_is_lost() -> None:
    known = KnownEnds()
    known.update(SoonestEnds(ends={"a": end()}, until_ns=ms(25)))
    assert known.shortage_ns("a", ms(108), ms(25) - 1) == ms(2)
    assert known.shortage_ns("a", ms(108), ms(25)) == 0, "the controller may be stuck or dead"
    assert known.shortage_ns("a", ms(108), ms(24)) == ms(2)
    known.reset()
    assert known.shortage_ns("a", ms(108), ms(24)) == 0


# Heartbeats find a stalled process, and none if it was the counting process that was stopped.


BEAT_S = 0.02


class FakeLink:
    """Keeps what was sent."""

    def __init__(self, name: str) -> None:
        self.peer = Hello(role=Role.WORKER, name=name, pid=1, boot_id="")
        self.sent: list[Any] = []

    def send(self, frame: Any) -> None:
        self.sent.append(frame)


class WorkerProbe:
    """A heartbeat, one worker, and the events posted about it."""

    def __init__(self) -> None:
        self.posted: list[WorkerSilent | WorkerHeard] = []
        self.heartbeat = WorkerHeartbeats(self.posted.append, BEAT_S)
        self.fake = FakeLink("w0")
        self.link = cast("Link", self.fake)
        self.heartbeat.watch(self.link)


async def test_a_worker_that_returns_beats_is_not_stalled() -> None:
    one = WorkerProbe()
    for _ in range(3 * BEATS_MISSED):
        await asyncio.sleep(BEAT_S)
        if one.fake.sent:
            one.heartbeat.beat_received(one.link)
    assert len(one.fake.sent) > 1
    assert set(map(type, one.fake.sent)) == {Beat}
    assert one.posted == []


async def test_a_stall_is_posted_at_each_tick_until_a_beat_is_returned() -> None:
    one = WorkerProbe()
    await until(lambda: len(one.posted) > 1)
    assert one.fake.sent == [Beat()], "a stopped process is not sent more and more"
    silent = [each for each in one.posted if isinstance(each, WorkerSilent)]
    assert silent == one.posted
    assert silent[0].for_ns < silent[-1].for_ns
    one.heartbeat.beat_received(one.link)
    assert one.posted[-1] == WorkerHeard(worker="w0")
    one.heartbeat.unwatch(one.link)
    one.posted.clear()
    await asyncio.sleep((BEATS_MISSED + 6) * BEAT_S)
    assert one.posted == []


async def test_a_controller_that_was_stopped_itself_finds_no_worker_stalled() -> None:
    one = WorkerProbe()
    await asyncio.sleep(1.5 * BEAT_S)
    time.sleep(3 * BEATS_MISSED * BEAT_S)  # noqa: ASYNC251 - that is what it is about
    await asyncio.sleep(1.5 * BEAT_S)
    one.heartbeat.beat_received(one.link)
    assert one.posted == []


async def test_only_a_worker_that_is_to_be_ended_is_reported_to_the_supervisor() -> None:
    one, supervisor = WorkerProbe(), FakeLink("keeper")
    end = WorkerHung(worker="w0", why="late", end=True)
    for hung in (WorkerHung(worker="w0", why="late"), end, WorkerHung(worker="w0")):
        one.heartbeat.report_hung(hung, cast("Link", supervisor))
        one.heartbeat.report_hung(hung, None)
    assert supervisor.sent == [end]


class PeerProbe:
    """A peer's heartbeat, the beats sent, and the changes of ``stalled``."""

    def __init__(self) -> None:
        self.sent: list[Beat] = []
        self.changes: list[bool] = []
        self.heartbeat = PeerHeartbeat(
            self.sent.append, lambda: self.changes.append(self.heartbeat.stalled), BEAT_S
        )
        self.heartbeat.start()


async def test_a_peer_is_stalled_while_it_returns_no_beats() -> None:
    one = PeerProbe()
    for _ in range(3 * PEER_BEATS_MISSED):
        await asyncio.sleep(BEAT_S)
        one.heartbeat.beat_received()
    assert len(one.sent) > 1
    assert one.changes == []
    sent = len(one.sent)
    await until(lambda: one.changes)
    await asyncio.sleep((PEER_BEATS_MISSED + 6) * BEAT_S)
    assert len(one.sent) <= sent + 1
    assert one.changes == [True]
    assert one.heartbeat.stalled_s >= PEER_BEATS_MISSED * BEAT_S
    one.heartbeat.beat_received()
    assert one.changes == [True, False]
    one.heartbeat.stop()


async def test_a_disconnected_peer_is_not_stalled() -> None:
    one = PeerProbe()
    await until(lambda: one.changes)
    one.heartbeat.stop()
    assert not one.heartbeat.stalled
    sent = len(one.sent)
    await asyncio.sleep((PEER_BEATS_MISSED + 6) * BEAT_S)
    assert len(one.sent) == sent
    assert one.changes == [True]


async def test_a_process_that_was_stopped_itself_finds_no_peer_stalled() -> None:
    one = PeerProbe()
    for _ in range(5):
        await asyncio.sleep(1.5 * BEAT_S)
        time.sleep(3 * PEER_BEATS_MISSED * BEAT_S)  # noqa: ASYNC251 - that is what it is about
        await asyncio.sleep(1.5 * BEAT_S)
        one.heartbeat.beat_received()
    assert one.changes == []
    one.heartbeat.stop()
