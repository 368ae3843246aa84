"""What ``clockwork ray up`` creates, replaces and leaves as it is. Without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clockwork_serve.apps.ray.deployment import ClusterRole, read_deployment
from tests.apps.ray.fake import NAMESPACE, FakeRay, faked

pytest.importorskip("cryptography", reason="it comes with the extra `ray`")

FILE = """
name = "shop"
store = "store"
[controllers]
count = 2
labels = {{zone = "{zone}"}}
[[workers]]
device = "cpu"
labels = {{zone = "{zone}"}}
"""
ROLES = ["controller-0", "controller-1", "gateway-0", "worker-cpu-0"]


class Stage:
    """A Ray cluster on which roles are ready as soon as they have room."""

    def __init__(self, ray: FakeRay, actors: Any, cluster: Any, folder: Path) -> None:
        self.ray, self.cluster, self._file = ray, cluster, folder / "shop.toml"

        class ReadyRole:
            def __init__(self, role: ClusterRole, credentials: Any) -> None:
                self._role = role
                ray.actors[NAMESPACE, "directory"].beat(role, "life", "")

            def report(self) -> Any:
                return actors.RoleReport(
                    role=self._role, node="a" * 56, host="127.0.0.2", state="ready", pid=1, leads=False,
                    nice=0, restarts=0, at={}, said="", log="",
                )  # fmt: skip

            def stop(self) -> None:
                pass

        cluster.RoleActor = ReadyRole

    def up(self, zone: str) -> dict[str, Any]:
        """With this selector for controllers and workers; what there is then, by name."""
        self._file.write_text(FILE.format(zone=zone))
        self.cluster.up(read_deployment(str(self._file)), lambda *given: None, timeout_s=0)
        return {name: self.ray.actors[NAMESPACE, name] for name in ROLES}


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with faked() as (ray, actors, cluster):
        yield Stage(ray, actors, cluster, tmp_path)


def test_roles_without_room_are_replaced_by_those_of_a_corrected_file(stage: Stage) -> None:
    stage.ray.full = [{"zone": "in(a,b)"}]
    with pytest.raises(stage.cluster.DeploymentError, match="found controller-0 "):
        stage.up("in(a, b)")

    assert None not in stage.up("c").values()
    assert stage.ray.groups["controllers"].selector == {"zone": "c"}


def test_what_is_as_the_file_says_stays_as_it_is(stage: Stage) -> None:
    before = stage.up("in(a, b)")

    assert stage.up("in(a, b)") == before


def test_what_ray_is_about_to_start_again_stays_as_it_is(stage: Stage) -> None:
    stage.up("a")
    created = len(stage.ray.selectors)
    stage.ray.actors |= {(NAMESPACE, name): None for name in ROLES}

    with pytest.raises(stage.cluster.DeploymentError):
        stage.up("a")

    assert len(stage.ray.selectors) == created


def test_what_was_about_to_start_again_is_replaced_where_the_file_differs(stage: Stage) -> None:
    stage.up("a")
    stage.ray.actors |= {(NAMESPACE, name): None for name in ROLES if not name.startswith("gateway")}

    assert None not in stage.up("b").values()
    assert stage.ray.groups["controllers"].selector == {"zone": "b"}


def test_a_file_that_is_put_back_replaces_what_waits_for_room(stage: Stage) -> None:
    stage.up("a")
    stage.ray.full = [{"zone": "b"}]
    with pytest.raises(stage.cluster.DeploymentError):
        stage.up("b")

    assert None not in stage.up("a").values()


def test_ray_gets_no_blank_in_a_selector(stage: Stage) -> None:
    stage.up("in(a, b)")

    assert stage.ray.selectors.count({"zone": "in(a,b)"}) == 3
