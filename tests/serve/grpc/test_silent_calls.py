"""Time limits for clients that send nothing."""

from __future__ import annotations

from clockwork_serve.serve.grpc.call import SilentCalls


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_message_ends_the_time_limit_and_a_response_restarts_it() -> None:
    clock = Clock()
    silence: SilentCalls[str] = SilentCalls(10, clock)
    for name in ("silent", "spoke", "answered"):
        silence.begin(name)
    clock.now_s = 9
    silence.end("spoke")
    silence.renew("answered")
    silence.renew("spoke")
    assert silence.overdue() == []
    clock.now_s = 11
    assert silence.overdue() == ["silent"]
    clock.now_s = 20
    assert silence.overdue() == ["silent", "answered"]
    assert len(silence) == 2
