"""What our own processes tell each other beside requests and actions, on one machine and between machines."""

from __future__ import annotations

import enum

from msgspec import Struct

from clockwork_serve.messages.actions import Extent, Lane
from clockwork_serve.messages.records import Code, DeviceSpec, Model, Profile, Quota, Weights

# ------------------------------------------------------------
# What our own processes tell each other beside requests and actions.


class Role(enum.StrEnum):
    """What a process is."""

    CONTROLLER = "controller"
    GATEWAY = "gateway"
    WORKER = "worker"
    KEEPER = "keeper"
    """The process that reads the model repository and supervises the others."""


class Hello(Struct, frozen=True, kw_only=True, tag="hello"):
    """The first frame on a link, both ways.

    ``boot_id`` equal on both sides means that both read the same monotonic clock (offset zero).
    ``protocol`` must be equal too.
    """

    role: Role
    name: str
    pid: int
    boot_id: str
    protocol: int = 1


class Ping(Struct, frozen=True, kw_only=True, tag="ping"):
    """A sample for clock alignment: the sender's clock, and the least delay it has seen from the peer."""

    sent_ns: int
    least_delta_ns: int | None = None


class Resident(Struct, frozen=True, kw_only=True):
    """Weights that a device holds, loaded for an earlier controller; not ``ready``: their LOAD runs."""

    model: str
    code_id: str
    weights: Weights
    extent: Extent
    version: int
    ready: bool = True


class Running(Struct, frozen=True, kw_only=True):
    """An action of an earlier controller that a lane is at; its result still comes.

    It moves or reads the weights of that ``version``, was expected to take ``expected_ns``, and to end in
    ``left_ns``.
    """

    action_id: int
    lane: Lane
    version: int
    left_ns: int
    expected_ns: int = 0


class MeasuredDurations(Struct, frozen=True, kw_only=True):
    """The last durations of a code on a device, oldest first, at that batch size (0: LOADs) and signature."""

    code_id: str
    batch: int
    lasted_ns: tuple[int, ...]
    signature: str = ""


class DeviceState(Struct, frozen=True, kw_only=True):
    """What is left on a device of the time before its worker lost a controller."""

    device: str
    codes: tuple[str, ...] = ()
    """Those prepared."""
    weights: tuple[Resident, ...] = ()
    running: tuple[Running, ...] = ()
    measured: tuple[MeasuredDurations, ...] = ()


class WorkerJoined(Struct, frozen=True, kw_only=True, tag="worker_joined"):
    """A worker is up, with empty memory, or back with what ``states`` tell.

    Then a :class:`RetainWeights` chooses.
    """

    worker: str
    devices: tuple[DeviceSpec, ...]
    states: tuple[DeviceState, ...] = ()


class RetainWeights(Struct, frozen=True, kw_only=True, tag="keep"):
    """Of the weights on a device when its worker joined, these ``versions`` stay; all others are to go."""

    device: str
    versions: tuple[int, ...] = ()


class WorkerLost(Struct, frozen=True, kw_only=True, tag="worker_lost"):
    """A worker is gone, and all that was in flight on it.

    ``running`` are the actions, and ``preparing`` the codes, that its lanes were at when it died (the last
    ones, if they were at nothing, and then it was ``idle``); None where that is not known, or the link alone
    is gone.
    """

    worker: str
    running: tuple[int, ...] | None = None
    preparing: tuple[str, ...] = ()
    idle: bool = False


class WorkerCrashed(Struct, frozen=True, kw_only=True, tag="worker_crashed"):
    """A worker that is gone, or soon will be, ended by a fault of its own: nobody killed it."""

    worker: str


class Beat(Struct, frozen=True, kw_only=True, tag="beat"):
    """Sent now and then, and by the other side at once in return: its loop runs.

    The controller sends it to workers and the keeper, and gateways send it to the controller.
    """


class WorkerSilent(Struct, frozen=True, kw_only=True, tag="worker_silent"):
    """A worker has returned no beat for so long; told again while that lasts."""

    worker: str
    for_ns: int


class WorkerHeard(Struct, frozen=True, kw_only=True, tag="worker_heard"):
    """A worker that was silent returned a beat."""

    worker: str


class WorkerHung(Struct, frozen=True, kw_only=True, tag="worker_hung"):
    """A worker does not answer in time, and nothing is planned on it; without a ``why``, it did after all.

    With ``end``, it is to be ended, for another one to be started.
    """

    worker: str
    why: str = ""
    end: bool = False


class ProcessesEnded(Struct, frozen=True, kw_only=True, tag="processes_ended"):
    """How often the keeper has ended each process because it did not answer, since the server's start."""

    unanswering: dict[str, int]


class CodeAdded(Struct, frozen=True, kw_only=True, tag="code_added"):
    """A code and its profiles are known; a worker prepares it on every device."""

    code: Code
    profiles: tuple[Profile, ...] = ()


class CodeReady(Struct, frozen=True, kw_only=True, tag="code_ready"):
    """A worker prepared a code on a device, or could not (``message`` says why)."""

    device: str
    code_id: str
    ok: bool = True
    message: str = ""


class ArtefactDamaged(Struct, frozen=True, kw_only=True, tag="artefact_damaged"):
    """A worker found that an artefact (``code`` or ``weights``) is not what its name, an id, says."""

    what: str
    name: str
    message: str = ""


class CodeRemade(Struct, frozen=True, kw_only=True, tag="code_remade"):
    """A code that was damaged is whole again: who could not prepare it is to try again."""

    code_id: str


class DamageCounted(Struct, frozen=True, kw_only=True, tag="damage_counted"):
    """How many files of the cache were found damaged since the server began, by what they are.

    ``remade`` are the artefacts that were made again for it, ``lost`` those that could not be.
    """

    found: dict[str, int]
    remade: int = 0
    lost: int = 0


