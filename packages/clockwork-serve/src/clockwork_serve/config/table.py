"""Every setting, declared once: name, type, default, reader, help, and the processes that use it.

:class:`Settings` is the declaration and the record at once. Each process of a server gets the whole record,
and each part of a process reads from it what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Flag, auto
from pathlib import Path
from typing import Annotated, Any, Final, get_type_hints

from msgspec import Struct, structs

from clockwork_serve.config.values import (
    URL,
    DeviceChoice,
    Unfit,
    address,
    addresses,
    folder_or_url,
    host_name,
    host_names,
    http_url,
    integer,
    lease_name,
    machine_name,
    number,
    one_of,
    or_none,
    or_off,
    path,
    port,
    prefix_or_off,
    read_devices,
    read_policy,
    size,
    size_or_share,
    span,
    switch,
    text,
)
from clockwork_serve.errors import ConfigError
from clockwork_serve.units import GIB, KIB, MIB, ms, plain, split_scratch

# ------------------------------------------------------------
# Every setting. Its field's name serves everywhere: ``slo_ms`` in the file is ``CLOCKWORK_SLO_MS`` in the
# environment and ``--slo-ms`` on the command line (where the command takes it).


PREFIX = "CLOCKWORK_"
NOT_SET: Final = "not set"
"""Instead of an empty value, in tables: it can be taken for no name and no file."""

CLUSTER_NAME: Final = "cluster.clockwork"
"""What the certificates of all machines name, unless ``cluster_name`` says otherwise. None has an address: a
machine may have several, and processes move."""
IN_MEMORY: Final = "memory"  # the journal's place that is no file of the user's: the server's private folder
JOURNAL_BYTES_IN_MEMORY: Final = 64 * MIB
JOURNAL_BYTES: Final = 4 * GIB
"""In a file: an hour at 5,000 requests a second, of 150 bytes each, and half as much again."""


class JoiningProcess(Flag):
    """A process that joins a server on another machine, started by a command of its own."""

    NONE = 0
    GATEWAY = auto()
    WORKER = auto()


GATEWAY: Final = JoiningProcess.GATEWAY
WORKER: Final = JoiningProcess.WORKER


class Setting(Struct, frozen=True):
    """The declaration of a setting, which annotates its field.

    ``read`` converts what was written; ``help`` completes "NAME: ..."; ``elsewhere`` are the processes on
    other machines that use it too; ``shown`` is the default as a person writes it, if that differs from its
    value. ``excess`` is for limits: what a client exceeds, its unit, and what the client may do instead.
    ``name`` and ``default`` come from the field.
    """

    read: Callable[[object], Any]
    help: str
    elsewhere: JoiningProcess = JoiningProcess.NONE
    shown: str | None = None
    excess: tuple[str, ...] = ()
    name: str = ""
    default: Any = None

    @property
    def variable(self) -> str:
        """Its name in the environment."""
        return PREFIX + self.name.upper()

    @property
    def flag(self) -> str:
        """Its name on the command line."""
        return "--" + self.name.replace("_", "-")

    def written(self, value: Any) -> Any:
        """A value as a file of settings has it; None is off, or none."""
        if self.name == "device":
            return [each.written for each in value]
        if self.name == "scaling_devices":
            return f"{value[0]}..{value[1]}"
        is_share = isinstance(value, float) and (self.shown or "").endswith(("B", "%"))
        return f"{100 * value:g}%" if is_share else value

    def text(self, value: Any, source: str | None) -> str:
        """A value for a table; without a ``source`` it is the default."""
        if source is None and self.shown and self.name != "cache":
            return self.shown
        written = self.written(value)
        if isinstance(written, list):
            return ", ".join(written)
        if isinstance(written, bool):
            return str(written).lower()
        if written is None:
            return (self.shown if self.default is None else None) or "off"
        return str(written) or NOT_SET


def default_cache(environment: Mapping[str, str]) -> str:
    """The default folder of artefacts. Raises :class:`ConfigError` if the user has no home, or an odd one."""
    base = environment.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return path(str(Path(base) / "clockwork-serve"))
    except Unfit as unfit:
        raise wrong("cache", "default", unfit.expected, base, "give --cache, or set HOME") from None


def wrong(name: str, source: str, expected: str, found: object, remedy: str) -> ConfigError:
    """An error about a setting; all of them have this form."""
    shown = repr(found) if len(repr(found)) <= 80 else f"{repr(found)[:77]}..."
    return ConfigError(f"{name} (from {source}): expected {expected}, found {shown}; {remedy}")


class Settings(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All settings, read and checked.

    ``sources`` says where each setting that is set was read; ``warnings`` name environment variables with our
    prefix that are no settings. Defaults are not encoded, as every process knows them.
    """

    # fmt: off
    repository: Annotated[str, Setting(
        path, "folder of models, in Triton's layout, or one file NAME.onnx or NAME.pt2",
    )] = ""

    # Listening
    host: Annotated[str, Setting(
        text, "address to listen on; 0.0.0.0 for every interface", GATEWAY,
    )] = "127.0.0.1"
    http_port: Annotated[int, Setting(port, "port of HTTP; 0 lets the system choose", GATEWAY)] = 8000
    grpc_port: Annotated[int | None, Setting(or_off(port), "port of gRPC, or off", GATEWAY)] = 8001
    metrics_port: Annotated[int | None, Setting(or_off(port), "port of /metrics, or off", GATEWAY)] = 8002
    gateways: Annotated[int, Setting(
        integer(1, 64), "gateway processes, which share the HTTP and gRPC ports", GATEWAY,
    )] = 1
    max_body: Annotated[int, Setting(
        size(1024), "largest body of a request over HTTP, and largest message over gRPC",
        GATEWAY, "8MiB over gRPC, else 64MiB", ("body", "bytes", "send less at once"),
    )] = 64 * MIB
    gateway_memory: Annotated[int, Setting(
        size(MIB), "room for tensors in flight, per gateway", GATEWAY | WORKER, "256MiB",
        ("incomplete large bodies", "bytes together", "try again later"),
    )] = 256 * MIB
    model_control: Annotated[bool, Setting(
        switch, "whether clients may load and unload models", GATEWAY,
    )] = True
    shared_memory: Annotated[str | None, Setting(
        prefix_or_off,
        "prefix of the keys of shared memory that clients on this host may use, such as /clockwork-; or off",
        GATEWAY, "off",
    )] = None
    triton: Annotated[bool, Setting(
        switch,
        "answer refusals and missed deadlines with Triton's codes, 503 and UNAVAILABLE, and show requests "
        "under Triton's names of metrics, too: nv_inference_...",
        GATEWAY,
    )] = False
    live_page: Annotated[bool, Setting(
        switch, "whether the metrics port has the live page, with its stream and its tables", GATEWAY,
    )] = True

    # Access and limits
    tls_certificate: Annotated[str, Setting(
        path, "PEM file of the server's certificate chain; turns TLS on", GATEWAY,
    )] = ""
    tls_key: Annotated[str, Setting(
        path, "PEM file of that certificate's key, without a passphrase", GATEWAY,
    )] = ""
    tls_client_ca: Annotated[str, Setting(
        path, "PEM file of authorities; clients must show a certificate of one", GATEWAY,
    )] = ""
    api_keys: Annotated[str, Setting(
        path, "TOML file of API keys and tenants; not set: every client may do everything", GATEWAY,
    )] = ""
    trusted_hosts: Annotated[tuple[str, ...], Setting(
        host_names,
        "more names under which clients and pages may ask for changes without API keys, with commas between",
        GATEWAY, "",
    )] = ()
    max_connections: Annotated[int, Setting(
        integer(1, 1_000_000), "connections at once, per gateway and port", GATEWAY,
        excess=("connections", "of this port at once", "try again later"),
    )] = 10_000
    patience: Annotated[float, Setting(
        number(0.1, 100),
        "factor of the time that clients have: 10 s for a head, 30 s for a body or to read a response, "
        "600 s idle",
        GATEWAY,
    )] = 1.0

    # Deadlines and scheduling
    slo_ms: Annotated[float | None, Setting(
        or_none(number(0, 3_600_000, above=True)),
        "deadline of requests that name none; none: 100 ms, or 5 times what the model takes if that is more",
        GATEWAY, "none",
    )] = None
    decide_ms: Annotated[float | None, Setting(
        or_off(number(0, 3_600_000)),
        "how long the yes or no to a request may take; a yes is a promise; off: until its deadline",
        shown="off",
    )] = None
    policy: Annotated[str, Setting(
        read_policy, "scheduling policy, by name: of this package or installed; it changes no other setting",
    )] = "default"
    max_batch: Annotated[int, Setting(
        integer(1, 1024), "largest batch; a model that declares no max_batch_size has at most 16",
    )] = 64
    slack_ms: Annotated[float, Setting(
        number(0, 1000), "how long before its deadline a request should end",
    )] = 2.0
    quarantine_after: Annotated[int, Setting(
        integer(0, 1000),
        "workers that a model may crash before it is quarantined; 0: any number",
    )] = 3
    watchdog_s: Annotated[float, Setting(
        number(0, 600),
        "seconds that an action may be late before its worker counts as hung, which then has 5 times as long "
        "to respond; any other process has 1.5 times as long; 0: for ever",
        GATEWAY,
    )] = 2.0
    controllers: Annotated[int, Setting(
        integer(1, 2), "controller processes; of 2, one stands by and takes over when the other one ends",
    )] = 1

    # Devices
    device: Annotated[tuple[DeviceChoice, ...], Setting(
        read_devices,
        "cpu, torch-cpu, cuda (each also with :N) or emulated:PROFILE; may be given several times",
        WORKER, "cpu",
    )] = (DeviceChoice("cpu:0", "cpu"),)
    device_memory: Annotated[int | float, Setting(
        size_or_share(MIB),
        "the most memory for weights, per device; a CPU device touches what its models need. For GPUs also a "
        "share of free memory, by default 80%",
        WORKER, "1GB",
    )] = 10**9
    host_memory: Annotated[int, Setting(
        size(0), "weights kept ready in pinned memory, per GPU", WORKER, "1GiB",
    )] = 1024 * MIB
    scratch_memory: Annotated[int, Setting(
        size(5 * MIB),
        "most memory of one batch beside its weights, per device: a fifth for inputs and outputs",
        WORKER, "1280MiB",
    )] = 1280 * MIB
    threads: Annotated[int, Setting(
        integer(1, 1024), "threads that run one model on a CPU device", WORKER,
    )] = 1
    isolate: Annotated[str, Setting(
        one_of("off", "cores", "realtime", "both"),
        "cores: every device has its own; realtime: lanes have real-time priority (needs CAP_SYS_NICE); both",
        WORKER,
    )] = "off"

    # Other machines
    listen_machines: Annotated[str, Setting(
        address, "HOST:PORT where workers and gateways on other machines may join",
    )] = ""
    tensor_port: Annotated[int, Setting(
        port,
        "first port at which gateways give tensors to workers on other machines; 0 lets the system choose",
        GATEWAY,
    )] = 0
    controller: Annotated[str, Setting(
        addresses,
        "HOST:PORT of the server that `clockwork worker` or `gateway` joins; of all controllers, with commas",
        GATEWAY | WORKER,
    )] = ""
    lease: Annotated[str, Setting(
        lease_name,
        "name of the lease in the store by which one of several `clockwork controller` leads",
    )] = "main"
    lease_s: Annotated[float | None, Setting(
        or_none(number(0.2, 600)),
        "seconds without a sign of life there after which another one may lead; none: 1, at a URL 10",
        shown="none",
    )] = None
    machine_name: Annotated[str, Setting(
        machine_name, "name of this machine there; not set: its host name", GATEWAY | WORKER,
    )] = ""
    cluster_certificate: Annotated[str, Setting(
        path, "PEM file of this machine's certificate, for the others", GATEWAY | WORKER,
    )] = ""
    cluster_key: Annotated[str, Setting(
        path, "PEM file of that certificate's key, without a passphrase", GATEWAY | WORKER,
    )] = ""
    cluster_ca: Annotated[str, Setting(
        path, "PEM file of the authority of all machines' certificates", GATEWAY | WORKER,
    )] = ""
    cluster_name: Annotated[str, Setting(
        host_name, "name that the certificates of all machines have", GATEWAY | WORKER,
    )] = CLUSTER_NAME

    # Running
    cache: Annotated[str, Setting(
        path, "folder of compiled models and profiles", WORKER, "~/.cache/clockwork-serve",
    )] = ""
    store: Annotated[str, Setting(
        folder_or_url,
        "folder or URL (s3://BUCKET/NAME) of compiled models and profiles for all machines, behind the cache",
        WORKER,
    )] = ""
    compile_memory: Annotated[int | float, Setting(
        size_or_share(512 * MIB),
        "most memory that compiling and profiling models may take, or a share of the machine's",
        shown="75%",
    )] = 0.75
    drain_s: Annotated[float, Setting(
        number(0, 3600), "seconds for waiting requests to finish when the server stops", GATEWAY | WORKER,
    )] = 10.0
    log_format: Annotated[str, Setting(
        one_of("text", "json"), "text for people, json for collectors", GATEWAY | WORKER,
    )] = "text"
    log_level: Annotated[str, Setting(
        one_of("debug", "info", "warning", "error"), "least level logged", GATEWAY | WORKER,
    )] = "info"
    journal: Annotated[str | None, Setting(
        or_off(path), "where every event and decision is kept: memory, a file, or off", shown="memory",
    )] = IN_MEMORY
    journal_size: Annotated[int | None, Setting(
        or_none(size(MIB)), "most that the journal takes; none: 64MiB in memory, 4GiB in a file",
        shown="none",
    )] = None
    otlp_endpoint: Annotated[str, Setting(
        http_url,
        "URL of a collector of traces, such as http://127.0.0.1:4318; it is sent to by OTLP over HTTP",
    )] = ""
    trace_sample: Annotated[float, Setting(
        number(0, 1), "share of requests that are traced; those refused, failed or late always are",
    )] = 0.1
    scaling_target: Annotated[float | None, Setting(
        or_off(number(0.5, 0.99999)), "share of requests in time that the wanted devices give", shown="off",
    )] = None
    scaling_lead_s: Annotated[float, Setting(number(0, 3600), "seconds until a wanted device serves")] = 60.0
    scaling_devices: Annotated[tuple[int, int], Setting(
        span(1, 10_000), "fewest and most devices that are wanted", shown="1..64",
    )] = (1, 64)
    # fmt: on

    # No settings, but limits and times that some of them set (`parts`), and that tests choose.
    max_message: int = 8 * MIB
    max_json: int = 16 * MIB
    max_head: int = 32 * KIB
    max_headers: int = 100
    max_calls: int = 1000
    max_requests: int = 20_000
    max_unsent: int = 256 * MIB
    head_s: float = 10.0
    body_s: float = 30.0
    send_s: float = 30.0
    idle_s: float = 600.0
    stream_s: float = 600.0
    hang_s: float = 2.0
    hang_grace_s: float = 10.0
    stuck_s: float = 3.0
    workspace: int = 1024 * MIB
    io_memory: int = 256 * MIB
    silence_s: float = 2.0
    compile_s: float = 900.0

    sources: dict[str, str] = {}
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check what concerns several settings. Raises :class:`ConfigError`."""
        seen: dict[int | None, str] = {}
        for name, chosen in self.ports.items():
            if chosen in seen:
                raise self._wrong(
                    name, f"another port than {seen[chosen]}'s", chosen, "choose a free one, or 0"
                )
            if chosen:
                seen[chosen] = name

    def _wrong(self, name: str, expected: str, found: object, remedy: str) -> ConfigError:
        return wrong(name, self.sources.get(name, "default"), expected, found, remedy)

    def is_set(self, name: str) -> bool:
        """Whether the setting is set anywhere, even to its default."""
        return name in self.sources

    def rows(self) -> list[tuple[str, str, str]]:
        """Each setting's name, value, and where that comes from, for a table."""
        return [
            (entry.name, entry.text(getattr(self, entry.name), source), source or "default")
            for entry in SETTINGS
            for source in (self.sources.get(entry.name),)
        ]

    @property
    def largest_batches(self) -> tuple[int, int]:
        """The largest batch of a model that declares none, and of one that declares its own."""
        return min(16, self.max_batch), self.max_batch

    @property
    def has_own_cores(self) -> bool:
        """Whether every device has cores of its own."""
        return self.isolate in {"cores", "both"}

    @property
    def is_realtime(self) -> bool:
        """Whether lanes run at real-time priority."""
        return self.isolate in {"realtime", "both"}

    @property
    def ports(self) -> dict[str, int | None]:
        """The configured ports, by setting; None for off."""
        return {"http_port": self.http_port, "grpc_port": self.grpc_port, "metrics_port": self.metrics_port}

    def journal_path(self, run_dir: str) -> Path | None:
        """The journal's file, of a server with that private folder; None if it is off."""
        if not self.journal:
            return None
        return Path(run_dir, "journal") if self.journal == IN_MEMORY else Path(self.journal)

    @property
    def journal_bytes(self) -> int:
        """The most that the journal's files take."""
        default = JOURNAL_BYTES_IN_MEMORY if self.journal == IN_MEMORY else JOURNAL_BYTES
        return self.journal_size or default

    @property
    def lease_time_s(self) -> float:
        """The time of the lease."""
        far = URL.match(self.store) and not self.store.startswith("file:")
        return self.lease_s or (10.0 if far else 1.0)

    @property
    def has_standby(self) -> bool:
        """Whether another controller stands by, here or elsewhere."""
        return self.controllers > 1 or "," in self.controller

    @property
    def default_slo_ns(self) -> int | None:
        """The SLO of requests and models that set none; None: derived from the model's profile."""
        return None if self.slo_ms is None else ms(self.slo_ms)


