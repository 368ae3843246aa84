"""From a scenario to the jobs of all senders: what is sent when, by which process."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from msgspec import Struct, structs

from clockwork_lab.bench.job import ClosedClients, Job
from clockwork_lab.bench.messages import Data, Deadline, Maker, Message, Tensor, read_shapes
from clockwork_lab.bench.records import Rows
from clockwork_lab.bench.server import (
    ClientTlsFiles,
    GrpcMetadata,
    HttpMetadata,
    Protocol,
    ServerAddress,
    inputs_of,
    names_at_server,
    reached,
    tls_context,
)
from clockwork_serve.errors import ConfigError
from clockwork_serve.units import NS_PER_MS, NS_PER_S, plain
from clockwork_serve.workload.processes import dice
from clockwork_serve.workload.scenario import Scenario, read_scenario
from clockwork_serve.workload.stream import ClosedLoad, Workload, build
from clockwork_serve.workload.tables import FieldError, LoadTable, Ramp

# ------------------------------------------------------------
# A scenario as a schedule: rows of open loads, clients of closed ones.
#
# A caller may scale a scenario's rates or end it early. All random choices are made before the run.


REQUESTS_MAX: Final = 50_000_000  # the most requests of one run: 64 bytes each
STEPS_MAX: Final = 10_000
CLIENTS: Final = 16
"""Number of the random stream for the start of a closed load's clients; the workload's own are below it."""
_TRACES: Final = ("azure", "timestamps", "generated")

Column = npt.NDArray[Any]


@dataclass(slots=True)
class Schedule:
    """Requests of open loads in order of time, as columns, and the workload that they belong to.

    ``end_ns``: when the last request may be sent; ``warmup_ns``: requests are counted from then on.
    """

    workload: Workload
    times_ns: Column
    models: Column
    slos_ns: Column
    loads: Column
    end_ns: int
    warmup_ns: int

    def part(self, number: int, parts: int) -> Schedule:
        """Every ``parts``-th request from ``number`` on, for one of several processes."""
        cut = slice(number, None, parts)
        return Schedule(
            self.workload, self.times_ns[cut], self.models[cut], self.slos_ns[cut], self.loads[cut],
            self.end_ns, self.warmup_ns,
        )  # fmt: skip

    def models_asked(self) -> list[int]:
        """The models that can get a request, in the scenario's order."""
        asked = set(np.unique(self.models).tolist())
        for load in self.workload.closed:
            asked.update(load.models)
        return sorted(asked)

    def most_at_once(self, within_ns: int) -> int:
        """The most requests that are due within any interval of that length."""
        if not self.times_ns.size:
            return 0
        first = np.searchsorted(self.times_ns, self.times_ns - within_ns, side="right")
        return int((np.arange(self.times_ns.size) - first).max()) + 1


def make_schedule(
    scenario: Scenario, *, seed: int, traces: Path | None = None, rate_scale: float = 1.0,
    seconds: float | None = None, most: int = REQUESTS_MAX,
) -> Schedule:  # fmt: skip
    """Draw all requests, at most ``most``. Raises :class:`ConfigError`."""
    if seconds is not None and scenario.warmup_s >= seconds:
        raise ConfigError(
            f"duration: expected more than the scenario's warmup_s = {scenario.warmup_s:g}, found "
            f"{seconds:g}; raise it"
        )
    workload = build(scaled(scenario, rate_scale), seed, traces)
    end_ns = workload.duration_ns if seconds is None else min(workload.duration_ns, round(seconds * NS_PER_S))
    columns: dict[str, list[Column]] = {"times_ns": [], "models": [], "slos_ns": [], "loads": []}
    total = 0
    for arrivals in workload.open():
        total += len(arrivals.times_ns)
        if total > most:
            raise ConfigError(
                f"{scenario.name}: expected at most {most:,} requests in one run, found more; "
                "give --duration or a smaller --rate-scale"
            )
        for name, parts in columns.items():
            kind = np.int64 if name.endswith("_ns") else np.int32
            parts.append(np.array(getattr(arrivals, name), dtype=kind))
        if arrivals.times_ns and arrivals.times_ns[-1] >= end_ns:
            break
    joined = {
        name: np.concatenate(parts) if parts else np.zeros(0, np.int64) for name, parts in columns.items()
    }
    before = int(np.searchsorted(joined["times_ns"], end_ns))
    return Schedule(
        workload=workload, **{name: column[:before] for name, column in joined.items()}, end_ns=end_ns,
        warmup_ns=workload.warmup_ns,
    )  # fmt: skip


