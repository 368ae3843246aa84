"""What a journal tells of a server: profiles of its models as they were measured there, and its delays.

A model has a row of the columns that ``clockwork profile --json`` has. Its durations are medians of the last
that were measured; batch sizes that never ran take what was profiled before serving, as many times as slow as
those that did. How much single ones differ from that, how long messages take, and how much of a request's
time gateways keep for themselves is for simulations to draw.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from statistics import median, median_low
from typing import Any, Final

import msgspec
from msgspec import Struct, structs

from clockwork_serve.errors import ConfigError
from clockwork_serve.messages import (
    Cancel,
    Code,
    CodeAdded,
    DeviceSpec,
    Infer,
    Load,
    Model,
    ModelAdded,
    ModelRemoved,
    Profile,
    Quota,
    QuotasSet,
    Request,
    Result,
    Status,
    WorkerJoined,
    WorkerLost,
)
from clockwork_serve.sim import Constants, read_constants
from clockwork_serve.sim.constants import Network, Noise, Quantiles
from clockwork_serve.telemetry import JournalHead, Step, Torn, read_records
from clockwork_serve.telemetry.journal import MAGIC, machine_name
from clockwork_serve.units import MIB, NS_PER_S, NS_PER_US, counted
from clockwork_serve.workload.traffic import told
from clockwork_serve.workload.zoo import Zoo, check_machine, row_of

KEPT: Final = 255  # so many of the last durations of a kind count
KINDS_MAX: Final = 256  # of how many kinds of actions the noise is known: those that ran last
ENOUGH: Final = 20  # durations of a kind of which the median is known
MOST_NS: Final = 60 * NS_PER_S  # no delay of a server is longer
QUICK: Final = 0.1  # of delays, what the least is taken to be
SHARES: Final = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)


class LearnedServer:
    """Takes a journal's records one by one; memory does not grow with their number."""

    def __init__(self) -> None:
        self.delays = LearnedDelays()
        self.models: dict[str, Model] = {}  # all that were served, by key
        self.quotas: dict[str, Quota] = {}
        self.machine = ""
        self.lost: Counter[str] = Counter()  # what a scenario does not have, in words
        self.devices: dict[str, int] = {}  # by kind: so many at most at once
        self._names: dict[str, str] = {}
        self._codes: dict[str, Code] = {}
        self._profiles: dict[tuple[str, str], Profile] = {}
        self._present: dict[str, tuple[DeviceSpec, ...]] = {}
        self._specs: dict[str, DeviceSpec] = {}  # by device, all that were there
        self._sent: dict[int, Infer | Load] = {}
        self._measured: dict[tuple[str, str, int], deque[int]] = {}
        """By code, kind of device and batch size; 0: LOADs, in parts of what the profile says."""

    def take(self, record: JournalHead | Step | Torn) -> None:
        """The next record."""
        if isinstance(record, JournalHead):
            self.machine = record.machine
            self._sent.clear()
            self._present.clear()
            return
        if isinstance(record, Torn):
            self.lost["chunk cut short, and its requests missing"] += 1
            return
        if record.dropped:
            self.lost["step missing, with the requests in it"] += record.dropped
        for event in record.events:
            self._observe(event, record.now_ns)
        for effect in record.effects:
            if isinstance(effect, Infer | Load):
                self._sent[effect.action_id] = effect

    def _observe(self, event: object, now_ns: int) -> None:
        match event:
            case Result():
                action = self._sent.pop(event.action_id, None)
                if action is not None and event.status is Status.OK:
                    self._measure(action, event)
                    self.delays.ended(action, event, now_ns)
            case Request():
                self.delays.came(event, now_ns)
                self.lost["request of several rows, which has one here"] += event.rows > 1
                self.lost["request with inputs of other shapes than its model declares"] += bool(
                    event.signature
                )
            case CodeAdded():
                self._codes[event.code.code_id] = event.code
                for profile in event.profiles:
                    self._profiles[profile.code_id, profile.device_kind] = profile
            case ModelAdded():
                self.models[event.model.key] = event.model
            case WorkerJoined():
                self._present[event.worker] = event.devices
                self._specs.update((spec.device, spec) for spec in event.devices)
                present = Counter(spec.kind for specs in self._present.values() for spec in specs)
                self.devices = {
                    kind: max(self.devices.get(kind, 0), n) for kind, n in (self.devices | present).items()
                }
            case WorkerLost():
                self._present.pop(event.worker, None)
                self._sent.clear()  # its actions never end; a few measurements of others do not count
                self.lost["worker lost: here none is"] += 1
            case ModelRemoved():
                self.lost["model removed: here all are there all the time"] += 1
            case Cancel():
                self.lost["request cancelled by clients, who wait here"] += 1
            case QuotasSet():
                self.quotas = {quota.tenant: quota for quota in event.quotas}
            case _:
                pass

    def _measure(self, action: Infer | Load, result: Result) -> None:
        spec = self._specs.get(action.device)
        if spec is None:
            return
        code_id, kind, batch = action.code_id, spec.kind, 0
        lasted_ns = result.lane_ns - result.once_ns
        if isinstance(action, Infer):
            if action.signature:  # profiles are of the shapes that models declare
                return
            batch = action.batch
        else:
            profile = self._profiles.get((code_id, kind))
            if profile is None:
                return
            lasted_ns = lasted_ns * NS_PER_S // max(1, profile.load_ns(action.weights.size))
        self._measured.setdefault((code_id, kind, batch), deque(maxlen=KEPT)).append(max(1, lasted_ns))

    def name_of(self, key: str) -> str:
        """What a scenario calls a model: its name, with the version behind it where that is another one's."""
        found = self._names.get(key)
        if found is None:
            name, _, version = key.rpartition("/")
            found = f"{name}.{version}" if name in self._names.values() else name or key
            self._names[key] = found
        return found

    @property
    def kind(self) -> str:
        """The kind of most of its devices. Raises :class:`ConfigError` where there was none."""
        if not self.devices:
            raise ConfigError("journal: expected devices that joined, found none; let the server run on")
        return max(self.devices, key=lambda kind: (self.devices[kind], kind))

    def kinds(self) -> dict[str, str]:
        """The row of each model, by its name in a scenario; models of one code and size share one."""
        first: dict[tuple[str, int], str] = {}
        found = {}
        for key, model in self.models.items():
            name = self.name_of(key)
            row = first.setdefault(
                (model.code_id, model.weights.size), re.sub(r"[^A-Za-z0-9_.+-]", "_", name)
            )
            found[name] = row
        return found

    def present(self) -> list[DeviceSpec]:
        """The devices that are there now, those of :attr:`kind` first."""
        specs = [spec for specs in self._present.values() for spec in specs]
        return sorted(specs, key=lambda spec: spec.kind != self.kind) if specs else []

    def rows(self) -> list[dict[str, str | float]]:
        """The table of the devices of :attr:`kind`; models without a profile have no row."""
        kinds, found = self.kinds(), dict[str, dict[str, str | float]]()
        for key, model in self.models.items():
            row = kinds[self.name_of(key)]
            profile = self._profiles.get((model.code_id, self.kind))
            if row not in found and profile is not None:
                learned = self._learned(profile)
                if not learned.guessed:
                    found[row] = row_of(row, model, self._codes[model.code_id], learned)
        return list(found.values())

    def _learned(self, profile: Profile) -> Profile:
        """A profile with what was measured in place of it."""
        code_id, kind = profile.code_id, profile.device_kind
        measured = {
            batch: median_low(self._measured[code_id, kind, batch])
            for batch in profile.infer_ns
            if (code_id, kind, batch) in self._measured
        }
        times = median(
            [lasted_ns / profile.infer_ns[batch] for batch, lasted_ns in measured.items()] or [1.0]
        )
        infer_ns = {
            batch: measured.get(batch) or round(lasted_ns * times)
            for batch, lasted_ns in profile.infer_ns.items()
        }
        loads = self._measured.get((code_id, kind, 0))
        load_times = median(loads) / NS_PER_S if loads else 1.0
        return structs.replace(
            profile, infer_ns=infer_ns, guessed=profile.guessed and not measured,
            load_base_ns=round(profile.load_base_ns * load_times),
            load_ns_per_mib=round(profile.load_ns_per_mib * load_times),
        )  # fmt: skip

    def cluster(self) -> dict[str, Any]:
        """The fields of a scenario's cluster that its devices of :attr:`kind` have."""
        specs = [spec for spec in self._specs.values() if spec.kind == self.kind]
        spec = min(specs, key=lambda one: one.pages * one.page_bytes)
        return {
            "devices": self.devices[self.kind], "page_mib": max(1, spec.page_bytes // MIB),
            "memory_mib": max(1, spec.pages * spec.page_bytes // MIB),
            "lanes_share": spec.lanes_share or None,

        }  # fmt: skip

    def tenants(self) -> dict[str, dict[str, Any]]:
        """The fields of tenants that have quotas, by name."""
        return {
            name: {
                "device_ms_per_s": None if quota.device_ns_per_s is None else quota.device_ns_per_s / 1e6,
                "loaded_bytes_per_s": quota.loaded_bytes_per_s, "burst_s": quota.burst_ns / NS_PER_S,
            }
            for name, quota in self.quotas.items()
        }  # fmt: skip

    def notes(self) -> list[str]:
        """What was lost, in sentences."""
        said = told(self.lost)
        others = [f"{counted(number, 'device')} of {kind}" for kind, number in self.devices.items()]
        if len(others) > 1:
            said.append(f"the table is of {self.kind} alone; there were {', '.join(others)}")
        return said


class LearnedDelays:
    """The delays and the noise of a journal's server, for simulations.

    Memory does not grow with the number of requests and actions.
    """

    def __init__(self) -> None:
        self._up_delay_ns = (
            _Kept()
        )  # from arrivals, of which gateways know the earliest that they may have been
        self._reserve_ns = _Kept()
        self._back_delay_ns = _Kept()  # from the end of an action until the controller knew
        self._lasted_ns: dict[tuple[str, str, int], _Kept] = {}
        """By code, device, and batch size (0: LOADs)."""

    def came(self, request: Request, now_ns: int) -> None:
        """The controller got a request."""
        self._up_delay_ns.append(now_ns - request.arrival_ns)
        self._reserve_ns.append(request.way_ns)

    def ended(self, action: Infer | Load, result: Result, now_ns: int) -> None:
        """The controller got the result of an action that succeeded."""
        self._back_delay_ns.append(now_ns - result.ended_ns)
        batch = action.batch if isinstance(action, Infer) else 0
        kind = action.code_id, action.device, batch
        lasted = self._lasted_ns.pop(kind, None) or _Kept(most=KEPT)
        lasted.append(result.lane_ns - result.once_ns)
        self._lasted_ns[kind] = lasted
        if len(self._lasted_ns) > KINDS_MAX:
            del self._lasted_ns[next(iter(self._lasted_ns))]

    @property
    def known(self) -> bool:
        """Whether requests were served, so that there is anything to learn from."""
        return bool(self._up_delay_ns and self._back_delay_ns)

    def constants(self) -> Constants:
        """Those of the package, with what was measured in place of them.

        A message takes as long as the quickest tenth, plus what is drawn. An arrival may be noted too early:
        what is left of the usual delay is time that requests do not have. Raises :class:`ConfigError`.
        """
        if not self.known:
            raise ConfigError(
                "journal: expected requests that were served, found none; let the server run on"
            )
        usual = read_constants()
        hop_ns, worker_ns = self._up_delay_ns.at(QUICK), self._back_delay_ns.at(QUICK)
        jitter = _Kept(max(0, delay_ns - worker_ns) for delay_ns in self._back_delay_ns)
        return structs.replace(
            usual,
            network=Network(
                gateway_ns=max(0, hop_ns), worker_ns=max(0, worker_ns), jitter_ns=0,
                jitter_us=jitter.quantiles_us(),
                reserve_ns=max(0, self._reserve_ns.at(0.5) + self._up_delay_ns.at(0.5) - hop_ns),
            ),
            noise=Noise(
                infer_us=self._noise(infers=True) or usual.noise.infer_us,
                load_us=self._noise(infers=False) or usual.noise.load_us,
            ),
        )  # fmt: skip

    def _noise(self, *, infers: bool) -> Quantiles:
        """By how much durations differ from the median of their kind; empty where too few were seen."""
        off = _Kept()
        for (_, _, batch), lasted in self._lasted_ns.items():
            if bool(batch) == infers and len(lasted) >= ENOUGH:
                usual_ns = lasted.at(0.5)
                off.extend(lasted_ns - usual_ns for lasted_ns in lasted)
        return off.quantiles_us() if off else ()


class _Kept(deque[int]):
    """The last durations of a kind, in ns; by default enough for a quantile of 0.999."""

    def __init__(self, values_ns: Iterable[int] = (), most: int = 4096) -> None:
        super().__init__(values_ns, maxlen=most)

    def at(self, share: float) -> int:
        """A quantile."""
        ordered = sorted(self)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    def quantiles_us(self) -> Quantiles:
        """The distribution, in us."""
        return tuple((share, self.at(share) / NS_PER_US) for share in SHARES)


def read_delays(file: str) -> Constants:
    """The delays and the noise of a journal's server. Raises :class:`ConfigError`."""
    if not is_journal(file):
        raise ConfigError(
            f"delays: expected a server's journal, found {file}; clockwork serve --journal FILE"
        )
    return _learned(file).delays.constants()


class TableDelays(Struct, frozen=True, kw_only=True):
    """The delays and the noise of the server whose durations a table as JSON has, its field ``delays``."""

    network: Network
    noise: Noise

    @staticmethod
    def of(learned: LearnedDelays) -> TableDelays | None:
        """As a journal tells them; None where nothing was served."""
        if not learned.known:
            return None
        constants = learned.constants()
        return TableDelays(network=constants.network, noise=constants.noise)

    def constants(self) -> Constants:
        """Those of the package, with these in place of them."""
        return structs.replace(read_constants(), network=self.network, noise=self.noise)

    @property
    def possible(self) -> bool:
        """Whether all are times that can be: from 0 to a minute, quantiles by ascending share."""
        network, noise = self.network, self.noise
        times = (network.gateway_ns, network.worker_ns, network.jitter_ns, network.reserve_ns)
        curves = (network.jitter, noise.infer_us, noise.load_us)
        shares = [[share for share, _ in curve] for curve in curves]
        values = [value for curve in curves for _, value in curve]
        return (
            all(0 <= time_ns <= MOST_NS for time_ns in times)
            and all(each[:1] == [0] and each[-1:] == [1] and each == sorted(set(each)) for each in shares)
            and all(abs(value) <= MOST_NS / NS_PER_US for value in values)
        )


class _Table(Struct):
    delays: TableDelays | None = None


def delays_beside(zoo: str) -> Constants | None:
    """Those of a journal that is a table of models, or that a table as JSON has from one; None without any.

    Raises :class:`ConfigError` where they cannot be.
    """
    if is_journal(zoo):
        found = TableDelays.of(_learned(zoo).delays)
    elif not zoo.endswith(".json"):
        return None
    else:
        try:
            found = msgspec.json.decode(Path(zoo).read_bytes(), type=_Table).delays
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise ConfigError(f"zoo {zoo}: delays: expected those of a server, found {error}") from None
        if found is not None and not found.possible:
            raise ConfigError(
                f"zoo {zoo}: delays: expected times from 0 to a minute and quantiles by ascending share "
                "from 0 to 1, found others; make the file anew by clockwork workload from"
            )
    return None if found is None else found.constants()


def _learned(journal: str) -> LearnedServer:
    """All by one pass, which takes a second for 100,000 requests; kept until the file changes."""
    state = Path(journal).stat()
    return _learned_once(journal, (state.st_ino, state.st_mtime_ns, state.st_size))


@lru_cache(maxsize=1)
def _learned_once(journal: str, state: tuple[int, ...]) -> LearnedServer:
    learned = LearnedServer()
    for _, record in read_records(Path(journal)):
        learned.take(record)
    return learned


def is_journal(path: str | Path) -> bool:
    """Whether a file begins as a journal does."""
    try:
        with Path(path).open("rb") as file:
            return file.read(len(MAGIC))[:3] == MAGIC[:3]
    except OSError:
        return False


def read_zoo(name: str, *, foreign: bool = False) -> Zoo:
    """A table by its name or file; of a journal, what its server had learned at its end.

    Unless ``foreign``, it must have been measured on this machine, if it says where. Raises
    :class:`ConfigError`.
    """
    here = "" if foreign else machine_name()
    if not is_journal(name):
        return Zoo.read(name, here)
    path, learned = Path(name), _learned(name)
    check_machine(name, learned.machine, here, learned.kind)
    return Zoo.of(path.name, places(path, learned.rows()))


def places(path: Path, rows: Iterable[dict[str, str | float]]) -> Iterable[tuple[str, dict[str, str]]]:
    """Rows as a zoo is made of them: each with where it stands, all cells as text."""
    for row in rows:
        yield f"{path}: {row['model']}", {name: str(value) for name, value in row.items()}
