"""What delays to plan with."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from clockwork_serve.controller.estimates import (
    ANSWER_NS,
    BLOCK,
    BLOCKS,
    DRIFT_DOWN,
    DRIFT_FIRST,
    DRIFT_LEAST,
    DRIFT_MOST,
    ERRORS,
    FIRST_SLACK_NS,
    Delays,
    Spread,
    WindowMax,
)
from clockwork_serve.messages import Result, Status
from clockwork_serve.units import NS_PER_S, ms, us
from tests.controller.clusters import ask, belief, place, serve


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=400))
def test_the_worst_is_that_of_about_the_last_hundred(values: list[int]) -> None:
    worst = WindowMax()
    for value in values:
        worst.add(value)
    least, most = BLOCK * (BLOCKS - 1) + 1, BLOCK * BLOCKS
    assert max(values[-least:]) <= worst.value <= max(values[-most:])


def close(found_ns: int, wanted_ns: int) -> bool:
    """Not shorter, and longer by less than the width of a count."""
    return wanted_ns <= found_ns <= wanted_ns + max(us(2), wanted_ns // 30)


@given(st.lists(st.integers(0, 10**10), min_size=1, max_size=200), st.floats(0.01, 1.0))
def test_a_quantile_is_the_value_that_this_share_does_not_exceed(values: list[int], share: float) -> None:
    spread = Spread(1000)
    for value in values:
        spread.add(value)
    above = int((1.0 - share) * len(values))
    assert close(spread.quantile_ns(share), sorted(values, reverse=True)[min(above, len(values) - 1)])


def test_what_was_long_ago_counts_no_more_and_two_modes_are_both_seen() -> None:
    spread = Spread(100)
    for _ in range(300):
        spread.add(ms(5))
    for at in range(600):
        spread.add(us(900) if at % 10 == 0 else us(100))
    assert close(spread.quantile_ns(0.85), us(100))
    assert close(spread.quantile_ns(0.98), us(900))
    for _ in range(1000):
        spread.add(-ms(3))
    assert spread.quantile_ns(1.0) == us(1.024), "too early is not late"
    assert Spread(100).quantile_ns(0.5) == 0


def test_the_slack_follows_the_errors_within_its_bounds() -> None:
    delays = Delays(network_ns=us(200), slack_ns=ms(2))
    assert delays.slack_ns == FIRST_SLACK_NS
    delays.measured(us(300), -1, 0)
    assert close(delays.slack_ns - ANSWER_NS, us(300))
    delays.measured(ms(7), -1, 0)
    assert delays.slack_ns == ms(2), "never more than was allowed: a device that hangs stops nobody else"
    for _ in range(ERRORS):
        delays.measured(-ms(1), -1, 0)
    assert delays.slack_ns == us(100), "never less than a little; one error of a hundred is not covered"


def test_the_reach_is_measured_only_where_the_lane_was_idle() -> None:
    delays = Delays(network_ns=us(200), slack_ns=ms(2))
    delays.measured(0, -1, 0)
    assert delays.reach_ns == us(200)
    delays.measured(0, us(90), 0)
    assert delays.reach_ns == us(90)
    delays.measured(0, ms(50), 0)
    assert delays.reach_ns == us(1000)


def test_delays_may_be_longer_where_tensors_come_over_a_network() -> None:
    delays = Delays(network_ns=us(200), slack_ns=ms(2))
    delays.measured(ms(7), ms(6), 0, ms(5), ms(3))
    assert delays.reach_ns == ms(6)
    assert close(delays.slack_ns - ANSWER_NS, ms(7))
    delays.measured(ms(90), ms(90), 0, ms(5), ms(3))
    assert delays.reach_ns == ms(17), "five times what is usual, and twice the transfers"
    assert delays.slack_ns == ms(18), "what is allowed, and twice the transfers"
    delays.measured(ms(90), ms(90), NS_PER_S + 1)
    assert (delays.reach_ns, delays.slack_ns) == (ms(1), ms(2)), "they are forgotten like other delays"


def test_a_transfer_that_was_stopped_once_shuts_no_request_out() -> None:
    delays = Delays(network_ns=us(200), slack_ns=ms(2))
    for took_ms in (5000, 3, 3, 3):
        delays.measured(0, -1, 0, ms(took_ms), 0)
        assert delays.reach_ns < ms(20.1), "the first is not believed whole"
    for took_ms in (*[3] * 40, 5000, 3):
        delays.measured(0, -1, 0, ms(took_ms), 0)
    assert ms(3) < delays.reach_ns < ms(4)


def test_a_lane_that_is_never_idle_is_reached_as_soon_as_inputs_are_there() -> None:
    delays = Delays(network_ns=us(200), slack_ns=ms(2))
    for _ in range(100):
        delays.measured(0, -1, 0, ms(4), ms(2))
    assert ms(4) < delays.reach_ns < ms(4.1)
    assert delays.transfer_out_ns == ms(2)


def test_what_is_not_measured_for_a_second_is_forgotten() -> None:
    delays = Delays(network_ns=us(200), slack_ns=ms(2))
    delays.measured(ms(7), ms(1), 0)
    delays.measured(us(60), us(90), NS_PER_S + 1)
    assert delays.reach_ns == us(90)
    assert close(delays.slack_ns - ANSWER_NS, us(60))


def test_broken_promises_make_plans_end_earlier_and_kept_ones_let_them_end_later_again() -> None:
    delays = Delays(network_ns=us(200), slack_ns=ms(2))
    least_ns = delays.drift_ns(ms(128))
    assert least_ns == ms(1)
    for _ in range(3):
        delays.broke_promise()
    assert delays.drift_ns(ms(128)) == ms(4)
    delays.kept_promises(2000, 8)
    assert ms(2.99) < delays.drift_ns(ms(128)) < ms(3.1), "one of two thousand may be broken"
    delays.kept_promises(100_000, 8)
    assert delays.drift == DRIFT_LEAST
    for _ in range(1000):
        delays.broke_promise()
    assert delays.drift == DRIFT_MOST and delays.drift_ns(ms(128)) == ms(64)
    delays.forget()
    delays.kept_promises(1, 8)
    assert delays.drift == DRIFT_MOST - DRIFT_DOWN, "it lasts"
    assert Delays(us(200), ms(2), shares_cores=True).drift == DRIFT_FIRST > DRIFT_LEAST


def test_each_device_plans_with_its_own_slack_and_the_shortest_is_common() -> None:
    made = belief("d0", "d1")
    made.measures = True
    made.reset_bases()
    served = serve(made, "a")
    residencies = {name: place(made, served, name) for name in ("d0", "d1")}
    d0, d1 = (made.devices[name] for name in ("d0", "d1"))

    def hear(name: str, error_ms: float, at_ms: float = 10) -> None:
        queue = ask(made, served)
        strategy = next(one for one in queue.strategies if one.residency is residencies[name])
        made.send_infer(strategy, strategy.batches[0], 0, ms(at_ms), ms(at_ms))
        sent = next(one for one in made.sent.values() if one.waiters and one.device.name == name)
        end_ns = sent.device.exec.head_end_ns
        assert sent.samples is not None
        sent.samples.learn(strategy.batches[0].samples.estimate_ns, end_ns)
        result = Result(
            action_id=sent.action.action_id, device=name, status=Status.OK, started_ns=ms(at_ms),
            ended_ns=end_ns,
        )  # fmt: skip
        made.measure(sent, result, end_ns + ms(error_ms))
        del made.sent[sent.action.action_id]
        sent.device.exec.end(sent.action.action_id, end_ns)

    hear("d1", 1.9)
    assert made.slack_ns == FIRST_SLACK_NS, "a first estimate that was wrong says nothing of delays"
    for _ in range(200):
        hear("d0", 0.1)
        hear("d1", 0.7)
    assert close(made.slack_ns, ms(0.15))
    assert made.extra_ns(d0, ms(20)) == 0
    assert close(made.slack_ns + made.extra_ns(d1, ms(20)), ms(0.75))
    later_ns = d1.delays.measured_ns + NS_PER_S + 1
    assert made.extra_ns(d1, later_ns) == FIRST_SLACK_NS - made.slack_ns, "it was not measured for a second"
    del made.devices["d0"]
    made.reset_bases()
    assert (made.slack_ns, made.extra_ns(d1, later_ns)) == (FIRST_SLACK_NS, 0), (
        "nor does one count that is gone"
    )


def test_headroom_is_learned_by_class_from_promises_that_were_outranked() -> None:
    delays = Delays(us(200), ms(2))
    assert delays.headroom_ns(ms(128), 8) == 0
    for _ in range(3):
        delays.outranked_promise(8)
    assert (delays.headroom_ns(ms(64), 8), delays.headroom_ns(ms(64), 4)) == (ms(4.5), 0)
    delays.kept_promises(1500, 8)
    assert ms(2.99) < delays.headroom_ns(ms(64), 8) < ms(3.1), "one of fifteen hundred may be broken"
    delays.kept_promises(100_000, 8)
    assert delays.headroom_ns(ms(128), 8) == 0
    for _ in range(1000):
        delays.outranked_promise(8)
    assert delays.headroom_ns(ms(64), 8) == ms(256), "a fifth of the lane is left"
