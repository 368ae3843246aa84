"""Changes that a person asks for, in words: ``priority=1``, ``memory:gpu0=4GiB``, ``tenant:web=0.5``.

Each is held against what was there when it would begin: a device, model, tenant or policy that was not is
named in the error, with those that were.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import Final, NamedTuple

from msgspec.structs import replace

from clockwork_serve.controller.policies import is_policy, unknown_policy
from clockwork_serve.errors import ConfigError
from clockwork_serve.messages import LEAST_PRIORITY, Request
from clockwork_serve.sim.counterfactual import Change, Scene, Traffic
from clockwork_serve.sim.remedies import MOST_URGENT, RequestCase
from clockwork_serve.units import GIB, KIB, MIB, ms, plain

SLO_MS_MAX: Final = 86_400_000.0
DEVICES_MAX: Final = 64
TIMES_MAX: Final = 4.0
"""Who asks waits for it."""
SHOWN: Final = 5
"""Names that an error lists."""

_CHANGE: Final = re.compile(r"([a-z]+)(?::(.+))?=(.+)")
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?) ?(KiB|MiB|GiB)")
_UNITS: Final = {"KiB": KIB, "MiB": MIB, "GiB": GIB}


class AskedChange(NamedTuple):
    """A change that was asked for: from the beginning of ``scene`` on, in words."""

    change: Change
    scene: Scene
    text: str


def asked_change(case: RequestCase, asked: Sequence[str], viewer: str | None = None) -> AskedChange:
    """What all of these say together, of the world that surrounds a request.

    ``viewer``: the tenant who asks; of others it learns no names. Raises :class:`ConfigError`.
    """
    reader = _Reader(case, viewer)
    texts = [reader.read(one) for one in asked]
    scene = case.late
    if reader.early:
        scene = case.early
    elif reader.near:
        scene = case.near
    return AskedChange(reader.change(), scene, " and ".join(texts))


class _Reader:
    """Reads changes one by one; each adds to what is different."""

    def __init__(self, case: RequestCase, viewer: str | None) -> None:
        self._case, self._viewer = case, viewer
        self._controller = case.early.controller
        self._edits: dict[str, int] = {}
        self._devices = 0
        self._pages: dict[str, int] = {}
        self._without: list[str] = []
        self._policy = ""
        self._traffic: list[Traffic] = []
        self._most = 1.0
        self.near = self.early = False
        """It is to begin before the request; ``early``: long before it."""

    def change(self) -> Change:
        """All that was read."""
        request_id = self._case.request.request_id
        return Change(
            edits={request_id: self._edits} if self._edits else {}, devices=self._devices,
            pages_on=self._pages, without=tuple(self._without), policy=self._policy,
            traffic=tuple(self._traffic),
        )  # fmt: skip

    def read(self, asked: str) -> str:
        """One change; returns what it is called in a sentence that begins with "With"."""
        found = _CHANGE.fullmatch(asked.strip())
        kind = None if found is None else _KINDS.get(found[1])
        if found is None or kind is None or (found[2] is None and kind.of) or (found[2] and kind.of is None):
            forms = ", ".join(one.form for one in _KINDS.values())
            raise ConfigError(f"if: expected one of {forms}; found {asked!r:.80}; write one of these")
        return kind.read(self, found[2] or "", found[3])

    def slo(self, _: str, value: str) -> str:
        slo_ms = _number("slo", value, 0.1, SLO_MS_MAX)
        self._edits["deadline_ns"] = self._case.request.arrival_ns + ms(slo_ms)
        return f"an SLO of {plain(round(slo_ms, 3))} ms"

    def priority(self, _: str, value: str) -> str:
        self._edits["priority"] = priority = int(_number("priority", value, MOST_URGENT, LEAST_PRIORITY, 1))
        return f"priority {priority}"

    def devices(self, _: str, value: str) -> str:
        self.near = True
        self._devices = count = int(_number("devices", value.removeprefix("+"), 1, DEVICES_MAX, 1))
        return "one device more" if count == 1 else f"{count} devices more"

    def memory(self, of: str, value: str) -> str:
        self.near = True
        size = _SIZE.fullmatch(value.removeprefix("+"))
        if size is None or not float(size[1]):
            raise ConfigError(f"memory: expected how much more, such as 512MiB or 4GiB; found {value!r:.40}")
        specs = [spec for one in self._controller.workers() for spec in one.devices]
        if of:
            _known("memory", "a device that was there", of, [spec.device for spec in specs])
        for spec in specs:
            if of in {"", spec.device}:
                pages = spec.pages_of(round(float(size[1]) * _UNITS[size[2]]))
                self._pages[spec.device] = self._pages.get(spec.device, 0) + pages
        return f"{size[1]} {size[2]} more memory on {of or 'each device'}"

    def without(self, _: str, value: str) -> str:
        self.near = True
        if self._viewer is not None or self._controller.model(value) is None:
            served = [key for key in self._models() if self._controller.model(key) is not None]
            _known("without", "a model that was served", value, served)
        self._without.append(value)
        return f"{value} not there"

    def policy(self, _: str, value: str) -> str:
        self.early = True
        if not is_policy(value):
            raise unknown_policy(value)
        self._policy = value
        return f"policy {value}"

    def traffic(self, _: str, value: str) -> str:
        return self._times("traffic", value, Traffic(times=1.0), "")

    def tenant(self, of: str, value: str) -> str:
        whose = [self._viewer] if self._viewer is not None else [one.tenant for one in self._requests()]
        _known("tenant", "one that sent requests", of, whose)
        return self._times("tenant", value, Traffic(times=1.0, tenant=of), f" of tenant {of}")

    def model(self, of: str, value: str) -> str:
        _known("model", "one that was asked for", of, self._models())
        return self._times("model", value, Traffic(times=1.0, model=of), f" for {of}")

    def _times(self, what: str, value: str, traffic: Traffic, whose: str) -> str:
        self.early = True
        times = _number(what, value, 0.0, TIMES_MAX)
        self._most *= max(1.0, times)
        if self._most > TIMES_MAX:
            raise ConfigError(
                f"{what}: expected at most {plain(TIMES_MAX)} times the requests in all; found more"
            )
        self._traffic.append(replace(traffic, times=times))
        return f"no other requests{whose}" if not times else f"{times:g} times the requests{whose}"

    def _requests(self) -> Iterable[Request]:
        steps = self._case.early.steps
        return (event for step in steps for event in step.events if isinstance(event, Request))

    def _models(self) -> list[str]:
        """Those that were asked for, by who asks."""
        asked = [one.model for one in self._requests() if self._viewer in {None, one.tenant}]
        return list(dict.fromkeys(asked))


class _Kind(NamedTuple):
    """How a change is written and read; ``of`` whether it needs a name after a colon, None: it has none."""

    form: str
    read: Callable[[_Reader, str, str], str]
    of: bool | None = None


_KINDS: Final = {
    "slo": _Kind("slo=MS", _Reader.slo),
    "priority": _Kind("priority=1 (to 15)", _Reader.priority),
    "devices": _Kind("devices=+1", _Reader.devices),
    "memory": _Kind("memory=+SIZE or memory:DEVICE=+SIZE", _Reader.memory, of=False),
    "without": _Kind("without=MODEL", _Reader.without),
    "policy": _Kind("policy=NAME", _Reader.policy),
    "traffic": _Kind("traffic=TIMES", _Reader.traffic),
    "tenant": _Kind("tenant:NAME=TIMES", _Reader.tenant, of=True),
    "model": _Kind("model:NAME=TIMES", _Reader.model, of=True),
}
"""All that may be asked for, by its first word."""


def _number(what: str, text: str, least: float, most: float, step: int = 0) -> float:
    whole = "a whole number" if step else "a number"
    found = float(text) if re.fullmatch(r"\d{1,12}" if step else r"\d{1,12}(\.\d{1,12})?", text) else -1.0
    if not least <= found <= most:
        raise ConfigError(
            f"{what}: expected {whole} from {plain(least)} to {plain(most)}; found {text!r:.40}"
        )
    return found


def _known(what: str, expected: str, name: str, names: Iterable[str]) -> None:
    """Raise ConfigError for a name that is not among these; of many, those most like it are shown."""
    known = sorted({one for one in names if one})
    if name not in known:
        near = get_close_matches(name, known, n=SHOWN, cutoff=0.3) if len(known) > SHOWN else []
        shown = list(dict.fromkeys([*near, *known]))[:SHOWN]
        more = f" and {len(known) - len(shown)} more" if len(known) > len(shown) else ""
        raise ConfigError(
            f"{what}: expected {expected} ({', '.join(shown) or 'there was none'}{more}); found {name!r:.80}"
        )
