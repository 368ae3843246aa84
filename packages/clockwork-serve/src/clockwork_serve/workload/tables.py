"""The tables of a scenario as records, and messages that name the line and the key that are wrong."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any, Final, Literal

from msgspec import Struct
from msgspec.structs import force_setattr

from clockwork_serve.errors import ConfigError, did_you_mean
from clockwork_serve.messages import Quota
from clockwork_serve.units import NS_PER_S, ms, plain

# ------------------------------------------------------------
# The one form of messages about scenarios and traces; it never decides what is wrong.


_SHOWN = 80  # characters of a found value that a message shows


class FieldError(ConfigError):
    """One field of a record is wrong: ``field``, and ``what`` was expected, found and can be done.

    Records raise it when they are built; who read them from a file adds the file and the line.
    """

    def __init__(self, field: str, what: str) -> None:
        """Complain about ``field``: ``what`` follows its name in the message."""
        super().__init__(f"{field}: {what}")
        self.field = field
        self.what = what


def found(value: object) -> str:
    """A value as messages show it: cut if long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def unfit(field: str, expected: str, value: object, remedy: str) -> FieldError:
    """The error of one field."""
    return FieldError(field, f"expected {expected}, found {found(value)}; {remedy}")


# ------------------------------------------------------------
# The tables of a scenario as records; they say what is asked for and never how it is served.


NO_SLO_MS: Final = 24 * 3600 * 1000.0
"""The SLO of a load that names none: a day (the paper's batch clients, section 6.4)."""

MOST_RPS: Final = 1e7
"""Requests per second beyond which no ramp goes: a hundred times what one controller of the paper took."""

SHORTEST_S: Final = 0.001
"""Steps of ramps and bursts shorter than this would cost more than the requests in them."""

Arrival = Literal["poisson", "gamma", "fixed", "closed", "azure", "timestamps", "generated"]
Popularity = Literal["uniform", "zipf"]
Mapping = Literal["block", "stripe", "shuffled", "named"]
Counts = Literal["rates", "exact"]
Retry = Literal["fixed", "retry_after"]
FaultKind = Literal[
    "crash", "hang", "slow", "loss", "delay", "skew", "remove_model", "add_model", "gateway", "cancel",
    "drain", "kills", "stop", "hangs", "controller", "deposed", "busy",
]  # fmt: skip
"""``harness.seeds`` draws the first eleven by their order, and the others from streams of their own."""