def slo_steps(load: ClosedLoad, end_ns: int) -> list[tuple[int, int]]:
    """The SLOs of a closed load over the run: (from ns, SLO in ns)."""
    steps = [(0, load.slo.at(load.start_ns))]
    if load.slo.ramp is not None:
        every_ns = load.slo.ramp.every_ns
        for step in range(1, min(STEPS_MAX, max(0, end_ns - load.start_ns) // every_ns + 1)):
            at_ns = load.start_ns + step * every_ns
            if (slo_ns := load.slo.at(at_ns)) != steps[-1][1]:
                steps.append((at_ns, slo_ns))
    return steps


def clients(workload: Workload, seed: int) -> Iterator[tuple[int, int, int]]:
    """Every client of every closed load: (index of the closed load, model, when it starts in ns)."""
    for index, load in enumerate(workload.closed):
        total = len(load.models) * load.concurrency
        jitter = dice(seed, load.load, CLIENTS).random(total) * load.start_jitter_ns
        for number, start_ns in enumerate((load.start_ns + jitter.astype(np.int64)).tolist()):
            yield index, load.models[number // load.concurrency], start_ns


def scaled(scenario: Scenario, factor: float) -> Scenario:
    """The scenario with all rates of its open loads times ``factor``. Raises :class:`ConfigError`."""
    if factor == 1.0:
        return scenario
    loads = []
    for index, load in enumerate(scenario.loads):
        try:
            loads.append(_scaled(load, factor))
        except FieldError as error:
            raise ConfigError(f"rate_scale: {plain(factor)} makes loads[{index}].{error}") from None
    return structs.replace(scenario, loads=tuple(loads))


def _scaled(load: LoadTable, factor: float) -> LoadTable:
    if load.arrivals == "closed":
        return load
    changed: dict[str, Any] = {}
    if load.rate_rps is not None:
        changed["rate_rps"] = load.rate_rps * factor
        if load.rate_ramp is not None:
            changed["rate_ramp"] = _scaled_ramp(load.rate_ramp, factor)
    elif load.arrivals in _TRACES:
        changed["rate_scale"] = (load.rate_scale or 1.0) * factor
    return structs.replace(load, **changed)


def _scaled_ramp(ramp: Ramp, factor: float) -> Ramp:
    return structs.replace(
        ramp,
        add=None if ramp.add is None else ramp.add * factor,
        until=None if ramp.until is None else ramp.until * factor,
    )


# ------------------------------------------------------------
# From a scenario and options to the jobs of all senders.


CLOSED_RPS_MAX: Final = 50_000
"""Rows reserved for closed loads, per process and second; unused ones take no memory."""
CLOSED_ROWS_MAX: Final = 50_000_000
RETRY_NS: Final = NS_PER_MS
"""How long clients of closed loads wait after a rejection without advice, if the scenario sets nothing."""
RESERVE: Final = 4  # HTTP connections opened in reserve
SOON_NS: Final = 20 * NS_PER_MS
"""Before the run, connections are opened for the most requests due within this time."""
GRPC_CONNECTIONS: Final = 8
HTTP_CONNECTIONS: Final = 1024


class Options(Struct, frozen=True, kw_only=True):
    """All options beside the scenario. docs/use/bench.md explains each."""

    url: str
    protocol: Protocol = "http"
    seed: int = 1
    traces: str | None = None
    rate_scale: float = 1.0
    seconds: float | None = None
    processes: int = 1
    connections: int | None = None
    models: tuple[str, ...] = ()
    renamed: dict[str, str] = {}
    shapes: tuple[str, ...] = ()
    input_data: str = "random"
    path: str = ""
    body: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    deadline: Deadline | None = None
    abandon: bool = False
    drain_s: float = 10.0
    max_lateness_ms: float = 1.0
    cores: tuple[int, ...] = ()
    realtime: bool = False

    @property
    def tls_files(self) -> ClientTlsFiles:
        """The files for TLS."""
        return ClientTlsFiles(self.ca, self.cert, self.key)

    @property
    def deadline_field(self) -> Deadline:
        """How deadlines are sent to the server."""
        if self.deadline is not None:
            return self.deadline
        return {"http": "header", "grpc": "grpc", "raw": "none"}[self.protocol]  # type: ignore[return-value]


@dataclass(slots=True)
class Plan:
    """A prepared run: jobs and their rows, which the caller keeps."""

    scenario: Scenario
    schedule: Schedule
    options: Options
    address: ServerAddress
    names: dict[int, str]  # the server's names of the models that get requests, by the scenario's number
    jobs: list[Job]
    rows: list[Rows]


def make_plan(path: str | Path, options: Options) -> Plan:
    """Read the scenario, draw the schedule, query the server's models, and build all messages.

    Raises :class:`ConfigError` and :class:`Unreachable`.
    """
    address = _address(options)
    scenario = read_scenario(path)
    schedule = make_schedule(
        scenario, seed=options.seed, traces=None if options.traces is None else Path(options.traces),
        rate_scale=options.rate_scale, seconds=options.seconds,
    )  # fmt: skip
    workload = schedule.workload
    indices = schedule.models_asked()
    if not indices:
        raise ConfigError(f"{scenario.name}: expected at least one request, found none; make it longer")
    given = [workload.models[index][0] for index in indices]
    renamed = names_at_server(given, options.models, options.renamed)
    names = {index: renamed[name] for index, name in zip(indices, given, strict=True)}
    tls = tls_context(options.tls_files, http2=options.protocol == "grpc") if address.tls else None
    ip = reached(address, tls)
    maker = Maker(address, options.headers, options.deadline_field)
    make = _messages(maker, options, renamed, address, tls)
    messages: list[Message] = []
    known: dict[tuple[int, int, int], int] = {}

    def message(model: int, slo_ns: int, load: int) -> int:
        """The index of the message for a model, SLO and priority."""
        key = (model, slo_ns, workload.priorities[load])
        if key not in known:
            known[key] = len(messages)
            messages.append(make(names[model], slo_ns, key[2]))
        return known[key]

    of_row = _of_rows(schedule, message)
    groups = _clients(schedule, options, message)
    jobs, rows = [], []
    for number in range(options.processes):
        part = schedule.part(number, options.processes)
        own = _filled(part, of_row[number :: options.processes], any(groups))
        rows.append(own)
        jobs.append(
            structs.replace(
                _job(options, address, ip, part, groups[number]),
                messages=messages, bodies=maker.bodies, rows_fd=own.fd, rows_size=own.size,
                core=options.cores[number % len(options.cores)] if options.cores else None,
            )
        )  # fmt: skip
    return Plan(scenario, schedule, options, address, names, jobs, rows)


def _address(options: Options) -> ServerAddress:
    address = ServerAddress.of(options.url, options.protocol)
    for name in ("ca", "cert", "key"):
        if getattr(options, name) is not None and not address.tls:
            raise ConfigError(
                f"{name}: expected an https or grpcs URL beside it, found {options.url}; correct one of them"
            )
    if options.key is not None and options.cert is None:
        raise ConfigError("key: expected --cert beside it, found none; give the key's certificate")
    return address


def _messages(
    maker: Maker, options: Options, names: Mapping[str, str], address: ServerAddress,
    tls: ssl.SSLContext | None,
) -> Callable[[str, int, int], Message]:  # fmt: skip
    """A function that builds the message for a model, an SLO and a priority."""
    if options.protocol == "raw":
        return lambda model, slo_ns, priority: maker.raw(options.path, model, _raw_body(options), slo_ns)
    server: HttpMetadata | GrpcMetadata
    if options.protocol == "grpc":
        server = GrpcMetadata(address, options.headers, tls, options.tls_files)
    else:
        server = HttpMetadata(address, options.headers, tls)
    with closing(server):
        inputs = inputs_of(server, names, address)
    data, shapes = Data(options.input_data, options.seed), read_shapes(options.shapes)
    tensors: dict[str, tuple[Tensor, ...]] = {
        model: data.tensors(model, infos, shapes) for model, infos in inputs.items()
    }
    made = maker.grpc if options.protocol == "grpc" else maker.http
    return lambda model, slo_ns, priority: made(model, tensors[model], slo_ns, priority)


def _raw_body(options: Options) -> bytes:
    """``random:BYTES``, or the content of a file."""
    kind, _, size = options.body.partition(":")
    if kind == "random" and size.isdecimal():
        return np.random.default_rng(options.seed).bytes(int(size))
    try:
        return Path(options.body).read_bytes() if options.body else b""
    except OSError as error:
        raise ConfigError(
            f"body: expected random:BYTES or a file that can be read, found {options.body!r} "
            f"({error.strerror})"
        ) from None


def _of_rows(schedule: Schedule, message: Callable[[int, int, int], int]) -> np.ndarray:
    """The message of each open request."""
    if not schedule.times_ns.size:
        return np.zeros(0, np.int32)
    slos, slo_at = np.unique(schedule.slos_ns, return_inverse=True)
    loads = len(schedule.workload.loads)
    keys = (schedule.models.astype(np.int64) * loads + schedule.loads) * slos.size + slo_at.reshape(-1)
    different, places = np.unique(keys, return_inverse=True)
    of_key = np.array(
        [
            message(key // slos.size // loads, int(slos[key % slos.size]), key // slos.size % loads)
            for key in different.tolist()
        ],
        np.int32,
    )
    found: np.ndarray = of_key[places.reshape(-1)]
    return found


def _clients(
    schedule: Schedule, options: Options, message: Callable[[int, int, int], int]
) -> list[tuple[ClosedClients, ...]]:
    """The clients of each process, assigned round-robin."""
    workload = schedule.workload
    starts: list[dict[tuple[int, int], list[int]]] = [{} for _ in range(options.processes)]
    for number, (index, model, start_ns) in enumerate(clients(workload, options.seed)):
        starts[number % options.processes].setdefault((index, model), []).append(start_ns)
    dealt = []
    for own in starts:
        groups = []
        for (index, model), starts_ns in own.items():
            load = workload.closed[index]
            steps = slo_steps(load, schedule.end_ns)
            groups.append(
                ClosedClients(
                    load=load.load, model=model, starts_ns=tuple(starts_ns),
                    stop_ns=min(load.stop_ns, schedule.end_ns),
                    steps=tuple((at_ns, slo, message(model, slo, load.load)) for at_ns, slo in steps),
                    retry_after=load.retry == "retry_after",
                    retry_ns=RETRY_NS if load.retry_ns is None else load.retry_ns,
                )
            )  # fmt: skip
        dealt.append(tuple(groups))
    return dealt


def _filled(part: Schedule, messages: np.ndarray, closed: bool) -> Rows:  # noqa: FBT001
    """Rows with the open requests, and room for those of closed loads."""
    most = min(CLOSED_ROWS_MAX, max(1, round(part.end_ns / NS_PER_S * CLOSED_RPS_MAX)))
    rows = Rows.make(part.times_ns.size + (most if closed else 0))
    columns = {
        "scheduled_ns": part.times_ns, "slo_ns": part.slos_ns, "model": part.models, "load": part.loads,
        "message": messages,
    }  # fmt: skip
    for name, column in columns.items():
        rows.array(name)[: column.size] = column
    return rows


def _job(
    options: Options, address: ServerAddress, ip: str, part: Schedule, groups: tuple[ClosedClients, ...]
) -> Job:
    """A job without its rows, messages and core."""
    grpc = options.protocol == "grpc"
    most = options.connections or (GRPC_CONNECTIONS if grpc else HTTP_CONNECTIONS)
    most = max(1, most // options.processes)
    at_once = part.most_at_once(SOON_NS) + sum(len(group.starts_ns) for group in groups)
    return Job(
        protocol=options.protocol, host=address.host, ip=ip, port=address.port, tls=address.tls,
        tls_files=options.tls_files, messages=[], bodies=[], rows_fd=-1, rows_size=0,
        open_rows=part.times_ns.size, clients=groups, connections=most,
        first_connections=most if grpc else min(most, max(2 * RESERVE, at_once)),
        reserve=0 if grpc else RESERVE, abandon=options.abandon, end_ns=part.end_ns,
        drain_ns=round(options.drain_s * NS_PER_S), realtime=options.realtime,
    )  # fmt: skip
