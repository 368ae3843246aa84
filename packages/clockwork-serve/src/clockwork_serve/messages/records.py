"""Records that describe what is served: codes, weights, models, profiles, devices; and for whom: quotas."""

from __future__ import annotations

from msgspec import Struct

from clockwork_client.datatypes import DATATYPES
from clockwork_serve.units import scratch_for

# ------------------------------------------------------------
# *Code* is what is compiled once and shared by every model of one architecture; *weights* are one blob per
# model. A *model* is what a client names: a version of a name, made of one code and one weights.


class TensorSpec(Struct, frozen=True, kw_only=True):
    """An input or output of a code.

    ``shape`` leaves out the batch axis when the code is batched; -1 marks a dimension that a request
    chooses. ``datatype`` is a key of ``DATATYPES``.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False

    @property
    def row_bytes(self) -> int | None:
        """Bytes of one row (or of the whole tensor if not batched); None where its size is open, or BYTES."""
        size = DATATYPES[self.datatype]
        for dim in self.shape:
            size *= dim
        return size if size > 0 and all(dim >= 0 for dim in self.shape) else None


class CodeFile(Struct, frozen=True, array_like=True):
    """A file in a code's folder, and the SHA-256 of what must be in it."""

    name: str
    sha256: str


class Code(Struct, frozen=True, kw_only=True):
    """What is compiled once: a graph without weights, or a user's class.

    ``code_id`` is a content hash. ``path`` is the artefact's folder on the host. ``batched`` means that
    axis 0 of every input and output is the batch; else a request is run alone, as it is.
    ``batch_sizes`` are those compiled and profiled, ascending, starting with 1.
    ``lifted``: weights live in device pages; if not, they are part of the artefact that ``Weights.path``
    names, and a LOAD opens that (slow; the model's warnings say so).
    ``backend`` is ``onnx``, ``torch``, ``python`` or ``emulated``.
    ``files`` are those of the artefact; no other file of its folder is read (a user's class: any).
    """

    code_id: str
    backend: str
    path: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batched: bool
    batch_sizes: tuple[int, ...]
    lifted: bool
    files: tuple[CodeFile, ...] = ()

    @property
    def outputs_open(self) -> bool:
        """Whether only a run tells how large its outputs are: an open dimension, or BYTES."""
        return any(spec.row_bytes is None for spec in self.outputs)


class Weights(Struct, frozen=True, kw_only=True):
    """One model's weights: a blob file laid out by its code's index, ``size`` bytes long.

    ``weights_id`` is the SHA-256 of the file, where there is one.

    ``size`` is what a LOAD claims on a device, in bytes (for weights that are not lifted, an estimate of
    what the loaded model occupies).
    """

    weights_id: str
    path: str
    size: int


class Model(Struct, frozen=True, kw_only=True):
    """A version of a model, as served. ``key`` is ``name/version``.

    ``max_batch_size`` means what it means in Triton: 0, no batch axis is shown to clients.
    ``batch_sizes`` are those the scheduler may use: the code's, up to ``max_batch_size``.
    ``slo_ns`` is the model's own default SLO (None: the server's). ``queue_limit`` bounds waiting requests.
    ``decide_ns``: how long the yes or no to its requests may take (-1: as the server's setting says).
    ``output_bytes`` is the room for a request's outputs, in bytes per request row: what they take, or the
    first guess if that is open.
    ``labels`` maps an output's name to its class labels. ``config`` is the model configuration as JSON, in
    Triton's field names. ``warnings`` say what is lost and why.
    """

    key: str
    name: str
    version: str
    code_id: str
    weights: Weights
    platform: str
    max_batch_size: int
    batch_sizes: tuple[int, ...]
    output_bytes: int
    slo_ns: int | None = None
    queue_limit: int = 1000
    priority: int = 0
    decide_ns: int = -1
    labels: dict[str, tuple[str, ...]] = {}
    config: bytes = b"{}"
    warnings: tuple[str, ...] = ()


