"""What Ray's autoscaler is asked for, as advice comes, changes, ends, and is taken back. Without Ray."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from clockwork_serve.apps.ray.deployment import NODE_ID, ClusterRole
from clockwork_serve.cli.ray import _show
from clockwork_serve.telemetry.counters import WANTED_NS, DevicesWanted
from harness.serving import until
from tests.apps.ray.fake import NAMESPACE, FakeRay, faked

pytest.importorskip("cryptography", reason="it comes with the extra `ray`")

CONTROLLER = ClusterRole(name="controller-0", kind="controller", number=0, words=(), cpus=0.5, grace_s=2)
SAYS = "import sys, time; print(sys.argv[1], flush=True); time.sleep(600)"


def worker(number: int, labels: dict[str, str] | None = None) -> ClusterRole:
    words = ("worker", "--device=cuda")
    name = f"worker-cuda-{number}"
    return ClusterRole(
        name=name, kind="worker", number=number, words=words, cpus=1, gpus=1, labels=labels or {}
    )


class Stage:
    """A deployment with two workers, and a controller whose process says where its advice is, or nothing."""

    def __init__(self, ray: FakeRay, actors: Any, cluster: Any, folder: Path) -> None:
        self.ray, self.actors, self.cluster, self.file = ray, actors, cluster, folder / "devices-wanted"
        self.directory = self.add(NAMESPACE, worker(0), worker(1))

    def add(self, namespace: str, *roles: ClusterRole) -> Any:
        """The directory of a deployment with these roles."""
        directory = self.ray.actors[namespace, "directory"] = self.actors.Directory(None)
        for role in roles:
            directory.beat(role, "life", "")
        return directory

    def start(self, *, advises: bool = True) -> Any:
        """The controller's actor."""
        facts = msgspec.json.encode({"listening": True, "devices_wanted": str(self.file) if advises else ""})
        self.actors.command_of = lambda *given: [sys.executable, "-c", SAYS, facts.decode()]
        return self.actors.RoleActor(CONTROLLER, self.actors.Credentials(certificate=b"", key=b""))

    def advise(self, wanted: int, *, at_ns: int = 0) -> None:
        """What the observer writes down."""
        said = DevicesWanted(at_ns=at_ns or time.monotonic_ns(), wanted=wanted, cause="load")
        part = self.file.with_suffix(".part")
        part.write_bytes(msgspec.json.encode(said))
        part.replace(self.file)

    def until_asked(self, devices: int) -> None:
        """Wait until the last request is for so many."""
        until(f"{devices} are asked for", lambda: self.ray.requests and self.asked() == devices)

    def asked(self) -> int:
        return len(self.ray.requests[-1][0])


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with faked() as (ray, actors, cluster):
        for name, seconds in (("BEAT_S", 0.02), ("TEND_S", 0.01), ("REQUEST_S", 0.1)):
            monkeypatch.setattr(actors, name, seconds)
        yield Stage(ray, actors, cluster, tmp_path)


@pytest.fixture
def start(stage: Stage) -> Iterator[Callable[..., Any]]:
    """Starts actors, which are stopped at the end."""
    started = []

    def start(*, advises: bool = True) -> Any:
        started.append(stage.start(advises=advises))
        return started[-1]

    yield start
    for one in started:
        one.stop()


def test_as_many_devices_are_asked_for_as_are_wanted(stage: Stage, start: Callable[..., Any]) -> None:
    stage.advise(3)
    start()

    stage.until_asked(3)
    assert stage.ray.requests[-1] == ([{"CPU": 1.0, "GPU": 1.0}] * 3, [{}] * 3)
    stage.advise(5)
    stage.until_asked(5)


def test_it_is_asked_again_for_others_may_have_asked_since(stage: Stage, start: Callable[..., Any]) -> None:
    stage.advise(3)
    start()
    stage.until_asked(3)

    stage.ray.requests.clear()

    stage.until_asked(3)


def test_what_other_deployments_want_is_asked_for_beside_it(
    stage: Stage, start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage.actors, "PATIENCE_S", 0.5)
    other = stage.add("clockwork-other", worker(0, {"disk": "fast", NODE_ID: "b" * 56}))
    other.want(2)
    stage.ray.actors["clockwork-lost", "directory"] = None
    stage.advise(1)
    start()

    stage.until_asked(3)
    assert stage.ray.requests[-1][1] == [{"disk": "fast"}] * 2 + [{}]


def test_advice_that_is_old_or_not_there_changes_nothing(stage: Stage, start: Callable[..., Any]) -> None:
    stage.directory.want(4)
    stage.advise(1, at_ns=time.monotonic_ns() - WANTED_NS)
    actor = start()

    until("it is ready", lambda: actor.report().state == "ready")
    time.sleep(0.2)
    assert not stage.ray.requests
    assert stage.directory.want(4) == 4


def test_where_scaling_was_never_on_nothing_is_asked(stage: Stage, start: Callable[..., Any]) -> None:
    actor = start(advises=False)

    until("it is ready", lambda: actor.report().state == "ready")
    time.sleep(0.2)
    stage.cluster.down(lambda *given: None)
    assert not stage.ray.requests


def test_a_controller_without_scaling_takes_back_what_the_one_before_asked_for(
    stage: Stage, start: Callable[..., Any]
) -> None:
    stage.directory.want(4)
    stage.ray.broken = True
    actor = start(advises=False)
    until("it could not", lambda: "the head is gone" in actor.report().said)

    stage.ray.broken = False

    stage.until_asked(0)


@pytest.mark.parametrize("answers", [True, False])
def test_what_is_taken_down_asks_for_nothing_and_others_for_theirs(stage: Stage, *, answers: bool) -> None:
    stage.directory.want(4)
    stage.add("clockwork-other", worker(0)).want(2)
    if not answers:
        stage.ray.actors[NAMESPACE, "directory"] = None

    stage.cluster.down(lambda *given: None)

    assert stage.asked() == 2
    assert (NAMESPACE, "directory") not in stage.ray.actors


def test_who_leads_says_what_is_asked_for(
    stage: Stage, start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage.actors, "_is_ready", lambda url: True)
    stage.advise(3)
    actor = start()

    until("it is said", lambda: actor.report().wanted == 3)


def test_status_says_it_in_its_last_line(
    stage: Stage,
    start: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(stage.actors, "_is_ready", lambda url: True)
    stage.advise(1)
    actor = start()
    report = until("it is said", lambda: actor.report() if actor.report().wanted else None)

    _show({"shop": {"controller-0": report, "worker-0": "lost"}}, as_json=False)

    assert capsys.readouterr().out.endswith("shop: 1 of 2 roles ready; Ray is asked for 1 device\n")
