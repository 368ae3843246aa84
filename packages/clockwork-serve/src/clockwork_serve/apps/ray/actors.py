"""The actors: one for each role, which keeps its process, and the directory, which knows all roles.

No request, tensor or timed action passes through an actor: processes speak to each other, by mutual TLS.
"""

from __future__ import annotations

import datetime as dt
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import IO, Any, Final
from urllib.parse import urlsplit

import msgspec
import ray
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from msgspec import Struct

from clockwork_serve.apps.ray.deployment import (
    CONTROLLER_ROLE,
    Bundle,
    ClusterRole,
    bundles_for,
    command_of,
    joined,
)
from clockwork_serve.config import CLUSTER_NAME
from clockwork_serve.errors import described, printable
from clockwork_serve.telemetry.counters import DevicesWanted

PEM: Final = serialization.Encoding.PEM

# ------------------------------------------------------------
# What roles know each other by.


VALID: Final = dt.timedelta(days=3650)


class Credentials(Struct, frozen=True, kw_only=True):
    """Of all roles of a deployment, in PEM: a certificate, which they trust alone, and its key."""

    certificate: bytes
    key: bytes


def new_credentials() -> Credentials:
    """With a name and no address: a node may have several, and roles move."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, CLUSTER_NAME)])
    names = x509.SubjectAlternativeName([x509.DNSName(CLUSTER_NAME)])
    now = dt.datetime.now(dt.UTC)
    made = x509.CertificateBuilder().issuer_name(name).subject_name(name).public_key(key.public_key())
    made = made.serial_number(x509.random_serial_number())
    made = made.not_valid_before(now - dt.timedelta(days=1)).not_valid_after(now + VALID)
    made = made.add_extension(names, critical=False)
    made = made.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    made = made.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    return Credentials(
        certificate=made.sign(key, hashes.SHA256()).public_bytes(PEM),
        key=key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )


# ------------------------------------------------------------
# The directory. Where its node was lost, Ray starts it elsewhere, with the same credentials; roles tell it
# again what and where they are.


DIRECTORY: Final = "directory"


class Register(Struct, frozen=True, kw_only=True):
    """What the directory tells a role: addresses of controllers by name, its own restarts.

    ``wanted``: how many devices Ray is to be asked for; 0: none.
    """

    controllers: dict[str, str] = {}
    restarts: int = 0
    wanted: int = 0


class Directory:
    """Knows a deployment's roles, and has what they know each other by."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials
        self._controllers: dict[str, str] = {}
        self._lives: dict[str, set[str]] = {}
        self._roles: dict[str, ClusterRole] = {}
        self._wanted = 0

    def credentials(self) -> Credentials:
        """Those that a role is created with."""
        return self._credentials

    def roles(self) -> dict[str, ClusterRole]:
        """All that were ever alive, and are not forgotten."""
        return self._roles

    def beat(self, role: ClusterRole, life: str, address: str) -> Register:
        """A role is alive; ``life`` is its actor's, ``address`` a controller's, once it has one."""
        self._roles[role.name] = role
        lives = self._lives.setdefault(role.name, set())
        lives.add(life)
        if address:
            self._controllers[role.name] = address
        return Register(controllers=self._controllers, restarts=len(lives) - 1, wanted=self._wanted)

    def forget(self, *names: str) -> None:
        """These roles are no more."""
        for name in names:
            self._controllers.pop(name, None)
            self._lives.pop(name, None)
            self._roles.pop(name, None)

    def want(self, devices: int) -> int:
        """From now on so many devices are wanted, 0: nobody says how many; returns how many were before."""
        before, self._wanted = self._wanted, devices
        return before

    def bundles(self) -> list[Bundle]:
        """What Ray is to be asked for."""
        return bundles_for(self._wanted, self._roles.values()) if self._wanted else []


def namespaces() -> list[str]:
    """Of all deployments of this Ray cluster."""
    found = ray.util.list_named_actors(all_namespaces=True)
    return sorted(each["namespace"] for each in found if each["name"] == DIRECTORY)


