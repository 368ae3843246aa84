"""Streams, graphs and losses of a GPU, on a stand-in with separate memories; no GPU is needed or used.

What it shows is what the device asks for and in which order, not what a GPU does then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import msgspec
import pytest

from tests.devices import torch_models as models

torch = models.torch

from clockwork_serve.devices.accelerator import Accelerator, Clocks, Cuda, read_clocks  # noqa: E402
from clockwork_serve.devices.torch import TorchDevice  # noqa: E402
from clockwork_serve.errors import DeviceError, DeviceGone, ModelError  # noqa: E402
from tests.devices import lifted  # noqa: E402
from tests.devices.lifted import close, numbers  # noqa: E402
from tests.devices.torch_models import CONFIG, ask  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
GPU = msgspec.structs.replace(CONFIG, device="cuda:0", kind="cuda", pool_bytes=9 << 20, warm_up_ns=0)


class Stand(Accelerator):
    """A stand-in for a GPU, with memory apart from the host's; it records calls and can fail."""

    kind = "cuda:sm_90"
    shares_memory = False

    def __init__(self, config) -> None:
        super().__init__(config)
        self.log: list[str] = []
        self.breaks = False
        self.refuses_graphs = False
        self.has_room = True
        self.replayed = 0
        self._lanes = ["none"]

    def area(self, nbytes):
        return super().area(nbytes)[0], torch.zeros(nbytes, dtype=torch.uint8)

    def zeros(self, nbytes):
        return super().zeros(nbytes) if self.has_room else None

    @contextlib.contextmanager
    def lane(self, name) -> Iterator[None]:
        self._lanes.append(name)
        self.log.append(f"{name}:")
        yield
        self._lanes.pop()

    def mark(self, lane):
        assert lane == self._lanes[-1], "a mark is of the lane that it is made in"
        self.log.append(f"mark {lane}")
        if self.breaks:
            raise RuntimeError("CUDA error: unspecified launch failure\nException raised from nowhere")
        return super().mark(lane)

    def follow(self, mark):
        self.log.append(f"{self._lanes[-1]} follows")

    def wait(self, mark):
        self.log.append("wait")

    def capture(self, first, run):
        if self.refuses_graphs:
            raise RuntimeError("operation not permitted when stream is capturing")
        first()
        outputs = [output.clone() for output in run()]

        def replay() -> None:
            self.replayed += 1
            for output, new in zip(outputs, run(), strict=True):
                output.copy_(new)

        return replay, outputs

    def lost(self, error) -> bool:
        return self.breaks


@pytest.fixture
def stand():
    return Stand(GPU)


@pytest.fixture
def device(stand):
    made = TorchDevice(GPU, stand)
    yield made
    made.close()


@pytest.fixture(scope="module")
def code():
    return models.net()


@pytest.fixture
def net(device, code, tmp_path):
    """A model in the device's first page."""
    made = models.Net(1)
    device.prepare(code)
    device.load(lifted.load(code, models.weights(code, made, tmp_path / "w")))
    return made


def test_a_request_crosses_to_the_device_and_back_in_order(device, stand, code, net):
    stand.log.clear()
    assert close(ask(device, code, numbers(2))[0], models.plain(net, numbers(2))[0])
    assert stand.log == [
        "input:", "mark input", "mark input",
        "exec:", "exec follows", "mark exec", "mark exec",
        "output:", "output follows", "mark output",
        "wait",
    ]  # fmt: skip


def test_a_load_goes_its_own_way_and_is_waited_for(device, stand, code, net, tmp_path):
    stand.log.clear()
    device.load(lifted.load(code, models.weights(code, net, tmp_path / "again"), 4))
    assert stand.log == ["load:", "mark load", "wait"]


def test_every_place_gets_a_graph_per_batch_at_its_first_load(device, stand, code, net, tmp_path):
    assert device.counters()["graphs"] == 3
    swaps = device.counters()["swaps"]
    for x in (numbers(1), numbers(2), numbers(4)):
        assert close(ask(device, code, x)[0], models.plain(net, x)[0])
    assert (stand.replayed, device.counters()["swaps"]) == (3, swaps)
    other = models.Net(2)
    device.load(lifted.load(code, models.weights(code, other, tmp_path / "other")))
    assert device.counters()["graphs"] == 3, "addresses are the same"
    assert close(ask(device, code, numbers(1))[0], models.plain(other, numbers(1))[0])
    device.retire(code.code_id)
    assert device.counters()["graphs"] == 0


