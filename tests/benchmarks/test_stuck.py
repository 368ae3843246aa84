"""What is judged of a stopped process: which lost requests went with it, how long ready was said."""

from __future__ import annotations

from benchmarks.stalls.stuck import Ask, Load, judged

STOP_S, REPLACED_S, SERVED_S = 10.0, 12.0, 13.0


def load(*asks: Ask, probes: tuple[Ask, ...] = ()) -> Load:
    return Load(0, list(asks), list(probes))


def test_what_a_stopped_gateway_held_went_with_it_and_nothing_else_may() -> None:
    seen = load(
        Ask(9.0, 9.1, "lost"),  # before
        Ask(10.1, 12.0, "lost", "gateway-1"),
        Ask(10.2, 12.0, "lost"),
        Ask(10.3, 12.0, "lost", "gateway-0"),
        Ask(10.4, 10.5, "refused"),
        Ask(10.5, 10.6, "200", "gateway-0"),
    )
    found = judged(seen, "gateway-1", 2, STOP_S, REPLACED_S, SERVED_S)
    assert (found.inside, found.elsewhere, found.refused, found.answered) == (2, 2, 1, 1)
    assert (found.said_s, found.replaced_s, found.served_s) == (2.0, 2.0, 3.0)


def test_where_it_was_the_only_one_nobody_else_could_have_listened() -> None:
    seen = load(Ask(10.1, 12.0, "lost", "gateway-0"), Ask(12.1, 12.2, "refused"))
    found = judged(seen, "gateway-0", 1, STOP_S, REPLACED_S, SERVED_S)
    assert (found.inside, found.elsewhere, found.refused) == (1, 0, 1)


def test_a_stopped_controller_loses_nothing_and_is_not_said_to_be_ready() -> None:
    probes = tuple(
        Ask(at, at + 0.01, how) for at, how in ((9.9, "200"), (11.2, "200"), (11.3, "503"), (13.1, "200"))
    )
    found = judged(
        load(Ask(10.1, 10.2, "lost"), probes=probes), "controller", 1, STOP_S, REPLACED_S, SERVED_S
    )
    assert (found.inside, found.elsewhere) == (0, 1)
    assert round(found.said_s, 2) == 1.21
