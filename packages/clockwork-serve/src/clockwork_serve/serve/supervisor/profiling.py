"""Profiles of all codes on all kinds of device: read from the cache, or measured now."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec
from msgspec import Struct

from clockwork_serve.devices import DeviceConfig, emulated_profile, profile_kind, runs
from clockwork_serve.errors import DeviceError, printable
from clockwork_serve.messages import Code, Model, Profile
from clockwork_serve.serve.child import SUPERVISOR_PID_VARIABLE
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

REPLY_BYTES: Final = 64
"""The most of a reply of the process that forks those which measure."""

Progress = Callable[[int, int, str], None]
"""Called with (done, total, text) after each code."""


class Profiled(Struct, frozen=True, kw_only=True):
    """The profile of every code on every kind of device that can run it, with warnings about guesses.

    ``problems`` are models that crash the process that runs them, or cannot be prepared. ``measured`` are
    the ids of codes that were measured now, ``left`` of those that were left out for lack of time.
    """

    profiles: tuple[Profile, ...] = ()
    warnings: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()
    measured: frozenset[str] = frozenset()
    left: frozenset[str] = frozenset()

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
    until_s: float = math.inf,
) -> Profiled:
    """Profile each distinct code on each kind of device.

    ``again`` measures codes whose profiles are in the cache, too. ``limit_s`` applies to each code. From
    ``until_s`` on, an instant of the monotonic clock, none is measured but the first.

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
    processes = ProfileProcesses(limit_s)
    found = _Found()
    try:
        for done, (config, models) in enumerate(work, start=1):
            known = _known(models[0].code, config, cache, again=again)
            if known is not None:
                found.profiles.append(known)
            elif found.measured and time.monotonic() >= until_s:
                found.left.add(models[0].code.code_id)
            else:
                found.measured.add(models[0].code.code_id)
                _measure(models, config, processes, cache, found)
            if progress is not None:
                progress(done, len(work), models[0].model.key)
    finally:
        processes.close()
    return Profiled(
        profiles=tuple(found.profiles), warnings=tuple(found.warnings), problems=tuple(found.problems),
        measured=frozenset(found.measured), left=frozenset(found.left),
    )  # fmt: skip


@dataclass(slots=True)
class _Found:
    """What was found so far, as in :class:`Profiled`."""

    profiles: list[Profile] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    measured: set[str] = field(default_factory=set)
    left: set[str] = field(default_factory=set)


def _measure(
    models: list[ServedVersion],
    config: DeviceConfig,
    processes: ProfileProcesses,
    cache: Cache,
    found: _Found,
) -> None:
    """Measure the code that the models share, with the first of them that does not crash."""
    for tried, each in enumerate(models, start=1):
        try:
            measured = processes.measure(each.code, each.model, config)
        except DeviceError as error:
            found.warnings.append(f"model {each.model.key} does not run on {config.device}: {error}")
        except Unprepared as error:
            found.problems.extend([_unprepared(one.model, error) for one in models])
        except Crashed as crash:
            alike = models[tried - 1 :] if tried == TRIES else [each]
            found.problems.extend([_crash(one.model, config, crash) for one in alike])
            if tried < TRIES:
                continue
        else:
            found.profiles.append(measured.profile)
            found.warnings.extend(measured.warnings)
            if not measured.warnings:
                cache.save_profile(measured.profile)
        return


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


def _known(code: Code, config: DeviceConfig, cache: Cache, *, again: bool) -> Profile | None:
    """The profile of a code that needs not be measured."""
    if config.kind == "emulated":
        return emulated_profile(config, code)
    return None if again else cache.profile(code.code_id, profile_kind(config))


