"""A user's class is run with what it should get, and what it returns is checked."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest

from clockwork_serve.devices import DeviceConfig, build
from clockwork_serve.errors import DeviceError, ModelError
from clockwork_serve.messages import Weights
from tests.devices import lifted
from tests.devices.lifted import spec

CLASS = """
import numpy as np

class Model:
    def load(self, path):
        with open(path) as file:
            self.factor = float(file.read())

    def infer(self, inputs):
        {infer}

    def unload(self):
        with open({log!r}, "a") as file:
            file.write("unloaded ")
"""
DOUBLE = 'return {"y": inputs["x"] * np.float32(self.factor)}'


@pytest.fixture
def device():
    made = build(DeviceConfig(device="cpu:0", memory_bytes=1 << 20, page_bytes=65536))
    yield made
    made.close()


class Served:
    """A code and its weights in a folder."""

    def __init__(self, folder, infer=DOUBLE, source=CLASS, **settings):
        self.log = folder / "log"
        (folder / "model.py").write_text(
            source.replace("{infer}", infer).replace("{log!r}", repr(str(self.log)))
        )
        io = {"inputs": [spec("x", 2)], "outputs": [spec("y", 2)]}
        self.code = lifted.code_of(folder, **{**io, "backend": "python", "lifted": False, **settings})

    def weights(self, factor):
        path = self.log.with_name(f"factor{factor}")
        path.write_text(str(factor))
        return Weights(weights_id=str(factor), path=str(path), size=1000)


def run(device, served, rows=(1,), first=0):
    calls = [lifted.call({"x": np.full((n, 2), place + 1, np.float32)}) for place, n in enumerate(rows)]
    device.infer(lifted.infer(served.code, rows, None if sum(rows) != 3 else 4, first=first), calls)
    return calls


def test_calls_are_stacked_and_each_gets_its_rows(device, tmp_path):
    served = Served(tmp_path)
    device.prepare(served.code)
    device.load(lifted.load(served.code, served.weights(2)))
    calls = run(device, served, (1, 2))
    assert lifted.output(calls[0], "y").tolist() == [[2, 2]]
    assert lifted.output(calls[1], "y").tolist() == [[4, 4], [4, 4]]


def test_each_extent_has_a_model_of_its_own(device, tmp_path):
    served = Served(tmp_path)
    device.prepare(served.code)
    device.load(lifted.load(served.code, served.weights(2), 0))
    device.load(lifted.load(served.code, served.weights(3), 1))
    assert lifted.output(run(device, served, first=0)[0], "y")[0, 0] == 2
    assert lifted.output(run(device, served, first=1)[0], "y")[0, 0] == 3
    device.unload(lifted.unload(0))
    assert served.log.read_text() == "unloaded "
    with pytest.raises(DeviceError, match="not loaded at page 0"):
        run(device, served, first=0)


def test_modules_are_private_and_removed(device, tmp_path):
    served = Served(tmp_path)
    before = set(sys.modules)
    device.prepare(served.code)
    device.load(lifted.load(served.code, served.weights(2)))
    added = set(sys.modules) - before
    assert added == {f"_clockwork_model_{served.code.code_id}"}
    device.retire(served.code.code_id)
    assert not added & set(sys.modules)
    assert served.log.read_text() == "unloaded "


def test_inputs_cannot_be_written_to(device, tmp_path):
    served = Served(tmp_path, 'inputs["x"][:] = 0; return inputs')
    device.prepare(served.code)
    device.load(lifted.load(served.code, served.weights(2)))
    with pytest.raises(ModelError, match=r"model m: ValueError: .*read-only"):
        run(device, served)


GONE = "from clockwork_serve.errors import DeviceGone"
WRONG = [
    ("return None", r"expected a dict with outputs \['y'\], found NoneType"),
    ('return {"z": 1}', r"expected a dict with outputs \['y'\], found \['z'\]"),
    ('return {"y": inputs["x"].astype("f8")}', r"output y: expected float32 \(FP32\), found float64"),
    ('return {"y": inputs["x"].astype(object)}', r"output y: expected float32 \(FP32\), found object"),
    ('return {"y": inputs["x"][:, :1]}', r"output y: expected shape \(2, 2\), found \(2, 1\)"),
    ('return {"y": inputs["x"][:1]}', r"output y: expected shape \(2, 2\), found \(1, 2\)"),
    ('raise RuntimeError("no\\nluck")', "RuntimeError: no luck"),
    ("import sys; sys.exit(3)", "SystemExit: 3"),
    ("return {}[0]", "KeyError: 0"),
    ("raise ValueError('unknown op \\ud800')", r"ValueError: unknown op \\ud800"),
    ("raise ValueError('\\x1b[2J\\0')", r"ValueError: \\x1b\[2J\\x00"),
    ("raise ValueError('x' * 10**7)", "ValueError: x{900}"),
    ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ("raise GeneratorExit", "GeneratorExit"),
    ("raise MemoryError", "MemoryError"),
    ("raise StopIteration(3)", "StopIteration: 3"),
    ("f = lambda: f(); f()", "RecursionError: maximum recursion depth"),
    ("raise BaseExceptionGroup('g', [SystemExit()])", "BaseExceptionGroup: g"),
    (
        "class E(BaseException):\n            def __str__(self): raise SystemExit\n        raise E",
        "E: .its text",
    ),
    ("class E(Exception):\n            def __str__(self): return 1\n        raise E", "E: .its text"),
    (f"{GONE} as G; raise type('E', (Exception,), {{'__class__': G}})('lies')", "E: lies"),
    (f"{GONE} as G; raise G('x')", "DeviceGone: x"),
    ("class K:\n            def __str__(self): raise SystemExit\n        return {K(): 1}", "SystemExit"),
    (
        "class A:\n            def __array__(self, *_): raise KeyboardInterrupt\n        return {'y': A()}",
        "KeyboardI",
    ),
]


@pytest.mark.parametrize(("infer", "message"), WRONG)
def test_what_is_wrong_is_the_models_fault_and_said_in_one_line(device, tmp_path, infer, message):
    served = Served(tmp_path, infer)
    device.prepare(served.code)
    device.load(lifted.load(served.code, served.weights(2)))
    with pytest.raises(ModelError, match=f"^model m: .*{message}") as error:
        run(device, served, (1, 1))
    assert "\n" not in str(error.value)


FORKS = [
    'return {"y": np.full_like(inputs["x"], pid)}',
    "if pid == 0: raise SystemExit\n        return {'y': np.full_like(inputs['x'], pid)}",
]


@pytest.mark.parametrize("then", FORKS)
def test_a_child_that_comes_back_from_the_model_ends_there(device, tmp_path, then):
    served = Served(tmp_path, f"import os\n        pid = os.fork()\n        {then}")
    device.prepare(served.code)
    device.load(lifted.load(served.code, served.weights(2)))
    own = os.getpid()
    try:
        (call,) = run(device, served)
    finally:
        if os.getpid() != own:
            os._exit(1)  # a second one of these tests
    pid = int(lifted.output(call, "y")[0, 0])
    assert os.waitpid(pid, 0) == (pid, 0)


def test_outputs_whose_room_cannot_grow_are_an_error_and_leave_no_reference(device, tmp_path):
    served = Served(tmp_path)
    device.prepare(served.code)
    device.load(lifted.load(served.code, served.weights(2)))
    inputs = {"x": np.ones((1, 2), np.float32)}
    calls = [lifted.call(inputs), lifted.full(inputs, room=7)]
    with pytest.raises(ModelError, match="8 bytes for 7"):
        device.infer(lifted.infer(served.code, [1, 1]), calls)
    assert [call.outputs for call in calls] == [[], []]


def test_strings(device, tmp_path):
    served = Served(
        tmp_path,
        'return {"y": np.array([[w.decode().upper() for w in row] for row in inputs["x"]])}',
        inputs=[spec("x", 2, datatype="BYTES")],
        outputs=[spec("y", 2, datatype="BYTES")],
    )
    device.prepare(served.code)
    device.load(lifted.load(served.code, served.weights(2)))
    call = lifted.call({"x": np.array([[b"a", b"b"]], dtype=object)})
    device.infer(lifted.infer(served.code, [1]), [call])
    assert bytes(call.output[:10]) == b"\x01\0\0\0A\x01\0\0\0B"


WRONG_STRINGS = [
    ("['\\ud800', 'b']", r"UnicodeEncodeError: 'utf-8' codec can't encode character '\\ud800'"),
    ("[b'a', 10**12]", "TypeError: expected bytes or str as elements, found int"),
    ("[b'a', None]", "TypeError: expected bytes or str as elements, found NoneType"),
]


@pytest.mark.parametrize(("strings", "message"), WRONG_STRINGS)
def test_strings_that_cannot_be_sent_are_the_models_fault(device, tmp_path, strings, message):
    served = Served(
        tmp_path, f'return {{"y": np.array([{strings}], object)}}', outputs=[spec("y", 2, datatype="BYTES")]
    )
    device.prepare(served.code)
    device.load(lifted.load(served.code, served.weights(2)))
    with pytest.raises(ModelError, match=f"^model m: {message}"):
        run(device, served)


SOURCES = [
    ("", "TypeError: expected a class Model with load, infer and unload, found no load"),
    ("class Model:\n    def load(self, path): pass\n", "TypeError: expected a class Model .* found no infer"),
    ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
    ("def", "SyntaxError: invalid syntax"),
    ("raise SystemExit", "SystemExit"),
    ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ("raise ValueError('\\ud800')", r"ValueError: \\ud800"),
    ("def __getattr__(name): raise SystemExit(name)", "SystemExit: Model"),
]


@pytest.mark.parametrize(("source", "message"), SOURCES)
def test_a_file_without_a_usable_class_is_refused(device, tmp_path, source, message):
    served = Served(tmp_path, source=source)
    before = set(sys.modules)
    with pytest.raises(DeviceError, match=rf"model\.py: {message}"):
        device.prepare(served.code)
    assert set(sys.modules) == before


def test_a_file_that_is_not_there_is_named(device, tmp_path):
    served = Served(tmp_path)
    (tmp_path / "model.py").unlink()
    with pytest.raises(DeviceError, match=r"model.py: expected a Python file, found none"):
        device.prepare(served.code)


def test_a_model_that_cannot_load_or_unload(device, tmp_path, caplog):
    served = Served(tmp_path)
    device.prepare(served.code)
    with pytest.raises(ModelError, match="load: FileNotFoundError"):
        device.load(lifted.load(served.code, Weights(weights_id="w", path=str(tmp_path / "none"), size=1)))
    device.load(lifted.load(served.code, served.weights(2)))
    served.log.mkdir()
    device.unload(lifted.unload())
    assert "unload raised: IsADirectoryError" in caplog.text
