"""The ONNX backend answers as a plain session would, from a model's own weights, whatever shares a batch."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from clockwork_serve.devices import CallBuffers, DeviceConfig, build
from clockwork_serve.devices.onnx import warm_up
from clockwork_serve.devices.onnx_session import BoundWeights
from clockwork_serve.errors import DeviceError, ModelError
from clockwork_serve.messages import Extent
from harness import records
from tests.devices import lifted
from tests.devices.lifted import close, dense, numbers, spec

PAGE = 65536
WIDE = 20_000  # elements that make a tensor too large to be copied


def make(**settings):
    return build(DeviceConfig(device="cpu:0", memory_bytes=32 * PAGE, page_bytes=PAGE, **settings))


@pytest.fixture
def device():
    made = make(io_bytes=4 << 20)
    yield made
    made.close()


def elementwise(
    folder, op, shape, kind=TensorProto.FLOAT, datatype="FP32", *, constant=None, batched=True, **settings
):
    """Y = op(x) or op(x, constant), as a code without weights."""
    weights = [] if constant is None else [numpy_helper.from_array(np.array(constant), "k")]
    nodes = [helper.make_node(op, ["x", *(["k"] if weights else [])], ["y"])]
    dims = (["b"] if batched else []) + [dim if dim >= 0 else f"d{i}" for i, dim in enumerate(shape)]
    proto = lifted.model(nodes, {"x": dims}, {"y": [None] * len(dims)}, weights, {"x": kind, "y": kind})
    lifted.lift(proto, folder / "code", optimise=False)
    sizes = {"batch_sizes": (1, 2, 4) if batched else (1,)}
    outputs = [spec("y", *shape, datatype=datatype)]
    code = lifted.code_of(
        folder / "code",
        [spec("x", *shape, datatype=datatype)],
        outputs,
        batched=batched,
        **{**sizes, **settings},
    )
    return code, lifted.weights_file(folder / "none", b"")


MIXES = [([1], 1), ([2], 2), ([4], 4), ([1, 1], 2), ([1, 2], 4), ([1, 1, 1, 1], 4), ([3], 4), ([2, 1, 1], 4)]


@pytest.mark.parametrize("io_bytes", [4 << 20, 0], ids=["area", "no area"])
def test_answers_equal_a_plain_session_in_every_mix(tmp_path, io_bytes):
    device = make(io_bytes=io_bytes)
    plain, code, weights = dense(tmp_path)
    device.prepare(code)
    device.load(lifted.load(code, weights, 3))
    for rows, batch in MIXES * 2:
        xs = [numbers(count, seed=place) for place, count in enumerate(rows)]
        calls = [lifted.call({"x": x}) for x in xs]
        phases = device.infer(lifted.infer(code, rows, batch, first=3), calls)
        assert min(phases.input_ns, phases.run_ns, phases.output_ns) >= 0
        for x, call in zip(xs, calls, strict=True):
            assert close(lifted.output(call, "y"), plain.run(None, {"x": x})[0])
            assert call.output[4 * x.size] == 0xAA, "nothing is written after the outputs"
    device.close()


def test_models_of_one_code_answer_from_their_own_weights(device, tmp_path):
    models = [dense(tmp_path, seed) for seed in range(4)]
    code = models[0][1]
    device.prepare(code)
    for page, (_, _, weights) in enumerate(models):
        device.load(lifted.load(code, weights, page))
    for page in (2, 0, 3, 1, 1):
        call, x = lifted.call({"x": numbers(1)}), numbers(1)
        device.infer(lifted.infer(code, [1], first=page), [call])
        assert close(lifted.output(call, "y"), models[page][0].run(None, {"x": x})[0])


def test_a_load_replaces_the_weights_of_an_extent(device, tmp_path):
    (_, code, first), (plain, _, second) = dense(tmp_path, 1), dense(tmp_path, 2)
    device.prepare(code)
    device.load(lifted.load(code, first))
    device.infer(lifted.infer(code, [1]), [lifted.call({"x": numbers(1)})])
    device.unload(lifted.unload())
    device.load(lifted.load(code, second))
    call = lifted.call({"x": numbers(1)})
    device.infer(lifted.infer(code, [1]), [call])
    assert close(lifted.output(call, "y"), plain.run(None, {"x": numbers(1)})[0])


def test_nothing_but_the_extent_is_written(device, tmp_path):
    _, code, weights = dense(tmp_path)
    arena = device._arena
    arena.view(Extent(0, 32), 32 * PAGE)[:] = 0x55
    device.prepare(code)
    device.load(lifted.load(code, weights, 5))
    device.infer(lifted.infer(code, [1], first=5), [lifted.call({"x": numbers(1)})])
    assert (arena.view(Extent(0, 5), 5 * PAGE) == 0x55).all()
    assert (arena.view(Extent(5, 1), PAGE)[weights.size :] == 0x55).all()
    assert (arena.view(Extent(6, 26), 26 * PAGE) == 0x55).all()


def test_large_tensors_stay_in_the_requests_memory_and_are_let_go(device, tmp_path):
    code, weights = elementwise(tmp_path, "Neg", (WIDE,))
    device.prepare(code)
    device.load(lifted.load(code, weights))
    memory = mmap.mmap(-1, 1 << 20)
    x = np.ndarray((1, WIDE), np.float32, buffer=memory)
    x[:] = 5
    call = CallBuffers(inputs={"x": x}, output=memoryview(memory)[1 << 19 :])
    device.infer(lifted.infer(code, [1]), [call])
    assert (lifted.output(call, "y") == -5).all()
    del x, call
    memory.close()  # BufferError if the device still held on to it
    call = lifted.call({"x": np.ones((1, WIDE), np.float32)}, room=1 << 17)
    device.infer(lifted.infer(code, [1]), [call])
    assert (lifted.output(call, "y") == -1).all()


@pytest.mark.parametrize("shape", [(WIDE,), (-1,)], ids=["static", "open"])
def test_strided_inputs_are_taken_as_they_are_seen(device, tmp_path, shape):
    code, weights = elementwise(tmp_path, "Neg", shape)
    device.prepare(code)
    device.load(lifted.load(code, weights))
    x = np.arange(2 * WIDE, dtype=np.float32)[::2].reshape(1, WIDE)
    call = lifted.call({"x": x}, room=1 << 17)
    device.infer(lifted.infer(code, [1]), [call])
    assert (lifted.output(call, "y") == -x).all()


@pytest.mark.parametrize("rows", [[1], [2], [1, 1], [1, 2]])
def test_dimensions_that_a_request_chooses(device, tmp_path, rows):
    code, weights = elementwise(tmp_path, "Neg", (-1, 2))
    device.prepare(code)
    device.load(lifted.load(code, weights))
    for length in (3, 1, 7):
        xs = [numbers(count * length * 2, 1).reshape(count, length, 2) for count in rows]
        calls = [lifted.call({"x": x}) for x in xs]
        device.infer(lifted.infer(code, rows, 4 if sum(rows) == 3 else None), calls)
        for x, call in zip(xs, calls, strict=True):
            assert (lifted.output(call, "y") == -x).all()


def test_rows_of_different_shapes_do_not_share_a_batch(device, tmp_path):
    code, weights = elementwise(tmp_path, "Neg", (-1,))
    device.prepare(code)
    device.load(lifted.load(code, weights))
    calls = [lifted.call({"x": numbers(1, width)}) for width in (3, 4)]
    with pytest.raises(DeviceError, match="rows of shape"):
        device.infer(lifted.infer(code, [1, 1]), calls)


def test_an_unbatched_code_takes_one_call_as_it_is(device, tmp_path):
    for shape in ((3, 2), (3, -1)):
        folder = tmp_path / str(shape)
        folder.mkdir()
        code, weights = elementwise(folder, "Neg", shape, batched=False)
        device.prepare(code)
        device.load(lifted.load(code, weights))
        x = numbers(3, 2)
        call = lifted.call({"x": x})
        device.infer(lifted.infer(code, [1]), [call])
        assert (lifted.output(call, "y") == -x).all()
        with pytest.raises(DeviceError, match="no batch axis"):
            device.infer(lifted.infer(code, [1, 1]), [call, call])


@pytest.mark.parametrize("width", [3, -1])
def test_an_output_that_is_an_input_has_its_own_request_s_values(device, tmp_path, width):
    nodes = [helper.make_node("Neg", ["x"], ["y"])]
    dims = ["b", width if width > 0 else "d"]
    lifted.lift(
        lifted.model(nodes, {"x": dims}, {"x": dims, "y": dims}, []), tmp_path / "code", optimise=False
    )
    outputs = [spec("x", width), spec("y", width)]
    code = lifted.code_of(tmp_path / "code", [spec("x", width)], outputs, batch_sizes=(1, 2))
    device.prepare(code)
    device.load(lifted.load(code, lifted.weights_file(tmp_path / "none", b"")))
    for rows in ([1], [2], [1, 1]):
        xs = [numbers(count, abs(width), seed=place) for place, count in enumerate(rows)]
        calls = [lifted.call({"x": x}) for x in xs]
        device.infer(lifted.infer(code, rows), calls)
        for x, call in zip(xs, calls, strict=True):
            assert (lifted.output(call, "x") == x).all()
            assert (lifted.output(call, "y") == -x).all()


KINDS = [
    (TensorProto.INT64, "INT64", np.int64), (TensorProto.INT8, "INT8", np.int8),
    (TensorProto.UINT8, "UINT8", np.uint8),
    (TensorProto.BOOL, "BOOL", np.bool_), (TensorProto.FLOAT16, "FP16", np.float16),
    (TensorProto.DOUBLE, "FP64", np.float64), (TensorProto.BFLOAT16, "BF16", np.uint16),
]  # fmt: skip


@pytest.mark.parametrize("width", [3, -1, WIDE])
@pytest.mark.parametrize(("kind", "datatype", "dtype"), KINDS)
def test_element_types(device, tmp_path, kind, datatype, dtype, width):
    code, weights = elementwise(tmp_path, "Identity", (width,), kind, datatype)
    device.prepare(code)
    device.load(lifted.load(code, weights))
    x = np.arange(2 * abs(width)).reshape(2, -1).astype(dtype)
    for rows, parts in (([2], [x]), ([1, 1], [x[:1], x[1:]])):
        calls = [lifted.call({"x": part}, room=1 << 19) for part in parts]
        device.infer(lifted.infer(code, rows), calls)
        for part, call in zip(parts, calls, strict=True):
            assert (lifted.output(call, "y") == part).all()
            assert call.outputs[0].datatype == datatype


def test_strings_come_and_go_in_wire_form(device, tmp_path):
    code, weights = elementwise(tmp_path, "Identity", (2,), TensorProto.STRING, "BYTES")
    device.prepare(code)
    device.load(lifted.load(code, weights))
    calls = [
        lifted.call({"x": np.array([["a", "bc"]], dtype=object)}),
        lifted.call({"x": np.array([["ü".encode(), b""]], dtype=object)}),
    ]
    device.infer(lifted.infer(code, [1, 1]), calls)
    assert bytes(calls[0].output[:11]) == b"\x01\0\0\0a\x02\0\0\0bc"
    assert bytes(calls[1].output[:10]) == b"\x02\0\0\0" + "ü".encode() + b"\0\0\0\0"
    with pytest.raises(ModelError, match="UTF-8"):
        device.infer(lifted.infer(code, [1]), [lifted.call({"x": np.array([[b"\xff", b""]], dtype=object)})])


def test_an_optional_input_left_out_is_not_that_of_the_call_before(device, tmp_path):
    nodes = [helper.make_node("Add", ["x", "k"], ["y"])]
    default = numpy_helper.from_array(np.zeros((1, 2), np.float32), "k")
    proto = lifted.model(nodes, {"x": ["b", 2], "k": ["b", 2]}, {"y": ["b", 2]}, [default])
    lifted.lift(proto, tmp_path / "code", optimise=False)
    code = lifted.code_of(tmp_path / "code", [spec("x", 2), spec("k", 2, optional=True)], [spec("y", 2)])
    device.prepare(code)
    device.load(lifted.load(code, lifted.weights_file(tmp_path / "none", b"")))
    x = np.ones((1, 2), np.float32)
    for inputs, wanted in (
        ({"x": x, "k": 5 * x}, 6),
        ({"x": x}, 1),
        ({"x": x, "k": 2 * x}, 3),
        ({"x": x}, 1),
    ):
        call = lifted.call(inputs)
        device.infer(lifted.infer(code, [1]), [call])
        assert (lifted.output(call, "y") == wanted).all()
    with pytest.raises(DeviceError, match="input k"):
        device.infer(lifted.infer(code, [1, 1]), [lifted.call({"x": x, "k": x}), lifted.call({"x": x})])


def test_a_warm_up_leaves_optional_inputs_to_their_defaults():
    class Session:
        def __init__(self) -> None:
            self.fed: list[list[str]] = []

        def run(self, _, feed) -> None:
            self.fed.append(list(feed))

    session = Session()
    code = records.code(inputs=(spec("x", 2), spec("k", 2, optional=True)))
    warm_up(code, BoundWeights(session, None, {}, []), (1,), 10**9)
    assert session.fed == [["x"]]


@pytest.mark.parametrize("others", [0, 1])
@pytest.mark.parametrize(("inputs", "message"), lifted.BAD_INPUTS)
def test_inputs_that_are_not_as_declared_are_refused(device, tmp_path, inputs, message, others):
    plain, code, weights = dense(tmp_path)
    device.prepare(code)
    device.load(lifted.load(code, weights))
    calls = [lifted.call({"x": numbers(1)}) for _ in range(others)] + [lifted.call(inputs)]
    with pytest.raises(DeviceError, match=message):
        device.infer(lifted.infer(code, [1] * len(calls)), calls)
    good = lifted.call({"x": numbers(1)})
    device.infer(lifted.infer(code, [1]), [good])
    assert close(lifted.output(good, "y"), plain.run(None, {"x": numbers(1)})[0])


@pytest.mark.parametrize(("shape", "io_bytes"), [((64,), 4 << 20), ((64,), 0), ((-1,), 4 << 20)])
def test_outputs_whose_room_cannot_grow_are_an_error_and_leave_no_reference(tmp_path, shape, io_bytes):
    device = make(io_bytes=io_bytes)
    code, weights = elementwise(tmp_path, "Neg", shape)
    device.prepare(code)
    device.load(lifted.load(code, weights))
    calls = [lifted.call({"x": numbers(1)}), lifted.full({"x": numbers(1)}, room=255)]
    with pytest.raises(ModelError, match="256 bytes for 255"):
        device.infer(lifted.infer(code, [1, 1]), calls)
    assert [call.outputs for call in calls] == [[], []]
    device.close()


@pytest.mark.parametrize("shape", [(2,), (-1,)], ids=["static", "open"])
def test_a_model_that_raises_says_why_in_one_line_and_answers_the_next(device, tmp_path, shape):
    nodes = [helper.make_node("Gather", ["k", "x"], ["y"], name="pick")]
    table = numpy_helper.from_array(np.arange(4, dtype=np.float32), "k")
    proto = lifted.model(nodes, {"x": ["b", "n"]}, {"y": ["b", "n"]}, [table], {"x": TensorProto.INT64})
    lifted.lift(proto, tmp_path / "code", optimise=False)
    code = lifted.code_of(tmp_path / "code", [spec("x", *shape, datatype="INT64")], [spec("y", *shape)])
    device.prepare(code)
    device.load(lifted.load(code, lifted.weights_file(tmp_path / "none", b"")))
    bad = lifted.call({"x": np.array([[0, 9]])})
    with pytest.raises(ModelError) as error:
        device.infer(lifted.infer(code, [1]), [bad])
    assert str(error.value).startswith(
        "model m: Gather node 'pick': indices element out of data bounds, idx=9"
    )
    assert "\n" not in str(error.value)
    assert bad.outputs == []
    good = lifted.call({"x": np.array([[3, 0]])})
    device.infer(lifted.infer(code, [1]), [good])
    assert lifted.output(good, "y").tolist() == [[3, 0]]
