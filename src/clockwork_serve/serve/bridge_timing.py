"""What an INFER on another machine takes, seen from here: the lane there, and the way to it and back.

The controller plans with these durations, so the way is part of its estimates. It reads no clock.
"""

from __future__ import annotations

from typing import Final

from msgspec import structs

from clockwork_serve.messages import Infer, Result, Status, Window

KEYS_MAX: Final = 1024
"""Kinds of INFERs whose way there is remembered."""
_FADE: Final = 8
"""The longest way fades by this part with each that was shorter."""

Key = tuple[str, int, int]
"""Code, batch size, bytes of inputs."""


class LaneTiming:
    """Of one device."""

    def __init__(self) -> None:
        self._ended_ns = 0  # when the last result came
        self._way_ns: dict[Key, int] = {}  # how long inputs took, lately

    def ordered(self, action: Infer, key: Key) -> Infer:
        """An INFER with the window in which it may start there: the way to it is not held against it."""
        way_ns = self._way_ns.get(key, 0)
        if not way_ns:
            return action
        window = Window(action.window.earliest_ns, action.window.latest_ns + way_ns)
        return structs.replace(action, window=window)

    def ended(self, result: Result, key: Key, sent_ns: int, now_ns: int, output_bytes: int) -> Result:
        """A result, complete since ``now_ns``, of what was sent at ``sent_ns``; on our clock."""
        if result.status is not Status.OK:
            return structs.replace(result, started_ns=now_ns, ended_ns=now_ns)
        lane_ns = max(0, result.lane_ns)
        # It had the lane, or the way to it, for itself since the one before it came back.
        started_ns = min(max(sent_ns, self._ended_ns), now_ns - lane_ns)
        self._ended_ns = now_ns
        over_ns = now_ns - started_ns - lane_ns
        in_ns = over_ns * (key[2] + 1) // (key[2] + output_bytes + 2)
        self._learn(key, in_ns)
        return structs.replace(
            result, started_ns=started_ns, ended_ns=now_ns, input_ns=result.input_ns + in_ns,
            output_ns=result.output_ns + over_ns - in_ns,
        )  # fmt: skip

    def _learn(self, key: Key, in_ns: int) -> None:
        before_ns = self._way_ns.pop(key, 0)
        if len(self._way_ns) >= KEYS_MAX:
            del self._way_ns[next(iter(self._way_ns))]
        self._way_ns[key] = max(in_ns, before_ns - before_ns // _FADE)


def not_after(result: Result, now_ns: int) -> Result:
    """The result of a LOAD or UNLOAD: clocks are known to some error, and nothing ends in the future."""
    ahead_ns = result.ended_ns - now_ns
    if ahead_ns <= 0:
        return result
    return structs.replace(result, started_ns=result.started_ns - ahead_ns, ended_ns=now_ns)
