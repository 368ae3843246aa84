"""A device that computes nothing and sleeps for the durations of a profile.

Durations come from ``profile.json`` in the code's folder for codes of backend ``emulated``::

    {"infer_ns": {"1": 2000000, "4": 5000000}, "load_ns": 8000000}

and for codes of other backends from the TOML file that ``DeviceConfig.profile`` names (a path, or the name of
one in ``devices/profiles``)::

    [device]                # optional, for emulated_config: what such a device has
    memory_bytes = 17179869184
    page_bytes = 16777216

    [load]
    base_us = 50.0          # of each LOAD
    gb_per_s = 12.0         # 10^9 bytes per second

    [infer_ms]              # by batch size, for every code; linear between two sizes and beyond the last two
    1 = 2.6
    16 = 20.0

    [codes.CODE_ID]         # optional, for one code
    infer_ms = {1 = 1.0, 16 = 9.0}
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

from clockwork_serve.devices.arena import span
from clockwork_serve.devices.base import (
    CallBuffers,
    DeviceConfig,
    Phases,
    PreparedCodes,
    Underway,
    io_bytes,
    plan_outputs,
    rows_of,
    sleep_precisely,
)
from clockwork_serve.devices.files import read_record
from clockwork_serve.errors import ConfigError
from clockwork_serve.messages import Code, Infer, Load, Profile, TensorRef, Unload
from clockwork_serve.units import MIB, NS_PER_US, ms

DEFAULT_PROFILE: Final = "v100"
PROFILE_FILE: Final = "profile.json"  # the durations of a code of backend ``emulated``, in its folder


class CodeProfile(Struct, frozen=True, kw_only=True):
    """``profile.json``: durations of one emulated code."""

    infer_ns: dict[int, int]
    load_ns: int


class DeviceTable(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[device]`` of a profile file."""

    memory_bytes: int | None = None
    page_bytes: int | None = None
    workspace_bytes: int | None = None
    io_bytes: int | None = None


