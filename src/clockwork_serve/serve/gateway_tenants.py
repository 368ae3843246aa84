"""Tenants, as a file of keys tells them: what each may use, and what it may ask for. It reads no file."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Final

from msgspec import Struct

from clockwork_serve.errors import ClockworkError
from clockwork_serve.messages import LEAST_PRIORITY, USUAL_PRIORITY, Quota
from clockwork_serve.units import NS_PER_MS, NS_PER_S, ms

NAME: Final = re.compile("[A-Za-z0-9._:@/-]{1,64}")
"""What a tenant, or the holder of a key, may be called."""


class Tenant(Struct, frozen=True, kw_only=True):
    """What one tenant may use (None: as much as there is) and ask for.

    Requests of a tighter SLO than ``min_slo_ns`` get that one, those of a more urgent class than
    ``max_priority`` that class.
    """

    name: str
    device_ms_per_s: float | None = None
    loaded_bytes_per_s: int | None = None
    burst_s: float = 1.0
    min_slo_ns: int = 0
    max_priority: int = 1

    @property
    def quota(self) -> Quota | None:
        """What the controller is to know; None if there is no limit."""
        device_ms, loaded_bytes = self.device_ms_per_s, self.loaded_bytes_per_s
        if device_ms is None and loaded_bytes is None:
            return None
        return Quota(
            tenant=self.name, burst_ns=round(self.burst_s * NS_PER_S), loaded_bytes_per_s=loaded_bytes,
            device_ns_per_s=None if device_ms is None else ms(device_ms),
        )  # fmt: skip


class Caps:
    """What tenants may ask for, as far as is known now."""

    def __init__(self, known: Callable[[], Mapping[str, Tenant]] = dict) -> None:
        self._known = known

    def of(self, tenant: str, slo_ns: int, priority: int = 0) -> tuple[int, int]:
        """The SLO and the class that a request gets; class 0 stands for the usual one."""
        if not tenant:
            return slo_ns, priority
        found = self._known().get(tenant)
        if found is None:
            return slo_ns, priority
        if (priority or USUAL_PRIORITY) < found.max_priority:
            priority = found.max_priority
        return max(slo_ns, found.min_slo_ns), priority


class Unfit(ClockworkError):
    """A table that will not do: ``expected`` and ``found`` name the field."""

    def __init__(self, expected: str, found: str, remedy: str) -> None:
        super().__init__(f"expected {expected}; found {found}; {remedy}")
        self.expected = expected
        self.found = found
        self.remedy = remedy


_LIMITS: Final[dict[str, tuple[str, float, float]]] = {
    "device_ms_per_s": ("a number", 0.001, 1e9),
    "loaded_bytes_per_s": ("a whole number", 1, 1 << 50),
    "burst_s": ("a number", 0.001, 3600),
    "min_slo_ms": ("a number", 0.001, 24 * 3600 * 1000),
    "max_priority": ("a whole number", 1, LEAST_PRIORITY),
}
FIELDS: Final = ("name", *_LIMITS)
"""Of a table ``[[tenants]]``."""


def read_tenants(tables: Sequence[Mapping[str, object]]) -> dict[str, Tenant]:
    """Tenants by name. Raises :class:`Unfit`."""
    found: dict[str, Tenant] = {}
    for index, table in enumerate(tables):
        place = f"tenants[{index}]"
        for field in table:
            if field not in FIELDS:
                near = get_close_matches(field, FIELDS, n=1)
                remedy = f"did you mean {near[0]}?" if near else f"it takes {', '.join(FIELDS)}"
                raise Unfit(f"a known field in {place}", repr(field), remedy)
        name = table.get("name")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            shown = "none" if name is None else repr(name)
            raise Unfit(f"a name of 1 to 64 letters, digits or ._:@/- in {place}", shown, "correct it")
        if name in found:
            raise Unfit("each tenant once", f"{name!r} again in {place}", "make it one table")
        numbers = {field: _number(place, field, table[field]) for field in _LIMITS if field in table}
        min_slo_ms = numbers.pop("min_slo_ms", 0)
        found[name] = Tenant(name=name, min_slo_ns=round(min_slo_ms * NS_PER_MS), **numbers)  # type: ignore[arg-type]
    return found


def _number(place: str, field: str, value: object) -> float:
    kind, least, most = _LIMITS[field]
    types = (int,) if kind == "a whole number" else (int, float)
    if isinstance(value, bool) or not isinstance(value, types) or not math.isfinite(value):
        right = False
    else:
        right = least <= value <= most
    if not right:
        raise Unfit(
            f"{place}.{field} to be {kind} from {least:.15g} to {most:.15g}", repr(value), "correct it"
        )
    assert isinstance(value, int | float)
    return value