def request_devices() -> None:
    """Ask Ray's autoscaler for nodes that have what all deployments want.

    It knows one request, the last, whoever made it. A directory that says nothing now is asked again by its
    own controller.
    """
    import ray.autoscaler.sdk as autoscaler  # which is large

    asked = []
    for namespace in namespaces():
        with suppress(ValueError):  # it has just ended
            asked.append(ray.get_actor(DIRECTORY, namespace=namespace).bundles.remote())
    found: list[Bundle] = []
    if asked:
        answered, _ = ray.wait(asked, num_returns=len(asked), timeout=PATIENCE_S)
        for reference in answered:
            with suppress(ray.exceptions.RayError):
                found += ray.get(reference)
    autoscaler.request_resources(
        bundles=[bundle.resources for bundle in found],
        bundle_label_selectors=[bundle.labels for bundle in found],
    )


# ------------------------------------------------------------
# The actor of a role.


BEAT_S, TEND_S, PATIENCE_S = 1.0, 0.1, 3.0
REQUEST_S: Final = 10.0
"""How often Ray is asked for devices again, for others may have asked since."""
PAUSE_S, PAUSE_S_MAX, STEADY_S = 0.1, 10.0, 10.0
"""Between starts: the first pause, doubled up to the last; after a run that long, the first again."""
LIVES_S: Final = 3.0
"""A worker that has lived for so long is taken to be well."""
COMPLETE_S: Final = 30.0
"""So long a role waits until all controllers have an address; then some will do."""
TURN_S: Final = 15.0
"""Roles that know one controller of two are started again in turns of this length."""
LAUNCH: Final = (
    "import ctypes, os, sys\n"
    "ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)\n"  # SIGKILL at the end of the thread that started it
    "if os.getppid() != int(sys.argv[1]): sys.exit()\n"
    "try: os.setpriority(os.PRIO_PROCESS, 0, 0)\n"  # Ray's processes have 15, which may be for ever
    "except OSError: pass\n"
    "os.execv(sys.argv[2], sys.argv[2:])"
)
"""The program that becomes a role's process: one that ends with its actor, however that ends."""


class RoleReport(Struct, frozen=True, kw_only=True):
    """What an actor says of its role. ``at`` are addresses, ``said`` what its process said when it ended.

    ``wanted``: of who leads, how many devices Ray is asked for; 0: none.
    """

    role: ClusterRole
    node: str
    host: str
    state: str
    pid: int | None
    leads: bool
    nice: int
    restarts: int
    at: dict[str, str]
    said: str
    log: str
    wanted: int = 0


