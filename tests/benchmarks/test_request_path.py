"""A request's path through real processes: each part that it must pass is seen, and no beat of others."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.request_path import REQUESTS, ROLES, measure, median_path


def test_what_fewer_than_half_of_the_requests_call_does_not_count():
    requests = {number: ["a.py:f", "b.py:g", "a.py:f"] for number in range(1, REQUESTS + 1)}
    requests[1] = [*requests[1], "beat.py:beat"]
    found = median_path(requests)
    assert found.functions == {"a.py:f": 2, "b.py:g": 1}
    assert (found.calls, found.files, set(found.switches)) == (3, {"a.py", "b.py"}, {2})


@pytest.mark.system
def test_a_warm_request_passes_the_port_the_brains_and_a_lane(tmp_path: Path):
    found = measure(tmp_path)
    assert found.keys() == set(ROLES)
    assert "serve/http/connection.py" in found["gateway"].files
    assert {"controller/controller.py", "controller/policies/default.py"} <= found["controller"].files
    assert {"worker/device.py", "devices/emulated.py"} <= found["worker"].files
    assert "Controller.decide" in {name.partition(":")[2] for name in found["controller"].functions}
    assert not any("announce" in name for path in found.values() for name in path.functions)
