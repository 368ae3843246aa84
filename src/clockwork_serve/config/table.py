"""Every setting: its name, how it is read, its default, what it is for. It reads nothing itself.

One name serves everywhere: ``slo_ms`` in the file is ``CLOCKWORK_SLO_MS`` in the environment and ``--slo-ms``
on the command line (where the command takes it).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from clockwork_serve.config.devices import DeviceChoice, read_devices
from clockwork_serve.config.values import (
    address,
    integer,
    machine_name,
    number,
    one_of,
    path,
    port,
    port_or_off,
    prefix_or_off,
    size,
    size_or_share,
    switch,
    text,
)
from clockwork_serve.units import KIB, MIB

PREFIX = "CLOCKWORK_"


class Setting(Struct, frozen=True):
    """One setting. ``shown`` is its default as a person writes it; ``help`` completes "NAME: ..."."""

    name: str
    read: Callable[[object], Any]
    default: Any
    shown: str
    help: str

    @property
    def variable(self) -> str:
        """Its name in the environment."""
        return PREFIX + self.name.upper()

    @property
    def flag(self) -> str:
        """Its name on the command line."""
        return "--" + self.name.replace("_", "-")


def default_cache(environment: Mapping[str, str]) -> str:
    """Where artefacts are kept unless told otherwise."""
    base = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return str(Path(base) / "clockwork-serve")


SETTINGS = (
    Setting("repository", path, "", "", "folder of models, in Triton's layout"),
    # Listening
    Setting("host", text, "127.0.0.1", "127.0.0.1", "address to listen on; 0.0.0.0 for every interface"),
    Setting("http_port", port, 8000, "8000", "port of HTTP; 0 lets the system choose"),
    Setting("grpc_port", port_or_off, 8001, "8001", "port of gRPC, or off"),
    Setting("metrics_port", port_or_off, 8002, "8002", "port of /metrics, or off"),
    Setting("gateways", integer(1, 64), 1, "1", "gateway processes, which share the HTTP and gRPC ports"),
    Setting("max_body", size(1024), 64 * MIB, "64MiB", "largest body of a request"),
    Setting(
        "max_message", size(1024), 8 * MIB, "8MiB", "largest message over gRPC, and no larger than max_body",
    ),
    Setting("max_json", size(1024), 16 * MIB, "16MiB", "most JSON of a request; tensors may be binary"),
    Setting("gateway_memory", size(MIB), 256 * MIB, "256MiB", "room for tensors in flight, per gateway"),
    Setting("model_control", switch, True, "true", "whether clients may load and unload models"),
    Setting(
        "shared_memory", prefix_or_off, None, "off",
        "prefix of the keys of shared memory that clients on this host may use, such as /clockwork-; or off",
    ),
    Setting(
        "triton_codes", switch, False, "false",
        "answer refusals and missed deadlines as Triton does, with 503 and UNAVAILABLE",
    ),
    # The door
    Setting("tls_certificate", path, "", "", "PEM file of the server's certificate chain; turns TLS on"),
    Setting("tls_key", path, "", "", "PEM file of that certificate's key, without a passphrase"),
    Setting("tls_client_ca", path, "", "", "PEM file of authorities, whose certificates clients must show"),
    Setting("api_keys", path, "", "", "TOML file of API keys and tenants; none: everybody may do everything"),
    Setting(
        "max_connections", integer(1, 1_000_000), 10_000, "10000", "connections at once, per gateway and port"
    ),
    Setting("max_head", size(1024), 32 * KIB, "32KiB", "largest head of a request"),
    Setting("max_headers", integer(1, 10_000), 100, "100", "most headers of a request"),
    Setting("max_calls", integer(1, 1_000_000), 1000, "1000", "open calls of one gRPC connection"),
    Setting("max_requests", integer(1, 10_000_000), 20_000, "20000", "open requests of one gateway"),
    Setting("max_unsent", size(64 * KIB), 256 * MIB, "256MiB", "most that a client may leave unread"),
    Setting("head_s", number(1, 3600), 10.0, "10", "seconds for a request's head, and for a TLS handshake"),
    Setting("body_s", number(1, 3600), 30.0, "30", "seconds for a request's body, and one per 128KiB of it"),
    Setting("send_s", number(1, 3600), 30.0, "30", "seconds to read a response, and one per 128KiB of it"),
    Setting("idle_s", number(1, 86_400), 600.0, "600", "seconds that a connection may be idle"),
    Setting("stream_s", number(1, 86_400), 600.0, "600", "seconds that a gRPC call may say nothing"),
    # Deadlines and scheduling
    Setting(
        "slo_ms", number(0, 3_600_000, above=True), None, "none",
        "deadline of requests that name none; none: 100 ms, or 5 times what the model takes if that is more",
    ),
    Setting("policy", one_of("default", "paper"), "default", "default", "ours, or that of the paper"),
    Setting("reject", switch, True, "true", "refuse a request once no schedule can meet its deadline"),
    Setting("max_batch", integer(1, 1024), 16, "16", "most requests in one batch"),
    Setting("largest_batch", integer(1, 1024), 64, "64", "most that a model's max_batch_size may say"),
    Setting("look_ahead_ms", number(0, 1000, above=True), 5.0, "5", "how far ahead lanes are filled"),
    Setting("slack_ms", number(0, 1000), 2.0, "2", "how long before its deadline a request should end"),
    Setting("queue_limit", integer(1, 1_000_000), 1000, "1000", "waiting requests per model"),
    Setting("retries", integer(0, 100), 1, "1", "times a request on a lost worker is planned again"),
    Setting(
        "quarantine_after", integer(0, 1000), 3, "3",
        "workers that a model may take down before it is not served any more; 0: any number",
    ),
    Setting(
        "hang_s", number(0, 3600), 2.0, "2",
        "seconds that an action may be late before its worker counts as hung; 0: for ever",
    ),
    Setting(
        "hang_grace_s", number(0, 3600, above=True), 10.0, "10",
        "seconds that a hung worker has to answer before it is ended and started again",
    ),
    Setting(
        "stuck_s", number(0, 3600), 3.0, "3",
        "seconds that any other process may not answer before it is ended and started again; 0: for ever",
    ),
    # Devices
    Setting(
        "device", read_devices, (DeviceChoice("cpu:0", "cpu"),), "cpu",
        "cpu, torch-cpu, cuda (each also with :N) or emulated:PROFILE; may be given several times",
    ),
    Setting(
        "device_memory", size_or_share(MIB), 10**9, "1GB",
        "memory for weights, per device; of GPUs also a share of what is free, 80% if nothing is said",
    ),
    Setting(
        "page_size", size(4 * KIB), 256 * KIB, "256KiB",
        "page of that memory: a multiple of 4KiB; of GPUs 16MiB if nothing is said",
    ),
    Setting("host_memory", size(0), 1024 * MIB, "1GiB", "weights kept ready in pinned memory, per GPU"),
    Setting("cuda_graphs", integer(0, 100_000), 256, "256", "CUDA graphs kept, per GPU; 0 for none"),
    Setting("workspace", size(MIB), 1024 * MIB, "1GiB", "most scratch memory of one batch, per device"),
    Setting("io_memory", size(MIB), 256 * MIB, "256MiB", "most inputs and outputs of one batch, per device"),
    Setting("threads", integer(1, 1024), 1, "1", "threads that run one model on a CPU device"),
    Setting("jitter", number(0, 1), 0.0, "0", "share by which emulated durations vary"),
    Setting("seed", integer(0, 1 << 31), 0, "0", "seed of that jitter"),
    Setting("pin", switch, False, "false", "give every device cores of its own"),
    Setting("realtime", switch, False, "false", "run lanes at real-time priority (needs CAP_SYS_NICE)"),
    # Other machines
    Setting(
        "listen_machines", address, "", "", "HOST:PORT where workers and gateways on other machines may join"
    ),
    Setting(
        "controller", address, "", "", "HOST:PORT of the server that `clockwork worker` or `gateway` joins"
    ),
    Setting("machine_name", machine_name, "", "", "what this machine is called there; none: its host name"),
    Setting("cluster_certificate", path, "", "", "PEM file of this machine's certificate, for the others"),
    Setting("cluster_key", path, "", "", "PEM file of that certificate's key, without a passphrase"),
    Setting("cluster_ca", path, "", "", "PEM file of the authority of all machines' certificates"),
    Setting(
        "silence_s", number(0.2, 60), 2.0, "2", "seconds of silence after which the link to a machine is lost"
    ),
    # Running
    Setting("cache", path, None, "~/.cache/clockwork-serve", "folder of compiled models and profiles"),
    Setting(
        "compile_memory", size_or_share(512 * MIB), 0.75, "75%",
        "most memory that compiling and profiling models may take, or a share of the machine's",
    ),
    Setting(
        "compile_s", number(10, 86_400), 900.0, "900",
        "seconds after which compiling that says nothing is stuck, and ended",
    ),
    Setting("drain_s", number(0, 3600), 10.0, "10", "seconds given to waiting requests when it stops"),
    Setting("log_format", one_of("text", "json"), "text", "text", "text for people, json for collectors"),
    Setting("log_level", one_of("debug", "info", "warning", "error"), "info", "info", "least level logged"),
    Setting("journal", path, "", "", "file to which every event and decision is appended"),
)  # fmt: skip

_BY_NAME = {entry.name: entry for entry in SETTINGS}


def setting(name: str) -> Setting:
    """The setting of that name; KeyError is a bug of the caller."""
    return _BY_NAME[name]
