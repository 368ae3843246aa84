"""Short words for the worker's tests: a small device, its code, and actions on it with windows in ms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from msgspec import structs

from clockwork_serve.messages import (
    Call,
    Code,
    CodeAdded,
    CodeReady,
    DeviceSpec,
    Extent,
    Infer,
    Lane,
    Load,
    Profile,
    Result,
    Status,
    Unload,
    Weights,
    Window,
)
from clockwork_serve.units import ms
from clockwork_serve.worker import Prepare, Prepared, Start, Worker, WorkerEffect, WorkerEvent
from harness import records

GPU = "gpu:0"
SPEC = records.device(GPU, 10, 100, kind="toy", workspace_bytes=1000, io_bytes=500)
CODE = records.code("net", outputs=(records.X,))
PROFILE = records.profile(
    "net", {1: ms(2), 2: ms(3), 4: ms(5), 8: ms(9)}, device_kind="toy",
    workspace_bytes={1: 100, 8: 1001}, io_bytes={1: 100, 2: 100, 4: 501},
)  # fmt: skip
NO_WORKSPACE = (
    "batch 8 needs 1001 bytes of scratch memory and 0 for inputs and outputs; gpu:0 has 1000 and 500: "
    "set scratch_memory to at least 5MiB"
)
NO_IO = (
    "batch 4 needs 0 bytes of scratch memory and 501 for inputs and outputs; gpu:0 has 1000 and 500: "
    "set scratch_memory to at least 5MiB"
)
MORE = structs.replace(CODE, code_id="more")
OTHER = structs.replace(SPEC, device="gpu:1")


def load(
    action_id: int, model: str, first: int, count: int = 2, version: int = 1, *,
    window: tuple[float, float] = (0, 100), size: int = 150, code_id: str = "net", device: str = GPU,
) -> Load:  # fmt: skip
    return Load(
        action_id=action_id, device=device, model=model, code_id=code_id,
        weights=Weights(weights_id=model, path="", size=size), extent=Extent(first, count), version=version,
        window=between(*window), expected_ns=ms(1),
    )  # fmt: skip


def unload(
    action_id: int, model: str, first: int, count: int = 2, version: int = 1, *,
    window: tuple[float, float] = (0, 100), device: str = GPU,
) -> Unload:  # fmt: skip
    return Unload(
        action_id=action_id, device=device, model=model, extent=Extent(first, count), version=version,
        window=between(*window),
    )  # fmt: skip


def infer(
    action_id: int, model: str, first: int, count: int = 2, version: int = 1, *,
    window: tuple[float, float] = (0, 100),
    batch: int = 1, rows: tuple[int, ...] = (1,), code_id: str = "net", device: str = GPU,
) -> Infer:  # fmt: skip
    calls = tuple(Call(request_id=f"r{action_id}.{at}", rows=n, tensors=b"") for at, n in enumerate(rows))
    return Infer(
        action_id=action_id, device=device, model=model, code_id=code_id, extent=Extent(first, count),
        version=version, batch=batch, calls=calls, window=between(*window), expected_ns=ms(2),
    )  # fmt: skip


def between(earliest_ms: float, latest_ms: float) -> Window:
    return Window(ms(earliest_ms), ms(latest_ms))


def done(
    action: Load | Unload | Infer,
    at_ms: float,
    status: Status = Status.OK,
    *,
    started_ms: float | None = None,
) -> Result:
    ok = status is Status.OK and isinstance(action, Infer)
    return Result(
        action_id=action.action_id, device=action.device, status=status,
        started_ns=ms(at_ms if started_ms is None else started_ms), ended_ns=ms(at_ms),
        outputs=(b"answer",) * len(action.calls) if ok and isinstance(action, Infer) else (),
        message="" if status is Status.OK else "the lane says no",
    )  # fmt: skip


def start(action: Load | Unload | Infer) -> Start:
    return Start(
        device=action.device, lane=Lane.EXEC if isinstance(action, Infer) else Lane.LOAD, action=action
    )


@dataclass
class Told:
    """A worker that is told things at a time; every step is checked."""

    worker: Worker

    def __call__(self, at_ms: float, *events: WorkerEvent) -> list[WorkerEffect]:
        """Observe, decide, check that nothing is left to decide."""
        now_ns = ms(at_ms)
        for event in events:
            self.worker.observe(event, now_ns)
        effects = self.worker.decide(now_ns)
        assert self.worker.decide(now_ns) == []
        self.worker.check()
        wake_ns = self.worker.next_wakeup_ns()
        assert wake_ns is None or wake_ns > now_ns
        return effects

    def wake_ms(self) -> float | None:
        wake_ns = self.worker.next_wakeup_ns()
        return None if wake_ns is None else wake_ns / ms(1)

    def refusal(self, at_ms: float, *events: WorkerEvent) -> tuple[Status, str]:
        """The one effect, which must be a refusal: its status and message."""
        (result,) = self(at_ms, *events)
        assert isinstance(result, Result)
        assert result.started_ns == result.ended_ns == ms(at_ms)
        assert result.outputs == ()
        return result.status, result.message


def fresh(*specs: DeviceSpec, code: Code = CODE, profiles: tuple[Profile, ...] = (PROFILE,)) -> Told:
    """A worker with the code ready on every device, at time 0."""
    specs = specs or (SPEC,)
    tell = Told(Worker(specs))
    effects = tell(0, CodeAdded(code=code, profiles=profiles))
    assert effects == [Prepare(device=spec.device, code=code) for spec in specs]
    ready = tell(0, *(Prepared(device=spec.device, code_id=code.code_id) for spec in specs))
    assert ready == [CodeReady(device=spec.device, code_id=code.code_id) for spec in specs]
    return tell


def resident(
    tell: Told, model: str, first: int, *, version: int = 1, at_ms: float = 0, action_id: int = 1000
) -> Told:
    """The same worker, with weights loaded into two pages, in no time."""
    action = load(action_id, model, first, version=version)
    assert tell(at_ms, action) == [start(action)]
    (result,) = tell(at_ms, done(action, at_ms))
    assert isinstance(result, Result)
    assert result.status is Status.OK
    return tell


def statuses(effects: Sequence[object]) -> dict[int, Status]:
    """How each action ended, of those that did."""
    results = [effect for effect in effects if isinstance(effect, Result)]
    assert len({result.action_id for result in results}) == len(results)
    return {result.action_id: result.status for result in results}
