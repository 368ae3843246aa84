"""Messages between processes beside requests and actions, on one machine and between machines."""

from __future__ import annotations

import enum

from msgspec import Struct

from clockwork_serve.messages.actions import Extent, Lane
from clockwork_serve.messages.records import Code, DeviceSpec, Model, Profile, Quota, Weights

# ------------------------------------------------------------
# Messages between processes on one machine.


class Role(enum.StrEnum):
    """The role of a process."""

    CONTROLLER = "controller"
    GATEWAY = "gateway"
    WORKER = "worker"
    SUPERVISOR = "keeper"  # the supervisor: reads the model repository, and starts and watches the others


class Hello(Struct, frozen=True, kw_only=True, array_like=True, tag="hello"):
    """The first frame on a link, both ways.

    ``boot_id`` equal on both sides means that both read the same monotonic clock (offset zero).
    ``protocol`` is the sender's: see ``serve.transport``. ``epoch`` is that of a controller that leads by a
    lease, else 0. ``version`` is that of its build, for people: protocols are compared. Whatever is added
    comes last and has a default, so that any two builds can read it.
    """

    role: Role
    name: str
    pid: int
    boot_id: str
    protocol: int = 2
    epoch: int = 0
    version: str = ""


class Ping(Struct, frozen=True, kw_only=True, array_like=True, tag="ping"):
    """A sample for clock alignment: the sender's clock, and the least delay it has seen from the peer."""

    sent_ns: int
    least_delta_ns: int | None = None


class Resident(Struct, frozen=True, kw_only=True):
    """Weights on a device that an earlier controller loaded; not ``ready``: their LOAD is running."""

    model: str
    code_id: str
    weights: Weights
    extent: Extent
    version: int
    ready: bool = True


class Running(Struct, frozen=True, kw_only=True):
    """A running action that an earlier controller sent; its result will be sent to this one.

    It moves or reads the weights of that ``version``, was expected to take ``expected_ns``, and is expected
    to end in ``left_ns`` (a duration).
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
    """The state of a device whose worker had a controller before."""

    device: str
    codes: tuple[str, ...] = ()  # ids of prepared codes
    weights: tuple[Resident, ...] = ()
    running: tuple[Running, ...] = ()
    measured: tuple[MeasuredDurations, ...] = ()


class WorkerJoined(Struct, frozen=True, kw_only=True, array_like=True, tag="worker_joined"):
    """A worker connected: with empty memory or, after a failover, with the ``states`` of its devices.

    In that case the controller replies with a :class:`RetainWeights` for each device.
    """

    worker: str
    devices: tuple[DeviceSpec, ...]
    states: tuple[DeviceState, ...] = ()


class RetainWeights(Struct, frozen=True, kw_only=True, array_like=True, tag="keep"):
    """Of the weights on a device, keep these ``versions``; unload all others.

    Sent where a worker brought weights along, and where it holds some that the controller does not know of.
    """

    device: str
    versions: tuple[int, ...] = ()


class WorkerLost(Struct, frozen=True, kw_only=True, array_like=True, tag="worker_lost"):
    """A worker died or its link ended: all actions in flight on it are lost.

    ``running`` are the actions, and ``preparing`` the codes, that its lanes were executing when it died; if
    they were executing nothing, it was ``idle``, and they are the last ones. ``running`` is None if unknown,
    or if only the link ended.
    """

    worker: str
    running: tuple[int, ...] | None = None
    preparing: tuple[str, ...] = ()
    idle: bool = False


class WorkerCrashed(Struct, frozen=True, kw_only=True, array_like=True, tag="worker_crashed"):
    """A worker that is lost, or will be at once, crashed: no other process killed it."""

    worker: str


class Beat(Struct, frozen=True, kw_only=True, array_like=True, tag="beat"):
    """A heartbeat: sent periodically, and returned at once by the other side's event loop.

    The controller sends it to workers and the supervisor, and gateways send it to the controller.
    """


class WorkerSilent(Struct, frozen=True, kw_only=True, array_like=True, tag="worker_silent"):
    """A worker has returned no heartbeat for ``for_ns``; repeated while that lasts."""

    worker: str
    for_ns: int


class WorkerHeard(Struct, frozen=True, kw_only=True, array_like=True, tag="worker_heard"):
    """A worker returned a heartbeat after a WorkerSilent."""

    worker: str


class WorkerHung(Struct, frozen=True, kw_only=True, array_like=True, tag="worker_hung"):
    """A worker hangs, and nothing is planned on it; without a ``why``, it has recovered.

    With ``end``, the supervisor is to kill it and start another one.
    """

    worker: str
    why: str = ""
    end: bool = False


class ProcessesEnded(Struct, frozen=True, kw_only=True, array_like=True, tag="processes_ended"):
    """How often the supervisor has killed each process because it hung, since the server's start."""

    unanswering: dict[str, int]


