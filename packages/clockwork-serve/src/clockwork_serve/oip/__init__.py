"""Open Inference Protocol, version 2: records and codecs for HTTP and gRPC, without I/O.

The classes of gRPC's messages are in :mod:`clockwork_serve.oip.protobuf`, its codec in
:mod:`clockwork_serve.oip.grpc_infer`: what does not speak gRPC does not load protobuf.
"""

from __future__ import annotations

from clockwork_client.datatypes import Parameter
from clockwork_serve.oip.compression import Coding, compress, decompress, wanted_coding
from clockwork_serve.oip.http_infer import encode_infer, parse_infer
from clockwork_serve.oip.model import (
    InferCall,
    InputTensor,
    Known,
    OutputTensor,
    OutputWish,
    Served,
    http_description,
    missing,
    model_metadata,
    server_metadata,
)
from clockwork_serve.oip.shared_memory import (
    CUDA_SHARED_MEMORY,
    SHARED_MEMORY_OFF,
    SharedRef,
    SharedRegion,
    object_name,
    shared_region,
)
from clockwork_serve.oip.slo import decide_ns_of, default_slo_ns, priority_of, requested_slo_ns, tightest
from clockwork_serve.oip.status import (
    OK,
    ClientStatus,
    Forbidden,
    RegionExists,
    TooLarge,
    UnknownModel,
    UnknownRegion,
    Unsupported,
    grpc_of_http,
    reason_of_error,
    status_of,
    status_of_error,
)
from clockwork_serve.oip.strings import StringsWalk
from clockwork_serve.oip.trace_context import TRACE_HEADERS, trace_context

__all__ = [
    "CUDA_SHARED_MEMORY", "OK", "SHARED_MEMORY_OFF", "TRACE_HEADERS", "ClientStatus", "Coding", "Forbidden",
    "InferCall", "InputTensor", "Known", "OutputTensor", "OutputWish", "Parameter", "RegionExists", "Served",
    "SharedRef", "SharedRegion", "StringsWalk", "TooLarge", "UnknownModel", "UnknownRegion", "Unsupported",
    "compress", "decide_ns_of", "decompress", "default_slo_ns", "encode_infer", "grpc_of_http",
    "http_description", "missing", "model_metadata", "object_name", "parse_infer", "priority_of",
    "reason_of_error", "requested_slo_ns", "server_metadata", "shared_region", "status_of", "status_of_error",
    "tightest", "trace_context", "wanted_coding",
]  # fmt: skip
