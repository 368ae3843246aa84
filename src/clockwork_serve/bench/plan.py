"""From a scenario and what a caller wants of it to the jobs of all senders; it starts none of them."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from msgspec import Struct, structs

from clockwork_serve.bench.address import Address, Protocol, TlsFiles, tls_context
from clockwork_serve.bench.inputs import Data, Tensor, read_shapes
from clockwork_serve.bench.job import Clients, Job
from clockwork_serve.bench.messages import Deadline, Maker, Message
from clockwork_serve.bench.rows import Rows
from clockwork_serve.bench.schedule import Schedule, clients, make_schedule, slo_steps
from clockwork_serve.bench.server import (
    GrpcServer,
    HttpServer,
    Server,
    inputs_of,
    names_at_server,
    reached,
)
from clockwork_serve.errors import ConfigError
from clockwork_serve.units import NS_PER_MS, NS_PER_S
from clockwork_serve.workload.scenario import Scenario, read_scenario

CLOSED_RPS_MAX: Final = 50_000
"""Requests a second of a process's closed loads for which there are rows; they take memory when used."""
CLOSED_ROWS_MAX: Final = 50_000_000
RETRY_NS: Final = NS_PER_MS
"""What clients of closed loads wait after a refusal, if neither it nor the scenario says."""
RESERVE: Final = 4
"""HTTP connections that are opened ahead of the requests that will need them."""
SOON_NS: Final = 20 * NS_PER_MS
"""There are connections for what comes within such a time before the run begins."""
GRPC_CONNECTIONS: Final = 8
HTTP_CONNECTIONS: Final = 1024


class Options(Struct, frozen=True, kw_only=True):
    """All that a caller says beside the scenario. docs/bench.md explains each."""

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
    def tls_files(self) -> TlsFiles:
        """What TLS needs."""
        return TlsFiles(self.ca, self.cert, self.key)

    @property
    def deadline_told(self) -> Deadline:
        """How the server hears of deadlines."""
        if self.deadline is not None:
            return self.deadline
        return {"http": "header", "grpc": "grpc", "raw": "none"}[self.protocol]  # type: ignore[return-value]


@dataclass(slots=True)
class Plan:
    """A run made ready: jobs, and their rows, which the caller keeps."""

    scenario: Scenario
    schedule: Schedule
    options: Options
    address: Address
    names: dict[int, str]
    """The server's names of the models that are asked."""
    jobs: list[Job]
    rows: list[Rows]


def make_plan(path: str | Path, options: Options) -> Plan:
    """Read, draw, ask the server about its models, make all messages.

    Raises :class:`ConfigError` and :class:`Unreachable`.
    """
    address = _address(options)
    scenario = read_scenario(path)
    schedule = _drawn(scenario, options)
    workload = schedule.workload
    indices = schedule.models_asked()
    if not indices:
        raise ConfigError(f"{scenario.name}: expected at least one request, found none; make it longer")
    given = [workload.models[index][0] for index in indices]
    renamed = names_at_server(given, options.models, options.renamed)
    names = {index: renamed[name] for index, name in zip(indices, given, strict=True)}
    tls = tls_context(options.tls_files, http2=options.protocol == "grpc") if address.tls else None
    ip = reached(address, tls)
    maker = Maker(address, options.headers, options.deadline_told)
    make = _messages(maker, options, renamed, address, tls)
    messages: list[Message] = []
    known: dict[tuple[int, int, int], int] = {}

    def message(model: int, slo_ns: int, load: int) -> int:
        """The place of such a request's message."""
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


def _drawn(scenario: Scenario, options: Options) -> Schedule:
    return make_schedule(
        scenario,
        seed=options.seed,
        traces=None if options.traces is None else Path(options.traces),
        rate_scale=options.rate_scale,
        seconds=options.seconds,
    )


def _address(options: Options) -> Address:
    address = Address.of(options.url, options.protocol)
    for name in ("ca", "cert", "key"):
        if getattr(options, name) is not None and not address.tls:
            raise ConfigError(
                f"{name}: expected an https or grpcs URL beside it, found {options.url}; correct one of them"
            )
    if options.key is not None and options.cert is None:
        raise ConfigError("key: expected --cert beside it, found none; give the key's certificate")
    return address


def _messages(
    maker: Maker,
    options: Options,
    names: Mapping[str, str],
    address: Address,
    tls: ssl.SSLContext | None,
) -> Callable[[str, int, int], Message]:
    """What makes the message for a model of the server, an SLO and a priority."""
    if options.protocol == "raw":
        body = _raw_body(options)
        return lambda model, slo_ns, priority: maker.raw(options.path, model, body, slo_ns)
    server: Server
    if options.protocol == "grpc":
        server = GrpcServer(address, options.headers, tls, options.tls_files)
    else:
        server = HttpServer(address, options.headers, tls)
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
) -> list[tuple[Clients, ...]]:
    """The clients of each process: they are dealt out in turn."""
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
                Clients(
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
    """Rows with what is due, and room for what closed loads will ask."""
    most = min(CLOSED_ROWS_MAX, max(1, round(part.end_ns / NS_PER_S * CLOSED_RPS_MAX)))
    rows = Rows.make(part.times_ns.size + (most if closed else 0))
    columns = {
        "scheduled_ns": part.times_ns, "slo_ns": part.slos_ns, "model": part.models, "load": part.loads,
        "message": messages,
    }  # fmt: skip
    for name, column in columns.items():
        rows.array(name)[: column.size] = column
    return rows


def _job(options: Options, address: Address, ip: str, part: Schedule, groups: tuple[Clients, ...]) -> Job:
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
