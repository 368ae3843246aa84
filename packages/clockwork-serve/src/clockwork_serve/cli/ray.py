"""``clockwork ray``: all processes of a server on a Ray cluster. Ray is imported when one of these runs."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import click

from clockwork_serve.cli.options import json_flag
from clockwork_serve.cli.screen import Progress, note, say, show_json, show_table
from clockwork_serve.errors import ConfigError, install_advice
from clockwork_serve.units import counted

if TYPE_CHECKING:
    from clockwork_serve.apps.ray.cluster import Reports
    from clockwork_serve.apps.ray.deployment import Deployment

_COLUMNS = ["role", "state", "node", "address", ">pid", ">restarts", "at"]


@click.group(epilog="What is in CONFIG, and how it works: clockwork docs ray")
def ray() -> None:
    """Run all processes of a server on a Ray cluster, which places and restarts them."""


@ray.command()
@click.argument("config", metavar="CONFIG")
@click.option("--drain", multiple=True, metavar="NODE", help="Move what runs on a node that is to leave.")
@click.option("--local", is_flag=True, help="Start Ray on this machine, if it does not run.")
@click.option("--timeout", default=300.0, metavar="SECONDS", show_default=True, help="How long to wait.")
@json_flag
def up(config: str, drain: tuple[str, ...], local: bool, timeout: float, as_json: bool) -> None:  # noqa: FBT001
    """Bring about what CONFIG says, and change what differs; returns when all of it is ready."""
    deployment = _deployment(config)
    from clockwork_serve.apps.ray import cluster

    with cluster.joined_ray(deployment.address, deployment.name, local=local):
        with Progress("starting", quiet=as_json) as progress:
            found = cluster.up(deployment, progress.step, leaving=drain, timeout_s=timeout)
        _show({deployment.name: found}, as_json=as_json)


@ray.command()
@click.argument("config", metavar="CONFIG", required=False)
@json_flag
def status(config: str | None, as_json: bool) -> None:  # noqa: FBT001
    """Show the roles of CONFIG, or of everything of ours on this Ray cluster."""
    deployment = _deployment(config) if config else None
    _require_ray()
    from clockwork_serve.apps.ray import cluster

    address = deployment.address if deployment else ""
    with cluster.joined_ray(address, deployment.name if deployment else ""):
        names = [deployment.name] if deployment else cluster.deployments()
    found = {}
    for name in names:
        with cluster.joined_ray(address, name):
            found[name] = cluster.reports()
    _show(found, as_json=as_json)


@ray.command()
@click.argument("config", metavar="CONFIG")
@json_flag
def down(config: str, as_json: bool) -> None:  # noqa: FBT001
    """End all roles of CONFIG: gateways finish what waits, then workers and controllers end."""
    deployment = _deployment(config)
    from clockwork_serve.apps.ray import cluster

    joined = cluster.joined_ray(deployment.address, deployment.name)
    with joined, Progress("ending", quiet=as_json) as progress:
        ended = cluster.down(progress.step)
    if as_json:
        show_json({"name": deployment.name, "ended": ended})
    else:
        say(f"{deployment.name}: {counted(ended, 'role')} ended")


def _deployment(config: str) -> Deployment:
    from clockwork_serve.apps.ray.deployment import read_deployment

    found = read_deployment(config)
    _require_ray()
    return found


def _require_ray() -> None:
    if missing := [name for name in ("ray", "cryptography") if find_spec(name) is None]:
        raise ConfigError(
            f"ray: expected {' and '.join(missing)} to be installed; found none; "
            f"{install_advice('clockwork-serve[ray]')}, here and on every node"
        )


def _show(found: dict[str, Reports], *, as_json: bool) -> None:
    if as_json:
        show_json(found)
        return
    for name, each in found.items():
        rows = []
        for role, one in each.items():
            if isinstance(one, str):
                rows.append([role, "lost", "", "", "", "", one])
                continue
            state = "leads" if one.leads else one.state
            words = " ".join(one.at.values()) if one.state == "ready" else one.said
            rows.append([role, state, one.node[:8], one.host, str(one.pid or ""), str(one.restarts), words])
            if one.nice > 0:
                note(f"warning: {role} runs at niceness {one.nice}; start Ray with RAY_worker_niceness=0")
        if rows:
            show_table(_COLUMNS, rows, name)
        known = [one for one in each.values() if not isinstance(one, str)]
        ready = sum(one.state == "ready" for one in known)
        wanted = max((one.wanted for one in known), default=0)
        asked = f"; Ray is asked for {counted(wanted, 'device')}" if wanted else ""
        say(f"{name}: {ready} of {counted(len(each), 'role')} ready{asked}")
    if not found:
        say("nothing of ours runs on this Ray cluster")
