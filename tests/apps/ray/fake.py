"""A Ray cluster of this process alone: named actors whose calls run at once, and what Ray is asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

NAMESPACE = "clockwork-shop"
OURS = ("clockwork_serve.apps.ray.actors", "clockwork_serve.apps.ray.cluster")


class RayError(Exception):
    pass


class GetTimeoutError(RayError):
    pass


class Handle:
    """Of an actor; None in its place is one that never answers."""

    def __init__(self, actor: Any, key: tuple[str, str]) -> None:
        self.actor, self.key = actor, key

    def __getattr__(self, method: str) -> Any:
        def remote(*arguments: Any) -> Any:
            return (lambda: getattr(self.actor, method)(*arguments)) if self.actor else None

        return SimpleNamespace(remote=remote)


class FakeRay:
    """``requests`` are those of the autoscaler; ``broken`` makes it raise.

    ``full`` are selectors of nodes without room, where what is created waits; ``selectors`` are all it got.
    """

    def __init__(self) -> None:
        self.actors: dict[tuple[str, str], Any] = {}
        self.groups: dict[str, SimpleNamespace] = {}
        self.full: list[dict[str, str]] = []
        self.selectors: list[dict[str, str]] = []
        self.requests: list[tuple[list[dict[str, float]], list[dict[str, str]]]] = []
        self.broken = False

    def get_actor(self, name: str, namespace: str = NAMESPACE) -> Handle:
        if (namespace, name) not in self.actors:
            raise ValueError(f"no actor {name}")
        return Handle(self.actors[namespace, name], (namespace, name))

    def remote(self, kind: Any) -> Any:
        """Ray's way to create an actor: ``remote(kind).options(...).remote(...)``."""

        def options(name: str, **given: Any) -> Any:
            return SimpleNamespace(remote=lambda *arguments: self.create(kind, arguments, name, **given))

        return SimpleNamespace(options=options)

    def create(
        self, kind: Any, arguments: Any, name: str, *, get_if_exists: bool = False,
        label_selector: Any = None, scheduling_strategy: Any = None, **given: Any,
    ) -> Handle:  # fmt: skip
        key = NAMESPACE, name
        if key not in self.actors or not get_if_exists:
            selector = getattr(scheduling_strategy, "selector", label_selector) or {}
            self.selectors.append(selector)
            self.actors[key] = None if selector in self.full else kind(*arguments)
        return Handle(self.actors[key], key)

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {"NodeID": f"{number}" * 56, "Alive": True, "Labels": {"zone": zone}, "Resources": {"CPU": 8.0}}
            for number, zone in enumerate("aabbcc")
        ]

    def placement_group(self, bundles: Any, name: str, bundle_label_selector: Any, **given: Any) -> Any:
        selector = (bundle_label_selector or [{}])[0]
        return self.groups.setdefault(name, SimpleNamespace(name=name, selector=selector))

    def get_placement_group(self, name: str) -> Any:
        if name not in self.groups:
            raise ValueError(f"no placement group {name}")
        return self.groups[name]

    def get(self, reference: Any, timeout: float | None = None) -> Any:
        if isinstance(reference, list):
            return [self.get(one, timeout) for one in reference]
        if reference is None:
            raise RayError("it does not answer")
        return reference()

    def wait(self, references: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        assert references, "as Ray, which takes no empty list"
        return [one for one in references if one is not None], [one for one in references if one is None]

    def kill(self, handle: Handle) -> None:
        self.actors.pop(handle.key, None)

    def list_named_actors(self, *, all_namespaces: bool = False) -> list[Any]:
        if all_namespaces:
            return [{"namespace": namespace, "name": name} for namespace, name in self.actors]
        return [name for namespace, name in self.actors if namespace == NAMESPACE]

    def request_resources(
        self, bundles: list[dict[str, float]], bundle_label_selectors: list[dict[str, str]]
    ) -> None:
        if self.broken:
            raise ConnectionError("the head is gone")
        self.requests.append((bundles, bundle_label_selectors))

    def modules(self) -> dict[str, Any]:
        """As Ray is imported."""
        found = {
            name: ModuleType(name)
            for name in (
                "ray", "ray.autoscaler", "ray.autoscaler.sdk", "ray.util", "ray.util.placement_group",
                "ray.util.scheduling_strategies",
            )
        }  # fmt: skip
        here = SimpleNamespace(namespace=NAMESPACE, get_node_id=lambda: "a" * 56)
        for name, content in {
            "ray": {
                "get": self.get,
                "remote": self.remote,
                "nodes": self.nodes,
                "wait": self.wait,
                "kill": self.kill,
                "get_actor": self.get_actor,
                "get_runtime_context": lambda: here,
                "util": found["ray.util"],
                "autoscaler": found["ray.autoscaler"],
                "exceptions": SimpleNamespace(RayError=RayError, GetTimeoutError=GetTimeoutError),
            },
            "ray.autoscaler": {"sdk": found["ray.autoscaler.sdk"]},
            "ray.autoscaler.sdk": {"request_resources": self.request_resources},
            "ray.util": {
                "list_named_actors": self.list_named_actors,
                "get_node_ip_address": lambda: "127.0.0.1",
                "get_placement_group": self.get_placement_group,
            },
            "ray.util.placement_group": {
                "placement_group": self.placement_group,
                "remove_placement_group": lambda group: self.groups.pop(group.name),
            },
            "ray.util.scheduling_strategies": {
                "PlacementGroupSchedulingStrategy": lambda group, number: group
            },
        }.items():
            vars(found[name]).update(content)
        return found


@contextmanager
def faked() -> Iterator[tuple[FakeRay, Any, Any]]:
    """The fake, and our modules of actors and of what is done to them as they are with it."""
    fake = FakeRay()
    replaced = {name: sys.modules.pop(name, None) for name in (*fake.modules(), *OURS)}
    sys.modules.update(fake.modules())
    try:
        yield fake, *(importlib.import_module(name) for name in OURS)
    finally:
        for name, module in replaced.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
