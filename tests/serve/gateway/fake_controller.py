"""A fake controller that speaks frames: models echo their inputs, and tests decide the rest."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from clockwork_serve.messages import (
    AdmissionQuery,
    AdmissionReply,
    Answer,
    Ask,
    Beat,
    Cancel,
    CodeAdded,
    CreditBlocked,
    Delivered,
    Frame,
    ModelAdded,
    ModelsAskedFor,
    Outcome,
    Question,
    Readiness,
    Release,
    Reply,
    Request,
    Role,
    TensorRef,
    Tensors,
    TensorsOffered,
    TensorSpec,
)
from clockwork_serve.serve.shm import RegionMap, SpilledOutputs, read_epoch
from clockwork_serve.serve.transport import Link, Listener, hello, listen
from clockwork_serve.telemetry import Counters, encode
from clockwork_serve.units import MIB, align, ms
from harness import records

_decoder = msgspec.msgpack.Decoder(Tensors)


def spec(name: str, datatype: str, *shape: int, optional: bool = False) -> TensorSpec:
    return TensorSpec(name=name, datatype=datatype, shape=shape, optional=optional)


def served(
    name: str,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    *,
    version: str = "1",
    batched: bool = True,
    **fields: Any,
) -> tuple[CodeAdded, ModelAdded]:
    """A code and a model of it, as the controller's process sends them."""
    sizes = (1, 2, 4, 8) if batched else (1,)
    code = records.code(
        f"code-{name}",
        sizes,
        backend="onnx",
        path="/nowhere",
        inputs=inputs,
        outputs=outputs,
        batched=batched,
    )
    profile = records.profile(code.code_id, {1: ms(1)}, device_kind="cpu")
    plain: dict[str, Any] = {
        "platform": "onnxruntime_onnx",
        "max_batch_size": 8 if batched else 0,
        "output_bytes": 4096,
        "config": msgspec.json.encode(
            {
                "name": name, "platform": "onnxruntime_onnx", "backend": "onnxruntime", "runtime": "",
                "max_batch_size": 8 if batched else 0, "version_policy": {"latest": {"num_versions": 1}},
                "input": [
                    {"name": each.name, "data_type": f"TYPE_{each.datatype}", "dims": each.shape}
                    for each in inputs
                ],
            }
        ),
    }  # fmt: skip
    model = records.model(name, code.code_id, version=version, sizes=sizes, **(plain | fields))
    return CodeAdded(code=code, profiles=(profile,)), ModelAdded(model=model)


