"""Profiles of all codes on all kinds of device: read from the cache, or measured now."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

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
    ClassFailed,
    MeasuredProfile,
    ProfileConfig,
)
from clockwork_serve.store import Problem, ServedVersion
from clockwork_serve.store.settings import shortened
from clockwork_serve.units import KIB, MIB, NS_PER_MS

if TYPE_CHECKING:
    from clockwork_serve.store import Cache

TIME_LIMIT_S: Final = 120.0
"""For profiling one code; if it takes longer, but was prepared, it is served with guessed durations."""

TRIES: Final = 2
"""If this many models of one code crash the process that measures them, the others are not tried."""

REPLY_BYTES: Final = 64  # the most of a reply of the process that forks those which measure


class Crashed(Exception):
    """The process that measured a model crashed; so would a worker."""


class Unprepared(Exception):
    """The model's own code raised at import or load, or its import did not end; the message says which."""


class Profiler:
    """Profiles codes as their models come, each code once on each kind of device.

    ``profiles`` are all so far by code id and kind, ``warnings`` about guesses in them, and ``measured`` the
    ids of codes whose profiles were not in the cache. Without devices nothing is measured, and all profiles
    of a code are taken that there are.
    """

    def __init__(
        self, devices: Sequence[DeviceConfig], cache: Cache, *,
        again: bool = False, limit_s: float = TIME_LIMIT_S,
    ) -> None:  # fmt: skip
        self.profiles: dict[tuple[str, str], Profile] = {}
        self.warnings: list[str] = []
        self.measured: set[str] = set()
        self._devices = {profile_kind(config): config for config in reversed(devices)}
        self._cache = cache
        self._again = again
        self._processes = ProfileProcesses(limit_s)
        # By code id and kind, as profiles: what was looked up, and what needs not be measured any more.
        self._seen: set[tuple[str, str]] = set()
        self._over: set[tuple[str, str]] = set()
        self._problems: dict[tuple[str, str], Callable[[Model], Problem]] = {}  # why not: it never succeeds
        self._crashes: Counter[tuple[str, str]] = Counter()

    def profile(self, each: ServedVersion) -> list[Problem]:
        """Profile the code of a model, unless that was done; the problems of the model."""
        if not self._devices:
            return self._take_all(each)
        found = []
        for kind, config in self._devices.items():
            key = each.code.code_id, kind
            if not self._settled(each.code, config, key):
                self.measured.add(each.code.code_id)
                problem = self._measure(each, config, key)
            else:
                problem = self._problems[key](each.model) if key in self._problems else None
            if problem is not None:
                found.append(problem)
        return found

    def _take_all(self, each: ServedVersion) -> list[Problem]:
        """Take all profiles of the code of a model; its problem if there is none."""
        code_id = each.code.code_id
        profiles = self._cache.profiles(code_id)
        self.profiles.update(((code_id, profile.device_kind), profile) for profile in profiles)
        if profiles:
            return []
        return [
            Problem(
                model=each.model.name, version=each.model.version, field="store",
                expected="a profile of its code", found="none",
                advice="run clockwork profile REPO --store --device KIND for the kinds that will serve",
            )
        ]  # fmt: skip

    def is_known(self, code: Code) -> bool:
        """Whether nothing of a code is still to be measured."""
        return all(
            self._settled(code, config, (code.code_id, kind)) for kind, config in self._devices.items()
        )

    def close(self) -> None:
        """End all processes."""
        self._processes.close()

    def _settled(self, code: Code, config: DeviceConfig, key: tuple[str, str]) -> bool:
        """Whether a code needs not be measured on a kind of device any more; reads the cache once."""
        if key not in self._seen:
            self._seen.add(key)
            known = None
            if not runs(config, code.backend):
                self._over.add(key)
            elif config.kind == "emulated":
                known = emulated_profile(config, code)
                if self._cache.shared is not None and self._cache.profile(*key) != known:
                    self._cache.save_profile(known)  # for servers without such a device
            elif not self._again:
                known = self._cache.profile(*key)
            if known is not None:
                self.profiles[key] = known
                self._over.add(key)
        return key in self._over

    def _measure(self, each: ServedVersion, config: DeviceConfig, key: tuple[str, str]) -> Problem | None:
        try:
            measured = self._processes.measure(each.code, each.model, config)
        except DeviceError as error:
            self.warnings.append(f"model {each.model.key} does not run on {config.device}: {error}")
        except Unprepared as error:
            self._problems[key] = partial(
                _problem, expected="a class that can be imported and loaded", found=shortened(str(error)),
                advice="correct it, and load the model again",
            )  # fmt: skip
        except Crashed as crash:
            crashed = partial(
                _problem, expected=f"a model that runs on {config.device}", found=f"a crash ({crash})",
                advice="it would take the device down for all others; run it by itself to see why",
            )  # fmt: skip
            # Perhaps for its weights: the next model of this code is tried.
            self._crashes[key] += 1
            if self._crashes[key] < TRIES:
                return crashed(each.model)
            self._problems[key] = crashed
        else:
            self.profiles[key] = measured.profile
            self.warnings.extend(measured.warnings)
            if not measured.warnings:
                self._cache.save_profile(measured.profile)
        self._over.add(key)
        return self._problems[key](each.model) if key in self._problems else None


def _problem(model: Model, expected: str, found: str, advice: str) -> Problem:
    return Problem(
        model=model.name, version=model.version, field="model",
        expected=expected, found=found, advice=advice,
    )  # fmt: skip


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
                found: MeasuredProfile | ClassFailed = msgspec.json.decode(
                    ended.stdout.splitlines()[-1], type=MeasuredProfile | ClassFailed
                )
            except (msgspec.MsgspecError, ValueError, RecursionError):
                raise Crashed("ended without a result: does the model end its process?") from None
            if isinstance(found, ClassFailed):
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
        return _Ended(self._status(requests), tails[0].end(), tails[1].end())

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
        finally:
            if pid:
                end_offspring(pid)

    def _start(self) -> socket.socket:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._parent = subprocess.Popen(
                [
                    sys.executable, "-m", "clockwork_serve.serve.supervisor.profile_process",
                    str(theirs.fileno()),
                ],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=(theirs.fileno(),),
                env=environment_of_child(),
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
