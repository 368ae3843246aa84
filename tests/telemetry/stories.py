"""Events and effects for telemetry tests; it asserts nothing."""

from __future__ import annotations

from clockwork_serve.messages import (
    Answer,
    Call,
    Extent,
    Infer,
    Load,
    ModelAdded,
    Outcome,
    Reason,
    Request,
    Result,
    Status,
    Unload,
    Weights,
    Window,
    WorkerJoined,
)
from clockwork_serve.units import MIB, ms
from harness import records

MODEL = "net/1"
WINDOW = Window(0, ms(1000))


def model_added(name: str = "net", version: str = "1") -> ModelAdded:
    made = records.model(name, "code", version=version, size=3 * MIB, sizes=(1, 2, 4), platform="onnx")
    return ModelAdded(model=made)


def worker_joined(worker: str = "w0", device: str = "cpu:0") -> WorkerJoined:
    spec = records.device(device, 8, kind="cpu", workspace_bytes=MIB, io_bytes=MIB)
    return WorkerJoined(worker=worker, devices=(spec,))


def request(
    name: str, at_ms: float = 0, slo_ms: float = 100, gateway: str = "g0", model: str = MODEL
) -> Request:
    return Request(
        request_id=name, gateway=gateway, model=model, arrival_ns=ms(at_ms), deadline_ns=ms(at_ms + slo_ms)
    )


def infer(
    action_id: int, *names: str, expected_ms: float = 10, batch: int = 0, device: str = "cpu:0"
) -> Infer:
    return Infer(
        action_id=action_id,
        device=device,
        model=MODEL,
        code_id="code",
        extent=Extent(0, 3),
        version=1,
        batch=batch or len(names),
        calls=tuple(Call(request_id=name, rows=1, tensors=b"") for name in names),
        window=WINDOW,
        expected_ns=ms(expected_ms),
    )


def load(action_id: int, expected_ms: float = 4, device: str = "cpu:0") -> Load:
    return Load(
        action_id=action_id,
        device=device,
        model=MODEL,
        code_id="code",
        weights=Weights(weights_id="net", path="", size=3 * MIB),
        extent=Extent(0, 3),
        version=1,
        window=WINDOW,
        expected_ns=ms(expected_ms),
    )


def unload(action_id: int) -> Unload:
    return Unload(
        action_id=action_id, device="cpu:0", model=MODEL, extent=Extent(0, 3), version=1, window=WINDOW
    )


def result(action_id: int, took_ms: float = 10, status: Status = Status.OK, device: str = "cpu:0") -> Result:
    """A result whose phases are 1 part input, 8 parts run, 1 part output."""
    part = ms(took_ms) // 10
    return Result(
        action_id=action_id,
        device=device,
        status=status,
        started_ns=ms(5),
        ended_ns=ms(5) + 10 * part,
        input_ns=part,
        run_ns=8 * part,
        output_ns=part,
    )


def answer(
    name: str, outcome: Outcome = Outcome.OK, reason: Reason = Reason.NONE, *, cold: bool = False
) -> Answer:
    ran = outcome is Outcome.OK
    return Answer(
        request_id=name,
        gateway="g0",
        outcome=outcome,
        reason=reason,
        cold=cold,
        queue_ns=ms(5) if ran else 0,
        exec_ns=ms(10) if ran else 0,
        expected_ns=ms(10) if ran else 0,
        batch=1 if ran else 0,
    )
