"""How long messages and small delays really take on a device, so that plans leave room enough and no more.

Two delays are measured at each result: from sending an action to an idle lane until it started (the *reach*),
and from the end that was believed until the result was heard (the *error*). What counts is the largest of
about the last hundred, and only for a second: what nobody measures any more is not believed either.
"""

# ruff: noqa: FURB136, PLR1730 - max() and min() cost 100 ns more than a condition
from __future__ import annotations

from typing import Final

from clockwork_serve.units import NS_PER_S, NS_PER_US

BLOCK: Final = 16
BLOCKS: Final = 8
"""The largest of the last 113 to 128 values is kept, as that of eight blocks of sixteen."""

LASTS_NS: Final = NS_PER_S
"""What was measured counts for so long."""

FIRST_SLACK_NS: Final = 500 * NS_PER_US
"""The slack before anything was measured: with a large one, requests of a tight SLO were never tried."""

LEAST_SLACK_NS: Final = 100 * NS_PER_US
LEAST_REACH_NS: Final = 20 * NS_PER_US
"""Less is never assumed."""

ANSWER_NS: Final = 50 * NS_PER_US
"""From the controller to the client's gateway, which no result tells."""


class Worst:
    """The largest of the last values."""

    __slots__ = ("_blocks", "_count", "value")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all of them."""
        self._blocks = [0]
        self._count = 0
        self.value = 0

    def add(self, value: int) -> None:
        """Take one more."""
        if self._count == BLOCK:
            self._count = 0
            self._blocks.append(0)
            if len(self._blocks) > BLOCKS:
                del self._blocks[0]
                self.value = max(self._blocks)
        self._count += 1
        if value > self._blocks[-1]:
            self._blocks[-1] = value
            if value > self.value:
                self.value = value


class Delays:
    """Of one device; ``reach_ns`` and ``slack_ns`` are what to plan with."""

    __slots__ = ("_error", "_most_slack_ns", "_reach", "_usual_ns", "heard_ns", "reach_ns", "slack_ns")

    def __init__(self, network_ns: int, slack_ns: int) -> None:
        self._usual_ns = network_ns
        self._most_slack_ns = slack_ns
        self._error = Worst()
        self._reach = Worst()
        self.heard_ns = 0
        """When something was measured last."""
        self.reach_ns = network_ns
        self.slack_ns = min(FIRST_SLACK_NS, slack_ns)

    def heard(self, error_ns: int, reach_ns: int, now_ns: int) -> None:
        """A result came ``error_ns`` after its believed end; ``reach_ns`` is below 0 if not measured."""
        if now_ns > self.heard_ns + LASTS_NS:
            self.forget()
        self.heard_ns = now_ns
        self._error.add(error_ns)
        slack_ns = self._error.value + ANSWER_NS
        if slack_ns < LEAST_SLACK_NS:
            slack_ns = LEAST_SLACK_NS
        self.slack_ns = slack_ns if slack_ns < self._most_slack_ns else self._most_slack_ns
        if reach_ns >= 0:
            self._reach.add(reach_ns)
            most_ns = 5 * self._usual_ns
            reach_ns = self._reach.value if self._reach.value < most_ns else most_ns
            self.reach_ns = reach_ns if reach_ns > LEAST_REACH_NS else LEAST_REACH_NS

    def forget(self) -> None:
        """Nothing was measured for a while."""
        self._error.clear()
        self._reach.clear()
        self.reach_ns = self._usual_ns
        self.slack_ns = min(FIRST_SLACK_NS, self._most_slack_ns)