class RoleActor:
    """The actor of a role: starts its process, again when it ended, and ends it with itself."""

    def __init__(self, role: ClusterRole, credentials: Credentials) -> None:
        here = ray.get_runtime_context()
        self._role = role
        self._host: str = ray.util.get_node_ip_address()
        self._node: str = here.get_node_id()
        self._directory = ray.get_actor(DIRECTORY, namespace=here.namespace)
        self._folder, self._lock = _private_folder(f"{here.namespace}-{self._node[:12]}-{role.name}")
        for what, content in msgspec.structs.asdict(credentials).items():
            path = Path(self._file(what))
            path.touch(mode=0o600)
            path.write_bytes(content)
        self._register = Register()
        self._address = ""  # of a controller, once it has a port
        self._child: subprocess.Popen[bytes] | None = None
        self._facts: dict[str, Any] = {}  # that it has told
        self._known: frozenset[str] = frozenset()  # controllers that it was told
        self._started_s = self._changed_s = time.monotonic()
        self._restarts = self._failures = 0
        self._said = ""
        self._requested_s = -REQUEST_S
        self._unrequested = False  # the directory knows what is wanted, and Ray perhaps not
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def report(self) -> RoleReport:
        """How it is."""
        child = self._child
        pid = child.pid if child is not None and child.poll() is None else None
        at = {name: str(self._facts[name]) for name in ("http", "grpc", "metrics") if self._facts.get(name)}
        if self._address:
            at = {"machines": self._address, **at}
        leads = pid is not None and self._role.kind == CONTROLLER_ROLE and _is_ready(at.get("metrics", ""))
        return RoleReport(
            role=self._role, node=self._node, host=self._host, state=self._state(pid, at), pid=pid,
            leads=leads, nice=os.getpriority(os.PRIO_PROCESS, pid or 0), at=at, said=self._said,
            restarts=self._restarts + self._register.restarts, log=str(self._folder / "log"),
            wanted=self._register.wanted if leads else 0,
        )  # fmt: skip

    def _state(self, pid: int | None, at: dict[str, str]) -> str:
        if self._stopped.is_set():
            return "stopped"
        if pid is not None:
            match self._role.kind:
                case "gateway":
                    ready = _is_ready(at.get("http", ""))
                case "controller":
                    ready = bool(self._facts)
                case _:  # which says nothing: what is wrong with its settings ends it sooner
                    ready = time.monotonic() - self._started_s >= LIVES_S
            if ready:
                return "ready"
        return "failing" if self._failures > 1 else "starting" if pid is not None else "waiting"

    def stop(self) -> None:
        """End the process, which finishes what waits; returns when it has ended."""
        self._stopped.set()
        self._thread.join()
        shutil.rmtree(self._folder, ignore_errors=True)
        os.close(self._lock)

    def _keep(self) -> None:
        """In a thread of its own, which lives as long as the actor, for the process ends with it."""
        beaten_s = -BEAT_S
        while not self._stopped.wait(TEND_S):
            try:
                beats = time.monotonic() - beaten_s >= BEAT_S
                if beats:
                    self._beat()
                    beaten_s = time.monotonic()
                self._tend()
                if beats and self._role.kind == CONTROLLER_ROLE:
                    self._follow_advice()
            except Exception as error:  # noqa: BLE001 - whatever it is, it is said, and tried again
                self._said = described(error)
        self._end()

    def _beat(self) -> None:
        """Tell the directory that the role is alive, and learn where controllers are."""
        beat = self._directory.beat.remote(self._role, f"{self._node}:{os.getpid()}", self._address)
        self._register = ray.get(beat, timeout=PATIENCE_S)
        if self._role.kind == CONTROLLER_ROLE and not self._address:
            before = self._register.controllers.get(self._role.name, "")
            self._address = joined(self._host, self._role.port or _free_port(self._host, before))

    def _follow_advice(self) -> None:
        """Have Ray asked for the devices that the server wants; for none once it does not say how many."""
        if not self._facts:  # it starts
            return
        file = str(self._facts.get("devices_wanted", ""))
        said = DevicesWanted.read(Path(file), time.monotonic_ns()) if file else None
        if file and said is None:  # it stands by, or does not know: all stays as it is
            return
        wanted = 0 if said is None else said.wanted
        now_s = time.monotonic()
        if wanted != self._register.wanted:
            self._unrequested = True
            ray.get(self._directory.want.remote(wanted), timeout=PATIENCE_S)
        elif wanted and now_s - self._requested_s >= REQUEST_S:
            self._unrequested = True
        if self._unrequested:
            self._requested_s = now_s
            request_devices()
            self._unrequested = False

    def _file(self, what: str) -> str:
        return str(self._folder / f"{what}.pem")

    def _tend(self) -> None:
        """Start the process, or once more."""
        now_s = time.monotonic()
        child = self._child
        if child is not None and child.poll() is not None:
            self._failures = 1 if now_s - self._started_s >= STEADY_S else self._failures + 1
            self._restarts += 1
            self._said = f"ended with {child.returncode}: {_last_line(self._folder / 'log')}"
            self._child = child = None
        if child is not None:
            if self._outdated(now_s):
                self._end()
            return
        there, waited_s = len(self._register.controllers), now_s - self._started_s
        enough = there >= self._role.controllers or (there and waited_s >= COMPLETE_S)
        pause_s = min(PAUSE_S_MAX, PAUSE_S * 2**self._failures) if self._failures else 0.0
        if (enough or self._address) and waited_s >= pause_s:
            self._start()

    def _outdated(self, now_s: float) -> bool:
        """Whether it must learn of other controllers: at once if it knows none, else when it is its turn."""
        there = frozenset(self._register.controllers.values())
        if self._role.kind == CONTROLLER_ROLE or there <= self._known:
            self._changed_s = now_s
            return False
        return now_s - self._changed_s >= (TURN_S * (1 + self._role.number) if self._known & there else 0)

    def _start(self) -> None:
        controllers = sorted(self._register.controllers.values())
        port = int(self._address.rpartition(":")[2] or 0)
        command = command_of(self._role, self._host, port, controllers, self._file)
        self._facts, self._known, self._started_s = {}, frozenset(controllers), time.monotonic()
        with (self._folder / "log").open("ab") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", LAUNCH, str(os.getpid()), *command],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
            )  # fmt: skip
        threading.Thread(target=_listen, args=(self._child.stdout, self._facts), daemon=True).start()

    def _end(self) -> None:
        """End the process by its pid: it drains; if that takes too long, it is killed."""
        child, self._child = self._child, None
        if child is None:
            return
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(self._role.grace_s)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _private_folder(name: str) -> tuple[Path, int]:
    """A folder of this user alone, the same one for each life of an actor on a node, and a lock on it.

    Folders whose lock nobody holds are removed, for keys are in them: their node was lost. Raises OSError.
    """
    top = Path(tempfile.gettempdir(), f"clockwork-ray-{os.geteuid()}")
    top.mkdir(mode=0o700, exist_ok=True)
    found = top.lstat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise PermissionError(f"expected {top} to be a folder of this user alone; remove it")
    alone = _locked(top / "lock", fcntl.LOCK_EX)  # another actor could remove what is not locked yet
    try:
        (top / name).mkdir(exist_ok=True)
        held = _locked(top / name / "lock", fcntl.LOCK_SH)
        for lock in top.glob("*/lock"):
            with suppress(OSError):  # it is held, or its actor removes it now
                os.close(_locked(lock, fcntl.LOCK_EX | fcntl.LOCK_NB))
                shutil.rmtree(lock.parent, ignore_errors=True)
    finally:
        os.close(alone)
    return top / name, held


