"""What may wait for a lane: the fast answer is the slow one's, and the slow one names what is wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from clockwork_serve.messages import CodeAdded, Extent, Infer, Window
from clockwork_serve.worker.device import EARLY_MAX_NS, acceptable, refuse
from clockwork_serve.worker.pages import CodeState, CodeStep, HeldCode
from tests.worker.actions import CODE, NO_IO, NO_WORKSPACE, PROFILE, SPEC, infer

NOW_NS = 10**12


def held(*, batched: bool = True, ready: bool = True, profiled: bool = True) -> HeldCode:
    code = HeldCode(CODE)
    added = structs.replace(CODE, batched=batched)
    code.add(CodeAdded(code=added, profiles=(PROFILE,) if profiled else ()), SPEC)
    code.step(CodeStep.PREPARE)
    if ready:
        code.step(CodeStep.OK)
    return code


def instants(*around: int) -> st.SearchStrategy[int]:
    return st.sampled_from([instant + step for instant in around for step in (-1, 0, 1)])


actions = st.builds(
    lambda first, count, batch, rows, window: structs.replace(
        infer(1, "a", 0, batch=batch, rows=tuple(rows)), extent=Extent(first, count), window=window
    ),
    st.integers(-1, SPEC.pages),
    st.integers(-1, SPEC.pages + 1),
    st.integers(0, 9),
    st.lists(st.integers(-1, 4), max_size=4),
    st.builds(Window, instants(NOW_NS, NOW_NS + EARLY_MAX_NS), instants(NOW_NS, NOW_NS + EARLY_MAX_NS)),
)
codes = st.none() | st.builds(held, batched=st.booleans(), ready=st.booleans(), profiled=st.booleans())


@given(actions, codes)
def test_the_fast_answer_is_the_slow_one(action: Infer, code: HeldCode | None) -> None:
    assert acceptable(action, SPEC, code, NOW_NS) == (refuse(action, SPEC, code, NOW_NS) is None)


@pytest.mark.parametrize("batch", [1, 2])
def test_some_infers_are_acceptable(batch: int) -> None:
    action = structs.replace(infer(1, "a", 8, batch=batch, rows=(1,) * batch), window=Window(NOW_NS, NOW_NS))
    assert acceptable(action, SPEC, held(), NOW_NS)


@pytest.mark.parametrize("beyond_ns", [0, 1])
def test_a_window_may_open_just_so_late(beyond_ns: int) -> None:
    opens_ns = NOW_NS + EARLY_MAX_NS + beyond_ns
    action = structs.replace(infer(1, "a", 0), window=Window(opens_ns, opens_ns))
    assert acceptable(action, SPEC, held(), NOW_NS) == (beyond_ns == 0)


@pytest.mark.parametrize(
    ("workspace", "io", "fits"), [(1000, 500, True), (1001, 500, False), (1000, 501, False)]
)
def test_a_size_that_takes_all_the_room_fits(workspace: int, io: int, fits: bool) -> None:
    code = HeldCode(CODE)
    profile = structs.replace(PROFILE, workspace_bytes={2: workspace}, io_bytes={2: io})
    code.add(CodeAdded(code=CODE, profiles=(profile,)), SPEC)
    assert (2 in code.fitting) == fits


def test_the_sizes_that_fit_follow_the_profile_that_came_last() -> None:
    code = held(profiled=False)
    assert code.state is CodeState.READY
    assert code.fitting == {1, 2, 4, 8}
    code.add(CodeAdded(code=CODE, profiles=(PROFILE,)), SPEC)
    assert code.fitting == {1, 2}
    code.add(CodeAdded(code=CODE), SPEC)
    assert code.fitting == {1, 2}


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        ({"window": Window(2, 1)}, held(), "window: expected earliest_ns <= latest_ns, found 2 > 1"),
        ({"extent": Extent(9, 2)}, held(), "extent: expected pages within 0..9, found 2 from page 9"),
        ({}, None, "code_id: net is not prepared on gpu:0; it is absent"),
        ({}, held(ready=False), "code_id: net is not prepared on gpu:0; it is preparing"),
        ({"batch": 3}, held(), "batch: expected one of (1, 2, 4, 8), found 3"),
        ({"calls": ()}, held(), "calls: expected at least one, found none"),
        ({"calls": ()}, held(batched=False), "calls: expected at least one, found none"),
        ({"calls": infer(1, "a", 0, rows=(1, 1)).calls}, held(batched=False),
         "calls: expected 1 where there is no batch axis, found 2"),
        ({"calls": infer(1, "a", 0, rows=(1, 1)).calls}, held(),
         "rows: expected at least 1 each and at most 1 in all, found [1, 1]"),
        ({"batch": 8}, held(), NO_WORKSPACE),
        ({"batch": 4}, held(), NO_IO),
    ],
)  # fmt: skip
def test_a_refusal_names_the_field_what_was_expected_and_what_was_found(
    fields: dict[str, object], code: HeldCode | None, message: str
) -> None:
    refusal = refuse(structs.replace(infer(1, "a", 0), **fields), SPEC, code, 0)
    assert refusal is not None
    assert refusal[1] == message