class Profile(Struct, frozen=True, kw_only=True):
    """Durations of one code on one kind of device, measured before serving.

    ``infer_ns[batch]`` is the whole lane time (inputs copied in, run, outputs read). LOAD is linear:
    ``load_base_ns + load_ns_per_mib * size / 2**20``. ``workspace_bytes[batch]`` and ``io_bytes[batch]`` are
    what an INFER needs beside the weights. ``guessed``: nothing could be measured, and the first execution
    replaces it. ``extrapolated`` are the batches that were not run, for others took so long.
    """

    code_id: str
    device_kind: str
    infer_ns: dict[int, int]
    load_base_ns: int
    load_ns_per_mib: int
    workspace_bytes: dict[int, int] = {}
    io_bytes: dict[int, int] = {}
    guessed: bool = False
    extrapolated: tuple[int, ...] = ()

    def load_ns(self, size: int) -> int:
        """The LOAD duration of ``size`` bytes, in ns."""
        return self.load_base_ns + (self.load_ns_per_mib * size >> 20)


class DeviceSpec(Struct, frozen=True, kw_only=True):
    """A device and its capacity. Memory for weights is ``pages`` pages of ``page_bytes``.

    ``workspace_bytes`` and ``io_bytes`` are the most that one INFER may need of each.
    ``kind`` selects profiles: ``cpu``, ``torch-cpu``, ``cuda:sm_90``, ``emulated:NAME``. ``backends`` are
    those of the codes that it can run (empty: any). ``lanes_share``: LOADs and INFERs compete for the same
    cores.
    """

    device: str
    kind: str
    pages: int
    page_bytes: int
    workspace_bytes: int
    io_bytes: int
    backends: tuple[str, ...] = ()
    lanes_share: bool = False

    def runs(self, backend: str) -> bool:
        """Whether it can run codes of that backend."""
        return not self.backends or backend in self.backends

    def misfit(self, backend: str) -> str:
        """The message where it cannot run codes of a backend."""
        return f"{self.device} runs {' and '.join(self.backends)} codes; found one of backend {backend}"

    def shortage(self, batch: int, workspace_bytes: int, io_bytes: int) -> str:
        """Why it has no room for a batch that needs these, and what to set; empty if it has."""
        if workspace_bytes <= self.workspace_bytes and io_bytes <= self.io_bytes:
            return ""
        return (
            f"batch {batch} needs {workspace_bytes} bytes of scratch memory and {io_bytes} for inputs and "
            "outputs; "
            f"{self.device} has {self.workspace_bytes} and {self.io_bytes}: "
            f"set scratch_memory to at least {scratch_for(io_bytes, workspace_bytes)}"
        )

    def pages_of(self, size: int) -> int:
        """Pages that ``size`` bytes of weights take: at least 1."""
        return max(1, -(-size // self.page_bytes))


class Quota(Struct, frozen=True, kw_only=True):
    """What a tenant may use of all devices together; None: unlimited.

    ``burst_ns`` is how long it takes to fill an empty bucket: as much of either quota may be used at once.
    """

    tenant: str
    burst_ns: int
    device_ns_per_s: int | None = None
    loaded_bytes_per_s: int | None = None


# ------------------------------------------------------------
# The file ``index.json`` of a code, which the store writes and a device reads: where in the blob of each of
# its models every weight lies.


class OnnxTensor(Struct, frozen=True, kw_only=True):
    """Where one lifted weight is in the blob: ``nbytes`` from ``offset``. ``dtype`` is numpy's name."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int


class OnnxIndex(Struct, frozen=True, kw_only=True):
    """How a blob is laid out, in the order of the graph's inputs."""

    tensors: tuple[OnnxTensor, ...]
    blob_bytes: int


class TorchTensor(Struct, frozen=True, kw_only=True):
    """Where one constant of a program is in the blob: ``size`` bytes from ``offset``.

    ``name`` is what ``get_constant_fqns`` calls it. ``dtype`` is torch's name (``float32``). ``stride``
    counts elements; ``size`` is what they span, which for a dense tensor is its bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    size: int


class TorchIndex(Struct, frozen=True, kw_only=True):
    """How a blob is laid out, and what the packages were compiled by and for.

    ``target`` is ``cpu`` or ``cuda:sm_90``. ``inputs`` are names in calling order, ``outputs`` in the order
    they come back in.
    """

    tensors: tuple[TorchTensor, ...]
    blob_bytes: int
    torch_version: str
    target: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
