"""How long one call may take, over all its attempts, and when it tries again. It reads no clock.

An attempt's deadline is the caller's SLO from its start; what is left of it when the request is sent is what
the server is told. The client itself waits a little longer, so that the server can still say how it ended.
"""

from __future__ import annotations

import math
from typing import Final

from clockwork_serve.client.errors import Expired, Invalid, ServingError
from clockwork_serve.oip.slo import SLO_MAX_NS
from clockwork_serve.units import NS_PER_MS

SLO_MAX_MS: Final = SLO_MAX_NS / NS_PER_MS


class Patience:
    """One call: all its attempts within ``timeout_s``, each within ``slo_ms`` if that is given."""

    def __init__(
        self, now: float, timeout_s: float, slo_ms: float | None, grace_s: float, retries: int
    ) -> None:
        check_seconds("timeout_s", timeout_s)
        if slo_ms is not None and not (isinstance(slo_ms, int | float) and 0 < slo_ms <= SLO_MAX_MS):
            raise Invalid(
                f"parameter 'slo_ms': expected milliseconds above 0 and up to {SLO_MAX_MS:.0f} (24 h), "
                f"found {slo_ms!r}"
            )
        if not isinstance(retries, int) or retries < 0:
            raise Invalid(f"parameter 'retries': expected 0 or more, found {retries!r}")
        self._end = now + timeout_s
        self._slo_ms = slo_ms
        self._grace_s = grace_s
        self._retries = retries
        self._deadline = self._end

    def start(self, now: float) -> float:
        """An attempt starts; until when its answer is waited for."""
        if self._slo_ms is None:
            return self._end
        self._deadline = min(self._end, now + self._slo_ms / 1000)
        return min(self._end, self._deadline + self._grace_s)

    def left_ms(self, now: float) -> float | None:
        """What the server is told: what is left for this attempt; None if the caller gave no SLO.

        Raises :class:`Expired` if it is nothing.
        """
        if self._slo_ms is None:
            return None
        left_ms = (self._deadline - now) * 1000
        if left_ms < 0.001:
            raise Expired(
                "the deadline passed before there was a connection to send the request; nothing was sent"
            )
        return left_ms

    def wait_s(self, error: ServingError, now: float) -> float | None:
        """How long to wait before the next attempt; None if there is none: the error is the caller's."""
        wait_s = error.retry_after_s
        if not self._retries or wait_s is None or now + wait_s >= self._end:
            return None
        self._retries -= 1
        return wait_s


def check_seconds(field: str, value: float) -> None:
    """Raise :class:`Invalid` unless it is a time to wait."""
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise Invalid(f"parameter '{field}': expected seconds above 0, found {value!r}")
