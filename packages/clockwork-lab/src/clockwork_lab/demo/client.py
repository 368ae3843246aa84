"""The demo's client and load, which use the published tritonclient only."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import aiohttp
import numpy as np
import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_grpc_aio
import tritonclient.http as triton_http
import tritonclient.http.aio as triton_http_aio
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from clockwork_lab.demo.judgement import Tensors

UNHURRIED_MS = 60_000  # the SLO of requests that test results rather than latency

CONNECTIONS = 256


def inputs_of(tensors: Tensors, module: Any) -> list[Any]:
    """``InferInput`` objects of the HTTP or gRPC module; they may be sent many times."""
    made = []
    for name, array in tensors.items():
        tensor = module.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        made.append(tensor)
    return made


def outputs_of(result: Any, *, http: bool) -> Tensors:
    """All outputs of a response by name."""
    response = result.get_response()
    names = [o["name"] for o in response["outputs"]] if http else [o.name for o in response.outputs]
    return {name: np.asarray(result.as_numpy(name)) for name in names}


class DemoClient:
    """One request at a time, alternating between HTTP and gRPC."""

    def __init__(self, http_url: str, grpc_url: str) -> None:
        self._http = triton_http.InferenceServerClient(
            http_url.removeprefix("http://"), network_timeout=120.0
        )
        self._grpc = triton_grpc.InferenceServerClient(grpc_url)
        self._asked = 0

    def ask(self, model: str, tensors: Tensors) -> Tensors:
        """Run ``model``; its outputs. Raises ``InferenceServerException`` on failure."""
        self._asked += 1
        http = bool(self._asked % 2)
        client, module = (self._http, triton_http) if http else (self._grpc, triton_grpc)
        result = client.infer(model, inputs_of(tensors, module), parameters={"slo_ms": UNHURRIED_MS})
        return outputs_of(result, http=http)

    def __enter__(self) -> Self:
        """The client itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close both connections."""
        self._http.close()
        self._grpc.close()


_LATE = ("504", "StatusCode.DEADLINE_EXCEEDED")
_REFUSED = ("429", "503", "StatusCode.RESOURCE_EXHAUSTED", "StatusCode.UNAVAILABLE")


def refusal(error: InferenceServerException) -> tuple[str, str]:
    """The outcome (``late``, ``rejected`` or ``failed``) and reason of a request without a result.

    The reason of a rejection is empty: tritonclient does not pass it on; the server's metrics have it.
    """
    status = str(error.status())
    if status in _LATE:
        return "late", "late"
    return ("rejected", "") if status in _REFUSED else ("failed", f"{status}: {error.message()}")


def parameters_of(result: Any, *, http: bool) -> Mapping[str, Any]:
    """The response's parameters."""
    response = result.get_response()
    if http:
        return dict(response.get("parameters", {}))
    return {name: getattr(p, p.WhichOneof("parameter_choice")) for name, p in response.parameters.items()}


# ------------------------------------------------------------
# An open-loop load: requests are sent at times drawn beforehand, independent of responses.


ZIPF = 0.9  # exponent of the popularity of a model's instances

SLO_FACTORS = (5, 10, 20)
"""A request's SLO as a multiple of its model's duration, if that is above the load's floor."""

FLOOR_MS = 100.0  # the least SLO of any model: the server's own default

GRPC_SHARE = 0.25
RATE_MAX = 150.0  # requests per second that the client can send beside the server on two cores

GRACE_S = 15.0  # how long to wait for responses after the last request was sent


@dataclass(frozen=True, slots=True)
class Mix:
    """One model in the load: its instances, its requests, and its duration at batch 1."""

    name: str
    instances: tuple[str, ...]
    cases: tuple[Tensors, ...]
    batch_1_ms: float


@dataclass(frozen=True, slots=True)
class Shot:
    """One request: when it is sent (s from the start), its instance and inputs, and its SLO."""

    at_s: float
    model: str
    instance: str
    case: int
    slo_ms: int
    http: bool


@dataclass(frozen=True, slots=True)
class Hit:
    """How a request ended: ``ok``, ``late``, ``rejected`` or ``failed``; latency is from its planned time."""

    shot: Shot
    outcome: str
    reason: str
    latency_ms: float


@dataclass(slots=True)
class Answers:
    """All hits, the first good result of each instance, and how late the client itself was, in ms.

    ``lanes`` are (measured, expected) times on the execution lane of good results, in ms, as the server
    reports.
    """

    hits: list[Hit] = field(default_factory=list)
    lanes: list[tuple[float, float]] = field(default_factory=list)
    first: dict[str, tuple[int, Tensors]] = field(default_factory=dict)
    lags_ms: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class DemoPlan:
    """A load of ``rate`` requests per second, which use ``utilisation`` of the device without batching."""

    shots: tuple[Shot, ...]
    rate: float
    utilisation: float
    floor_ms: float


