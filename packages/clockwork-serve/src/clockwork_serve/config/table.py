"""Every setting: its name, how its value is read, its default, what it is for."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from msgspec import Struct

from clockwork_serve.errors import encodable
from clockwork_serve.units import GIB, KIB, MIB

# ------------------------------------------------------------
# Turns what was written into values, or says what was expected; it knows no setting by name.
#
# A reader takes what TOML gives (typed) and what the environment or the command line gives (text) alike. It
# raises :class:`Unfit`, to which the caller adds the field and the source.


Value = TypeVar("Value")
Read = Callable[[object], Value]

_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(\d{1,5})")
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
_UNITS = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": KIB, "mib": MIB, "gib": GIB, "tib": GIB << 10,
}  # fmt: skip


class Unfit(Exception):
    """A value does not fit; ``expected`` completes "expected ...", ``remedy`` says what to write instead."""

    def __init__(self, expected: str, remedy: str) -> None:
        super().__init__(expected)
        self.expected = expected
        self.remedy = remedy


def text(value: object) -> str:
    """A string that is not empty. Other bytes than UTF-8 can be a file's name, but not be told."""
    if not isinstance(value, str) or not value.strip():
        raise Unfit("text that is not empty", "write it in quotes")
    if "\0" in value or encodable(value) != value:
        raise Unfit("text in UTF-8 without NUL", "rename the file, or link to it under another name")
    return value.strip()


def path(value: object) -> str:
    """A path, with ``~`` resolved."""
    return str(Path(text(value)).expanduser())


def switch(value: object) -> bool:
    """True or false; as text also yes/no, on/off, 1/0."""
    if isinstance(value, bool):
        return value
    word = value.strip().lower() if isinstance(value, str) else ""
    if word in _TRUE or word in _FALSE:
        return word in _TRUE
    raise Unfit("true or false", "write true or false")


def one_of(*choices: str) -> Read[str]:
    """A reader of one word out of ``choices``."""

    def read(value: object) -> str:
        if isinstance(value, str) and value in choices:
            return value
        raise Unfit(f"one of {', '.join(choices)}", did_you_mean(str(value), choices))

    return read


def policy(value: object) -> str:
    """The name of a scheduling policy, of this package's or of an installed one's."""
    from clockwork_serve.controller.config import is_policy, known_policies

    if isinstance(value, str) and is_policy(value):
        return value
    known = known_policies()
    raise Unfit(f"one of {known}", did_you_mean(str(value), known.split(", ")))


def integer(least: int, most: int, what: str = "a whole number") -> Read[int]:
    """A reader of whole numbers in ``least..most``."""
    expected = f"{what} from {least} to {most}"

    def read(value: object) -> int:
        found = value
        if isinstance(found, str) and re.fullmatch(r"\s*[+-]?\d{1,20}\s*", found):
            found = int(found)
        if isinstance(found, int) and not isinstance(found, bool) and least <= found <= most:
            return found
        raise Unfit(expected, f"write {what} in that range")

    return read


def number(least: float, most: float, *, above: bool = False) -> Read[float]:
    """A reader of finite numbers from ``least`` (or only above it) to ``most``."""
    expected = f"a number {'above' if above else 'from'} {least:g} {'and up to' if above else 'to'} {most:g}"

    def read(value: object) -> float:
        try:
            found = float(value) if isinstance(value, str | int | float) else math.nan
        except (ValueError, OverflowError):
            found = math.nan
        if isinstance(value, bool) or not least <= found <= most or (above and found == least):
            raise Unfit(expected, "write a number in that range")
        return found

    return read


def port(value: object) -> int:
    """A TCP port; 0 lets the system choose one."""
    try:
        return integer(0, 65535, "a port")(value)
    except Unfit as unfit:
        raise Unfit("a port from 0 to 65535", "choose a free port; 0 lets the system choose") from unfit


def port_or_off(value: object) -> int | None:
    """A TCP port, or None for ``off``."""
    if value is False or (isinstance(value, str) and value.strip().lower() in {"off", "none"}):
        return None
    try:
        return port(value)
    except Unfit as unfit:
        raise Unfit(f"{unfit.expected}, or off", unfit.remedy) from unfit


def address(value: object) -> str:
    """An address and a port: ``10.0.0.1:7000``, ``[::1]:7000``, ``server:7000``."""
    found = value.strip() if isinstance(value, str) else ""
    if (match := _ADDRESS.fullmatch(found)) and 1 <= int(match[2]) <= 65535:
        return found
    raise Unfit("an address and a port", "write it like 10.0.0.1:7000")


def split_address(found: str) -> tuple[str, int]:
    """The two parts of an :func:`address`."""
    host, _, number = found.rpartition(":")
    return host.strip("[]"), int(number)


def machine_name(value: object) -> str:
    """A short name of letters, digits, dashes, dots and underscores."""
    found = value.strip() if isinstance(value, str) else ""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", found):
        return found
    raise Unfit(
        "up to 64 letters, digits, dashes, dots and underscores, a letter or a digit first",
        "choose a name of those",
    )