class Ramp(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A value that changes in steps: every ``every_s`` it is multiplied by ``factor`` or grows by ``add``.

    ``until`` bounds it: a rising value never exceeds it, a falling one never goes below.
    """

    every_s: float
    factor: float | None = None
    add: float | None = None
    until: float | None = None

    def __post_init__(self) -> None:
        """Check the fields. Raises :class:`FieldError`."""
        require_between(self, ("every_s",), SHORTEST_S, 1e8)
        require_above(self, ("factor",), 0)
        require_finite(self, ("add", "until"))
        if (self.factor is None) == (self.add is None):
            raise unfit("factor", "either factor or add", self, "write exactly one of them")

    @property
    def every_ns(self) -> int:
        """Time between two steps."""
        return max(1, round(self.every_s * NS_PER_S))

    def value(self, base: float, steps: int) -> float:
        """The value after so many steps."""
        if self.factor is not None:
            try:
                reached = base * self.factor**steps
            except OverflowError:
                reached = math.inf
            rising = self.factor >= 1
        else:
            assert self.add is not None
            reached = base + self.add * steps
            rising = self.add >= 0
        if self.until is None:
            return reached
        if rising:
            return max(base, min(reached, self.until))
        return min(base, max(reached, self.until))


class ModelSet(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Copies of one kind of model.

    They are called NAME if there is one copy, else NAME-0000, NAME-0001, ... The kind ``*`` stands for all
    models of the paper in the zoo's order, each ``copies`` times, called by their kinds.
    """

    name: str
    kind: str
    copies: int = 1

    def __post_init__(self) -> None:
        """Check the fields. Raises :class:`FieldError`."""
        require_text(self, ("name", "kind"))
        require_within(self, ("copies",), 1, 1_000_000)


class LoadTable(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One class of requests: to which models, how they come, until when they must be answered.

    Rates are totals over the models of the load, in requests per second; while bursts are on if ``on_s`` is
    given. None stands for "not given". Every field is explained in docs/use/workloads.md.
    """

    name: str
    models: tuple[str, ...]
    arrivals: Arrival
    rate_rps: float | None = None
    cv: float | None = None
    popularity: Popularity = "uniform"
    zipf_s: float | None = None
    on_s: float | None = None
    off_s: float | None = None
    slo_ms: float | None = None
    slo_ramp: Ramp | None = None
    rate_ramp: Ramp | None = None
    model_ramp: Ramp | None = None
    active_models: int | None = None
    start_s: float = 0.0
    stop_s: float | None = None
    concurrency: int | None = None
    start_jitter_s: float = 0.0
    retry: Retry = "fixed"
    retry_ms: float | None = None
    priority: int = 0
    decide_ms: float | None = None
    tenant: str | None = None
    trace: str | tuple[str, ...] | None = None
    mapping: Mapping = "block"
    counts: Counts | None = None
    rate_scale: float | None = None
    first_minute: int = 0
    minutes: int | None = None
    drop_top: int = 0
    cap_share: float | None = None
    functions: int | None = None

    def __post_init__(self) -> None:
        """Check each field, then what fields say together. Raises :class:`FieldError`."""
        require_text(self, ("name",))
        if not self.models or len(set(self.models)) != len(self.models):
            raise unfit("models", "names of model sets, each once", self.models, "list at least one set")
        require_above(self, ("cap_share", "stop_s"), 0)
        require_between(self, ("slo_ms",), 0.001, NO_SLO_MS)
        require_between(self, ("rate_rps",), 1e-6, MOST_RPS)
        require_between(self, ("rate_scale",), 1e-6, 1e6)
        require_between(self, ("cv",), 0.001, 50)
        require_between(self, ("zipf_s",), 0.001, 10)
        require_between(self, ("on_s", "off_s"), SHORTEST_S, 1e6)
        require_between(self, ("start_s", "start_jitter_s", "retry_ms"), 0, 1e8)
        if self.trace is not None and not all(self.traces or ("",)):
            raise unfit("trace", "a path, or a list of paths", self.trace, "name at least one file")
        require_within(self, ("concurrency", "active_models", "functions"), 1, 10_000_000)
        require_within(self, ("minutes",), 1, 10_000_000)
        require_within(self, ("first_minute", "drop_top"), 0, 10_000_000)
        require_within(self, ("priority",), 0, 15)
        require_between(self, ("decide_ms",), 0, NO_SLO_MS)
        self._check_together()

    def _check_together(self) -> None:
        given = {field for field in DEFAULTS if getattr(self, field) != DEFAULTS[field]}
        for field in sorted(given - _USED[self.arrivals] - _ALWAYS):
            raise unfit(
                field,
                f'no value with arrivals = "{self.arrivals}"',
                getattr(self, field),
                "remove one of the two",
            )
        for field in _REQUIRED[self.arrivals]:
            if getattr(self, field) is None:
                raise unfit(field, f'a value with arrivals = "{self.arrivals}"', None, "add it")
        if self.stop_s is not None and self.stop_s <= self.start_s:
            raise unfit(
                "stop_s", f"more than start_s = {plain(self.start_s)}", self.stop_s, "stop after the start"
            )
        for field, other in (("on_s", "off_s"), ("off_s", "on_s")):
            if field in given and other not in given:
                raise unfit(other, f"a value beside {field}", None, "bursts need both")
        for field, other in (("slo_ramp", "slo_ms"), ("active_models", "model_ramp")):
            if field in given and other not in given:
                raise unfit(other, f"a value beside {field}", None, f"give {other} too, or remove {field}")
        if "zipf_s" in given and self.popularity != "zipf":
            raise unfit("zipf_s", 'popularity = "zipf" beside it', self.popularity, "add it or remove zipf_s")
        if {"rate_rps", "rate_scale"} <= given:
            raise unfit(
                "rate_scale", "either rate_rps or rate_scale", self.rate_scale, "remove one of the two"
            )
        if self.counts == "exact" and "rate_ramp" in given:
            raise unfit("rate_ramp", 'no value with counts = "exact"', self.rate_ramp, 'use counts = "rates"')
        if self.cap_share is not None and self.cap_share > 1:
            raise unfit("cap_share", "a share in (0, 1]", self.cap_share, "write 0.05 for 5 %")

    def active_s(self, from_s: float, until_s: float) -> float:
        """How long it is active within that time."""
        stop_s = until_s if self.stop_s is None else min(until_s, self.stop_s)
        return max(0.0, stop_s - max(from_s, self.start_s))

    @property
    def traces(self) -> tuple[str, ...]:
        """The paths of its trace files, in order."""
        if self.trace is None:
            return ()
        return (self.trace,) if isinstance(self.trace, str) else self.trace


class TenantTable(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the loads of one tenant may use together, as in a file of keys; None: as much as there is."""

    name: str
    device_ms_per_s: float | None = None
    loaded_bytes_per_s: int | None = None
    burst_s: float = 1.0

    def __post_init__(self) -> None:
        """Check the fields. Raises :class:`FieldError`."""
        require_text(self, ("name",))
        require_between(self, ("device_ms_per_s",), 0.001, 1e9)
        require_within(self, ("loaded_bytes_per_s",), 1, 1 << 50)
        require_between(self, ("burst_s",), 0.001, 3600)

    def quota(self) -> Quota:
        """As the controller knows it."""
        device_ms = self.device_ms_per_s
        return Quota(
            tenant=self.name, burst_ns=round(self.burst_s * NS_PER_S),
            device_ns_per_s=None if device_ms is None else ms(device_ms),
            loaded_bytes_per_s=self.loaded_bytes_per_s,
        )  # fmt: skip


class DeviceGroup(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Devices of a cluster that are alike: ``slower`` times as slow as the zoo's (below 1: faster).

    ``profiled``: the controller knows that from a profile; else it believes the zoo, and has to find out.
    What plans are made with: ``name``, the kind of device, ``price`` of one, in any unit, and how many can be
    had, ``at_most`` (None: any number).
    """

    devices: int = 1
    slower: float = 1.0
    memory_mib: int | None = None
    profiled: bool = True
    name: str | None = None
    price: float = 1.0
    at_most: int | None = None

    def __post_init__(self) -> None:
        """Check the fields. Raises :class:`FieldError`."""
        require_within(self, ("devices",), 1, 1_000_000)
        require_between(self, ("slower",), 0.01, 100.0)
        require_within(self, ("memory_mib",), 1, 1 << 30)
        if self.name is not None:
            require_text(self, ("name",))
        require_between(self, ("price",), 1e-6, 1e9)
        require_within(self, ("at_most",), 1, 10_000)


class ClusterTable(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The devices that a simulation serves the loads with; other users of a scenario ignore it.

    With ``groups``, which are not alike, ``devices`` is their sum.
    """

    zoo: str = "v100"
    devices: int = 1
    devices_per_worker: int = 1
    memory_mib: int | None = None
    page_mib: int = 16
    lanes_share: bool = False
    groups: tuple[DeviceGroup, ...] = ()

    def __post_init__(self) -> None:
        """Check the fields. Raises :class:`FieldError`."""
        require_text(self, ("zoo",))
        total = sum(group.devices for group in self.groups)
        if self.groups and self.devices not in (1, total):
            raise unfit("devices", f"none, or the {total} of groups", self.devices, "change the groups")
        names = [group.name for group in self.groups]
        for at, name in enumerate(names):
            if name is not None and name in names[:at]:
                raise unfit(f"groups[{at}].name", "each name once", name, "call it otherwise")
        force_setattr(self, "devices", total or self.devices)
        require_within(self, ("devices", "devices_per_worker", "page_mib"), 1, 1_000_000)
        require_within(self, ("memory_mib",), 1, 1 << 30)
        if self.devices % self.devices_per_worker:
            raise unfit(
                "devices_per_worker",
                f"a divisor of devices = {self.devices}",
                self.devices_per_worker,
                "correct one",
            )


class FaultTable(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Something that goes wrong in a simulation; other users of a scenario ignore it.

    ``at_s`` and ``for_s``: when and how long (None: until the end; a worker or controller that died comes
    back all the same). ``device``, ``worker`` (indices from 0) and ``model`` (a name) say what it hits; None:
    everything that it can. ``factor``: how many times slower (slow), or the share of messages lost (loss) or
    of clients that go away (cancel). ``ms``: how much messages are delayed (delay) or a clock is off (skew).
    A model that kills takes its worker down whenever it has run.
    """

    kind: FaultKind
    at_s: float
    for_s: float | None = None
    device: int | None = None
    worker: int | None = None
    model: str | None = None
    factor: float | None = None
    ms: float | None = None

    def __post_init__(self) -> None:
        """Check the fields. Raises :class:`FieldError`."""
        require_finite(self, ("at_s",), least=0)
        require_between(self, ("for_s", "factor"), 1e-6, 1e8)
        require_between(self, ("ms",), -1e8, 1e8)
        require_within(self, ("device", "worker"), 0, 1_000_000)
        needed = _FAULT_NEEDS.get(self.kind)
        for field in ("factor", "ms", "model"):
            value = getattr(self, field)
            if field == needed and value is None:
                raise unfit(field, f'a value with kind = "{self.kind}"', None, "add it")
            if field != needed and value is not None:
                raise unfit(field, f'no value with kind = "{self.kind}"', value, "remove it")
        if self.kind == "delay" and self.ms is not None and self.ms < 0:
            raise unfit("ms", "a number >= 0", self.ms, "messages do not arrive before they are sent")
        if self.kind in {"loss", "cancel"} and self.factor is not None and self.factor > 1:
            raise unfit("factor", "a share in (0, 1]", self.factor, "write 0.01 for 1 %")
        if self.device is not None and self.worker is not None:
            raise unfit("device", "either device or worker", self.device, "remove one of the two")


_FAULT_NEEDS: Final = {
    "slow": "factor", "loss": "factor", "cancel": "factor", "delay": "ms", "skew": "ms",
    "remove_model": "model", "add_model": "model", "kills": "model", "hangs": "model",
}  # fmt: skip

DEFAULTS: Final[dict[str, Any]] = dict(
    zip(
        LoadTable.__struct_fields__[-len(LoadTable.__struct_defaults__) :],
        LoadTable.__struct_defaults__,
        strict=True,
    )
)
_ALWAYS: Final = {"slo_ms", "slo_ramp", "start_s", "stop_s", "priority", "decide_ms", "tenant"}
_POPULAR: Final = {"popularity", "zipf_s"}
_OPEN: Final = {"rate_rps", "on_s", "off_s", "rate_ramp", "model_ramp", "active_models"} | _POPULAR
_CUT: Final = {"rate_rps", "rate_scale", "mapping", "first_minute", "minutes", "drop_top", "cap_share"}
_USED: Final[dict[str, set[str]]] = {
    "poisson": _OPEN,
    "gamma": _OPEN | {"cv"},
    "fixed": _OPEN,
    "closed": {"concurrency", "start_jitter_s", "retry", "retry_ms"},
    "azure": _CUT | {"trace", "cv", "counts", "rate_ramp"},
    "timestamps": _CUT | _POPULAR | {"trace"},
    "generated": _CUT | {"functions", "cv", "counts", "rate_ramp"},
}
_REQUIRED: Final[dict[str, tuple[str, ...]]] = {
    "poisson": ("rate_rps",), "gamma": ("rate_rps", "cv"), "fixed": ("rate_rps",), "closed": ("concurrency",),
    "azure": ("trace",), "timestamps": ("trace",), "generated": ("functions",),
}  # fmt: skip


def require_between(record: Struct, fields: Iterable[str], least: float, most: float) -> None:
    """Each field that is given is a finite number in ``least..most``."""
    for field in fields:
        value = getattr(record, field)
        if value is not None and not (math.isfinite(value) and least <= value <= most):
            raise unfit(field, f"a number in {plain(least)}..{plain(most)}", value, "correct it")


def require_text(record: Struct, fields: Iterable[str]) -> None:
    """Each field is a string that is not blank."""
    for field in fields:
        value = getattr(record, field)
        if not value.strip() or value != value.strip():
            raise unfit(field, "a name without blanks around it", value, "give it one")


def require_above(record: Struct, fields: Iterable[str], bound: float) -> None:
    """Each field that is given is a finite number above ``bound``."""
    for field in fields:
        value = getattr(record, field)
        if value is not None and not (math.isfinite(value) and value > bound):
            raise unfit(field, f"a number > {plain(bound)}", value, "correct it")


def require_finite(record: Struct, fields: Iterable[str], least: float = -math.inf) -> None:
    """Each field that is given is a finite number, at least ``least``."""
    for field in fields:
        value = getattr(record, field)
        if value is not None and not (math.isfinite(value) and value >= least):
            wanted = "a finite number" if least == -math.inf else f"a number >= {plain(least)}"
            raise unfit(field, wanted, value, "correct it")


def require_within(record: Struct, fields: Iterable[str], least: int, most: int) -> None:
    """Each field that is given is in ``least..most``."""
    for field in fields:
        value = getattr(record, field)
        if value is not None and not least <= value <= most:
            raise unfit(field, f"a whole number in {least}..{most}", value, "correct it")


def require_known(field: str, name: str, known: Iterable[str], what: str) -> None:
    """``name`` is one of ``known``."""
    choices = tuple(known)
    if name not in choices:
        raise unfit(field, what, name, did_you_mean(name, choices))


# ------------------------------------------------------------
# Finds the lines of a TOML file's keys, for messages; it never judges or reads values.


_HEADER: Final = re.compile(r"\s*(\[\[?)\s*([A-Za-z0-9_.\-\"' ]+?)\s*\]\]?\s*(?:#.*)?\r?$")
_KEY: Final = re.compile(r"\s*([A-Za-z0-9_\-]+|\"[^\"]*\"|'[^']*')\s*(?:\.[^=]*)?=")
_FENCES: Final = ('"""', "'''")


def lines_of(text: str) -> dict[str, int]:
    """Line numbers, from 1, by path: ``seconds``, ``loads[1]`` (its header), ``loads[1].slo_ms``.

    A key of a dotted or inline table is found by its first part's line; what looks like a key inside a string
    of several lines is passed over.
    """
    lines: dict[str, int] = {}
    counts: dict[str, int] = {}
    table = ""
    fence = ""
    for number, line in enumerate(text.split("\n"), start=1):
        if fence:
            fence = "" if fence in line else fence
            continue
        if header := _HEADER.match(line):
            name = header.group(2).replace('"', "").replace("'", "").replace(" ", "")
            if header.group(1) == "[[":
                counts[name] = counts.get(name, -1) + 1
                name = f"{name}[{counts[name]}]"
            else:
                first, _, rest = name.partition(".")
                name = f"{first}[{counts[first]}].{rest}" if rest and first in counts else name
            table = f"{name}."
            lines.setdefault(name, number)
        elif key := _KEY.match(line):
            lines.setdefault(table + key.group(1).strip("\"'"), number)
            fence = next((mark for mark in _FENCES if line.count(mark) % 2), "")
    return lines
