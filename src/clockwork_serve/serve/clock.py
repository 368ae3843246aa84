"""Clock alignment between two hosts, from one-way delays; it reads no clock itself.

Each side keeps the least of (received - sent) over the last messages, in both directions. Half of their
difference is the offset between the clocks, and half of their sum (the shortest round trip) bounds its
error, whatever the network's asymmetry. Equal boot ids mean one clock: offset and error are zero.
"""

from __future__ import annotations

from collections import deque
from typing import Final

import msgspec

from clockwork_serve.messages import (
    Announced,
    Frame,
    Infer,
    Load,
    Quarantined,
    Request,
    Result,
    Unload,
    Window,
)

SAMPLES_MAX: Final = 1024
"""How many one-way delays the minimum is taken over: long enough to catch a quiet moment, short enough to
follow a drifting clock."""


class SlidingMinimum:
    """The least of the last ``size`` numbers, at O(1) amortised."""

    def __init__(self, size: int) -> None:
        assert size > 0
        self._size = size
        self._count = 0
        # (index, number), both ascending: all and only those that may yet become the least.
        self._rising: deque[tuple[int, int]] = deque()

    def add(self, number: int) -> None:
        """Take in one number, and forget the one ``size`` before it."""
        while self._rising and self._rising[-1][1] >= number:
            self._rising.pop()
        self._rising.append((self._count, number))
        self._count += 1
        if self._rising[0][0] <= self._count - 1 - self._size:
            self._rising.popleft()

    @property
    def least(self) -> int | None:
        """The least number, or None before the first."""
        return self._rising[0][1] if self._rising else None


class ClockAlignment:
    """What is known of a peer's clock."""

    def __init__(self, *, same_clock: bool, samples: int = SAMPLES_MAX) -> None:
        self.same_clock = same_clock
        self._inbound = SlidingMinimum(samples)
        self._outbound_delta_ns: int | None = None

    def observe(self, sent_ns: int, received_ns: int, peer_delta_ns: int | None) -> None:
        """Take in a ping: the peer's clock when sent, ours when received, and the least delta it has seen."""
        self._inbound.add(received_ns - sent_ns)
        if peer_delta_ns is not None:
            self._outbound_delta_ns = peer_delta_ns

    @property
    def least_delta_ns(self) -> int | None:
        """The least (received here - sent there), to be told to the peer."""
        return self._inbound.least

    @property
    def aligned(self) -> bool:
        """Whether the offset is known."""
        return self.same_clock or (self._inbound.least is not None and self._outbound_delta_ns is not None)

    @property
    def offset_ns(self) -> int:
        """Our clock minus the peer's; zero until aligned."""
        inbound, outbound = self._inbound.least, self._outbound_delta_ns
        if self.same_clock or inbound is None or outbound is None:
            return 0
        return (inbound - outbound) // 2

    @property
    def error_ns(self) -> int:
        """How far the offset may be from the truth; zero for one clock."""
        inbound, outbound = self._inbound.least, self._outbound_delta_ns
        if self.same_clock or inbound is None or outbound is None:
            return 0
        # Clocks that were stepped between two samples can make the sum negative for a while.
        return max(0, -(-(inbound + outbound) // 2))


def to_local(frame: Frame, offset_ns: int, error_ns: int) -> Frame:
    """A frame from the controller with its times on our clock; windows lose the error of the offset."""
    match frame:
        case Load() | Unload() | Infer():
            return msgspec.structs.replace(frame, window=_local_window(frame.window, offset_ns, error_ns))
        case Quarantined() if frame.why:
            return msgspec.structs.replace(frame, since_ns=frame.since_ns + offset_ns)
        case _:
            return frame


def to_controller(frame: Frame, offset_ns: int) -> Frame:
    """A frame for the controller with its times on the controller's clock."""
    match frame:
        case Result():
            return msgspec.structs.replace(
                frame, started_ns=frame.started_ns - offset_ns, ended_ns=frame.ended_ns - offset_ns
            )
        case Request() | Announced():
            return msgspec.structs.replace(
                frame, arrival_ns=frame.arrival_ns - offset_ns, deadline_ns=frame.deadline_ns - offset_ns
            )
        case _:
            return frame


def _local_window(window: Window, offset_ns: int, error_ns: int) -> Window:
    earliest_ns, latest_ns = window.earliest_ns + offset_ns, window.latest_ns + offset_ns
    # A window shorter than twice the error shrinks to its middle, the likeliest instant inside it.
    margin_ns = min(error_ns, (latest_ns - earliest_ns) // 2)
    return Window(earliest_ns + margin_ns, latest_ns - margin_ns)
