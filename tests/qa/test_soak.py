"""What a soak concludes of what it found; and a short one, on real servers."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import numpy as np
import pytest

from clockwork_serve.workload.scenario import read_scenario
from harness import repositories
from qa.soak.__main__ import soak, unexplained
from qa.soak.honest import CHANGED_S, Truth
from qa.soak.load import SCENARIOS, Ends, scenario
from qa.soak.servers import LONG, WIDE
from qa.soak.verdict import WARM_LEGS, Findings, conclude, growths
from qa.soak.watch import Errors, Held, Quiet, growth_kib, leaked, segments

LEGS = WARM_LEGS + 9


def quiets(kib: list[int], files: list[int] | None = None, pids: list[int] | None = None) -> list[Quiet]:
    files, pids = files or [20] * len(kib), pids or [7] * len(kib)
    return [
        Quiet(float(at), at, {"cpu/worker": Held(pid, own, own, number, 3)}, 2, {}, {"cpu p50": 0.2})
        for at, (own, number, pid) in enumerate(zip(kib, files, pids, strict=True))
    ]


def findings(found: list[Quiet], **more: object) -> Findings:
    ends = Ends(asked=100_000, answered=90_000, good=90_000)
    return Findings(**{"seconds": 300.0, "ends": ends, "quiets": found, **more})  # type: ignore[arg-type]


def missed(found: Findings) -> list[str]:
    return [one.question.partition(":")[0] for one in conclude(found).verdicts if not one.good]


def test_a_soak_in_which_nothing_was_wrong_passes():
    outcome = conclude(findings(quiets([50_000] * LEGS)))
    assert outcome.verdict == "passed"


def test_memory_that_grows_on_is_growth_and_the_warm_up_is_not():
    warm = [10_000 * at for at in range(WARM_LEGS)]
    assert missed(findings(quiets([*warm, *[50_000] * 9]))) == []
    assert missed(findings(quiets([*warm, *[50_000 + 1_000 * at for at in range(9)]]))) == ["cpu/worker"]


def test_each_life_of_a_process_is_judged_by_itself():
    found = quiets([*[50_000] * LEGS, *[90_000] * 6], pids=[*[7] * LEGS, *[8] * 6])
    assert missed(findings(found)) == []
    growth = growths(findings(found).warm())["cpu/worker"]
    assert (growth.lives, growth.kib) == (2, 0)


def test_descriptors_that_come_and_go_are_no_leak_and_those_that_stay_are():
    assert missed(findings(quiets([1] * LEGS, [20, 25, 20] * 4 + [20, 20]))) == []
    assert missed(findings(quiets([1] * LEGS, [20 + at for at in range(LEGS)]))) == ["cpu/worker"]


def test_points_are_compared_by_their_thirds():
    assert growth_kib([1, 1, 9, 1, 1, 1, 2, 2, 2]) == 1
    assert leaked([3, 1, 1, 9, 9, 9, 4, 5, 5]) == 1
    assert leaked([3, 1, 1, 9, 9, 9, 2, 5, 5]) == 0


def test_each_violation_and_each_death_is_told():
    found = quiets([1] * LEGS)
    assert missed(findings(found, violations=["wrong answer of m1, 0.1 s after"])) == ["violations"]
    assert missed(findings(found, over=9)) == []
    assert missed(findings(found, over=10)) == ["good answers that came 40 ms after the deadline or later"]
    assert missed(findings(found, ended=["cpu/controller"])) == ["processes that ended by themselves"]
    assert missed(findings(found, tracebacks=["x"])) == ["tracebacks in logs"]
    assert missed(findings(found, seconds=3600.0)) == ["requests in 60.0 minutes, for each hour"]
    for one in found[-3:]:
        one.error_ms["cpu p50"] = 2.0
        one.segments = 3
    assert missed(findings(found)) == [
        "segments of shared memory leaked", "cpu",
    ]  # fmt: skip


def test_a_soak_that_is_too_short_or_cut_proves_nothing():
    assert conclude(findings(quiets([1] * 3))).verdict == "invalid"
    assert conclude(findings(quiets([1] * LEGS), cut=True)).verdict == "invalid"


def test_an_answer_is_right_if_weights_that_may_answer_give_it():
    truth, x = Truth(), np.ones((1, WIDE), np.float32)
    old, new = (x @ repositories.matrix_of(seed, WIDE, LONG) for seed in (0, 1001))
    now = time.monotonic()
    assert truth.right("r0", x, old, now)
    assert not truth.right("r0", x, new, now)
    truth.replacing("r0", 1001)
    assert truth.right("r0", x, old, now)
    assert truth.right("r0", x, new, now)
    truth.replaced("r0")
    later = time.monotonic() + CHANGED_S + 0.1
    assert not truth.right("r0", x, old, later)
    assert truth.right("r0", x, new, later)


def test_errors_are_those_since_the_last_look():
    name, errors = Errors.NAME, Errors()

    def at(**counts: float) -> dict:
        return {
            (name, frozenset({("action", "infer"), ("direction", "under"), ("le", edge)})): count
            for edge, count in {"0.001": counts["a"], "0.01": counts["b"], "+Inf": counts["b"]}.items()
        }

    assert errors.since(at(a=90, b=100)) == {"p50": 1.0, "p99": 10.0}
    assert errors.since(at(a=91, b=200)) == {"p50": 10.0, "p99": 10.0}
    assert errors.since(at(a=91, b=200)) == {}


def test_only_what_counts_as_late_may_be_missing_from_the_books():
    assert unexplained(good=100, late=0, answered=100) == 0
    assert unexplained(good=98, late=2, answered=100) == 0
    assert unexplained(good=97, late=2, answered=100) == -1
    assert unexplained(good=101, late=2, answered=100) == 1


def test_every_scenario_can_be_read(tmp_path: Path):
    for name in SCENARIOS:
        assert read_scenario(scenario(tmp_path, name, 5.0)).seconds == 5.0


def test_pieces_of_shared_memory_are_counted():
    import os

    assert segments([os.getpid()]) >= 0
    assert segments([]) == 0


@pytest.mark.system
@pytest.mark.slow
@pytest.mark.timeout(240)
# Half a minute is long enough for sockets that other tests left to be collected here.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning")
def test_a_short_soak_finds_nothing_wrong():
    record = io.StringIO()
    found = soak(25.0, 1, record)
    assert found.violations == []
    assert found.ended == []
    assert found.tracebacks == []
    assert found.requests > 3_000
    assert found.ends.good > 1_000
    assert found.honest["answered"] > 50
    assert sum(found.changes.values()) >= 3
    assert len(found.quiets) >= 3
    assert all(quiet.segments >= 1 for quiet in found.quiets)
    kinds = {key for line in record.getvalue().splitlines() for key in json.loads(line)}
    assert kinds == {"t", "held", "quiet", "leg"}