def plan(mixes: Sequence[Mix], seconds: float, utilisation: float, seed: int = 0) -> DemoPlan:
    """Poisson arrivals that use ``utilisation`` of the device, or as many as the client can send.

    A model's share of the requests decreases with its duration, so that long ones do not dominate the device;
    instances are drawn by Zipf's law. The floor of all SLOs is three times the longest batch-1 duration: a
    request may have to wait for that run, which cannot be interrupted.
    """
    dice = np.random.default_rng(seed)
    durations = np.array([mix.batch_1_ms for mix in mixes])
    shares = 1.0 / (durations + 10.0)
    shares /= shares.sum()
    mean_ms = float(shares @ durations)
    rate = min(RATE_MAX, utilisation * 1000.0 / mean_ms)
    floor_ms = max(FLOOR_MS, 3.0 * float(durations.max()) + 20.0)
    shots, now = [], 0.0
    while (now := now + dice.exponential(1.0 / rate)) < seconds:
        mix = mixes[int(dice.choice(len(mixes), p=shares))]
        popularity = np.arange(1, len(mix.instances) + 1) ** -ZIPF
        instance = mix.instances[int(dice.choice(len(mix.instances), p=popularity / popularity.sum()))]
        slo_ms = round(max(floor_ms, float(dice.choice(SLO_FACTORS)) * mix.batch_1_ms))
        case = int(dice.integers(len(mix.cases)))
        http = bool(dice.random() >= GRPC_SHARE)
        shots.append(Shot(now, mix.name, instance, case, slo_ms, http))
    return DemoPlan(tuple(shots), rate, rate * mean_ms / 1000.0, floor_ms)


class DemoLoad:
    """Sends a plan and collects the responses."""

    def __init__(self, mixes: Sequence[Mix], on_progress: Callable[[Answers], None]) -> None:
        self._inputs = {  # encoded once, by model, case and protocol
            (mix.name, number, http): inputs_of(case, triton_http if http else triton_grpc)
            for mix in mixes
            for number, case in enumerate(mix.cases)
            for http in (False, True)
        }
        self._on_progress = on_progress
        self.answers = Answers()

    async def send(self, shots: Sequence[Shot], http_url: str, grpc_url: str) -> Answers:
        """Send all requests at their times; returns when every one has ended or the grace period is over."""
        http = triton_http_aio.InferenceServerClient(http_url.removeprefix("http://"), conn_limit=CONNECTIONS)
        grpc = triton_grpc_aio.InferenceServerClient(grpc_url)
        tasks: list[asyncio.Task[None]] = []
        try:
            start_s = time.monotonic() + 0.2
            for shot in shots:
                await asyncio.sleep(max(0.0, start_s + shot.at_s - time.monotonic()))
                client = http if shot.http else grpc
                tasks.append(asyncio.create_task(self._one(client, shot, start_s + shot.at_s)))
                self._on_progress(self.answers)
            if tasks:
                await asyncio.wait(tasks, timeout=GRACE_S)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await http.close()
            await grpc.close()
        self._on_progress(self.answers)
        return self.answers

    async def _one(self, client: Any, shot: Shot, planned_s: float) -> None:
        self.answers.lags_ms.append(1000 * (time.monotonic() - planned_s))
        inputs = self._inputs[shot.model, shot.case, shot.http]
        outcome, reason = "failed", "no answer"
        result: Any = None
        try:
            result = await client.infer(shot.instance, inputs, parameters={"slo_ms": shot.slo_ms})
            outcome, reason = "ok", ""
        except InferenceServerException as error:
            outcome, reason = refusal(error)
        except (OSError, aiohttp.ClientError) as error:
            reason = type(error).__name__
        finally:
            latency_ms = 1000 * (time.monotonic() - planned_s)
            if outcome == "ok" and latency_ms > shot.slo_ms:
                outcome, reason = "late", "late"
            self.answers.hits.append(Hit(shot, outcome, reason, latency_ms))
        if result is not None:
            parameters = parameters_of(result, http=shot.http)
            self.answers.lanes.append((parameters["exec_ms"], parameters["expected_ms"]))
            if shot.instance not in self.answers.first:
                self.answers.first[shot.instance] = (shot.case, outputs_of(result, http=shot.http))
