"""The codec process of a gateway: parses and encodes what would block the gateway's loop, one job at a time.

msgspec parses JSON in one call, and in a thread it would hold Python's lock meanwhile. The process ends with
its gateway, has no port, and keeps nothing of a request.
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from msgspec import Struct

from clockwork_client.datatypes import Buffer
from clockwork_serve.errors import InvalidRequest
from clockwork_serve.oip import InferCall, OutputTensor, OutputWish, Parameter, SharedRef, parse_infer
from clockwork_serve.oip.http_infer import to_json
from clockwork_serve.oip.model import classify
from clockwork_serve.units import MIB

LENGTHS: Final = struct.Struct("<QQ")
"""Header of each job and each reply: the sizes of its record and of the data after it."""
MEMORY_BYTES: Final = 96 * MIB  # memory for a job beside the JSON itself and its tensors
IDLE_S: Final = 5.0  # after a pause this long, memory that jobs have freed is returned to the system
NICENESS: Final = 5  # requests with binary data have precedence


class Output(Struct, frozen=True):
    """An output to encode, of ``nbytes``: its ``classes`` best, or all of it as JSON, or both."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    nbytes: int
    classes: int
    json: bool


class Write(Struct, frozen=True, tag=True):
    """Encode the outputs that follow. ``labels`` are given for those whose classes are requested."""

    outputs: list[Output]
    labels: dict[str, tuple[str, ...]]
    batched: bool


class Written(Struct, frozen=True, tag=True):
    """The encoded outputs: tensors of classes, or JSON."""

    outputs: list[Output]


class Read(Struct, frozen=True, tag=True):
    """Parse the JSON that follows, of a body of ``body_bytes``. For the rest see :func:`parse_infer`."""

    header_length: int | None
    body_bytes: int
    tensors_max: int


class ReadTensor(Struct, frozen=True):
    """An input of ``nbytes``: in the data that follow if it was JSON, else in the body after its JSON."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    nbytes: int
    json: bool
    shared: SharedRef | None


class ReadCall(Struct, frozen=True, tag=True):
    """The content of the JSON."""

    inputs: list[ReadTensor]
    outputs: list[OutputWish] | None
    id: str
    parameters: dict[str, Parameter]
    binary: bool
    shared: bool


class Wrong(Struct, frozen=True, tag=True):
    """The job failed. ``kind`` is the class of the error for the client, "" for a bug of ours."""

    kind: str
    text: str


Job = Read | Write
Reply = ReadCall | Wrong | Written


def receive(link: socket.socket) -> tuple[bytes, memoryview]:
    """The next record and its data. Raises EOFError, and OSError."""
    record_bytes, data_bytes = LENGTHS.unpack(_exactly(link, LENGTHS.size))
    return bytes(_exactly(link, record_bytes)), _exactly(link, data_bytes)


def send(link: socket.socket, record: bytes, data: list[Buffer]) -> None:
    """Send a record and its data. Raises OSError."""
    link.sendall(LENGTHS.pack(len(record), sum(map(len, data))) + record)
    for part in data:
        link.sendall(part)


def answer(job: Job, text: memoryview) -> tuple[Reply, list[Buffer]]:
    """Do a job; the reply and its data."""
    try:
        if isinstance(job, Write):
            return _written(job, text)
        # Only the JSON of the body is here. Pages that are not accessed take no memory.
        body = np.zeros(job.body_bytes, np.uint8)
        body[: len(text)] = text
        return _found(parse_infer(body.data, job.header_length, job.tensors_max))
    except InvalidRequest as error:
        return Wrong(type(error).__name__, str(error)), []
    except MemoryError:
        return Wrong("TooLarge", "JSON: reading it takes too much memory; send tensors as binary data"), []
    except OverflowError as error:
        return Wrong("InvalidRequest", f"JSON: a number is out of range: {error}"), []
    except Exception as error:  # noqa: BLE001 - a bug that one request triggers must not end the process
        return Wrong("", f"{type(error).__name__}: {error}"), []


def _found(call: InferCall) -> tuple[Reply, list[Buffer]]:
    inputs, data = [], []
    for tensor in call.inputs:
        json = type(tensor.data) is not memoryview
        inputs.append(
            ReadTensor(tensor.name, tensor.datatype, tensor.shape, len(tensor.data), json, tensor.shared)
        )
        if json:
            data.append(tensor.data)
    return ReadCall(inputs, call.outputs, call.id, call.parameters, call.binary, call.shared), data


def _written(job: Write, data: memoryview) -> tuple[Reply, list[Buffer]]:
    found, parts = [], []
    for output in job.outputs:
        own, data = data[: output.nbytes], data[output.nbytes :]
        tensor = OutputTensor(output.name, output.datatype, output.shape, own)
        if output.classes:
            tensor = classify(tensor, output.classes, job.labels.get(output.name, ()), batched=job.batched)
        part: Buffer = tensor.data
        if output.json:
            part = msgspec.json.encode(to_json(tensor.datatype, tensor.data))
        parts.append(part)
        found.append(Output(tensor.name, tensor.datatype, tensor.shape, len(part), 0, output.json))
    return Written(found), parts


def _exactly(link: socket.socket, nbytes: int) -> memoryview:
    # Unlike a bytearray, it takes no memory before data arrives.
    room = np.empty(nbytes, np.uint8).data
    at = 0
    while at < nbytes:
        more = link.recv_into(room[at:])
        if not more:
            raise EOFError
        at += more
    return room


def main() -> int:
    """Do the jobs from the socket that is standard input, until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(NICENESS)
    link = socket.socket(fileno=os.dup(0))
    own_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    decoder, encode = msgspec.msgpack.Decoder(Job), msgspec.msgpack.Encoder().encode
    worked = False
    while True:
        if worked and not select.select((link,), (), (), IDLE_S)[0]:
            _trim()
            worked = False
        try:
            record, text = receive(link)
        except (EOFError, OSError):
            return 0
        job = decoder.decode(record)
        # The JSON text, and the numbers as Python objects, which are larger.
        more = 3 * len(text) + job.body_bytes if isinstance(job, Read) else 16 * len(text)
        most = own_bytes + MEMORY_BYTES + more
        resource.setrlimit(resource.RLIMIT_AS, (most if hard < 0 else min(most, hard), hard))
        reply, data = answer(job, text)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        del text
        try:
            encoded = encode(reply)
        except OverflowError as error:
            encoded, data = encode(Wrong("InvalidRequest", f"JSON: a number is out of range: {error}")), []
        try:
            send(link, encoded, data)
        except OSError:
            return 0
        del job, data, encoded, record, reply
        worked = True


def _trim() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


if __name__ == "__main__":
    sys.exit(main())