class EmulatedLoad(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[load]`` of a profile file."""

    base_us: float = 0.0
    gb_per_s: float


class CodeTable(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[codes.ID]`` of a profile file."""

    infer_ms: dict[int, float]


class ProfileFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole profile file."""

    load: EmulatedLoad
    infer_ms: dict[int, float]
    device: DeviceTable = DeviceTable()
    codes: dict[str, CodeTable] = {}


# Built before there are threads: the lanes of many devices prepare at once, and msgspec ends the process with
# a segmentation fault where two threads are the first to need what it knows of a type.
_code_profiles: Final = msgspec.json.Decoder(CodeProfile, strict=False)
msgspec.json.Decoder(ProfileFile)  # for TOML there is none to keep; msgspec caches what it knows of the type


BACKENDS: Final = ("onnx", "torch", "emulated")
"""A Python model is a program, whose duration and outputs no profile knows: it is not answered with zeros."""


class EmulatedDevice:
    """Occupies a lane for the durations of a profile; outputs are zeros of the right shape."""

    def __init__(
        self, config: DeviceConfig, clock: Callable[[], int] = time.monotonic_ns,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:  # fmt: skip
        self._config = config
        self._clock = clock
        self._sleep = sleep
        self._random = random.Random(config.seed)
        self._thread = threading.local()
        self._ready = PreparedCodes[tuple[Code, Profile]](config.device)
        self._layouts: dict[tuple[str, int], tuple[list[TensorRef], int]] = {}  # by code and rows of a call
        pages = config.memory_bytes // config.page_bytes
        self.spec = config.spec(device_kind(config), pages, backends=BACKENDS)

    def prepare(self, code: Code) -> None:
        """Read the code's durations."""
        if code.code_id not in self._ready:
            self._ready[code.code_id] = (code, emulated_profile(self._config, code))

    def retire(self, code_id: str) -> None:
        """Delete the code's durations."""
        self._ready.pop(code_id, None)
        for key in [key for key in self._layouts if key[0] == code_id]:
            del self._layouts[key]

    def load(self, action: Load) -> int:
        """Sleep as long as copying ``action.weights.size`` bytes takes."""
        self._wait(self.begin_load(action).end_ns)
        return 0

    def begin_load(self, action: Load) -> Underway:
        """When copying ``action.weights.size`` bytes from now ends."""
        end_ns = self._clock() + self._vary(self._ready[action.code_id][1].load_ns(action.weights.size))
        span(action.extent, 0, self.spec.pages, self.spec.page_bytes)
        return Underway(end_ns)

    def unload(self, action: Unload) -> None:
        """No-op."""

    def infer(self, action: Infer, calls: Sequence[CallBuffers]) -> Phases:
        """Write zeros, then sleep until the duration has passed."""
        started_ns = self._clock()
        underway = self.begin_infer(action, calls)
        self._wait(underway.end_ns)
        return Phases(0, self._clock() - started_ns - underway.output_ns, underway.output_ns)

    def begin_infer(self, action: Infer, calls: Sequence[CallBuffers]) -> Underway:
        """Write zeros; the duration is from now."""
        started_ns = self._clock()
        code, profile = self._ready[action.code_id]
        rows = rows_of(code, action, calls)
        end_ns = started_ns + self._vary(interpolate(profile.infer_ns, action.batch))
        for call, count in zip(calls, rows, strict=True):
            _put_zeros(call, *self._layout(code, count))
        return Underway(end_ns, self._clock() - started_ns)

    def close(self) -> None:
        """No-op."""

    def _layout(self, code: Code, rows: int) -> tuple[list[TensorRef], int]:
        """Where the outputs of a call of so many rows are in its room, and where they end."""
        layout = self._layouts.get((code.code_id, rows))
        if layout is None:
            layout = self._layouts[code.code_id, rows] = plan_outputs(code, rows)
        return layout

    def _vary(self, duration_ns: int) -> int:
        jitter = self._config.jitter
        return round(duration_ns * (1 + self._random.uniform(-jitter, jitter))) if jitter else duration_ns

    def _wait(self, end_ns: int) -> None:
        if not getattr(self._thread, "precise", False):
            sleep_precisely()
            self._thread.precise = True
        left = end_ns - self._clock()
        if left > 0:
            self._sleep(left / 1e9)


def emulated_config(device: str, profile: str, **settings: Any) -> DeviceConfig:
    """The config of an emulated device: sizes of the profile's ``[device]``, overridden by ``settings``."""
    table = msgspec.structs.asdict(read_profile(profile).device)
    sizes = {name: value for name, value in table.items() if value is not None}
    return DeviceConfig(device=device, kind="emulated", profile=profile, **{**sizes, **settings})


def device_kind(config: DeviceConfig) -> str:
    """The kind that selects profiles of this device: ``emulated:NAME``."""
    return f"emulated:{Path(config.profile or DEFAULT_PROFILE).stem}"


def emulated_profile(config: DeviceConfig, code: Code) -> Profile:
    """The durations of a code on an emulated device, no jitter; ConfigError or DeviceError if invalid."""
    if code.backend == "emulated":
        own = _read_code_profile(code)
        curve, base, per_mib = own.infer_ns, own.load_ns, 0
    else:
        file = read_profile(config.profile or DEFAULT_PROFILE)
        table = file.codes.get(code.code_id)
        milliseconds = table.infer_ms if table else file.infer_ms
        curve = {size: ms(value) for size, value in milliseconds.items()}
        base = round(file.load.base_us * NS_PER_US)
        per_mib = round(MIB / file.load.gb_per_s)
    sizes = code.batch_sizes
    return Profile(
        code_id=code.code_id, device_kind=device_kind(config),
        infer_ns={size: interpolate(curve, size) for size in sizes}, load_base_ns=base,
        load_ns_per_mib=per_mib, workspace_bytes=dict.fromkeys(sizes, 0),
        io_bytes={size: io_bytes(code, size) for size in sizes},
    )  # fmt: skip


def interpolate(curve: Mapping[int, int], size: int) -> int:
    """The value at ``size``: linear between two points, and beyond them along the nearest two; at least 0."""
    if size in curve:
        return curve[size]
    points = sorted(curve.items())
    if len(points) == 1:
        return points[0][1] * size // points[0][0]
    above = next((i for i, (x, _) in enumerate(points) if x > size), len(points) - 1)
    (x0, y0), (x1, y1) = points[max(above, 1) - 1], points[max(above, 1)]
    return max(0, y0 + (y1 - y0) * (size - x0) // (x1 - x0))


def read_profile(name: str) -> ProfileFile:
    """A profile file by path, or a built-in one by name; ConfigError naming what is wrong."""
    path, builtin = Path(name), Path(__file__).parent / "profiles"
    try:
        text = path.read_text() if path.suffix == ".toml" else (builtin / f"{name}.toml").read_text()
        file = msgspec.toml.decode(text, type=ProfileFile, strict=False)
    except OSError as error:
        known = ", ".join(sorted(p.name[:-5] for p in builtin.iterdir() if p.name.endswith(".toml")))
        raise ConfigError(
            f"profile: expected a .toml file or one of: {known}; found {name!r} ({error.strerror})"
        ) from error
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ConfigError(f"profile {name}: {error}") from error
    _check_curve(f"profile {name}: infer_ms", file.infer_ms)
    for code_id, table in file.codes.items():
        _check_curve(f"profile {name}: codes.{code_id}.infer_ms", table.infer_ms)
    if file.load.gb_per_s <= 0 or file.load.base_us < 0:
        raise ConfigError(f"profile {name}: load: expected gb_per_s > 0 and base_us >= 0, found {file.load}")
    return file


def _read_code_profile(code: Code) -> CodeProfile:
    profile = read_record(code, PROFILE_FILE, _code_profiles)
    _check_curve(f"code {code.path}/{PROFILE_FILE}: infer_ns", profile.infer_ns)
    return profile


def _check_curve(where: str, curve: Mapping[int, float]) -> None:
    if not curve or min(curve) < 1 or min(curve.values()) <= 0:
        raise ConfigError(f"{where}: expected a duration above 0 for at least one batch size, found {curve}")


def _put_zeros(call: CallBuffers, refs: list[TensorRef], end: int) -> None:
    """Fill the outputs, which end there, with zeros: the wire form of empty strings, too."""
    if end > len(call.output):
        call.grow(end)
    call.output[:end] = bytes(end)
    call.outputs[:] = refs