def test_graphs_are_bounded_and_without_one_a_package_is_launched(stand, code, tmp_path):
    device = TorchDevice(msgspec.structs.replace(GPU, graphs=4), stand)
    device.prepare(code)
    nets = [models.Net(seed) for seed in range(3)]
    for page, net in enumerate(nets):
        device.load(lifted.load(code, models.weights(code, net, tmp_path / str(page)), page))
    assert device.counters()["graphs"] == 4
    for _ in range(3):
        for page, net in enumerate(nets):
            x = numbers(1)
            assert close(ask(device, code, x, first=page)[0], models.plain(net, x)[0])
    assert 0 < stand.replayed < 9
    device.close()


@pytest.mark.parametrize("graphs", [0, 8])
def test_where_graphs_cannot_be_made_or_are_off_packages_are_launched(stand, code, tmp_path, graphs):
    stand.refuses_graphs = True
    device = TorchDevice(msgspec.structs.replace(GPU, graphs=graphs), stand)
    device.prepare(code)
    net = models.Net(1)
    device.load(lifted.load(code, models.weights(code, net, tmp_path / "w")))
    assert close(ask(device, code, numbers(1))[0], models.plain(net, numbers(1))[0])
    assert device.counters()["graphs"] == 0
    device.close()


def test_all_batch_sizes_are_tried_however_long_it_takes(device, stand, code):
    device.prepare(code)
    assert stand.log.count("exec:") == 3


def test_without_room_for_zeros_a_code_is_ready_untried(device, stand, code, tmp_path):
    stand.has_room = False
    device.prepare(code)
    assert "exec:" not in stand.log
    net = models.Net(1)
    device.load(lifted.load(code, models.weights(code, net, tmp_path / "w")))
    assert close(ask(device, code, numbers(1))[0], models.plain(net, numbers(1))[0])


def test_a_device_that_is_lost_says_so_whatever_it_was_doing(device, stand, code, net, tmp_path):
    stand.breaks = True
    weights = models.weights(code, net, tmp_path / "w")
    lost = r"cuda:0 is lost after .*: CUDA error: unspecified launch failure$"
    with pytest.raises(DeviceGone, match=lost):
        ask(device, code, numbers(1))
    with pytest.raises(DeviceGone, match=lost):
        device.load(lifted.load(code, weights))
    with pytest.raises(DeviceGone, match=lost):
        device.prepare(msgspec.structs.replace(code, code_id="other"))


def test_a_device_that_is_not_lost_blames_the_model(device, stand, code, net, monkeypatch):
    monkeypatch.setattr(stand, "lost", lambda error: False)
    stand.breaks = True
    with pytest.raises(ModelError, match=r"model m: CUDA error: unspecified launch failure$"):
        ask(device, code, numbers(1))


def test_clock_rates_are_read_beside_the_work_and_may_be_missing():
    clocks = Clocks(0, lambda index: {"sm_mhz": 1000 + index})
    while not clocks.rates:
        pass
    assert clocks.rates == {"sm_mhz": 1000}
    clocks.close()
    if not torch.cuda.is_available():
        with pytest.raises(Exception):  # noqa: B017, PT011 - whatever torch raises without a GPU
            read_clocks(0)
        Clocks(0).close()


def test_memory_that_a_gpu_has_not_says_how_much_was_asked_is_free_and_is_to_be_set(monkeypatch):
    def no_room(*shape, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    gpu = Cuda.__new__(Cuda)
    gpu._config, gpu._device = msgspec.structs.replace(GPU, memory_share=0.9), "cuda:0"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    assert gpu.memory_bytes() == 900
    monkeypatch.setattr(torch, "empty", no_room)
    asked = r"device_memory: 900 bytes \(90% of what was free\) asked, 1000 bytes of 5000 are free on cuda:0"
    with pytest.raises(DeviceError, match=f"{asked}; set it to at most 800 or less"):
        gpu.arena(900)
    with pytest.raises(DeviceError, match="scratch_memory: no 70 bytes are left beside the arena; lower it"):
        gpu.area(70)
    with pytest.raises(DeviceError, match="pool_bytes: 70 bytes of pinned memory cannot be had; lower it"):
        gpu.pinned(70, "pool_bytes")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_cuda_device_says_so():
    with pytest.raises(DeviceError, match=r"cuda:0: torch .* sees 0 GPUs; install a torch built for CUDA"):
        Cuda(GPU)
