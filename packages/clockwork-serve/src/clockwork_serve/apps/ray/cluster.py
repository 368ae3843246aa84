"""What ``clockwork ray`` does: joins a Ray cluster, brings roles about, says how they are, ends them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from clockwork_serve.apps.ray.actors import (
    DIRECTORY,
    Credentials,
    Directory,
    RoleActor,
    RoleReport,
    namespaces,
    new_credentials,
    request_devices,
)
from clockwork_serve.apps.ray.deployment import (
    CONTROLLER_ROLE,
    GATEWAY_ROLE,
    NODE_ID,
    WORKER_ROLE,
    ClusterRole,
    Deployment,
    Node,
    roles_of,
)
from clockwork_serve.errors import ClockworkError, ConfigError, described

PREFIX: Final = "clockwork-"
"""Of the namespace of a cluster's actors; its name follows."""
GROUP: Final = "controllers"
"""The placement group's name, in that namespace."""
ASK_S, TICK_S, GONE_S, REACH_S = 5.0, 0.5, 30.0, 3.0
HOPELESS_S: Final = 20.0
"""A role that fails for so long ends ``up``, which says why."""

Reports = dict[str, RoleReport | str]
"""What each actor says, by name; or why it says nothing."""
Tell = Callable[[int, int, str], None]


class DeploymentError(ClockworkError):
    """Ray, or a role on it, does not do what it should."""


# ------------------------------------------------------------
# The Ray cluster.