class StandbysCounted(Struct, frozen=True, kw_only=True, array_like=True, tag="standbys_counted"):
    """How many controllers stand by, and would take over at once, beside the one that leads."""

    ready: int


class HandingOver(Struct, frozen=True, kw_only=True, array_like=True, tag="handing_over"):
    """The controller is about to give the lead up: gateways keep new requests for the next one."""


class CodeAdded(Struct, frozen=True, kw_only=True, array_like=True, tag="code_added"):
    """A code was added, with its profiles; workers prepare it on every device."""

    code: Code
    profiles: tuple[Profile, ...] = ()


class CodeReady(Struct, frozen=True, kw_only=True, array_like=True, tag="code_ready"):
    """A worker prepared a code on a device, or failed to (``message`` says why)."""

    device: str
    code_id: str
    ok: bool = True
    message: str = ""


class WeightsReady(Struct, frozen=True, kw_only=True, array_like=True, tag="weights_ready"):
    """A far worker has no valid file of some weights (``message`` says why), or has one again."""

    device: str
    weights_id: str
    ok: bool = True
    message: str = ""


class ArtefactDamaged(Struct, frozen=True, kw_only=True, array_like=True, tag="artefact_damaged"):
    """A worker found that an artefact (``what``: ``code`` or ``weights``) does not match its hash."""

    what: str
    name: str
    message: str = ""


class CodeRemade(Struct, frozen=True, kw_only=True, array_like=True, tag="code_remade"):
    """A damaged code was made again: workers that failed to prepare it are to try again."""

    code_id: str


class DamageCounted(Struct, frozen=True, kw_only=True, array_like=True, tag="damage_counted"):
    """How many files of the cache were found damaged since the server's start, by kind.

    ``remade`` counts the artefacts that were made again, ``lost`` those that could not be.
    """

    found: dict[str, int]
    remade: int = 0
    lost: int = 0


class DeviceNumbers(Struct, frozen=True, kw_only=True, array_like=True, tag="device_numbers"):
    """Counters of a device, and its clock rates, by name: for metrics."""

    device: str
    numbers: dict[str, int]


class CodeRemoved(Struct, frozen=True, kw_only=True, array_like=True, tag="code_removed"):
    """A code was removed: no model uses it any more."""

    code_id: str


class ModelAdded(Struct, frozen=True, kw_only=True, array_like=True, tag="model_added"):
    """A model is served from now on; its code was added before."""

    model: Model


class ModelRemoved(Struct, frozen=True, kw_only=True, array_like=True, tag="model_removed"):
    """A model is no longer served."""

    model: str


class Quarantined(Struct, frozen=True, kw_only=True, array_like=True, tag="quarantined"):
    """A model entered quarantine for taking devices down; without a ``why``, it is released.

    ``since_ns`` is on the controller's clock. ``code_id``, if any, is not to be prepared meanwhile.
    """

    model: str
    why: str = ""
    since_ns: int = 0
    code_id: str = ""


class Unservable(Struct, frozen=True, kw_only=True, array_like=True, tag="unservable"):
    """No device that has joined can ever run a model; without a ``why``, one can now."""

    model: str
    why: str = ""


class ReleaseFromQuarantine(Struct, frozen=True, kw_only=True, array_like=True, tag="pardon"):
    """An operator releases all versions of the model of that name from quarantine."""

    model: str


class QuotasSet(Struct, frozen=True, kw_only=True, array_like=True, tag="quotas_set"):
    """The quotas of all tenants that have one; replaces all earlier ones."""

    quotas: tuple[Quota, ...]


class GatewayLost(Struct, frozen=True, kw_only=True, array_like=True, tag="gateway_lost"):
    """A gateway is lost; its requests are cancelled."""

    gateway: str


class Drain(Struct, frozen=True, kw_only=True, array_like=True, tag="drain"):
    """Admit no new request; finish those that were admitted."""


class Preparing(Struct, frozen=True, kw_only=True, array_like=True, tag="preparing"):
    """Names of the models that are ``waiting`` to be prepared, of ``total`` that were present at the start.

    The others are served, or have a problem. The server is not ready while any waits.
    """

    waiting: tuple[str, ...] = ()
    total: int = 0

    @property
    def done(self) -> int:
        """How many are not waiting any more."""
        return self.total - len(self.waiting)


class ModelsAskedFor(Struct, frozen=True, kw_only=True, array_like=True, tag="models_asked_for"):
    """How many requests for each model, by name, a gateway has refused since its last such frame.

    They were refused because the model is not prepared yet; the most asked for are prepared first.
    """

    requests: dict[str, int]


class Readiness(Struct, frozen=True, kw_only=True, array_like=True, tag="readiness"):
    """Whether the server is ready; ``why`` names what is missing."""

    ready: bool
    why: str = ""


