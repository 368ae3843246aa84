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


class Handle:
    """Of an actor; None in its place is one that never answers."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def __getattr__(self, method: str) -> Any:
        def remote(*arguments: Any) -> Any:
            return (lambda: getattr(self.actor, method)(*arguments)) if self.actor else None

        return SimpleNamespace(remote=remote)


class FakeRay:
    """``requests`` are those of the autoscaler; ``broken`` makes it raise."""

    def __init__(self) -> None:
        self.actors: dict[tuple[str, str], Any] = {}
        self.requests: list[tuple[list[dict[str, float]], list[dict[str, str]]]] = []
        self.broken = False

    def get_actor(self, name: str, namespace: str = NAMESPACE) -> Handle:
        if (namespace, name) not in self.actors:
            raise ValueError(f"no actor {name}")
        return Handle(self.actors[namespace, name])

    def get(self, reference: Any, timeout: float | None = None) -> Any:
        if reference is None:
            raise RayError("it does not answer")
        return reference()

    def wait(self, references: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        assert references, "as Ray, which takes no empty list"
        return [one for one in references if one is not None], [one for one in references if one is None]

    def kill(self, handle: Handle) -> None:
        self.actors = {name: actor for name, actor in self.actors.items() if actor is not handle.actor}

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

    def none(self, *given: Any, **more: Any) -> Any:
        raise ValueError("there is none")

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
                "wait": self.wait,
                "kill": self.kill,
                "get_actor": self.get_actor,
                "get_runtime_context": lambda: here,
                "util": found["ray.util"],
                "autoscaler": found["ray.autoscaler"],
                "exceptions": SimpleNamespace(RayError=RayError),
            },
            "ray.autoscaler": {"sdk": found["ray.autoscaler.sdk"]},
            "ray.autoscaler.sdk": {"request_resources": self.request_resources},
            "ray.util": {
                "list_named_actors": self.list_named_actors,
                "get_node_ip_address": lambda: "127.0.0.1",
                "get_placement_group": self.none,
            },
            "ray.util.placement_group": {"placement_group": self.none, "remove_placement_group": self.none},
            "ray.util.scheduling_strategies": {"PlacementGroupSchedulingStrategy": self.none},
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