@contextmanager
def joined_ray(address: str, name: str, *, local: bool = False) -> Iterator[None]:
    """Be a driver of a Ray cluster, in the namespace of a deployment. Raises :class:`ConfigError`.

    ``local``: if there is none, one is started of this machine alone, which lasts until ``ray stop``.
    """
    where = address or os.environ.get("RAY_ADDRESS") or _current()
    init: dict[str, Any] = {"namespace": PREFIX + name, "log_to_driver": False, "logging_level": "ERROR"}
    try:
        try:
            _reach(where)
        except OSError:
            if not local:
                raise
            _start_local()
            where = _current()
        ray.init(address=where, **init)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ConfigError(
            f"address: expected a Ray cluster that this machine is a node of, at {where}; found "
            f"{described(error, 300)}; start a node here (ray start), name the cluster (RAY_ADDRESS), or "
            "give the token that it wants (RAY_AUTH_MODE=token, RAY_AUTH_TOKEN)"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _current() -> str:
    """The address of the cluster that this machine is a node of, as Ray wrote it down, or ``auto``."""
    folder = os.environ.get("RAY_TMPDIR", "/tmp")  # noqa: S108 - Ray's place for it
    try:
        return Path(folder, "ray", "ray_current_cluster").read_text().strip()
    except OSError:
        return "auto"


def _reach(where: str) -> None:
    """Raise OSError if nobody listens there: Ray itself would go on trying for minutes."""
    host, _, port = where.rpartition(":")
    if where == "auto":
        raise ConnectionError("none that was started on this machine")
    if port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()


def _start_local() -> None:
    command = ["start", "--head", "--node-ip-address=127.0.0.2", "--disable-usage-stats"]
    ended = subprocess.run(
        [Path(sys.executable).with_name("ray"), *command, "--include-dashboard=false"],
        env={**os.environ, "RAY_worker_niceness": "0"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if ended.returncode:
        raise RuntimeError(f"ray start: {ended.stderr.strip()[-300:]}")


def nodes() -> list[Node]:
    """All that are alive."""
    return [
        Node(
            node_id=each["NodeID"], labels=dict(each["Labels"]),
            cpus=each["Resources"].get("CPU", 0.0), gpus=each["Resources"].get("GPU", 0.0),
        )
        for each in ray.nodes()
        if each["Alive"]
    ]  # fmt: skip


def deployments() -> list[str]:
    """The names of all that run."""
    return [namespace.removeprefix(PREFIX) for namespace in namespaces()]


def reports() -> Reports:
    """What all actors of this namespace say."""
    found: Reports = {}
    asked: dict[str, Any] = {}
    for name in sorted(ray.util.list_named_actors()):
        with suppress(ValueError):  # it has just ended
            if name != DIRECTORY:
                asked[name] = ray.get_actor(name).report.remote()
    if asked:
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=ASK_S)
    for name, reference in asked.items():
        try:
            found[name] = ray.get(reference, timeout=0)
        except ray.exceptions.GetTimeoutError:
            found[name] = "waits for room on a node, or for Ray to start it again"
        except ray.exceptions.RayError as error:
            found[name] = described(error, 300)
    return found


# ------------------------------------------------------------
# up


def up(
    deployment: Deployment, tell: Tell, *, leaving: Sequence[str] = (), timeout_s: float = 300.0
) -> Reports:
    """Bring the roles about, and no others; returns when all are ready.

    ``leaving`` are beginnings of ids of nodes: what runs there drains, and goes elsewhere. ``tell`` hears of
    progress. Raises :class:`ConfigError` if the nodes are too few, :class:`DeploymentError` if a role fails.
    """
    there = nodes()
    left = {node.node_id for node in there if node.node_id.startswith(tuple(leaving))} if leaving else set()
    if leaving and not left:
        known = ", ".join(node.node_id[:8] for node in there)
        raise ConfigError(f"drain: expected the id of a node, found {', '.join(leaving)}; known: {known}")
    stay = [node for node in there if node.node_id not in left]
    wanted = {role.name: role for role in roles_of(deployment, stay)}
    credentials, created = _directory(timeout_s)
    running = reports()
    created |= {name: found.role for name, found in running.items() if isinstance(found, RoleReport)}
    ended = [name for name in running if name not in wanted]
    replaced = _places(created[name] for name in running if name in created) != _places(wanted.values())
    if replaced:
        ended += [name for name in running if name in wanted and wanted[name].kind == CONTROLLER_ROLE]
    _stop(ended, running)
    if replaced:
        _remove_group()  # which cannot be changed, and may wait for nodes that are not there
    for name, role in wanted.items():
        found = None if name in ended else running.get(name)
        if found is None or created.get(name) != role or _moves(found, left):
            tell(0, len(wanted), name)
            _stop([name] if found else [], running)
            _create(role, credentials, left)
            if isinstance(found, RoleReport) and role.kind != WORKER_ROLE:
                _wait_ready({name}, tell, timeout_s)
    return _wait_ready(wanted.keys(), tell, timeout_s)


_FOR_EVER: Final = {"lifetime": "detached", "max_restarts": -1, "max_task_retries": -1}


def _directory(timeout_s: float) -> tuple[Credentials, dict[str, ClusterRole]]:
    """The credentials, and what roles were created as, by name. Raises :class:`DeploymentError`.

    The directory knows no role that was never alive. Such a role waits for room, and may be created again.
    """
    made = ray.remote(Directory).options(name=DIRECTORY, get_if_exists=True, num_cpus=0, **_FOR_EVER)
    directory = made.remote(new_credentials())  # a directory that is there keeps those that it has
    try:
        credentials, roles = ray.get(
            [directory.credentials.remote(), directory.roles.remote()], timeout=timeout_s
        )
    except ray.exceptions.RayError as error:
        raise DeploymentError(
            f"directory: expected it to answer within {timeout_s:g} s; found {described(error, 300)}; see "
            "whether Ray's nodes are there (ray status), then clockwork ray up again"
        ) from None
    return credentials, roles


def _moves(found: RoleReport | str, left: Collection[str]) -> bool:
    """Whether a role that is as the file says is created again: it was ended, or its node is to leave.

    One that does not answer is not: Ray is about to start it again.
    """
    if isinstance(found, str):
        return False
    return found.state == "stopped" or (found.node in left and found.role.kind != CONTROLLER_ROLE)


def _places(roles: Iterable[ClusterRole]) -> set[str]:
    """What controllers among these ask of their placement group."""
    return {f"{one.controllers} {one.cpus} {one.labels}" for one in roles if one.kind == CONTROLLER_ROLE}


def _create(role: ClusterRole, credentials: Credentials, left: Collection[str]) -> None:
    options: dict[str, Any] = {"num_cpus": role.cpus, "num_gpus": role.gpus}
    if role.kind == CONTROLLER_ROLE:
        group = _group(role)
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, role.number)
    else:
        avoided = {NODE_ID: f"!in({','.join(sorted(left))})"} if left else {}
        options |= {"scheduling_strategy": "SPREAD", "label_selector": {**avoided, **role.labels}}
    actor = ray.remote(RoleActor).options(name=role.name, max_concurrency=4, **_FOR_EVER, **options)
    actor.remote(role, credentials)


def _group(role: ClusterRole) -> Any:
    """A bundle for each controller, each on a node of its own."""
    with suppress(ValueError):
        return ray.util.get_placement_group(GROUP)
    return placement_group(
        [{"CPU": role.cpus}] * role.controllers, strategy="STRICT_SPREAD", name=GROUP, lifetime="detached",
        bundle_label_selector=[role.labels] * role.controllers if role.labels else None,
    )  # fmt: skip


def _remove_group() -> None:
    with suppress(ValueError):
        remove_placement_group(ray.util.get_placement_group(GROUP))


def _wait_ready(names: Collection[str], tell: Tell, timeout_s: float) -> Reports:
    end_s = time.monotonic() + timeout_s
    failing: dict[str, float] = {}
    while True:
        found = {name: one for name, one in reports().items() if name in names}
        left = {name: _words(found.get(name, "is not there yet")) for name in sorted(names)}
        left = {name: words for name, words in left.items() if words != "ready"}
        tell(len(names) - len(left), len(names), "; ".join(f"{name} {words}" for name, words in left.items()))
        if not left:
            return found
        now_s = time.monotonic()
        failing = {n: failing.get(n, now_s) for n, words in left.items() if words.startswith("failing")}
        hopeless = [name for name, since_s in failing.items() if now_s - since_s >= HOPELESS_S]
        if hopeless or now_s >= end_s:
            said = "; ".join(f"{name} {left[name]}" for name in hopeless or left)
            raise DeploymentError(
                f"roles: expected all to be ready within {timeout_s:g} s; found {said}; correct that, then "
                "clockwork ray up again; what is there goes on meanwhile"
            )
        time.sleep(TICK_S)


def _words(found: RoleReport | str) -> str:
    if isinstance(found, str) or found.state == "ready":
        return found if isinstance(found, str) else "ready"
    return f"{found.state} {found.said}".strip()


# ------------------------------------------------------------
# down


def down(tell: Tell) -> int:
    """End every role, gateways first and controllers last, then the directory; how many roles there were."""
    running = reports()
    for done, kind in enumerate((GATEWAY_ROLE, WORKER_ROLE, CONTROLLER_ROLE)):
        tell(done, 3, f"{kind}s")
        _stop([name for name in running if name.startswith(f"{kind}-")], running)
    _remove_group()
    _withdraw()
    _kill([DIRECTORY])
    return len(running)


def _withdraw() -> None:
    """Ask Ray for no more than other deployments want, if this one wanted any: a request outlives us."""
    with suppress(ValueError):  # there is no directory
        try:
            wanted = ray.get(ray.get_actor(DIRECTORY).want.remote(0), timeout=ASK_S)
        except ray.exceptions.RayError:
            wanted = 1  # perhaps
        if wanted:
            request_devices()


def _stop(names: Sequence[str], running: Reports) -> None:
    """End these roles, and have the directory forget them: what answers drains, within its grace."""
    graces_s = {name: found.role.grace_s for name in names if isinstance(found := running[name], RoleReport)}
    asked = []
    for name in graces_s:
        with suppress(ValueError):
            asked.append(ray.get_actor(name).stop.remote())
    if asked:
        ray.wait(asked, num_returns=len(asked), timeout=max(graces_s.values()) + ASK_S)
    _kill(names)
    if names:
        with suppress(ValueError, ray.exceptions.RayError):  # there is no directory, or it does not answer
            ray.get(ray.get_actor(DIRECTORY).forget.remote(*names), timeout=ASK_S)


def _kill(names: Sequence[str]) -> None:
    for name in names:
        with suppress(ValueError):
            ray.kill(ray.get_actor(name))
    end_s = time.monotonic() + GONE_S
    while left := {*ray.util.list_named_actors()} & {*names}:
        if time.monotonic() >= end_s:
            raise DeploymentError(f"actors: expected {', '.join(sorted(left))} to end, found them; try again")
        time.sleep(0.05)
