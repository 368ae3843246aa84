"""The torch device answers as the model itself would, from weights in its pages, whatever was there."""

from __future__ import annotations

import gc
import logging
import resource
import shutil
import threading
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from tests.devices import torch_models as models

torch = models.torch

from clockwork_serve.devices import build  # noqa: E402
from clockwork_serve.devices import torch as torch_device  # noqa: E402
from clockwork_serve.devices.accelerator import CHUNK  # noqa: E402
from clockwork_serve.errors import DamageError, DeviceError, ModelError  # noqa: E402
from clockwork_serve.messages import Extent, TorchIndex  # noqa: E402
from tests.devices import lifted  # noqa: E402
from tests.devices.lifted import close, numbers  # noqa: E402
from tests.devices.torch_models import CONFIG, PAGE, ask  # noqa: E402

pytestmark = [
    pytest.mark.slow,  # models are compiled, by the first test that needs one
    pytest.mark.timeout(600),
]


def make(**settings):
    return build(msgspec.structs.replace(CONFIG, **settings))


@pytest.fixture
def device():
    made = make()
    yield made
    made.close()


@pytest.fixture(scope="module")
def code():
    return models.net()


def loaded(device, code, folder, seed=1, first=0):
    """A model in the device's pages."""
    net = models.Net(seed)
    device.prepare(code)
    weights = models.weights(code, net, folder / f"weights{seed}")
    device.load(lifted.load(code, weights, first))
    return net


def test_it_tells_what_it_offers():
    device = make(io_bytes=100, workspace_bytes=9)
    spec = device.spec
    assert (spec.device, spec.kind, spec.pages, spec.page_bytes) == ("torch-cpu:0", "torch-cpu", 64, PAGE)
    assert (spec.io_bytes, spec.workspace_bytes, spec.backends) == (100, 9, ("torch",))
    device.close()


@pytest.mark.parametrize(("cores", "share"), [(1, True), (2, False)])
def test_lanes_share_where_all_cores_are_an_infers(monkeypatch, cores, share):
    monkeypatch.setattr("clockwork_serve.devices.base.cores", lambda: cores)
    device = make()
    assert device.spec.lanes_share is share
    device.close()


MIXES = [([1], 1), ([2], 2), ([4], 4), ([1, 1], 2), ([1, 2], 4), ([1, 1, 1, 1], 4), ([3], 4), ([2, 1, 1], 4)]


def test_answers_equal_the_model_in_every_mix(device, code, tmp_path):
    net = loaded(device, code, tmp_path, first=3)
    for rows, batch in MIXES * 2:
        xs = [numbers(count, seed=place) for place, count in enumerate(rows)]
        for x, y in zip(xs, ask(device, code, *xs, batch=batch, first=3), strict=True):
            assert close(y, models.plain(net, x)[0])


def test_nothing_is_written_after_the_outputs(device, code, tmp_path):
    loaded(device, code, tmp_path)
    call = lifted.call({"x": numbers(1)})
    device.infer(lifted.infer(code, [1]), [call])
    assert set(call.output[4 * 64 :]) == {0xAA}


def test_nothing_but_the_extent_is_written(device, code, tmp_path):
    device._arena[:] = 0x55
    loaded(device, code, tmp_path, first=5)
    ask(device, code, numbers(1), first=5)
    memory = device._arena.numpy()
    size = device._prepared[code.code_id].index.blob_bytes
    assert (memory[: 5 * PAGE] == 0x55).all()
    assert (memory[5 * PAGE + size :] == 0x55).all()


def test_500_swaps_of_weights_over_one_package_answer_right_and_take_no_memory(device, code, tmp_path):
    nets = [models.Net(seed) for seed in range(6)]
    files = [models.weights(code, net, tmp_path / str(seed)) for seed, net in enumerate(nets)]
    device.prepare(code)
    xs = [numbers(1), numbers(2), numbers(4)]
    wanted = [[models.plain(net, x)[0] for x in xs] for net in nets]
    before, faults = 0, 0
    for swap in range(500):
        # Two extents, so that weights are both swapped by pointers and overwritten where they lie.
        seed, page = swap * 5 % 6, 3 * (swap % 2)
        device.load(lifted.load(code, files[seed], page))
        for x, y in zip(xs, wanted[seed], strict=True):
            assert close(ask(device, code, x, first=page)[0], y), f"swap {swap}"
        if swap % 50 == 0:
            gc.collect()
        if swap == 100:
            before, faults = device.used_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    assert device.counters()["swaps"] >= 1400
    assert device.used_bytes() - before < 1 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults < 2000, "1200 INFERs"