class RequestCredit(Struct, frozen=True, kw_only=True, array_like=True, tag="intake"):
    """Flow control from the controller to a gateway: how many requests may be on their way to it.

    ``heard`` more of the gateway's requests were received; at most ``most`` may be on their way from now on
    (0: any number). The others wait at the gateway. One that has waited there for its SLO divided by
    ``patience`` is rejected, and so is the oldest one if more than ``held`` wait.
    """

    heard: int
    most: int
    patience: int = 4
    held: int = 4096


class CreditBlocked(Struct, frozen=True, kw_only=True, array_like=True, tag="credit_blocked"):
    """Flow control from a gateway to the controller: requests wait because their credit is used up.

    Sent at most once after each :class:`RequestCredit`.
    """


class ControllerBusy(Struct, frozen=True, kw_only=True, array_like=True, tag="controller_busy"):
    """Gateways hold requests back, for the controller has no time to spare; counts for ``for_ns`` from now.

    An event of the controller alone: it is never sent.
    """

    for_ns: int


class SoonestEnd(Struct, frozen=True, array_like=True):
    """When one more request for a model, in a queue of the controller, would end at the soonest.

    Where requests wait of which the latest is due at ``due_ns``, one that is due then or later cannot end
    before ``end_ns``, and for each further one due before it ``each_ns`` later; nor, if a device that they do
    not wait for may serve it, before ``other_end_ns``, whichever is sooner.
    """

    due_ns: int
    end_ns: int
    each_ns: int
    other_end_ns: int


class SoonestEnds(Struct, frozen=True, kw_only=True, array_like=True, tag="soonest"):
    """A summary for gateways, while requests are rejected because they would miss their deadlines.

    ``ends`` are by model key, for requests of one row, of the model's own class and without a signature. All
    instants are as deadlines less ``way_ns``: the slack that the controller plans with is part of them. It
    counts until ``until_ns``, and replaces the summary before.
    """

    ends: dict[str, SoonestEnd]
    until_ns: int


class Ask(Struct, frozen=True, kw_only=True, array_like=True, tag="ask"):
    """A query to the controller process (``what`` is a :class:`Question`); answered by a Reply.

    ``body`` is JSON.
    """

    ask_id: int
    what: str
    body: bytes = b"{}"


class Question(enum.StrEnum):
    """The kinds of queries."""

    STATISTICS = "statistics"  # {"model": key or null} -> Triton's model_stats records
    METRICS = "metrics"  # -> counters and histograms, for exposition
    STATE = "state"  # -> queues, devices, resident models: for screens
    INDEX = "index"  # {"ready": bool} -> repository index; answered by the supervisor
    LOAD = "load"  # {"model": name} -> compiles if need be and serves; done by the supervisor
    UNLOAD = "unload"  # {"model": name}; done by the supervisor


class Reply(Struct, frozen=True, kw_only=True, array_like=True, tag="reply"):
    """The answer to an Ask. ``code`` is an HTTP status where ``ok`` is false; ``body`` is JSON."""

    ask_id: int
    ok: bool
    body: bytes = b"{}"
    code: int = 200


# ------------------------------------------------------------
# Messages between processes on other machines and the server's bridge, beside those above.
#
# Artefacts are sent in parts, so that no other message waits long behind them.


class MachineHello(Struct, frozen=True, kw_only=True, array_like=True, tag="machine"):
    """A remote worker's first frame: what it runs.

    ``runtime`` is what artefacts depend on beside their model, ``kinds`` those of its devices.
    """

    worker: str
    version: str
    runtime: dict[str, str]
    kinds: tuple[str, ...]


class FarGateway(Struct, frozen=True, kw_only=True, array_like=True, tag="far_gateway"):
    """A remote gateway's first frame: what it runs."""

    gateway: str
    version: str


class Refused(Struct, frozen=True, kw_only=True, array_like=True, tag="refused"):
    """A worker or gateway may not join; ``final``: it need not try again without a change."""

    why: str
    final: bool = True


class Admitted(Struct, frozen=True, kw_only=True, array_like=True, tag="admitted"):
    """A worker may join: the first frame that it is sent, unless that is a Refused."""


class TensorsOffered(Struct, frozen=True, kw_only=True, array_like=True, tag="tensors_offered"):
    """A gateway has tensors for workers at ``server`` (see :class:`Tensors`), which may be on other machines.

    The gateway sends it to the controller's process, and that to all workers; without a ``server`` once the
    gateway is gone. A worker answers with :class:`TensorsReached`.
    """

    gateway: str
    server: str = ""


class TensorsReached(Struct, frozen=True, kw_only=True, array_like=True, tag="tensors_reached"):
    """Whether a worker gets tensors from a gateway; if not, ``why``. Sent again when that changes.

    The controller's process sends the gateway whether any worker does, and else the reason of one.
    """

    gateway: str
    ok: bool
    why: str = ""
