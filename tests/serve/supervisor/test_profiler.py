"""A profile has the device's durations, takes limited time, and has a warning if it is a guess."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import pytest

from clockwork_serve.devices.base import CallBuffers, Phases
from clockwork_serve.errors import ModelError
from clockwork_serve.messages import (
    Code,
    DeviceSpec,
    Infer,
    Load,
    Model,
    TensorSpec,
    Unload,
)
from clockwork_serve.serve.supervisor.profile_process import (
    BATCH_TIME_NS,
    EXTRAPOLATE_NS,
    LOADS,
    REFUSED_NS,
    RUNS_MAX,
    RUNS_MIN,
    enough,
    load_line,
    profile,
)
from clockwork_serve.units import MIB, NS_PER_MS, NS_PER_S
from harness import records


class TimedDevice:
    """A device that takes ``infer_ns(batch)`` and ``load_ns`` on a clock of its own, and checks its calls."""

    def __init__(self, infer_ns: Callable[[int], int], load_ns: int = 4 * NS_PER_MS) -> None:
        self.spec = DeviceSpec(
            device="d", kind="test", pages=64, page_bytes=MIB, workspace_bytes=MIB, io_bytes=MIB
        )
        self.now_ns = 0
        self.runs: dict[int, int] = {}
        self.loads = 0
        self.prepared: set[str] = set()
        self.loaded = False
        self._infer_ns = infer_ns
        self._load_ns = load_ns

    def clock(self) -> int:
        return self.now_ns

    def prepare(self, code: Code) -> None:
        self.prepared.add(code.code_id)

    def retire(self, code_id: str) -> None:
        self.prepared.remove(code_id)

    def load(self, action: Load) -> int:
        assert not self.loaded
        assert action.extent.count * self.spec.page_bytes >= action.weights.size
        self.loaded = True
        self.loads += 1
        self.now_ns += self._load_ns
        return 0

    def unload(self, action: Unload) -> None:
        self.loaded = False

    def infer(self, action: Infer, calls: Sequence[CallBuffers]) -> Phases:
        assert self.loaded
        assert action.code_id in self.prepared
        assert len(calls) == len(action.calls)
        self.runs[action.batch] = self.runs.get(action.batch, 0) + 1
        self.now_ns += self._infer_ns(action.batch)
        return Phases(0, 0, 0)

    def close(self) -> None:
        pass


def code(*batch_sizes: int, batched: bool = True) -> Code:
    x = TensorSpec(name="x", datatype="FP32", shape=(16,))
    return records.code(
        sizes=batch_sizes, backend="onnx", path="/nowhere", inputs=(x,), outputs=(x,), batched=batched
    )


def model(size: int = 8 * MIB) -> Model:
    return records.model("m", size=size, sizes=(1,), path="/w", max_batch_size=4)


def test_durations_are_those_of_the_device() -> None:
    device = TimedDevice(lambda batch: NS_PER_MS + batch * NS_PER_MS)
    measured = profile(device, code(1, 2, 4), model(), device.clock)
    found = measured.profile
    assert measured.warnings == ()
    assert (found.code_id, found.device_kind) == ("c", "test")
    assert found.infer_ns == {1: 2 * NS_PER_MS, 2: 3 * NS_PER_MS, 4: 5 * NS_PER_MS}
    assert found.load_ns(8 * MIB) == pytest.approx(4 * NS_PER_MS, rel=0.001)
    assert found.io_bytes == {1: 128, 2: 256, 4: 512}
    assert set(found.workspace_bytes) == {1, 2, 4}
    assert device.loads == LOADS
    assert device.prepared == set()
    assert not device.loaded, "the device is left as it was"


def test_each_run_starts_with_cold_caches() -> None:
    """Else a batch, whose requests share the fetched weights, would seem to save nothing."""
    device, cold = TimedDevice(lambda batch: 0), [False]

    def infer_ns(batch: int) -> int:
        was_cold, cold[0] = cold[0], False
        return (batch + 1 if was_cold else batch) * NS_PER_MS

    def cache_evictor() -> None:
        cold[0] = True

    device._infer_ns = infer_ns
    found = profile(device, code(1, 2), model(), device.clock, cache_evictor).profile
    assert found.infer_ns == {1: 2 * NS_PER_MS, 2: 3 * NS_PER_MS}


def test_sizes_between_powers_of_two_of_a_python_model_are_interpolated() -> None:
    device = TimedDevice(lambda batch: (16 + 4 * batch) * NS_PER_MS)
    made = msgspec.structs.replace(code(1, 2, 3, 4, 5, 6, 7, 8), backend="python")
    found = profile(device, made, model(), device.clock).profile
    assert found.infer_ns == {size: (16 + 4 * size) * NS_PER_MS for size in made.batch_sizes}
    assert set(device.runs) == {1, 2, 4, 8}
    assert list(found.io_bytes) == list(found.workspace_bytes) == list(made.batch_sizes)


def test_an_outlier_does_not_count() -> None:
    device = TimedDevice(lambda batch: NS_PER_MS)
    durations = iter([9 * NS_PER_S, NS_PER_MS, NS_PER_MS, 60 * NS_PER_MS])
    device._infer_ns = lambda batch: next(durations, NS_PER_MS)
    assert profile(device, code(1), model(), device.clock).profile.infer_ns == {1: NS_PER_MS}


def test_long_batches_are_run_once_and_longer_ones_not_at_all() -> None:
    device = TimedDevice(lambda batch: batch * 700 * NS_PER_MS)
    found = profile(device, code(1, 2, 4, 8), model(), device.clock).profile
    assert found.infer_ns == {batch: batch * 700 * NS_PER_MS for batch in (1, 2, 4, 8)}
    assert 4 * 700 * NS_PER_MS > EXTRAPOLATE_NS
    assert device.runs == {1: 2, 2: 1}, "twice for batch 1: to learn that it takes these inputs"


def test_a_model_that_refuses_everything_gets_a_guess_and_a_warning() -> None:
    class Refusing(TimedDevice):
        def infer(self, action: Infer, calls: Sequence[CallBuffers]) -> Phases:
            raise ModelError("not these")

    device = Refusing(lambda batch: 1)
    measured = profile(device, code(1, 2), model(), device.clock)
    assert measured.profile.infer_ns == {1: REFUSED_NS, 2: 2 * REFUSED_NS}
    assert "m/1: it refused all inputs" in measured.warnings[0]
    assert not device.loaded


def test_a_batch_that_fails_is_extrapolated() -> None:
    class NoPairs(TimedDevice):
        def infer(self, action: Infer, calls: Sequence[CallBuffers]) -> Phases:
            if action.batch == 2:
                raise ModelError("no pairs")
            return super().infer(action, calls)

    device = NoPairs(lambda batch: NS_PER_MS)
    assert profile(device, code(1, 2), model(), device.clock).profile.infer_ns == {
        1: NS_PER_MS, 2: 2 * NS_PER_MS,
    }  # fmt: skip


def test_a_code_without_a_batch_axis_is_run_one_by_one() -> None:
    device = TimedDevice(lambda batch: NS_PER_MS)
    assert profile(device, code(1, batched=False), model(), device.clock).profile.infer_ns == {1: NS_PER_MS}


@pytest.mark.parametrize(
    ("durations", "stop"),
    [
        ([], False),
        ([NS_PER_MS] * (RUNS_MIN - 1), False),
        ([NS_PER_MS] * (2 * RUNS_MIN), True),
        ([NS_PER_MS, 3 * NS_PER_MS] * RUNS_MIN, False),
        ([NS_PER_MS, 3 * NS_PER_MS] * (RUNS_MAX // 2), True),
        ([BATCH_TIME_NS], True),
        ([BATCH_TIME_NS // 2], False),
        ([BATCH_TIME_NS // RUNS_MIN] * RUNS_MIN, True),
    ],
)
def test_it_stops_when_runs_agree_or_time_is_up(durations: list[int], *, stop: bool) -> None:
    assert enough(durations) is stop


@pytest.mark.parametrize(("load_ns", "size"), [(50_000, 4096), (4 * NS_PER_MS, 40 * MIB), (10**9, 10)])
def test_the_line_of_loads_passes_through_what_was_measured(load_ns: int, size: int) -> None:
    base_ns, per_mib_ns = load_line(load_ns, size)
    assert base_ns + per_mib_ns * size / MIB == pytest.approx(load_ns, rel=0.01)
    assert 0 <= base_ns <= load_ns


def test_weights_of_no_size_have_only_a_base() -> None:
    assert load_line(50_000, 0) == (50_000, 0)