class ProfileProcesses:
    """Measures codes, each in a process of its own. All are forked from one, which is started when needed."""

    def __init__(self, limit_s: float = TIME_LIMIT_S) -> None:
        """``limit_s`` applies to each code."""
        self._limit_s = limit_s
        self._parent: subprocess.Popen[bytes] | None = None
        self._requests: socket.socket | None = None

    def measure(self, code: Code, model: Model, config: DeviceConfig) -> MeasuredProfile:
        """Measure a code; if that fails, return a guess and a warning that says why.

        Raises :class:`Crashed` if the process ends by a signal, or without any output, and
        :class:`Unprepared`.
        """
        bare = msgspec.structs.replace(model, labels={}, config=b"{}", warnings=())
        ended = self._run(ProfileConfig(device=config, code=code, model=bare))
        if ended.returncode is None:
            if code.backend == "python" and PREPARED not in ended.stdout:
                raise Unprepared(f"an import that takes longer than {self._limit_s:.0f} s, or for ever")
            return _guessed(code, config, f"model {model.key}: not profiled within {self._limit_s:.0f} s")
        if ended.returncode < 0 or not (ended.stderr if ended.returncode else ended.stdout).strip():
            raise Crashed(describe_exit(ended.returncode))
        if ended.returncode == 0:
            try:
                found: MeasuredProfile | ImportFailed = msgspec.json.decode(
                    ended.stdout.splitlines()[-1], type=MeasuredProfile | ImportFailed
                )
            except (msgspec.MsgspecError, ValueError, RecursionError):
                raise Crashed("ended without a result: does the model end its process?") from None
            if isinstance(found, ImportFailed):
                raise Unprepared(found.why)
            return found
        said = [line for line in ended.stderr.decode(errors="replace").splitlines() if line.strip()]
        why = printable(said[-1]) if said else describe_exit(ended.returncode)
        return _guessed(code, config, f"model {model.key}: profiling failed ({why})")

    def close(self) -> None:
        """End all processes."""
        if self._requests is not None:
            self._requests.close()
            self._requests = None
        if self._parent is not None:
            self._parent.kill()
            self._parent.wait()
            self._parent = None

    def _run(self, config: ProfileConfig) -> _Ended:
        if self._parent is not None and self._parent.poll() is not None:
            self.close()  # it was killed, perhaps for lack of memory
        requests = self._requests or self._start()
        file = os.memfd_create("profile")
        (out, stdout), (err, stderr) = os.pipe(), os.pipe()
        tails = _Tail(out), _Tail(err)
        try:
            with open(file, "wb", closefd=False) as content:
                content.write(msgspec.json.encode(config))
            os.lseek(file, 0, os.SEEK_SET)
            with suppress(OSError):  # if the parent of all has ended, the status tells
                socket.send_fds(requests, [b"."], [file, stdout, stderr])
        finally:
            for fd in (file, stdout, stderr):
                os.close(fd)
        returncode = self._status(requests)
        return _Ended(returncode, tails[0].end(), tails[1].end())

    def _status(self, requests: socket.socket) -> int | None:
        """The exit status of the child that was asked for, or None if it did not end in time."""
        pid = 0
        requests.settimeout(self._limit_s)
        try:
            pid = int(requests.recv(REPLY_BYTES))
            return int(requests.recv(REPLY_BYTES))
        except TimeoutError:
            if pid:
                os.kill(pid, signal.SIGKILL)
                requests.settimeout(None)
                requests.recv(REPLY_BYTES)
            else:
                self.close()
            return None
        except (OSError, ValueError):
            # The parent of all was killed meanwhile, perhaps for lack of memory.
            assert self._parent is not None
            status = self._parent.wait()
            self.close()
            return status

    def _start(self) -> socket.socket:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._parent = subprocess.Popen(
                [
                    sys.executable, "-m", "clockwork_serve.serve.supervisor.profile_process",
                    str(theirs.fileno()),
                ],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=(theirs.fileno(),),
                env={**os.environ, SUPERVISOR_PID_VARIABLE: str(os.getpid())},
            )  # fmt: skip
        return self._requests


class _Ended(NamedTuple):
    """How a child ended (``returncode`` is None if it did not in time), and the last bytes that it wrote."""

    returncode: int | None
    stdout: bytes
    stderr: bytes


class _Tail(threading.Thread):
    """Reads a pipe in a thread, and keeps the last MiB: a model may write without end."""

    def __init__(self, pipe: int) -> None:
        super().__init__(daemon=True)
        self._pipe = pipe
        self._bytes = bytearray()
        self.start()

    def run(self) -> None:
        while data := os.read(self._pipe, 64 * KIB):
            self._bytes += data
            del self._bytes[:-MIB]
        os.close(self._pipe)

    def end(self) -> bytes:
        """The last bytes, once all writers have closed the pipe, or after 1 s: a grandchild may hold it."""
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