def test_two_codes_share_the_arena_and_the_area(device, code, tmp_path):
    net = loaded(device, code, tmp_path)
    pick = models.pick()
    device.prepare(pick)
    device.load(lifted.load(pick, models.weights(pick, models.Pick(), tmp_path / "table"), 9))
    for _ in range(3):
        assert close(ask(device, code, numbers(2))[0], models.plain(net, numbers(2))[0])
        call = lifted.call({"x": np.array([[3, 1]])})
        device.infer(lifted.infer(pick, [1], first=9), [call])
        assert (lifted.output(call, "y").astype(np.uint32) << 16).view(np.float32).tolist() == [[3.0, 1.0]]
        assert lifted.output(call, "y1").tolist() == [[False, False]]


def test_an_unbatched_code_takes_one_call_as_it_is(device, tmp_path):
    whole = models.whole()
    device.prepare(whole)
    device.load(lifted.load(whole, models.weights(whole, models.Whole(), tmp_path / "none")))
    x, y = numbers(2, 3), numbers(3, 4)
    call = lifted.call({"x": x, "x1": y})
    device.infer(lifted.infer(whole, [1]), [call])
    assert close(lifted.output(call, "y"), x @ y)
    with pytest.raises(DeviceError, match="no batch axis"):
        device.infer(lifted.infer(whole, [1, 1]), [call, call])


def test_strided_inputs_are_taken_as_they_are_seen(device, code, tmp_path):
    net = loaded(device, code, tmp_path)
    x = numbers(2, 128)[:, ::2]
    assert close(ask(device, code, x)[0], models.plain(net, x.copy())[0])


@pytest.mark.parametrize("others", [0, 1])
@pytest.mark.parametrize(("inputs", "message"), lifted.BAD_INPUTS)
def test_inputs_that_are_not_as_declared_are_refused(device, code, tmp_path, inputs, message, others):
    net = loaded(device, code, tmp_path)
    calls = [lifted.call({"x": numbers(1)}) for _ in range(others)] + [lifted.call(inputs)]
    with pytest.raises(DeviceError, match=message):
        device.infer(lifted.infer(code, [1] * len(calls)), calls)
    assert close(ask(device, code, numbers(1))[0], models.plain(net, numbers(1))[0])


def test_outputs_whose_room_cannot_grow_are_an_error_and_leave_no_reference(device, code, tmp_path):
    loaded(device, code, tmp_path)
    calls = [lifted.call({"x": numbers(1)}), lifted.full({"x": numbers(1)}, room=255)]
    with pytest.raises(ModelError, match="256 bytes for 255"):
        device.infer(lifted.infer(code, [1, 1]), calls)
    assert [call.outputs for call in calls] == [[], []]


def test_a_model_that_raises_says_why_in_one_line_and_answers_the_next(device, tmp_path):
    pick = models.pick()
    device.prepare(pick)
    device.load(lifted.load(pick, models.weights(pick, models.Pick(), tmp_path / "table")))
    bad = lifted.call({"x": np.array([[0, 9]])})
    with pytest.raises(ModelError) as error:
        device.infer(lifted.infer(pick, [1]), [bad])
    assert str(error.value).startswith("model m: ")
    assert "\n" not in str(error.value)
    assert bad.outputs == []
    good = lifted.call({"x": np.array([[2, 0]])})
    device.infer(lifted.infer(pick, [1]), [good])
    assert lifted.output(good, "y1").tolist() == [[True, True]]


# What is refused


def changed(code, folder, **fields):
    """A copy of the artefact with a changed index."""
    shutil.copytree(code.path, folder)
    path = folder / "index.json"
    index = msgspec.json.decode(path.read_bytes(), type=TorchIndex)
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(index, **fields)))
    return lifted.vouched(msgspec.structs.replace(code, code_id="changed", path=str(folder)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"torch_version": "2.1.0"}, r"torch 2\.1\.0, and torch .* is installed; compile the model again"),
        ({"target": "cuda:sm_90"}, r"compiled for cuda:sm_90, and torch-cpu:0 is cpu; compile the model ag"),
        ({"inputs": ("z",)}, "differ in names or their order"),
        ({"blob_bytes": 1}, r"expected to end by 1, found"),
        ({"tensors": (), "blob_bytes": 0}, r"not in the index \['k', 'layers"),
    ],
)
def test_a_code_made_for_others_is_refused(device, code, tmp_path, fields, message):
    with pytest.raises(DeviceError, match=message):
        device.prepare(changed(code, tmp_path / "code", **fields))


