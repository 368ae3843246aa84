"""Small torch models, compiled into the artefacts that a device reads; kept between runs of the tests."""

from __future__ import annotations

import hashlib
import inspect
import shutil
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip(
    "torch", reason="torch is not installed: pip install './packages/clockwork-serve[torch]'"
)
if shutil.which("g++") is None:
    pytest.skip("g++ compiles torch models, and is not there", allow_module_level=True)


from clockwork_serve.devices import DeviceConfig  # noqa: E402
from clockwork_serve.integrity import hash_of  # noqa: E402
from clockwork_serve.messages import Code, TensorSpec, TorchIndex, TorchTensor, Weights  # noqa: E402
from clockwork_serve.units import align  # noqa: E402
from tests.devices import lifted  # noqa: E402
from tests.devices.lifted import vouched  # noqa: E402

OPTIONS = {
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.use_runtime_constant_folding": False,
    "always_keep_tensor_constants": True,
}
NAMES = {torch.float32: "FP32", torch.int64: "INT64", torch.bfloat16: "BF16", torch.bool: "BOOL"}


class Net(torch.nn.Module):
    """y = tanh(x A + a) B + b + k, where k is a buffer of whole numbers: weights of two kinds."""

    def __init__(self, seed: int, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(layers))
        self.register_buffer("k", torch.randint(0, 5, (width,)))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return (x + self.k,)


class Pick(torch.nn.Module):
    """y = table[x], which raises where x is beyond the table; and whether x is even, in rows of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.arange(4, dtype=torch.bfloat16))

    def forward(self, x):
        return self.table[x], x % 2 == 0


class Whole(torch.nn.Module):
    """z = x y: two inputs and no batch axis."""

    def forward(self, x, y):
        return (x @ y,)


def artefact(
    name: str, model, inputs: Callable[[int], tuple], sizes: tuple[int, ...], *, batched: bool = True
) -> Code:
    """The code of a model, compiled now or by an earlier run of these very lines with this torch.

    Several processes may compile it at once: one folder counts, the first that is complete.
    """
    text = inspect.getsource(type(model)) + inspect.getsource(_compile) + torch.__version__ + str(sizes)
    code_id = f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    folder = Path(tempfile.gettempdir()) / "clockwork-torch-packages" / code_id
    record = folder / "code.json"
    if not record.exists():
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as made, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's compiler warns of itself
            whole = Path(made) / code_id
            whole.mkdir()
            _compile(whole, code_id, model, inputs, sizes, batched=batched)
            with suppress(OSError):  # another process was first
                whole.rename(folder)
    return msgspec.structs.replace(msgspec.json.decode(record.read_bytes(), type=Code), path=str(folder))


def _compile(folder: Path, code_id: str, model, inputs, sizes, *, batched: bool) -> None:
    model = model.eval()
    for size in sizes:
        program = torch.export.export(model, inputs(size))
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(folder / f"{size}.pt2"), inductor_configs=OPTIONS
        )
    names = torch._C._aoti.AOTIModelPackageLoader(
        str(folder / f"{sizes[0]}.pt2"), "model", True, 1, -1
    ).get_constant_fqns()
    tensors, end = [], 0
    for constant in sorted(names):
        value = model.state_dict()[constant]
        start = align(end, 256)
        end = start + value.numel() * value.element_size()
        tensors.append(
            TorchTensor(
                name=constant, dtype=str(value.dtype).removeprefix("torch."), shape=tuple(value.shape),
                stride=value.stride(), offset=start, size=end - start,
            )
        )  # fmt: skip
    example = inputs(sizes[0])
    given = [_spec("x", value, number, batched=batched) for number, value in enumerate(example)]
    made = [_spec("y", value, number, batched=batched) for number, value in enumerate(model(*example))]
    index = TorchIndex(
        tensors=tuple(tensors), blob_bytes=align(end, 256), torch_version=str(torch.__version__),
        target="cpu", inputs=tuple(spec.name for spec in given), outputs=tuple(spec.name for spec in made),
    )  # fmt: skip
    (folder / "index.json").write_bytes(msgspec.json.encode(index))
    code = Code(
        code_id=code_id, backend="torch", path=str(folder), inputs=tuple(given), outputs=tuple(made),
        batched=batched, batch_sizes=sizes, lifted=True,
    )  # fmt: skip
    (folder / "code.json").write_bytes(msgspec.json.encode(vouched(code)))


def _spec(letter: str, value, number: int, *, batched: bool) -> TensorSpec:
    shape = tuple(value.shape[1:] if batched else value.shape)
    return TensorSpec(name=letter + (str(number) if number else ""), datatype=NAMES[value.dtype], shape=shape)


def weights(code: Code, model, path: Path) -> Weights:
    """A model's weights as its code lays them out, in a file."""
    index = msgspec.json.decode((Path(code.path) / "index.json").read_bytes(), type=TorchIndex)
    blob = bytearray(index.blob_bytes)
    for tensor in index.tensors:
        value = model.state_dict()[tensor.name].detach().contiguous().view(torch.uint8)
        blob[tensor.offset : tensor.offset + tensor.size] = value.numpy().tobytes()
    path.write_bytes(blob)
    return Weights(weights_id=hash_of(bytes(blob)), path=str(path), size=len(blob))


def net(width: int = 64, layers: int = 2, sizes: tuple[int, ...] = (1, 2, 4)) -> Code:
    """The code of all ``Net``."""
    return artefact(
        f"net{width}x{layers}", Net(0, width, layers), lambda size: (torch.zeros(size, width),), sizes
    )


def pick() -> Code:
    """The code of ``Pick``."""
    return artefact("pick", Pick(), lambda size: (torch.zeros(size, 2, dtype=torch.int64),), (1, 2))


def whole() -> Code:
    """The code of ``Whole``."""
    return artefact("whole", Whole(), lambda _: (torch.zeros(2, 3), torch.zeros(3, 4)), (1,), batched=False)


def plain(model, *arrays: np.ndarray) -> list[np.ndarray]:
    """What the model answers without any of this."""
    with torch.no_grad():
        return [value.numpy() for value in model.eval()(*map(torch.from_numpy, arrays))]


PAGE = 65536
CONFIG = DeviceConfig(
    device="torch-cpu:0", kind="torch-cpu", memory_bytes=64 * PAGE, page_bytes=PAGE, io_bytes=4 << 20
)


def ask(device, code, *xs, batch=None, first=0):
    """The outputs ``y`` of one INFER of calls with these inputs."""
    calls = [lifted.call({"x": x}) for x in xs]
    phases = device.infer(lifted.infer(code, [len(x) for x in xs], batch, first), calls)
    assert min(phases.input_ns, phases.run_ns, phases.output_ns) >= 0
    return [lifted.output(call, "y") for call in calls]
