"""What delays to plan with."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from clockwork_serve.controller.estimates import ANSWER_NS, BLOCK, BLOCKS, FIRST_SLACK_NS, Delays, WindowMax
from clockwork_serve.units import NS_PER_S, ms, us
from tests.controller.clusters import ask, belief, place, serve


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=400))
def test_the_worst_is_that_of_about_the_last_hundred(values: list[int]) -> None:
    worst = WindowMax()
    for value in values:
        worst.add(value)
    least, most = BLOCK * (BLOCKS - 1) + 1, BLOCK * BLOCKS
    assert max(values[-least:]) <= worst.value <= max(values[-most:])


def test_the_slack_follows_the_worst_error_within_its_bounds() -> None:
    delays = Delays(network_ns=us(200), slack_ns=ms(2))
    assert delays.slack_ns == FIRST_SLACK_NS
    delays.measured(us(300), -1, 0)
    assert delays.slack_ns == us(300) + ANSWER_NS
    delays.measured(ms(7), -1, 0)
    assert delays.slack_ns == ms(2), "never more than was allowed: a device that hangs stops nobody else"
    for _ in range(BLOCK * BLOCKS):
        delays.measured(-ms(1), -1, 0)
    assert delays.slack_ns == us(100), "never less than a little"


def test_the_reach_is_measured_only_where_the_lane_was_idle() -> None:
    delays = Delays(network_ns=us(200), slack_ns=ms(2))
    delays.measured(0, -1, 0)
    assert delays.reach_ns == us(200)
    delays.measured(0, us(90), 0)
    assert delays.reach_ns == us(90)
    delays.measured(0, ms(50), 0)
    assert delays.reach_ns == us(1000)


def test_what_is_not_measured_for_a_second_is_forgotten() -> None:
    delays = Delays(network_ns=us(200), slack_ns=ms(2))
    delays.measured(ms(7), ms(1), 0)
    delays.measured(us(60), us(90), NS_PER_S + 1)
    assert (delays.slack_ns, delays.reach_ns) == (us(110), us(90))


def test_the_slack_of_all_is_the_longest_of_any_device_whoever_measured_last() -> None:
    made = belief("d0", "d1")
    made.measures = True
    made.reset_bases()
    served = serve(made, "a")
    residencies = {name: place(made, served, name) for name in ("d0", "d1")}

    def hear(name: str, error_ms: float) -> None:
        queue = ask(made, served)
        strategy = next(one for one in queue.strategies if one.residency is residencies[name])
        made.send_infer(strategy, strategy.batches[0], 0, ms(10), ms(10))
        sent = next(one for one in made.sent.values() if one.waiters and one.device.name == name)
        end_ns = sent.device.exec.head_end_ns
        made.measure(sent, ms(10), end_ns + ms(error_ms))
        del made.sent[sent.action.action_id]
        sent.device.exec.end(sent.action.action_id, end_ns)

    for _ in range(200):
        hear("d1", 0.1)
    for error_ms, found_ms in ((0.7, 0.75), (0.2, 0.75)):
        hear("d0", error_ms)
        hear("d1", 0.1)
        assert made.slack_ns == ms(found_ms)
    for _ in range(200):
        hear("d0", 0.2)
    assert made.slack_ns == ms(0.25), "what was long ago counts no more"
    del made.devices["d0"]
    made.reset_bases()
    assert made.slack_ns == ms(0.15), "nor does a device that is gone"