def test_artefacts_that_are_broken_are_refused(device, code, tmp_path):
    broken = changed(code, tmp_path / "code")
    (tmp_path / "code" / "2.pt2").write_bytes(b"this is no package")
    with pytest.raises(DamageError, match=r"2\.pt2, found other content"):
        device.prepare(broken)
    with pytest.raises(DeviceError, match=r"2\.pt2: cannot be loaded: .*; compile the model again"):
        device.prepare(lifted.vouched(broken))
    (tmp_path / "code" / "2.pt2").unlink()
    with pytest.raises(DamageError, match=r"2\.pt2, found No such file or directory"):
        device.prepare(broken)
    (tmp_path / "code" / "index.json").write_text("{}")
    with pytest.raises(DamageError, match=r"index\.json, found other content"):
        device.prepare(broken)
    with pytest.raises(DeviceError, match=r"index\.json: cannot be read"):
        device.prepare(lifted.vouched(broken))


def test_codes_of_other_backends_are_refused(device, tmp_path):
    with pytest.raises(DeviceError, match="torch-cpu:0 runs torch codes; found one of backend onnx"):
        device.prepare(lifted.code_of(tmp_path, [], [], backend="onnx"))


def test_tensors_whose_size_a_request_chooses_are_refused(device, code):
    with pytest.raises(DeviceError, match="tensor x: expected numbers of a known size"):
        device.prepare(msgspec.structs.replace(code, inputs=(lifted.spec("x", -1),)))


def test_a_code_that_does_not_fit_the_area_is_refused_and_a_batch_that_does_not_is(code, tmp_path):
    device = make(io_bytes=100)
    with pytest.raises(DeviceError, match="take 512 bytes, and the I/O area has 100; set scratch"):
        device.prepare(code)
    device.close()
    device = make(io_bytes=1024)
    net = loaded(device, code, tmp_path)
    assert close(ask(device, code, numbers(2))[0], models.plain(net, numbers(2))[0])
    with pytest.raises(DeviceError, match="batch 4: its tensors do not fit the I/O area"):
        ask(device, code, numbers(4))
    device.close()


def test_unknown_codes_are_refused_and_unknown_extents_forgotten(device, code, tmp_path):
    weights = models.weights(code, models.Net(1), tmp_path / "w")
    for act in (lambda: device.load(lifted.load(code, weights)), lambda: ask(device, code, numbers(1))):
        with pytest.raises(DeviceError, match="not prepared on torch-cpu:0"):
            act()
    device.unload(lifted.unload(3))
    device.retire(code.code_id)


def test_weights_that_are_not_this_code_s_are_refused(device, code, tmp_path):
    device.prepare(code)
    short = lifted.weights_file(tmp_path / "short", b"123")
    with pytest.raises(DeviceError, match=r"weights \w+: expected \d+ bytes for code net.*, found 3"):
        device.load(lifted.load(code, short))
    weights = models.weights(code, models.Net(1), tmp_path / "cut")
    Path(weights.path).write_bytes(b"123")
    with pytest.raises(DeviceError, match=r"cut, found 3 bytes, not \d+"):
        device.load(lifted.load(code, weights))


@pytest.mark.parametrize(("first", "count", "message"), [(64, 1, "within 0..63"), (-1, 1, "within 0..63")])
def test_extents_outside_the_arena_are_refused(device, code, tmp_path, first, count, message):
    loaded(device, code, tmp_path)
    weights = models.weights(code, models.Net(1), tmp_path / "w")
    with pytest.raises(DeviceError, match=message):
        device.load(lifted.load(code, weights, first, count))
    with pytest.raises(DeviceError, match=message):
        ask(device, code, numbers(1), first=first)


def test_weights_larger_than_their_extent_are_refused(code, tmp_path):
    device = make(page_bytes=4096)
    device.prepare(code)
    with pytest.raises(DeviceError, match="bytes do not fit into 1 pages of 4096 bytes"):
        device.load(lifted.load(code, models.weights(code, models.Net(1), tmp_path / "w")))
    device.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"page_bytes": 1000}, "page_size: expected a multiple of 4096, found 1000"),
        ({"memory_bytes": 100}, "device_memory: expected at least one page"),
        ({"memory_bytes": 1 << 60}, "device_memory: .* bytes asked, .* available on this host; lower it"),
        ({"io_bytes": 1 << 60}, "scratch_memory: .* lower it"),
    ],
)
def test_memory_that_cannot_be_had_says_what_to_set(settings, message):
    with pytest.raises(DeviceError, match=message):
        make(**settings)


# Codes that come and go


def test_a_retired_code_keeps_its_packages_mapped_for_its_return(device, code, tmp_path):
    net = loaded(device, code, tmp_path)
    packages = device._prepared[code.code_id].packages
    mapped = Path("/proc/self/maps").read_text().count(".so")
    for _ in range(5):
        device.retire(code.code_id)
        with pytest.raises(DeviceError, match="not prepared"):
            ask(device, code, numbers(1))
        device.prepare(code)
    assert device._prepared[code.code_id].packages is packages
    assert Path("/proc/self/maps").read_text().count(".so") == mapped
    assert close(ask(device, code, numbers(1))[0], models.plain(net, numbers(1))[0])


