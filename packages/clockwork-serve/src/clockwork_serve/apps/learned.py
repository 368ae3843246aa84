"""What a journal tells of a server's models and devices: a table of profiles as they were measured there.

A model has a row of the columns that ``clockwork profile --json`` has. Its durations are medians of the last
that were measured; batch sizes that never ran take what was profiled before serving, as many times as slow as
those that did.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterable
from pathlib import Path
from statistics import median, median_low
from typing import Any, Final

from msgspec import structs

from clockwork_serve.devices.kinds import machine_name
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
from clockwork_serve.telemetry import JournalHead, Step, Torn, read_records
from clockwork_serve.telemetry.journal import MAGIC
from clockwork_serve.units import MIB, NS_PER_S, counted
from clockwork_serve.workload.traffic import told
from clockwork_serve.workload.zoo import Zoo, check_machine, row_of

KEPT: Final = 255  # so many of the last durations of a kind count


class LearnedProfiles:
    """Takes a journal's records one by one; memory does not grow with their number."""

    def __init__(self) -> None:
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
        self._sent: dict[int, tuple[str, str, int, int]] = {}
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
            self._observe(event)
        for effect in record.effects:
            if isinstance(effect, Infer | Load) and effect.device in self._specs:
                kind = self._specs[effect.device].kind
                if isinstance(effect, Infer):
                    if not effect.signature:
                        self._sent[effect.action_id] = effect.code_id, kind, effect.batch, 0
                else:
                    self._sent[effect.action_id] = effect.code_id, kind, 0, effect.weights.size

    def _observe(self, event: object) -> None:
        match event:
            case Result():
                sent = self._sent.pop(event.action_id, None)
                if sent is not None and event.status is Status.OK:
                    self._learn(sent, event)
            case Request():
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
                self.lost["worker lost: here none is"] += 1
            case ModelRemoved():
                self.lost["model removed: here all are there all the time"] += 1
            case Cancel():
                self.lost["request cancelled by clients, who wait here"] += 1
            case QuotasSet():
                self.quotas = {quota.tenant: quota for quota in event.quotas}
            case _:
                pass

    def _learn(self, sent: tuple[str, str, int, int], result: Result) -> None:
        code_id, kind, batch, size = sent
        lasted_ns = result.lane_ns - result.once_ns
        if not batch:
            profile = self._profiles.get((code_id, kind))
            if profile is None:
                return
            lasted_ns = lasted_ns * NS_PER_S // max(1, profile.load_ns(size))
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


def is_journal(path: str | Path) -> bool:
    """Whether a file begins as a journal does."""
    try:
        with Path(path).open("rb") as file:
            return file.read(len(MAGIC))[:3] == MAGIC[:3]
    except OSError:
        return False


def read_zoo(name: str, *, foreign: bool = False, here: str | None = None) -> Zoo:
    """A table by its name or file; of a journal, what its server had learned at its end.

    Unless ``foreign``, it must have been measured ``here`` (None: on this machine), if it says where. Raises
    :class:`ConfigError`.
    """
    here = "" if foreign else machine_name() if here is None else here
    if not is_journal(name):
        return Zoo.read(name, here)
    path, learned = Path(name), LearnedProfiles()
    for _, record in read_records(path):
        learned.take(record)
    check_machine(name, learned.machine, here, learned.kind)
    return Zoo.of(path.name, places(path, learned.rows()))


def places(path: Path, rows: Iterable[dict[str, str | float]]) -> Iterable[tuple[str, dict[str, str]]]:
    """Rows as a zoo is made of them: each with where it stands, all cells as text."""
    for row in rows:
        yield f"{path}: {row['model']}", {name: str(value) for name, value in row.items()}


def machine_of(path: Path) -> str:
    """The machine of a journal's devices; empty where it does not tell. Raises :class:`ConfigError`."""
    _, head = next(read_records(path), (0, None))
    return head.machine if isinstance(head, JournalHead) else ""
