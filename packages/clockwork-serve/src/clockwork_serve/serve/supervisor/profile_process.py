"""A child process that measures how long one code takes on a device of its own; run by ``python -m``."""

from __future__ import annotations

import gc
import logging
import os
import socket
import statistics
import sys
import time
import traceback
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, NoReturn

import msgspec
import numpy as np
from msgspec import Struct

from clockwork_serve.config import Settings
from clockwork_serve.devices import CallBuffers, Device, DeviceConfig, build, import_runtime, io_bytes
from clockwork_serve.devices.arena import used_bytes
from clockwork_serve.devices.base import Array
from clockwork_serve.devices.files import has_file, read_file
from clockwork_serve.errors import DeviceError, ModelError
from clockwork_serve.messages import (
    Call,
    Code,
    Extent,
    Infer,
    Load,
    Model,
    Profile,
    TensorSpec,
    Unload,
    Window,
)
from clockwork_serve.serve import child
from clockwork_serve.store import Fill, generate_inputs
from clockwork_serve.store.cache import batch_sizes
from clockwork_serve.units import KIB, MIB, NS_PER_MS, NS_PER_S, TENSOR_ALIGN, align

# ------------------------------------------------------------
# Cold-cache profiling: where many models share a core, its caches hold the weights of others when one runs.
#
# A MobileNet (10 MB) takes 1.9 ms run after run, and 2.5 ms where fifteen are served on one core. Of two
# requests in one INFER, the second finds in the caches what the first fetched; run after run, such a batch
# seems to save nothing: 3.7 ms. With the caches evicted between runs it takes 4.0 ms, and a single request
# 2.3 ms (AMD EPYC).


EVICT_FROM_BYTES: Final = MIB  # smaller weights are fetched within 0.1 ms
DEFAULT_CACHE_BYTES: Final = 32 * MIB  # where the system does not say how large the caches are
EVICT_BYTES_MAX: Final = 128 * MIB
_CACHES: Final = Path("/sys/devices/system/cpu/cpu0/cache")


def cache_bytes(folder: Path = _CACHES) -> int:
    """The size of the largest cache of a core, shared with other cores or not."""
    found = []
    for file in folder.glob("index*/size"):
        text = ""
        with suppress(OSError):  # a system that hides it
            text = file.read_text(encoding="ascii").strip()
        if text.endswith("K") and text[:-1].isdigit():
            found.append(int(text[:-1]) * KIB)
    return max(found, default=DEFAULT_CACHE_BYTES)