def _declared() -> tuple[Setting, ...]:
    """The settings, in the order of their fields."""
    hints = get_type_hints(Settings, include_extras=True)
    found = []
    for field in structs.fields(Settings):
        for declared in getattr(hints[field.name], "__metadata__", ()):
            shown = _plain(field.default) if declared.shown is None else declared.shown
            found.append(structs.replace(declared, name=field.name, default=field.default, shown=shown))
    return tuple(found)


def _plain(default: object) -> str:
    """A default as a person writes it, if there is only one way."""
    if isinstance(default, bool):
        return str(default).lower()
    return f"{plain(default)}" if isinstance(default, int | float) else str(default)


def parts(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are no settings, as the settings that were read set them."""
    defaults = Settings()
    found: dict[str, Any] = {}
    if "patience" in values:
        times = ("head_s", "body_s", "send_s", "idle_s", "stream_s")
        found |= {name: getattr(defaults, name) * values["patience"] for name in times}
    if "watchdog_s" in values:
        late_s = values["watchdog_s"]
        found |= {
            "hang_s": late_s,
            "hang_grace_s": 5 * late_s or 10.0,
            "stuck_s": max(1.0, 1.5 * late_s) if late_s else 0.0,
        }
    if "scratch_memory" in values:
        found["io_memory"], found["workspace"] = split_scratch(values["scratch_memory"])
    if "max_body" in values:
        found["max_message"] = values["max_body"]
    return found


SETTINGS = _declared()
_BY_NAME = {entry.name: entry for entry in SETTINGS}


def setting(name: str) -> Setting:
    """The setting of that name; KeyError is a bug of the caller."""
    return _BY_NAME[name]
