"""Models and codes that come again, change, or were never heard of."""

from __future__ import annotations

import pytest

from clockwork_serve.messages import CodeReady, Infer, Load, ModelAdded, Outcome, Unload
from tests.controller.honest import World, device, model


def loaded() -> World:
    """One device that has the weights of one model."""
    world = World()
    world.serve(model("a"))
    world.join(device())
    world.request("a", slo_ms=500)
    world.run()
    world.actions.clear()
    return world


def test_a_model_that_is_added_again_as_it_was_stays_where_it_is() -> None:
    world = loaded()
    world.tell(ModelAdded(model=model("a")))
    world.request("a", slo_ms=500)
    world.run()
    assert [type(one) for one in world.actions] == [Infer]


def test_a_model_that_is_added_with_a_change_is_loaded_anew() -> None:
    world = loaded()
    world.tell(ModelAdded(model=model("a", mib=5)))
    request_id = world.request("a", slo_ms=500)
    world.run()
    assert [type(one) for one in world.actions] == [Unload, Load, Infer]
    assert world.answers[request_id].outcome is Outcome.OK


@pytest.mark.parametrize(("name", "code_id"), [("d9", "c"), ("d0", "unheard")])
def test_a_code_that_is_ready_where_nobody_asked_changes_nothing(name: str, code_id: str) -> None:
    world = loaded()
    before = world.controller.snapshot()
    world.tell(CodeReady(device=name, code_id=code_id))
    assert world.controller.snapshot() == before
