"""What a gateway answers beside inference, over any protocol: health, descriptions, statistics, control.

It knows no transport and keeps nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec

from clockwork_serve.errors import ClockworkError, InvalidRequest
from clockwork_serve.messages import Question, Reply
from clockwork_serve.oip import (
    CUDA_SHARED_MEMORY,
    model_metadata,
    server_metadata,
    shared_region,
    status_of_error,
)
from clockwork_serve.serve.gateway import Gateway
from clockwork_serve.serve.gateway_regions import allowed
from clockwork_serve.telemetry import decode, render

LOAD_PATIENCE_S = 600.0
"""A model may have to be compiled first."""


class Refused(ClockworkError):
    """The question has no good answer; ``code`` is its HTTP status."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(slots=True, frozen=True)
class Endpoints:
    """Answers as plain data. All raise :class:`UnknownModel` or :class:`Refused`."""

    gateway: Gateway
    version: str
    model_control: bool = True

    def server(self) -> dict[str, Any]:
        """Who serves."""
        more = () if self.gateway.regions is None else ("system_shared_memory",)
        return server_metadata(self.version, *more)

    def check_ready(self) -> None:
        """Raise :class:`Refused` unless the server is ready."""
        link = self.gateway.link
        if not link.ready:
            raise Refused(503, f"not ready: {link.why_not_ready}")

    def check_model_ready(self, name: str, version: str) -> None:
        """Raise unless the model is served now."""
        self.check_ready()
        models = self.gateway.models
        key = models.find(name, version).model.key
        if why := models.quarantines.why(key):
            raise Refused(503, f"model {key} is not ready: {why}")

    def models(self) -> list[str]:
        """Names of all models."""
        return self.gateway.models.names()

    def metadata(self, name: str, version: str) -> dict[str, Any]:
        """A model's inputs and outputs."""
        models = self.gateway.models
        return model_metadata(models.find(name, version), models.versions(name))

    def config(self, name: str, version: str) -> bytes:
        """A model's configuration as JSON in Triton's field names."""
        return self.gateway.models.find(name, version).model.config

    async def statistics(self, name: str = "", version: str = "") -> dict[str, Any]:
        """Triton's ``{"model_stats": [...]}`` of one version, all versions of a name, or all."""
        models = self.gateway.models
        if name:
            models.find(name, version)
        asked = (f"{name}/{version}" if version else name) or None
        body = msgspec.json.encode({"model": asked})
        found: dict[str, Any] = msgspec.json.decode(_body(await self.gateway.ask(Question.STATISTICS, body)))
        for record in found["model_stats"]:
            # Requests that were wrong never reached the controller.
            wrong = self.gateway.invalid_requests(f"{record['name']}/{record['version']}")
            record["inference_stats"]["fail"]["count"] += wrong
        return found

    async def metrics(self) -> bytes:
        """All metrics in Prometheus' text format."""
        counters = decode(_body(await self.gateway.ask(Question.METRICS)))
        return render(counters, self.gateway.counters())

    async def index(self, *, ready: bool) -> list[dict[str, Any]]:
        """The models of the repository and their states."""
        body = msgspec.json.encode({"ready": ready})
        found = msgspec.json.decode(_body(await self.gateway.ask(Question.INDEX, body)))
        assert isinstance(found, list)
        return found

    async def load(self, name: str, parameters: dict[str, Any]) -> None:
        """Serve a model of the repository, or serve it anew."""
        self._check_control("load")
        for parameter in parameters:
            if parameter == "config" or parameter.startswith("file:"):
                raise Refused(
                    400,
                    f"parameter '{parameter}': a load takes files and configuration from the repository "
                    "only; put them there and load again",
                )
            raise Refused(400, f"parameter '{parameter}': a load has no parameter of that name; leave it out")
        body = msgspec.json.encode({"model": name})
        _body(await self.gateway.ask(Question.LOAD, body, LOAD_PATIENCE_S))

    async def unload(self, name: str) -> None:
        """Serve a model no more."""
        self._check_control("unload")
        body = msgspec.json.encode({"model": name})
        _body(await self.gateway.ask(Question.UNLOAD, body, LOAD_PATIENCE_S))

    # Shared memory of clients; ``local``: the client is on this host

    def regions(self, name: str, *, local: bool) -> list[dict[str, Any]]:
        """One registered region, or all."""
        with _refusals():
            found = allowed(self.gateway.regions, local=local).registered(name)
        return [msgspec.structs.asdict(region) for region in found]

    def register(self, name: str, fields: Mapping[str, Any], *, local: bool) -> None:
        """Let requests name a region."""
        with _refusals():
            allowed(self.gateway.regions, local=local).register(shared_region(name, fields))

    def unregister(self, name: str, *, local: bool) -> None:
        """Forget one region, or all."""
        with _refusals():
            allowed(self.gateway.regions, local=local).unregister(name)

    def cuda_regions(self, name: str) -> list[dict[str, Any]]:
        """All regions of CUDA shared memory: none."""
        if name:
            raise Refused(404, f"Unable to find cuda shared memory region: '{name}'; {CUDA_SHARED_MEMORY}")
        return []

    def register_cuda(self) -> None:
        """There is no device that could reach it. To unregister what is not there is fine, as elsewhere."""
        raise Refused(501, CUDA_SHARED_MEMORY)

    def _check_control(self, what: str) -> None:
        if not self.model_control:
            raise Refused(503, f"explicit model {what} is not allowed: this server was started without it")


@contextmanager
def _refusals() -> Iterator[None]:
    """Errors of requests, as refusals."""
    try:
        yield
    except InvalidRequest as error:
        raise Refused(status_of_error(error).http, str(error)) from None


def _body(reply: Reply) -> bytes:
    if reply.ok:
        return reply.body
    try:
        message = str(msgspec.json.decode(reply.body)["error"])
    except (msgspec.DecodeError, KeyError, TypeError, ValueError, RecursionError):
        message = reply.body.decode(errors="replace")
    raise Refused(reply.code, message)