def cache_evictor(
    device_kind: str, weights_bytes: int, most_bytes: int = EVICT_BYTES_MAX
) -> Callable[[], object]:
    """Returns a function that evicts a model's weights from the caches, to be called between two runs.

    It reads twice the cache's size, ``most_bytes`` at most. It does nothing for small weights, and for a GPU,
    whose caches it cannot reach.
    """
    if weights_bytes < EVICT_FROM_BYTES or device_kind.startswith("cuda"):
        return lambda: None
    return np.ones(min(2 * cache_bytes(), most_bytes) // 8, np.int64).sum


# ------------------------------------------------------------
# Inputs to profile a code with, guessed from its tensors' names, datatypes and shapes.


SAMPLE_RATE: Final = 16_000  # the sample rate that most audio models expect; many refuse any other


def fills_to_try(code: Code) -> Iterator[tuple[Fill, ...]]:
    """Ways to fill one row of the inputs, the most realistic first; a model may refuse any of them.

    A code has the inputs that worked when it was compiled (``probe.json``). Where a request chooses a
    dimension, nobody knows how large it will be, so it is small: of a larger one the first request shows how
    long it takes, and a guess would refuse requests, or claim memory, for no reason.
    """
    known = _known_fills(code)
    if known:
        yield known
    base = known or tuple(_fill(spec, code) for spec in code.inputs if not spec.optional)
    for size in (64, 16, 1) if any(dim < 0 for spec in code.inputs for dim in spec.shape) else (1,):
        yield _sized(base, code, size)


def inputs_of(fills: Sequence[Fill]) -> dict[str, Array]:
    """One row of inputs by name, the same every time; elements of BYTES are ``bytes``, as devices expect."""
    made = generate_inputs(fills)
    return {name: _as_bytes(array) if array.dtype == object else array for name, array in made.items()}


def _as_bytes(array: Array) -> Array:
    elements = [each.encode() if isinstance(each, str) else each for each in array.ravel()]
    return np.array(elements, object).reshape(array.shape)


def _known_fills(code: Code) -> tuple[Fill, ...]:
    if not has_file(code, "probe.json"):
        return ()
    try:
        fills = msgspec.json.decode(read_file(code, "probe.json"), type=tuple[Fill, ...])
    except (ValueError, RecursionError, msgspec.MsgspecError):
        return ()
    return fills if {spec.name for spec in code.inputs} >= {fill.name for fill in fills} else ()


def _fill(spec: TensorSpec, code: Code) -> Fill:
    shape = (1, *spec.shape) if code.batched else spec.shape
    name = spec.name.lower()
    is_rate = spec.datatype in ("INT32", "INT64") and ("rate" in name or name == "sr")
    low, high = (SAMPLE_RATE, SAMPLE_RATE) if is_rate else (0, 1)
    return Fill(name=spec.name, datatype=spec.datatype, shape=shape, low=low, high=high)


def _sized(fills: Sequence[Fill], code: Code, size: int) -> tuple[Fill, ...]:
    """The fills with every dimension that a request chooses set to ``size``."""
    specs = {spec.name: spec for spec in code.inputs}
    return tuple(msgspec.structs.replace(fill, shape=_shape(specs[fill.name], code, size)) for fill in fills)


def _shape(spec: TensorSpec, code: Code, size: int) -> tuple[int, ...]:
    shape = tuple(size if dim < 0 else dim for dim in spec.shape)
    return (1, *shape) if code.batched else shape


# ------------------------------------------------------------
# Measures how long a code takes on an idle device, before the server starts.
#
# A profile only seeds the controller's estimates, which follow what is measured while serving; so a quick
# median is enough. Each run starts with cold caches, as it does when many models are served.


RUNS_MIN: Final = 5
RUNS_MAX: Final = 50
BATCH_TIME_NS: Final = 300 * NS_PER_MS
"""How long one batch size is measured; a batch that takes longer is run once."""
EXTRAPOLATE_NS: Final = 2 * NS_PER_S
"""A batch expected to take longer is extrapolated, not run, once two sizes were run: they show what one row
more takes, which may be nothing, however slow the model."""
LOADS: Final = 3
REFUSED_NS: Final = 50 * NS_PER_MS
"""The assumed duration of a row if the model refuses all inputs tried; estimates correct it while serving."""
LOAD_BASE_NS: Final = 100_000
"""The most of a LOAD's duration that counts as constant overhead, where one size of weights is measured."""
WORKSPACE_MIN: Final = MIB

_ANY_TIME: Final = Window(0, 1 << 62)
_log = logging.getLogger(__name__)


class MeasuredProfile(Struct, frozen=True, kw_only=True, tag=True):
    """A profile, with warnings about guesses in it."""

    profile: Profile
    warnings: tuple[str, ...] = ()


def profile(
    device: Device, code: Code, model: Model, clock: Callable[[], int] = time.monotonic_ns,
    between: Callable[[], object] | None = None, on_prepared: Callable[[], object] = lambda: None,
) -> MeasuredProfile:  # fmt: skip
    """Measure ``code`` on ``device`` with the weights of ``model``. Takes seconds; the device must be idle.

    ``between`` is called before each run, to evict the caches (default: :func:`cache_evictor`), and
    ``on_prepared`` once the device has prepared the code.

    Raises :class:`DeviceError` if the code cannot be prepared or the weights cannot be loaded there.
    """
    if between is None:
        between = cache_evictor(device.spec.kind, model.weights.size)
    return _Measurement(device, code, model, clock, between).run(on_prepared)


class _Measurement:
    def __init__(
        self, device: Device, code: Code, model: Model, clock: Callable[[], int],
        between: Callable[[], object],
    ) -> None:  # fmt: skip
        self._between = between
        self._device = device
        self._code = code
        self._model = model
        self._clock = clock
        self._actions = 0
        self._filled: tuple[tuple[Fill, ...], dict[str, Array]] = ((), inputs_of(()))  # the last inputs
        # A GPU's batches use device memory, which does not count as memory of this process.
        self._used: Callable[[], int] = getattr(device, "used_bytes", used_bytes)
        self._resident = self._used()
        self._extent = Extent(0, device.spec.pages_of(model.weights.size))

    def run(self, on_prepared: Callable[[], object]) -> MeasuredProfile:
        """Prepare, load, run each batch size, and leave the device as it was."""
        # Weights that are not lifted out of the code are outside the device's arena; they are no workspace.
        held = 0 if self._code.lifted else self._model.weights.size
        self._device.prepare(self._code)
        on_prepared()
        try:
            load_ns = self._loads()
            batches = _Batches(self._code, self._used, self._resident + held)
            fills = self._accepted_fills(batches)
            for batch in measured_sizes(self._code):
                self._measure(batch, fills, batches)
            batches.add_between()
            self._unload()
        finally:
            self._device.retire(self._code.code_id)
        base_ns, per_mib_ns = load_line(load_ns, self._model.weights.size)
        refused = (
            f"model {self._model.key}: it refused all inputs tried; its durations are a guess until it serves"
        )
        warnings = () if fills is not None else (refused,)
        return MeasuredProfile(
            profile=Profile(
                code_id=self._code.code_id, device_kind=self._device.spec.kind, infer_ns=batches.infer_ns,
                load_base_ns=base_ns, load_ns_per_mib=per_mib_ns, workspace_bytes=batches.workspace_bytes,
                io_bytes=batches.io_bytes, guessed=fills is None, extrapolated=tuple(batches.extrapolated),
            ),
            warnings=warnings,
        )  # fmt: skip

    def _loads(self) -> int:
        """The median duration of a LOAD; the weights stay loaded."""
        durations = []
        for count in range(LOADS):
            if count:
                self._unload()
            started_ns = self._clock()
            once_ns = self._device.load(self._load_action())
            durations.append(self._clock() - started_ns - once_ns)
            if durations[-1] > BATCH_TIME_NS:
                break
        return round(statistics.median(durations))

    def _accepted_fills(self, batches: _Batches) -> tuple[Fill, ...] | None:
        for fills in fills_to_try(self._code):
            try:
                batches.row_ns = self._infer(1, fills)
            except DeviceError as error:
                _log.debug("%s refused %s: %s", self._model.key, fills, error)
            else:
                return fills
        return None

    def _measure(self, batch: int, fills: tuple[Fill, ...] | None, batches: _Batches) -> None:
        expected_ns = batches.expected_ns(batch)
        if fills is None or (len(batches.infer_ns) > 1 and expected_ns > EXTRAPOLATE_NS):
            batches.add(batch, expected_ns, ran=False)
            return
        durations: list[int] = []
        try:
            if expected_ns < BATCH_TIME_NS:
                self._infer(batch, fills)
            while not enough(durations):
                durations.append(self._infer(batch, fills))
        except DeviceError as error:
            _log.warning("%s, batch %d: %s", self._model.key, batch, error)
        lasted_ns = round(statistics.median(durations)) if durations else expected_ns
        batches.add(batch, lasted_ns, ran=bool(durations))

    def _infer(self, batch: int, fills: tuple[Fill, ...]) -> int:
        """Run ``batch`` requests of one row each, as while serving; returns the duration."""
        count = batch if self._code.batched else 1
        if fills != self._filled[0]:
            self._filled = fills, inputs_of(fills)
        inputs = {name: array.copy() for name, array in self._filled[1].items()}  # a model may change its own
        room = align(self._model.output_bytes) + TENSOR_ALIGN * len(self._code.outputs)
        calls = [CallBuffers(inputs=inputs, output=memoryview(bytearray(room))) for _ in range(count)]
        action = Infer(
            action_id=self._next(), device=self._device.spec.device, model=self._model.key,
            code_id=self._code.code_id, extent=self._extent, version=1, batch=batch,
            calls=tuple(Call(request_id=str(row), rows=1, tensors=b"") for row in range(count)),
            window=_ANY_TIME, expected_ns=0,
        )  # fmt: skip
        self._between()
        started_ns = self._clock()
        self._device.infer(action, calls)
        return self._clock() - started_ns

    def _load_action(self) -> Load:
        return Load(
            action_id=self._next(), device=self._device.spec.device, model=self._model.key,
            code_id=self._code.code_id, weights=self._model.weights, extent=self._extent, version=1,
            window=_ANY_TIME, expected_ns=0,
        )  # fmt: skip

    def _unload(self) -> None:
        self._device.unload(
            Unload(
                action_id=self._next(), device=self._device.spec.device, model=self._model.key,
                extent=self._extent, version=1, window=_ANY_TIME,
            )
        )  # fmt: skip

    def _next(self) -> int:
        self._actions += 1
        return self._actions


class _Batches:
    """The measurements of each batch size, ascending."""

    def __init__(self, code: Code, used: Callable[[], int], before: int) -> None:
        self._code = code
        self._used = used
        self._before = before
        self.row_ns = REFUSED_NS  # of the first run, until a batch size was measured
        self.infer_ns: dict[int, int] = {}
        self.workspace_bytes: dict[int, int] = {}
        self.io_bytes: dict[int, int] = {}
        self.extrapolated: list[int] = []

    def add(self, batch: int, infer_ns: int, *, ran: bool) -> None:
        """Record one batch size."""
        if not ran:
            self.extrapolated.append(batch)
        self.infer_ns[batch] = max(1, infer_ns)
        self.io_bytes[batch] = io_bytes(self._code, batch)
        # All memory that the process gained since before it prepared the code: an upper bound, because this
        # is the first code in it.
        self.workspace_bytes[batch] = max(WORKSPACE_MIN, self._used() - self._before)

    def add_between(self) -> None:
        """Fill in sizes that were not run: interpolated durations, and the memory of the next larger size."""
        found = sorted(self.infer_ns)
        for batch in self._code.batch_sizes:
            if batch not in self.infer_ns:
                at = bisect(found, batch)
                low, high = found[at - 1], found[at]
                more_ns = (self.infer_ns[high] - self.infer_ns[low]) * (batch - low) // (high - low)
                self.infer_ns[batch] = self.infer_ns[low] + more_ns
                self.io_bytes[batch] = self.io_bytes[high]
                self.workspace_bytes[batch] = self.workspace_bytes[high]
        for table in (self.infer_ns, self.io_bytes, self.workspace_bytes):
            ascending = sorted(table.items())
            table.clear()
            table.update(ascending)

    def expected_ns(self, batch: int) -> int:
        """The duration by the two largest batches so far; in proportion to the largest, if it is alone."""
        if not self.infer_ns:
            return self.row_ns * batch
        *others, largest = sorted(self.infer_ns)
        last_infer_ns = self.infer_ns[largest]
        if not others:
            return last_infer_ns * batch // largest
        more_ns = max(0, last_infer_ns - self.infer_ns[others[-1]])
        return last_infer_ns + more_ns * (batch - largest) // (largest - others[-1])


def measured_sizes(code: Code) -> tuple[int, ...]:
    """The batch sizes that are run; the others, of a Python model, are interpolated."""
    return batch_sizes(code.batch_sizes[-1]) if code.backend == "python" else code.batch_sizes


def enough(durations: list[int]) -> bool:
    """Whether to stop: after many runs, after enough time and a few runs, or once the runs agree."""
    count, spent_ns = len(durations), sum(durations)
    if count < RUNS_MIN:
        return spent_ns >= BATCH_TIME_NS
    if count >= RUNS_MAX or spent_ns >= BATCH_TIME_NS:
        return True
    middle = statistics.median(durations)
    quartiles = statistics.quantiles(durations, n=4)
    return count >= 2 * RUNS_MIN and quartiles[2] - quartiles[0] <= 0.02 * middle


def load_line(load_ns: int, size: int) -> tuple[int, int]:
    """(base ns, ns per MiB) of a LOAD from one measurement: all weights of one code have the same size."""
    base_ns = min(load_ns // 2, LOAD_BASE_NS)
    return (load_ns, 0) if size == 0 else (base_ns, ((load_ns - base_ns) << 20) // size)


# ------------------------------------------------------------
# The child process: it measures one code on a device of its own, and prints the result.
#
# There is one process per code, because only so can its memory be measured, and because a model may crash the
# process that runs it. All are forked from one that has imported the runtime, which takes longer than to
# measure a small model. Stdout is for the result alone: what a model prints goes to stderr.


PREPARED: Final = b"prepared"  # the first line of output, once the device has prepared the code


class ClassFailed(Struct, frozen=True, tag=True):
    """The result instead of a ``MeasuredProfile``: the model's own Python code raised at import or load."""

    why: str


class ProfileConfig(Struct, frozen=True, kw_only=True):
    """The code to measure, on which device, with the weights of which model."""

    device: DeviceConfig
    code: Code
    model: Model


def main(argv: Sequence[str]) -> int:
    """Fork a child for each request on the socket ``argv[1]``, until that is closed; returns the exit status.

    A request is any byte with three files: a :class:`ProfileConfig` as JSON, and the child's stdout and
    stderr. The replies are two messages: its process id at once, and its exit status.
    """
    child.prepare("profile", Settings(log_level="warning"))
    requests = socket.socket(fileno=int(argv[1]))
    os.environ.update(child.environment_of_child())  # for those that are forked
    while True:
        request, files, _, _ = socket.recv_fds(requests, 1, 3)
        if not request:
            return 0
        with open(files[0], "rb") as file:
            config = msgspec.json.decode(file.read(), type=ProfileConfig)
        import_runtime(config.device)
        inputs_of(())  # numpy imports its generators when they are first used
        gc.freeze()  # so that collections of the child copy no pages of this process
        pid = os.fork()
        if not pid:
            requests.close()
            _run_child(config, *files[1:])
        for fd in files[1:]:
            os.close(fd)
        requests.send(str(pid).encode())
        requests.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())


def _run_child(config: ProfileConfig, stdout: int, stderr: int) -> NoReturn:
    """Measure in the process that was forked, and end it."""
    status = 1
    try:
        os.dup2(stderr, 2)
        os.dup2(2, 1)
        child.prepare("profile", Settings(log_level="warning"))
        _write_line(stdout, msgspec.json.encode(_measured(config, lambda: _write_line(stdout, PREPARED))))
        status = 0
    except SystemExit as end:  # of the model's own code
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 - the last line of stderr says why
        traceback.print_exc()
    finally:
        # At once: the result is written, and a thread of the model, or a stderr that it replaced, may not
        # make the process hang or fail now.
        os._exit(status)


def _measured(config: ProfileConfig, on_prepared: Callable[[], None]) -> MeasuredProfile | ClassFailed:
    page_bytes = config.device.page_bytes
    device = build(
        msgspec.structs.replace(
            config.device, memory_bytes=align(max(1, config.model.weights.size), page_bytes), warm_up_ns=0,
            memory_share=0.0, pool_bytes=0,
        )
    )  # fmt: skip
    prepared: list[bool] = []

    def note_prepared() -> None:
        prepared.append(True)
        on_prepared()

    try:
        return profile(device, config.code, config.model, on_prepared=note_prepared)
    except ModelError as error:
        # Once it is loaded, what it raises is noted as a refused input: this is its import, or its ``load``.
        if prepared and config.code.backend != "python":
            raise
        return ClassFailed(str(error))
    finally:
        device.close()


def _write_line(stdout: int, line: bytes) -> None:
    with open(stdout, "wb", closefd=False) as file:
        file.write(line + b"\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
