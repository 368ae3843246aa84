"""The gateway's client of the codec process: large JSON and large classifications, one job at a time."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import msgspec

from clockwork_client.datatypes import Buffer
from clockwork_serve.errors import ClockworkError, InvalidRequest
from clockwork_serve.oip import InferCall, InputTensor, OutputTensor, OutputWish, TooLarge, Unsupported
from clockwork_serve.serve.gateway.codec_process import (
    Job,
    Output,
    Read,
    ReadCall,
    Reply,
    Write,
    Written,
    Wrong,
    receive,
    send,
)
from clockwork_serve.serve.gateway.requests import InferResponse
from clockwork_serve.units import KIB, MIB

# ------------------------------------------------------------
# The codec process of a gateway, one job at a time; it is restarted when it dies.
#
# A thread of the gateway waits for it, in system calls without Python's lock, so that the loop never does.


INLINE_BYTES: Final = 64 * KIB
"""JSON up to this size is parsed in the loop: the worst case, brackets, takes 1 ms."""
WAITING_BYTES: Final = 64 * MIB  # JSON that may be queued for the process
TIMEOUT_S: Final = 10.0
"""For one job: 16 MiB of the worst case take half a second. Past this the process is stuck, and killed."""
_BUFFER_BYTES: Final = MIB
_ERRORS: Final = {kind.__name__: kind for kind in (InvalidRequest, TooLarge, Unsupported)}

_log = logging.getLogger(__name__)
_decode: Final = msgspec.msgpack.Decoder(Reply).decode
_encode: Final = msgspec.msgpack.Encoder().encode


class CodecBusy(ClockworkError):
    """Too much JSON is queued."""


class CodecFailed(ClockworkError):
    """The process died or was stuck during a job."""


class Codec:
    """All methods are for the running loop's thread, unless marked. ``command`` starts the process."""

    def __init__(
        self, command: tuple[str, ...] = (sys.executable, "-m", "clockwork_serve.serve.gateway.codec_process")
    ) -> None:
        self._command = command
        self._thread: ThreadPoolExecutor | None = None
        self._waiting_bytes = 0
        # Used by the thread only:
        self._process: subprocess.Popen[bytes] | None = None
        self._link: socket.socket | None = None

    def start_soon(self) -> None:
        """Start the process now, so that the first job does not wait for it."""
        self._executor().submit(self._running)

    def close(self) -> None:
        """End the process."""
        if self._thread is not None:
            self._thread.submit(self._end)
            self._thread.shutdown(wait=False)

    async def read(
        self, text: Buffer, body: memoryview, header_length: int | None, tensors_max: int,
        wanted: Callable[[], bool],
    ) -> InferCall:  # fmt: skip
        """Parse a request's JSON, like :func:`parse_infer`, unless it is no longer ``wanted`` by then.

        ``text`` is the JSON at the begin of ``body``, or a copy of it.

        Raises :class:`InvalidRequest`, :class:`CodecBusy`, and :class:`CodecFailed`, the last if it is not
        wanted.
        """
        if self._waiting_bytes and self._waiting_bytes + len(text) > WAITING_BYTES:
            raise CodecBusy(f"{self._waiting_bytes} bytes of JSON are queued to be parsed already")
        job = Read(header_length, len(body), tensors_max)
        reply, data = await self._answer(job, [text], wanted)
        assert isinstance(reply, ReadCall)
        return _call(reply, data, body, len(text))

    async def write(
        self, job: Write, data: list[Buffer], wanted: Callable[[], bool]
    ) -> list[tuple[Output, memoryview]]:
        """Encode outputs for a response. Such jobs are always queued, however many there are.

        Raises :class:`InvalidRequest`, and :class:`CodecFailed`.
        """
        reply, found = await self._answer(job, data, wanted)
        assert isinstance(reply, Written)
        outputs = []
        for output in reply.outputs:
            outputs.append((output, found[: output.nbytes]))
            found = found[output.nbytes :]
        return outputs

    async def _answer(
        self, job: Job, data: list[Buffer], wanted: Callable[[], bool]
    ) -> tuple[Reply, memoryview]:
        size = sum(map(len, data))
        self._waiting_bytes += size
        try:
            loop = asyncio.get_running_loop()
            reply, found = await loop.run_in_executor(self._executor(), self._exchange, job, data, wanted)
        finally:
            self._waiting_bytes -= size
        if isinstance(reply, Wrong):
            kind = _ERRORS.get(reply.kind)
            if kind is None:
                raise CodecFailed(f"the codec process failed: {reply.text}")
            raise kind(reply.text)
        return reply, found

    def _executor(self) -> ThreadPoolExecutor:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "codec")
        return self._thread

    # In the thread

    def _exchange(self, job: Job, data: list[Buffer], wanted: Callable[[], bool]) -> tuple[Reply, memoryview]:
        if not wanted():
            raise CodecFailed("the client left")
        try:
            link = self._running()
            send(link, _encode(job), data)
            record, found = receive(link)
        except (OSError, EOFError) as error:
            self._end()
            _log.error("the codec process died or was stuck; it is restarted: %r", error)
            raise CodecFailed(
                "the process that parses large JSON died of it or took too long; send tensors as binary data"
            ) from None
        return _decode(record), found

    def _running(self) -> socket.socket:
        if self._process is not None and self._process.poll() is not None:
            self._end()
        if self._link is None:
            self._link, theirs = socket.socketpair()
            self._link.settimeout(TIMEOUT_S)
            self._link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
            with theirs:
                self._process = subprocess.Popen(self._command, stdin=theirs.fileno())
        return self._link

    def _end(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()


def _call(found: ReadCall, data: memoryview, body: memoryview, at: int) -> InferCall:
    """The call with its tensors: views of ``data`` for JSON, else of ``body`` from ``at`` on, in order."""
    inputs = []
    start = 0
    for tensor in found.inputs:
        if tensor.json:
            content, start = data[start : start + tensor.nbytes], start + tensor.nbytes
        else:
            content, at = body[at : at + tensor.nbytes], at + tensor.nbytes
        inputs.append(InputTensor(tensor.name, tensor.datatype, tensor.shape, content, tensor.shared))
    return InferCall(inputs, found.outputs, found.id, found.parameters, found.binary, found.shared)


# ------------------------------------------------------------
# Outputs whose conversion to JSON or classes would block the loop for long: left to the codec process.


JSON_BYTES: Final = 32 * KIB
"""An output up to this size is encoded as JSON in the loop: 8,000 numbers take 1 ms."""
RANKED_BYTES: Final = 64 * KIB
CLASSES: Final = 1024
"""Classes of an output, in all its rows, that are ranked in the loop: a microsecond each."""


def has_large_outputs(response: InferResponse) -> bool:
    """Whether an output is to be encoded by the codec process."""
    call, served = response.call, response.served
    if call is None or served is None:
        return False
    for tensor in response.outputs:
        if len(tensor.data) > JSON_BYTES:
            break
    else:  # the common case; small outputs have few classes
        return call.outputs is not None and any(wish.classes > CLASSES // 8 for wish in call.outputs)
    sizes = {tensor.name: (len(tensor.data), tensor.shape) for tensor in response.outputs}
    return any(
        _is_heavy(wish, *sizes[wish.name], batched=served.code.batched) for wish in served.wanted(call)
    )


def _is_heavy(wish: OutputWish, nbytes: int, shape: tuple[int, ...], *, batched: bool) -> bool:
    if wish.classes:
        rows = shape[0] if batched and shape else 1
        return nbytes > RANKED_BYTES or rows * min(wish.classes, math.prod(shape)) > CLASSES
    return wish.shared is None and not wish.binary and nbytes > JSON_BYTES


class LargeOutputs:
    """Outputs of a response that the codec process is to encode; copied, unless their memory is their own.

    To be created before :meth:`Exchange.end` returns.
    """

    def __init__(self, response: InferResponse) -> None:
        call, served = response.call, response.served
        assert call is not None
        assert served is not None
        self.original = response
        if not response.own:
            response.outputs = [
                OutputTensor(tensor.name, tensor.datatype, tensor.shape, bytes(tensor.data))
                for tensor in response.outputs
            ]
            response.own = True
        self._wishes = served.wanted(call)
        self._tensors = {tensor.name: tensor for tensor in response.outputs}

    async def response(self, codec: Codec, wanted: Callable[[], bool]) -> InferResponse:
        """The response with classes as tensors, and ``texts`` of the outputs to be sent as JSON.

        Raises :class:`InvalidRequest`, and :class:`CodecFailed`; the latter also if it is no longer
        ``wanted``.
        """
        response = self.original
        assert response.call is not None
        assert response.served is not None
        outputs, data = [], []
        for wish in self._wishes:
            tensor = self._tensors[wish.name]
            if wish.shared is None and (wish.classes or not wish.binary):
                outputs.append(
                    Output(
                        tensor.name, tensor.datatype, tensor.shape, len(tensor.data), wish.classes,
                        not wish.binary,
                    )
                )  # fmt: skip
                data.append(tensor.data)
        names = {output.name for output in outputs if output.classes}
        labels = {name: found for name, found in response.served.model.labels.items() if name in names}
        job = Write(outputs, labels, response.served.code.batched)
        texts: dict[str, Buffer] = {}
        for output, content in await codec.write(job, data, wanted):
            if output.json:
                texts[output.name] = content
                content = b""  # type: ignore[assignment] # noqa: PLW2901
            self._tensors[output.name] = OutputTensor(output.name, output.datatype, output.shape, content)
        wishes = [msgspec.structs.replace(wish, classes=0) for wish in self._wishes]
        call = msgspec.structs.replace(response.call, outputs=wishes)
        return msgspec.structs.replace(response, call=call, outputs=[*self._tensors.values()], texts=texts)