def test_beyond_a_bound_packages_are_let_go_and_that_is_said(device, code, monkeypatch, caplog):
    monkeypatch.setattr(torch_device, "KEPT_MAX", 1)
    with caplog.at_level(logging.WARNING):
        for name in ("one", "two"):
            other = msgspec.structs.replace(code, code_id=name)
            device.prepare(other)
            device.retire(name)
    assert device.counters()["kept_codes"] == 1
    assert "code one was dropped after 1 others; its mappings stay" in caplog.text


def test_preparing_again_changes_nothing(device, code, tmp_path):
    net = loaded(device, code, tmp_path)
    device.prepare(code)
    assert close(ask(device, code, numbers(1))[0], models.plain(net, numbers(1))[0])


def test_loads_and_codes_come_while_another_lane_runs(device, code, tmp_path):
    net = loaded(device, code, tmp_path, first=0)
    others = [models.weights(code, models.Net(seed), tmp_path / f"o{seed}") for seed in range(4)]
    pick, ended = models.pick(), threading.Event()
    failures: list[BaseException] = []

    def load_lane():
        try:
            for turn in range(60):
                device.load(lifted.load(code, others[turn % 4], 3 + turn % 7))
                if turn % 10 == 0:
                    device.prepare(pick)
                    device.retire(pick.code_id)
        except BaseException as error:  # noqa: BLE001 - the test tells it
            failures.append(error)
        finally:
            ended.set()

    thread = threading.Thread(target=load_lane)
    thread.start()
    wanted, runs = models.plain(net, numbers(2))[0], 0
    while not ended.is_set() or runs < 50:
        assert close(ask(device, code, numbers(2))[0], wanted)
        runs += 1
        time.sleep(0.001)
    thread.join()
    assert not failures


# The pool of weights files


@pytest.mark.parametrize(("pool", "hits"), [(0, 0), (2 * CHUNK, 0), (4 * CHUNK, 3), (9 * CHUNK, 5)])
def test_weights_come_through_a_bounded_pool_of_host_memory(tmp_path, pool, hits):
    code = models.net(width=640, layers=2, sizes=(1,))
    device = make(memory_bytes=128 * PAGE, pool_bytes=pool)
    device.prepare(code)
    nets = [models.Net(seed, 640) for seed in range(3)]
    files = [models.weights(code, net, tmp_path / str(seed)) for seed, net in enumerate(nets)]
    assert files[0].size > CHUNK, "two chunks each"
    for seed in (0, 1, 1, 0, 2, 2, 0, 0):
        device.load(lifted.load(code, files[seed], 0, 60))
        call = lifted.call({"x": numbers(1, 640)})
        device.infer(lifted.infer(code, [1], count=60), [call])
        assert close(lifted.output(call, "y"), models.plain(nets[seed], numbers(1, 640))[0])
    counters = device.counters()
    assert (counters["pool_hits"], counters["pool_hits"] + counters["pool_misses"]) == (
        hits,
        8 if pool else 0,
    )
    device.close()


def test_a_file_that_is_gone_costs_the_pool_nothing(code, tmp_path):
    device = make(pool_bytes=3 * CHUNK)
    device.prepare(code)
    weights = models.weights(code, models.Net(1), tmp_path / "w")
    gone = msgspec.structs.replace(weights, path=str(tmp_path / "gone"))
    for _ in range(5):
        with pytest.raises(DeviceError, match="gone, found No such file or directory"):
            device.load(lifted.load(code, gone))
    device.load(lifted.load(code, weights))
    device.close()


# What was measured to go wrong


def test_no_line_has_torch_copy_constants_or_fold_them():
    sources = [*Path(torch_device.__file__).parent.glob("*.py")]
    text = "\n".join(path.read_text() for path in sources if path.name != "torch_index.py")
    assert "user_managed=True" in text
    assert "user_managed=False" not in text
    assert text.count("load_constants(") == 1
    assert "update_constant_buffer" not in text
    assert text.count("AOTIModelPackageLoader(") == 1


def test_constants_are_the_extent_itself(device, code, tmp_path):
    loaded(device, code, tmp_path)
    first = ask(device, code, numbers(1))[0].copy()
    other = models.weights(code, models.Net(7), tmp_path / "other")
    extent = device._extent(Extent(0, 1), other.size)
    extent.numpy()[:] = np.fromfile(other.path, np.uint8)
    second = ask(device, code, numbers(1))[0]
    assert not close(second, first)
    assert close(second, models.plain(models.Net(7), numbers(1))[0])
    assert device.counters()["swaps"] == 1