def _locked(file: Path, how: int) -> int:
    """A descriptor that keeps a lock on a file until it is closed. Raises OSError."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, how)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _listen(stdout: IO[bytes], facts: dict[str, Any]) -> None:
    """Note what a process says, in lines of JSON, until it ends."""
    with stdout:
        for line in stdout:
            with suppress(ValueError):
                facts.update(json.loads(line))


def _free_port(host: str, before: str) -> int:
    """A port that is free now: that of the address which another life had here, if there is one."""
    number = int(before.rpartition(":")[2]) if before.startswith(joined(host, 0)[:-1]) else 0
    for port in (number, 0):
        with suppress(OSError), socket.create_server((host, port)) as found:
            return int(found.getsockname()[1])
    raise OSError(f"no port is free at {host}")


def _is_ready(url: str) -> bool:
    """Whether who listens there serves, or leads. With TLS of an authority not known here: it listens."""
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname is None:
        return parts.scheme == "https"
    with closing(HTTPConnection(parts.hostname, parts.port, timeout=1)) as connection:
        try:
            connection.request("GET", "/v2/health/ready")
            return connection.getresponse().status == 200
        except (OSError, HTTPException):
            return False


def _last_line(log: Path) -> str:
    lines = log.read_bytes()[-4096:].decode(errors="replace").splitlines()
    return printable(next((line for line in reversed(lines) if line.strip()), ""))