class DeviceNumbers(Struct, frozen=True, kw_only=True, tag="device_numbers"):
    """What a device counts of itself, and its clock rates, by name: for metrics."""

    device: str
    numbers: dict[str, int]


class CodeRemoved(Struct, frozen=True, kw_only=True, tag="code_removed"):
    """No model uses that code any more."""

    code_id: str


class ModelAdded(Struct, frozen=True, kw_only=True, tag="model_added"):
    """A model is served from now on; its code was added before."""

    model: Model


class ModelRemoved(Struct, frozen=True, kw_only=True, tag="model_removed"):
    """A model is no longer served."""

    model: str


class Quarantined(Struct, frozen=True, kw_only=True, tag="quarantined"):
    """A model takes devices down, and is not served for that; without a ``why``, it is served again.

    ``since_ns`` is on the controller's axis. ``code_id``, if any, is not to be prepared while this lasts.
    """

    model: str
    why: str = ""
    since_ns: int = 0
    code_id: str = ""


class ReleaseFromQuarantine(Struct, frozen=True, kw_only=True, tag="pardon"):
    """All versions of the model of that name are to leave quarantine."""

    model: str


class QuotasSet(Struct, frozen=True, kw_only=True, tag="quotas_set"):
    """The quotas of all tenants that have any, in place of those known before."""

    quotas: tuple[Quota, ...]


class GatewayLost(Struct, frozen=True, kw_only=True, tag="gateway_lost"):
    """A gateway is gone; nobody waits for its requests."""

    gateway: str


class Drain(Struct, frozen=True, kw_only=True, tag="drain"):
    """Take no new request; finish those that wait."""


class Readiness(Struct, frozen=True, kw_only=True, tag="readiness"):
    """Whether the server can serve; ``why`` names what is missing."""

    ready: bool
    why: str = ""


class RequestCredit(Struct, frozen=True, kw_only=True, tag="intake"):
    """``heard`` more of a gateway's requests were taken in; ``most`` may be on their way from now on.

    0 stands for any number. Those that are too many wait at the gateway. One that has waited there for the
    ``patience``-th part of its SLO is refused; so is the oldest one where more than ``held`` wait.
    """

    heard: int
    most: int
    patience: int = 4
    held: int = 4096


class Ask(Struct, frozen=True, kw_only=True, tag="ask"):
    """A question to the controller process (``what`` is a :class:`Question`); answered by a Reply.

    ``body`` is JSON.
    """

    ask_id: int
    what: str
    body: bytes = b"{}"


class Question(enum.StrEnum):
    """What may be asked."""

    STATISTICS = "statistics"
    """{"model": key or null} -> Triton's model_stats records."""
    METRICS = "metrics"
    """-> counters and histograms, for exposition."""
    STATE = "state"
    """-> queues, devices, resident models: for screens."""
    INDEX = "index"
    """{"ready": bool} -> repository index; asked of the keeper."""
    LOAD = "load"
    """{"model": name} -> compiles if need be and serves; asked of the keeper."""
    UNLOAD = "unload"
    """{"model": name}; asked of the keeper."""


class Reply(Struct, frozen=True, kw_only=True, tag="reply"):
    """The answer to an Ask. ``code`` is an HTTP status where ``ok`` is false; ``body`` is JSON."""

    ask_id: int
    ok: bool
    body: bytes = b"{}"
    code: int = 200


# ------------------------------------------------------------
# What processes elsewhere and the bridge at the server tell each other beside what is said at home.
#
# Tensors and artefacts travel in pieces, so that nothing else waits long behind them.


class MachineHello(Struct, frozen=True, kw_only=True, tag="machine"):
    """A worker's first frame: what it runs.

    ``runtime`` is what artefacts depend on beside their model, ``kinds`` those of its devices.
    """

    worker: str
    version: str
    runtime: dict[str, str]
    kinds: tuple[str, ...]


class FarGateway(Struct, frozen=True, kw_only=True, tag="far_gateway"):
    """A gateway's first frame: what it runs."""

    gateway: str
    version: str


class Refused(Struct, frozen=True, kw_only=True, tag="refused"):
    """A worker or gateway may not join; ``final``: not later either, as it is."""

    why: str
    final: bool = True


class Piece(Struct, frozen=True, kw_only=True, tag="piece"):
    """Bytes of an INFER's tensors: inputs to the worker, outputs back.

    ``call`` is the place of the call in the action; ``at`` counts from the start of the call's inputs, or of
    its room for outputs.
    """

    action_id: int
    call: int
    at: int
    data: bytes


class RequestPiece(Struct, frozen=True, kw_only=True, tag="request_piece"):
    """Bytes of a request's tensors, in order: inputs from its gateway, outputs back.

    ``at`` counts from the start of its inputs, or of its room for outputs.
    """

    request_id: str
    at: int
    data: bytes


class Undelivered(Struct, frozen=True, kw_only=True, tag="unheard"):
    """The controller never heard of a request: there was no room (``why``), or it was cancelled before."""

    request_id: str
    why: str = ""


class Fetch(Struct, frozen=True, kw_only=True, tag="fetch"):
    """A worker lacks an artefact: ``what`` is ``code`` or ``weights``, ``name`` its id."""

    what: str
    name: str


class Part(Struct, frozen=True, kw_only=True, tag="part"):
    """Bytes of an artefact that was asked for, in order.

    ``file`` is its name where there are several. ``last`` ends the whole artefact; ``error`` says why it
    does not come.
    """

    what: str
    name: str
    file: str = ""
    data: bytes = b""
    last: bool = False
    error: str = ""
