"""Profiles of all codes on all kinds of device: read from the cache, or measured now."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import IO, TYPE_CHECKING, Final, NamedTuple

import msgspec
from msgspec import Struct

from clockwork_serve.devices import DeviceConfig, emulated_profile, profile_kind, runs
from clockwork_serve.errors import DeviceError, printable
from clockwork_serve.messages import Code, Model, Profile
from clockwork_serve.serve.child import environment_of_child
from clockwork_serve.serve.offspring import end_offspring
from clockwork_serve.serve.supervisor.processes import describe_exit
from clockwork_serve.serve.supervisor.profile_process import (
    LOAD_BASE_NS,
    PREPARED,
    REFUSED_NS,
    WORKSPACE_MIN,
    ImportFailed,
    MeasuredProfile,
    ProfileConfig,
)
from clockwork_serve.store import Problem, ServedVersion
from clockwork_serve.store.settings import shown
from clockwork_serve.units import KIB, MIB, NS_PER_MS

if TYPE_CHECKING:
    from clockwork_serve.store import Cache

TIME_LIMIT_S: Final = 120.0
"""For profiling one code; if it takes longer, but was prepared, it is served with guessed durations."""

TRIES: Final = 2
"""If this many models of one code crash the process that measures them, the others are not tried."""

_Found = MeasuredProfile | ImportFailed
Progress = Callable[[int, int, str], None]
"""Called with (done, total, text) after each code."""


class Profiled(Struct, frozen=True, kw_only=True):
    """The profile of every code on every kind of device that can run it, with warnings about guesses.

    ``problems`` are models that crash the process that runs them, or cannot be prepared.
    """

    profiles: tuple[Profile, ...] = ()
    warnings: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()

    def without_problems(self, served: Sequence[ServedVersion]) -> tuple[ServedVersion, ...]:
        """``served`` without the models that have a problem."""
        failed = {f"{problem.model}/{problem.version}" for problem in self.problems}
        return tuple([each for each in served if each.model.key not in failed])


class Crashed(Exception):
    """The process that measured a model crashed; so would a worker."""


class Unprepared(Exception):
    """The import of the model's own code raised, or did not end; the message says which."""


def profile_all(
    served: Sequence[ServedVersion],
    devices: Sequence[DeviceConfig],
    cache: Cache,
    progress: Progress | None = None,
    *,
    again: bool = False,
    limit_s: float = TIME_LIMIT_S,
) -> Profiled:
    """Profile each distinct code on each kind of device.

    ``again`` measures codes whose profiles are in the cache, too. ``limit_s`` applies to each code.

    Raises :class:`ConfigError` if a device's configuration is wrong.
    """
    sharing: dict[str, list[ServedVersion]] = {}
    for each in served:
        sharing.setdefault(each.code.code_id, []).append(each)
    kinds = {profile_kind(config): config for config in reversed(devices)}
    work = [
        (config, models)
        for config in kinds.values()
        for models in sharing.values()
        if runs(config, models[0].code.backend)
    ]
    profiles: list[Profile] = []
    warnings: list[str] = []
    problems: list[Problem] = []
    for done, (config, models) in enumerate(work, start=1):
        for tried, each in enumerate(models, start=1):
            try:
                measured = _profile_one(each.code, each.model, config, cache, again=again, limit_s=limit_s)
                profiles.append(measured.profile)
                warnings.extend(measured.warnings)
            except DeviceError as error:
                warnings.append(f"model {each.model.key} does not run on {config.device}: {error}")
            except Unprepared as error:
                problems.extend([_unprepared(one.model, error) for one in models])
            except Crashed as crash:
                alike = models[tried - 1 :] if tried == TRIES else [each]
                problems.extend([_crash(one.model, config, crash) for one in alike])
                if tried < TRIES:
                    continue
            break
        if progress is not None:
            progress(done, len(work), models[0].model.key)
    return Profiled(profiles=tuple(profiles), warnings=tuple(warnings), problems=tuple(problems))


def _crash(model: Model, config: DeviceConfig, crash: Crashed) -> Problem:
    return Problem(
        model=model.name,
        version=model.version,
        field="model",
        expected=f"a model that runs on {config.device}",
        found=f"a crash ({crash})",
        advice="it would take the device down for all others; run it by itself to see why",
    )