def prefix_or_off(value: object) -> str | None:
    """What keys of shared memory begin with, or None for ``off``."""
    if value is False or (isinstance(value, str) and value.strip().lower() in {"off", "none"}):
        return None
    found = value.strip() if isinstance(value, str) else ""
    if not found.startswith("/") or "/" in found[1:] or not found.isprintable() or len(found) > 128:
        raise Unfit(
            "a slash and the first letters of keys, or off",
            "write it like /clockwork-; / alone allows every key",
        )
    return found


def size(least: int) -> Read[int]:
    """A reader of memory sizes from ``least`` bytes: ``1GB`` (decimal), ``512MiB`` (binary), ``4096``."""
    expected = f"a memory size of at least {least} bytes" if least > 1 else "a memory size"
    remedy = "write it like 1GB, 512MiB or a number of bytes"

    def read(value: object) -> int:
        match = _SIZE.fullmatch(str(value)) if isinstance(value, str | int | float) else None
        unit = _UNITS.get(match[2].lower()) if match else None
        if isinstance(value, bool) or match is None or unit is None:
            raise Unfit(expected, remedy)
        found = float(match[1]) * unit
        if not least <= found <= 1 << 50:
            raise Unfit(expected, remedy)
        return round(found)

    return read


def size_or_share(least: int) -> Read[int | float]:
    """A reader of memory sizes (an int, of bytes) or shares of what is free: ``80%`` (a float, 0.8)."""
    read_size = size(least)

    def read(value: object) -> int | float:
        if isinstance(value, str) and value.strip().endswith("%"):
            try:
                return number(0, 100, above=True)(value.strip().removesuffix("%")) / 100
            except Unfit:
                raise Unfit("a share above 0% and up to 100%", "write it like 80%") from None
        try:
            return read_size(value)
        except Unfit as unfit:
            raise Unfit(f"{unfit.expected}, or a share", f"{unfit.remedy}; or 80% for GPUs") from None

    return read


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Advice for a word that is not known: the nearest one, or all of them."""
    names = sorted(known)
    near = get_close_matches(word.lower().replace("-", "_"), names, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}"


# ------------------------------------------------------------
# What ``--device`` may say. It names devices and builds none.
#
# ``cpu`` (the next free number), ``cpu:1`` (that number); ``torch-cpu`` and ``cuda`` likewise (``cuda:1``
# is the GPU of that number); ``emulated:PROFILE`` (a built-in profile or a file).


_KNOWN = "cpu, torch-cpu, cuda (each also with :N) or emulated:PROFILE"
_NUMBERED = ("cpu", "torch-cpu", "cuda")


class DeviceChoice(Struct, frozen=True):
    """A device asked for: its unique name (``cpu:0``), its kind, and for ``emulated`` its profile."""

    device: str
    kind: str
    profile: str = ""


def read_devices(value: object) -> tuple[DeviceChoice, ...]:
    """The devices in a list of specs, or in text with commas between. Raises :class:`Unfit`."""
    specs = value.split(",") if isinstance(value, str) else value
    if not isinstance(specs, list | tuple) or not specs or not all(isinstance(spec, str) for spec in specs):
        raise Unfit(f"{_KNOWN}, one or more", 'write device = ["cpu"] or --device cpu')
    parsed = [_split(spec.strip()) for spec in specs]
    taken = {name for name, _, _ in parsed if name}
    if len(taken) < sum(1 for name, _, _ in parsed if name):
        raise Unfit("each device once", "leave one of the equal ones out, or write cpu without a number")
    return tuple(
        DeviceChoice(name or _next_name(kind, taken), kind, profile) for name, kind, profile in parsed
    )


def _split(spec: str) -> tuple[str, str, str]:
    """Name (empty: to be chosen), kind and profile of one spec."""
    kind, colon, rest = spec.partition(":")
    if kind in _NUMBERED and not colon:
        return "", kind, ""
    if kind in _NUMBERED and rest.isascii() and rest.isdigit():
        return f"{kind}:{int(rest)}", kind, ""
    if kind == "emulated" and rest:
        return "", "emulated", rest
    if kind == "emulated":
        raise Unfit(_KNOWN, "name a profile after the colon: emulated:PROFILE")
    raise Unfit(_KNOWN, f"{spec!r} is none of these")


def _next_name(kind: str, taken: set[str]) -> str:
    number = 0
    while f"{kind}:{number}" in taken:
        number += 1
    taken.add(f"{kind}:{number}")
    return f"{kind}:{number}"


# ------------------------------------------------------------
# Every setting: its name, how it is read, its default, what it is for. It reads nothing itself.
#
# One name serves everywhere: ``slo_ms`` in the file is ``CLOCKWORK_SLO_MS`` in the environment and ``--slo-
# ms`` on the command line (where the command takes it).


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
    Setting("policy", policy, "default", "default", "ours (default), paper, or one that is installed"),
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
