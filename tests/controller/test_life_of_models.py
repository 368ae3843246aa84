"""Models and codes that come again, change, or were never heard of."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from clockwork_serve.controller import Controller, ControllerConfig
from clockwork_serve.messages import (
    Answer,
    CodeAdded,
    CodeReady,
    Infer,
    Load,
    ModelAdded,
    ModelRemoved,
    Outcome,
    Request,
    Unload,
)
from clockwork_serve.units import ms
from tests.controller.honest import CODE, World, model, serving


def loaded() -> World:
    """One device that has the weights of one model."""
    world = serving("a")
    world.ask("a", slo_ms=500)
    world.actions.clear()
    return world


def test_a_model_that_is_added_again_as_it_was_stays_where_it_is() -> None:
    world = loaded()
    world.tell(ModelAdded(model=model("a")))
    world.ask("a", slo_ms=500)
    assert [type(one) for one in world.actions] == [Infer]


def test_a_model_that_is_added_with_a_change_is_loaded_anew() -> None:
    world = loaded()
    world.tell(ModelAdded(model=model("a", mib=5)))
    request_id = world.ask("a", slo_ms=500)
    assert [type(one) for one in world.actions] == [Unload, Load, Infer]
    assert world.answers[request_id].outcome is Outcome.OK


@pytest.mark.parametrize(("name", "code_id"), [("d9", "c"), ("d0", "unheard")])
def test_a_code_that_is_ready_where_nobody_asked_changes_nothing(name: str, code_id: str) -> None:
    world = loaded()
    before = world.controller.snapshot()
    world.tell(CodeReady(device=name, code_id=code_id))
    assert world.controller.snapshot() == before


def test_who_waits_for_a_model_that_is_replaced_waits_for_the_next_if_that_is_asked_alike() -> None:
    for code, waits in ((CODE, True), (replace(CODE, outputs=()), False)):
        controller = Controller(ControllerConfig(reject_infeasible=False))
        other = replace(code, code_id="other")
        controller.observe(CodeAdded(code=CODE), 0)
        controller.observe(CodeAdded(code=other), 0)
        controller.observe(ModelAdded(model=model("a")), 0)
        asked = Request(request_id="r", gateway="g", model="a/1", arrival_ns=0, deadline_ns=ms(100))
        controller.observe(asked, 0)
        controller.decide(0)
        controller.observe(ModelRemoved(model="a/1"), ms(1))
        controller.observe(ModelAdded(model=model("a", code_id="other")), ms(1))
        effects = controller.decide(ms(1))
        controller.check()
        answers = [effect.outcome for effect in effects if isinstance(effect, Answer)]
        assert answers == ([] if waits else [Outcome.REJECTED])
        (answer,) = [one for one in controller.decide(ms(101)) if isinstance(one, Answer)] or [None]
        assert (answer is not None) is waits