class FakeController:
    """Listens like the controller. ``on_request`` handles a request; by default, an echo."""

    def __init__(self, path: Path, *catalogue: tuple[CodeAdded, ModelAdded]) -> None:
        self.path = path
        self.catalogue = list(catalogue)
        self.ready = Readiness(ready=True)
        self.leads_with = 0  # its epoch
        self.requests: list[Request] = []
        self.cancels: list[Cancel] = []
        self.admission_queries: list[AdmissionQuery] = []
        self.asks: list[Ask] = []
        self.in_time: list[str] = []  # requests whose answers were delivered in time, as the gateway reports
        self.late: list[str] = []
        self.offers: list[TensorsOffered] = []
        self.blocked = 0  # how often a gateway said that it holds requests back
        self.asked_for: list[dict[str, int]] = []  # models that are still to be prepared, by requests refused
        self.links: list[Link] = []
        self.released: list[str] = []
        self.beats = True  # whether it returns heartbeats
        self.kept_beats: list[Beat] = []  # those that it did not return
        self.on_request: Callable[[Request], Answer | None] = self.echo
        self.on_admission_query: Callable[[AdmissionQuery], AdmissionReply | None] = lambda announced: (
            AdmissionReply(announced_id=announced.announced_id, gateway=announced.gateway)
        )
        self.on_ask: Callable[[Ask], Reply | None] = _replied
        self._regions = RegionMap()
        self.spill = SpilledOutputs(64 * MIB)
        self._listener: Listener | None = None

    async def start(self) -> None:
        self._listener = await listen(
            self.path, hello(Role.CONTROLLER, "controller", self.leads_with), self._on_link, self._on_frames,
            self.links.remove,
        )  # fmt: skip

    def stop(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            self.links.clear()

    def send(self, *frames: Frame) -> None:
        for link in self.links:
            for frame in frames:
                link.send(frame)

    def tensors(self, request: Request) -> Tensors:
        return _decoder.decode(request.tensors)

    def epoch(self, tensors: Tensors) -> int:
        return read_epoch(self._regions.view(tensors.region), tensors.header_offset)

    def memory(self, tensors: Tensors) -> memoryview:
        return self._regions.view(tensors.region)

    def inputs(self, request: Request) -> dict[str, bytes]:
        tensors = self.tensors(request)
        memory = self.memory(tensors)
        return {ref.name: bytes(memory[ref.offset : ref.offset + ref.nbytes]) for ref in tensors.refs}

    def echo(self, request: Request, **fields: Any) -> Answer:
        """Output i is input i, as a worker would write it."""
        tensors = self.tensors(request)
        memory = self.memory(tensors)
        assert read_epoch(memory, tensors.header_offset) == tensors.epoch
        names = self._outputs_of(request.model)
        refs = []
        region, room, at = tensors.region, memory, tensors.output_offset
        nbytes = sum(align(ref.nbytes) for ref in tensors.refs)
        if nbytes > align(tensors.output_bytes):
            spilled = self.spill.take(tensors, memory, nbytes)
            region, room, at = spilled.name, spilled.buffer, 0
        for name, ref in zip(names, tensors.refs, strict=False):
            room[at : at + ref.nbytes] = memory[ref.offset : ref.offset + ref.nbytes]
            refs.append(
                TensorRef(name=name, datatype=ref.datatype, shape=ref.shape, offset=at, nbytes=ref.nbytes)
            )
            at += align(ref.nbytes)
        outputs = msgspec.structs.replace(tensors, region=region, refs=tuple(refs))
        plain: dict[str, Any] = {
            "outcome": Outcome.OK, "outputs": msgspec.msgpack.encode(outputs), "batch": 1, "exec_ns": ms(2),
            "queue_ns": ms(1), "expected_ns": ms(2.5),
        }  # fmt: skip
        return self.answer(request, **(plain | fields))

    def answer(self, request: Request, **fields: Any) -> Answer:
        return Answer(request_id=request.request_id, gateway=request.gateway, **fields)

    def release(self, request: Request) -> None:
        self.send(Release(request_id=request.request_id, gateway=request.gateway))

    def _outputs_of(self, key: str) -> list[str]:
        for added, model in self.catalogue:
            if model.model.key == key:
                return [output.name for output in added.code.outputs]
        raise AssertionError(key)

    def _on_link(self, link: Link) -> None:
        self.links.append(link)
        for added, model in self.catalogue:
            link.send(added)
            link.send(model)
        link.send(self.ready)

    def _on_frames(self, link: Link, frames: list[Frame]) -> None:
        for frame in frames:
            match frame:
                case Request():
                    self.requests.append(frame)
                    answer = self.on_request(frame)
                    if answer is not None:
                        link.send(answer)
                case Cancel():
                    self.cancels.append(frame)
                case AdmissionQuery():
                    self.admission_queries.append(frame)
                    admission_reply = self.on_admission_query(frame)
                    if admission_reply is not None:
                        link.send(admission_reply)
                case Ask():
                    self.asks.append(frame)
                    reply = self.on_ask(frame)
                    if reply is not None:
                        link.send(reply)
                case Beat():
                    if self.beats:
                        link.send(frame)
                    else:
                        self.kept_beats.append(frame)
                case Delivered():
                    self.in_time += frame.in_time
                    self.late += frame.late
                case TensorsOffered():
                    self.offers.append(frame)
                case CreditBlocked():
                    self.blocked += 1
                case ModelsAskedFor():
                    self.asked_for.append(frame.requests)
                case _:
                    raise AssertionError(f"a gateway sent {frame}")


def _replied(ask: Ask) -> Reply:
    body = b"{}"
    if ask.what == Question.METRICS:
        body = encode(Counters(received=7, ready=True))
    elif ask.what == Question.INDEX:
        body = b'[{"name":"ident","version":"1","state":"READY"}]'
    elif ask.what == Question.STATISTICS:
        duration = {"count": 1, "ns": 5}
        phases = (
            "success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit",
            "cache_miss",
        )  # fmt: skip
        body = msgspec.json.encode(
            {
                "model_stats": [
                    {
                        "name": "ident", "version": "1", "last_inference": time.time_ns() // 10**6,
                        "inference_count": 3, "execution_count": 2,
                        "inference_stats": dict.fromkeys(phases, duration),
                        "response_stats": {}, "memory_usage": [],
                        "batch_stats": [
                            {
                                "batch_size": 1, "compute_input": duration, "compute_infer": duration,
                                "compute_output": duration,
                            }
                        ],
                    }
                ]
            }
        )  # fmt: skip
    return Reply(ask_id=ask.ask_id, ok=True, body=body)