def _unprepared(model: Model, error: Unprepared) -> Problem:
    return Problem(
        model=model.name,
        version=model.version,
        field="model",
        expected="a class that can be imported",
        found=shown(str(error)),
        advice="correct it, and load the model again",
    )


def _profile_one(
    code: Code, model: Model, config: DeviceConfig, cache: Cache, *, again: bool, limit_s: float
) -> MeasuredProfile:
    if config.kind == "emulated":
        return MeasuredProfile(profile=emulated_profile(config, code))
    known = None if again else cache.profile(code.code_id, profile_kind(config))
    if known is not None:
        return MeasuredProfile(profile=known)
    measured = measure_apart(code, model, config, limit_s)
    if not measured.warnings:
        cache.save_profile(measured.profile)
    return measured


def measure_apart(
    code: Code, model: Model, config: DeviceConfig, limit_s: float = TIME_LIMIT_S
) -> MeasuredProfile:
    """Measure in a process of its own; if that fails, return a guess and a warning that says why.

    Raises :class:`Crashed` if the process ends by a signal, or without any output, and :class:`Unprepared`.
    """
    # Without fields that are not needed, for the system limits the length of an argument.
    bare = msgspec.structs.replace(model, labels={}, config=b"{}", warnings=())
    argument = msgspec.json.encode(ProfileConfig(device=config, code=code, model=bare)).decode()
    command = [sys.executable, "-m", "clockwork_serve.serve.supervisor.profile_process", argument]
    ended = _run(command, limit_s)
    if ended.returncode is None:
        if code.backend == "python" and PREPARED not in ended.stdout:
            raise Unprepared(f"an import that takes longer than {limit_s:.0f} s, or for ever")
        return _guessed(code, config, f"model {model.key}: not profiled within {limit_s:.0f} s")
    if ended.returncode < 0 or not (ended.stderr if ended.returncode else ended.stdout).strip():
        raise Crashed(describe_exit(ended.returncode))
    if ended.returncode == 0:
        try:
            found: MeasuredProfile | ImportFailed = msgspec.json.decode(
                ended.stdout.splitlines()[-1], type=_Found
            )
        except (msgspec.MsgspecError, ValueError, RecursionError):
            raise Crashed("ended without a result: does the model end its process?") from None
        if isinstance(found, ImportFailed):
            raise Unprepared(found.why)
        return found
    said = [line for line in ended.stderr.decode(errors="replace").splitlines() if line.strip()]
    why = printable(said[-1]) if said else describe_exit(ended.returncode)
    return _guessed(code, config, f"model {model.key}: profiling failed ({why})")


class _Ended(NamedTuple):
    """How a child ended (``returncode`` is None if it did not in time), and the last bytes that it wrote."""

    returncode: int | None
    stdout: bytes
    stderr: bytes


def _run(command: Sequence[str], limit_s: float) -> _Ended:
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment_of_child(),
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    stdout, stderr = _Tail(process.stdout), _Tail(process.stderr)
    try:
        returncode: int | None = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        returncode = None
    finally:
        process.kill()
        process.wait()
        end_offspring(process.pid)
    return _Ended(returncode, stdout.end(), stderr.end())


class _Tail(threading.Thread):
    """Reads a pipe in a thread, and keeps the last MiB: a model may write without end."""

    def __init__(self, pipe: IO[bytes]) -> None:
        super().__init__(daemon=True)
        self._pipe = pipe
        self._bytes = bytearray()
        self.start()

    def run(self) -> None:
        with self._pipe as pipe:
            while data := os.read(pipe.fileno(), 64 * KIB):
                self._bytes += data
                del self._bytes[:-MIB]

    def end(self) -> bytes:
        """The last bytes, once all writers have closed the pipe, or after 1 s."""
        self.join(1.0)
        return bytes(self._bytes)


def _guessed(code: Code, config: DeviceConfig, warning: str) -> MeasuredProfile:
    sizes = code.batch_sizes
    return MeasuredProfile(
        profile=Profile(
            code_id=code.code_id,
            device_kind=profile_kind(config),
            infer_ns={size: REFUSED_NS * size for size in sizes},
            load_base_ns=LOAD_BASE_NS,
            load_ns_per_mib=NS_PER_MS,
            workspace_bytes=dict.fromkeys(sizes, WORKSPACE_MIN),
            guessed=True,
        ),
        warnings=(f"{warning}; its durations are a guess until it serves",),
    )
