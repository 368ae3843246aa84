"""How long a code takes: with which inputs, how often, and from cold caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest

from clockwork_serve.devices.base import NUMPY_DTYPES, CallBuffers, Phases
from clockwork_serve.errors import ModelError
from clockwork_serve.integrity import hash_of
from clockwork_serve.messages import (
    DATATYPES,
    Code,
    CodeFile,
    DeviceSpec,
    Infer,
    Load,
    Model,
    TensorSpec,
    Unload,
)
from clockwork_serve.serve.supervisor.profile_process import (
    BATCH_TIME_NS,
    DEFAULT_CACHE_BYTES,
    EVICT_FROM_BYTES,
    EXTRAPOLATE_NS,
    LOADS,
    REFUSED_NS,
    RUNS_MAX,
    RUNS_MIN,
    SAMPLE_RATE,
    cache_bytes,
    cache_evictor,
    enough,
    fills_to_try,
    inputs_of,
    load_line,
    profile,
)
from clockwork_serve.store import Fill
from clockwork_serve.units import KIB, MIB, NS_PER_MS, NS_PER_S
from harness import records

# A profile has the device's durations, takes limited time, and has a warning if it is a guess.


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
    assert found.extrapolated == (4, 8)


def test_a_slow_model_whose_batches_take_no_longer_is_measured_in_all_sizes() -> None:
    device = TimedDevice(lambda batch: 1500 * NS_PER_MS)
    found = profile(device, code(1, 2, 4, 8), model(), device.clock).profile
    assert found.infer_ns == dict.fromkeys((1, 2, 4, 8), 1500 * NS_PER_MS)
    assert set(device.runs) == {1, 2, 4, 8}


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
    found = profile(device, code(1, 2), model(), device.clock).profile
    assert found.infer_ns == {1: NS_PER_MS, 2: 2 * NS_PER_MS}
    assert found.extrapolated == (2,)


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


# Inputs for profiling: those that worked before, dynamic dimensions at realistic sizes, all datatypes.


def code_of(*inputs: TensorSpec, batched: bool = True, path: Path = Path("/nowhere")) -> Code:
    return Code(
        code_id="c", backend="onnx", path=str(path), inputs=inputs, outputs=(), batched=batched,
        batch_sizes=(1,), lifted=True,
        files=tuple(CodeFile(one.name, hash_of(one.read_bytes())) for one in path.glob("*")),
    )  # fmt: skip


def spec(name: str, datatype: str, *shape: int, optional: bool = False) -> TensorSpec:
    return TensorSpec(name=name, datatype=datatype, shape=shape, optional=optional)


def shapes(of: Code) -> list[dict[str, tuple[int, ...]]]:
    return [{fill.name: fill.shape for fill in fills} for fills in fills_to_try(of)]


@pytest.mark.parametrize("datatype", DATATYPES)
@pytest.mark.parametrize("batched", [True, False])
def test_every_datatype_can_be_filled(datatype: str, *, batched: bool) -> None:
    (fills,) = fills_to_try(code_of(spec("x", datatype, 3, 4), batched=batched))
    array = inputs_of(fills)["x"]
    assert array.shape == ((1, 3, 4) if batched else (3, 4))
    assert array.dtype == NUMPY_DTYPES[datatype]


def test_ids_are_small_and_rates_are_rates() -> None:
    (fills,) = fills_to_try(code_of(spec("ids", "INT64", 100), spec("sr", "INT64", 1), spec("x", "FP32", 5)))
    arrays = inputs_of(fills)
    assert set(np.unique(arrays["ids"])) == {0, 1}
    assert arrays["sr"].tolist() == [[SAMPLE_RATE]]
    assert np.ptp(arrays["x"]) > 0


def test_dimensions_that_a_request_chooses_are_small() -> None:
    image = code_of(spec("x", "FP32", 3, -1, -1))
    assert shapes(image) == [{"x": (1, 3, size, size)} for size in (64, 16, 1)]
    assert shapes(code_of(spec("x", "FP32", -1, 8), batched=False))[0] == {"x": (64, 8)}


def test_inputs_that_worked_when_it_was_compiled_are_used(tmp_path: Path) -> None:
    known = (
        Fill(name="x", datatype="FP32", shape=(1, 32)),
        Fill(name="state", datatype="INT64", shape=(1, 1), low=8000, high=8000),
    )
    (tmp_path / "probe.json").write_bytes(msgspec.json.encode(known))
    fixed = code_of(spec("x", "FP32", 32), spec("state", "INT64", 1), path=tmp_path)
    assert next(iter(fills_to_try(fixed))) == known
    dynamic = code_of(spec("x", "FP32", -1), spec("state", "INT64", 1), path=tmp_path)
    first, second, *_ = fills_to_try(dynamic)
    assert first == known
    assert [(fill.shape, fill.low) for fill in second] == [((1, 64), 0), ((1, 1), 8000)]


@pytest.mark.parametrize("found", [b"nonsense", b'[{"name": "other", "datatype": "FP32", "shape": [1]}]'])
def test_a_probe_that_does_not_fit_is_ignored(tmp_path: Path, found: bytes) -> None:
    (tmp_path / "probe.json").write_bytes(found)
    assert shapes(code_of(spec("x", "FP32", 7), path=tmp_path)) == [{"x": (1, 7)}]


def test_optional_inputs_are_left_out() -> None:
    assert shapes(code_of(spec("x", "FP32", 7), spec("y", "FP32", 7, optional=True))) == [{"x": (1, 7)}]


def test_elements_of_bytes_are_bytes_as_devices_expect_them() -> None:
    fill = Fill(name="t", datatype="BYTES", shape=(1, 2))
    assert all(isinstance(each, bytes) for each in inputs_of([fill])["t"].ravel())


# The caches are evicted between two runs of a profile, for models with large weights.


def write(folder: Path, *sizes: str) -> None:
    for index, size in enumerate(sizes):
        (folder / f"index{index}").mkdir()
        (folder / f"index{index}" / "size").write_text(f"{size}\n")


def test_the_largest_cache_counts(tmp_path: Path) -> None:
    write(tmp_path, "32K", "32768K", "1024K")
    assert cache_bytes(tmp_path) == 32 * MIB


@pytest.mark.parametrize("said", [(), ("",), ("big",), ("-1K",)])
def test_a_default_size_is_assumed_where_none_is_given(tmp_path: Path, said: tuple[str, ...]) -> None:
    write(tmp_path, *said)
    assert cache_bytes(tmp_path) == DEFAULT_CACHE_BYTES


def test_a_default_size_is_assumed_where_the_system_hides_its_caches(tmp_path: Path) -> None:
    (tmp_path / "index0" / "size").mkdir(parents=True)
    assert cache_bytes(tmp_path) == DEFAULT_CACHE_BYTES


def test_large_weights_are_evicted_from_the_caches() -> None:
    read = cache_evictor("cpu", EVICT_FROM_BYTES, most_bytes=64 * KIB)
    assert read() == 64 * KIB // 8, "a sum of ones"


@pytest.mark.parametrize(("kind", "weights"), [("cpu", EVICT_FROM_BYTES - 1), ("cuda:sm_90", 100 * MIB)])
def test_nothing_is_read_for_small_weights_and_gpus(kind: str, weights: int) -> None:
    assert cache_evictor(kind, weights)() is None
