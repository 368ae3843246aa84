"""What is judged of killed controllers: who was touched, who could wait, how long nobody was answered."""

from __future__ import annotations

from benchmarks.failover import Kill, could_wait, in_time, judged, touched_by
from clockwork_serve.units import NS_PER_MS
from harness.http_load import Report, Sample

AT_MS = 10_000


def sample(due_ms: float, took_ms: float, slo_ms: int = 200, status: int = 200) -> Sample:
    due_ns = round(due_ms * NS_PER_MS)
    return Sample(str(slo_ms), due_ns, due_ns, due_ns + round(took_ms * NS_PER_MS), status)


def steady(*others: Sample, until_ms: int = 12_000) -> Report:
    """A request of each SLO every 100 ms, answered after 10; and others."""
    plain = [sample(at, 10, slo_ms) for at in range(9_000, until_ms, 100) for slo_ms in (2000, 200, 50)]
    return Report([*plain, *others])


def test_a_take_over_that_nobody_notices_keeps_all_promises() -> None:
    found = judged(steady(), [Kill(AT_MS * NS_PER_MS, 1, 7), Kill(11_000 * NS_PER_MS, 2, 0)], 2)
    assert found.verdict == "passed", found.verdicts
    assert found.figures["kills"][0]["gap_ms"] == 10.0


def test_each_promise_can_be_missed() -> None:
    kill = Kill(AT_MS * NS_PER_MS, 1, 0)
    for wrong, report, kills in (
        ("could wait", steady(sample(AT_MS - 5, 30, 2000, status=503)), [kill]),
        ("late", steady(sample(AT_MS - 5, 300)), [kill]),
        ("not even told", steady(sample(AT_MS - 5, 251, status=503)), [kill]),
        ("without a response", steady(sample(AT_MS - 5, 30, status=0)), [kill]),
        ("waited for weights", steady(), [kill, Kill(11_000 * NS_PER_MS, 2, 1)]),
        ("epochs", steady(), [kill, Kill(11_000 * NS_PER_MS, 1, 0)]),
        ("good answers again", Report([sample(AT_MS + 1, 1000, 2000), sample(AT_MS - 9, 1, 50)]), [kill]),
        ("SLO 50 ms", steady(*[sample(AT_MS + at, 20, 50, status=503) for at in range(50)]), [kill]),
    ):
        missed = [one.question for one in judged(report, kills, 2).verdicts if not one.good]
        assert any(wrong in question for question in missed), (wrong, missed)


def test_who_was_touched_and_who_could_wait() -> None:
    kills = [Kill(AT_MS * NS_PER_MS, 1, 0)]
    assert not touched_by(sample(AT_MS - 50, 40), kills), "it was answered before"
    assert touched_by(sample(AT_MS - 50, 60), kills)
    assert touched_by(sample(AT_MS + 900, 10), kills)
    assert not touched_by(sample(AT_MS + 1100, 10), kills)
    assert could_wait(sample(AT_MS - 50, 60, 2000), kills)
    assert not could_wait(sample(AT_MS - 50, 60, 200), kills)
    assert in_time(sample(0, 50, 50))
    assert not in_time(sample(0, 51, 50))
