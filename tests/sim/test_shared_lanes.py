"""A device whose lanes share its cores: what starts waits for what was begun before it."""

from __future__ import annotations

from itertools import pairwise

import pytest

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.messages import Infer, Load, Result, Status
from clockwork_serve.sim import Cluster, Simulation
from clockwork_serve.workload.scenario import ModelSet
from clockwork_serve.workload.stream import build
from clockwork_serve.workload.zoo import Zoo
from tests.sim.worlds import KIND, Steps, scenario


def spans(*, lanes_share: bool) -> list[tuple[int, int]]:
    """From when to when each LOAD and INFER computed, in order; nothing varies, and models are too many."""
    steps, zoo = Steps(), Zoo.read("v100")
    made = scenario(models=(ModelSet(name="m", kind=KIND, copies=6),))
    Simulation(
        workload=build(made, seed=1), zoo=zoo, cluster=Cluster(pages=14, lanes_share=lanes_share),
        config=ControllerConfig(), seed=1, watchers=[steps], noise=False, checks=True,
    ).run()  # fmt: skip
    found = []
    actions = {one.action_id: one for kind in (Infer, Load) for _, one in steps.done(kind)}
    for _, result in steps.seen(Result):
        action = actions.get(result.action_id)
        if action is None or result.status is not Status.OK:
            continue
        row = zoo[KIND]
        lasts_ns = row.infer_ns[action.batch] if isinstance(action, Infer) else row.load_ns
        found.append((result.ended_ns - lasts_ns, result.ended_ns))
    return sorted(found)


@pytest.mark.parametrize("lanes_share", [True, False])
def test_a_load_and_an_infer_are_done_at_once_only_where_lanes_do_not_share(lanes_share: bool) -> None:
    found = spans(lanes_share=lanes_share)
    assert len(found) > 100
    assert all(end <= begin for (_, end), (begin, _) in pairwise(found)) is lanes_share
