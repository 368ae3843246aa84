"""Messages between processes: frozen records, which are also the wire format.

``records`` describe codes, weights, models and devices; ``actions`` are what the controller sends to workers;
``requests`` are clients' requests and responses; ``links`` holds all other messages, on one machine and
between machines.

Messages and what they carry for each request are encoded as arrays: a field is found by its place. So fields
are only appended, each with a default, and none is removed or moved (``tests/messages/test_wire.py``).
"""

from __future__ import annotations

from clockwork_client.datatypes import DATATYPES
from clockwork_serve.messages.actions import (
    Action,
    Call,
    Extent,
    Held,
    Infer,
    Lane,
    Load,
    Result,
    Status,
    Unload,
    Window,
)
from clockwork_serve.messages.links import (
    Admitted,
    ArtefactDamaged,
    Ask,
    Beat,
    CodeAdded,
    CodeReady,
    CodeRemade,
    CodeRemoved,
    ControllerBusy,
    CreditBlocked,
    DamageCounted,
    DeviceNumbers,
    DeviceState,
    Drain,
    FarGateway,
    GatewayLost,
    HandingOver,
    Hello,
    MachineHello,
    MeasuredDurations,
    ModelAdded,
    ModelRemoved,
    ModelsAskedFor,
    Ping,
    Preparing,
    ProcessesEnded,
    Quarantined,
    Question,
    QuotasSet,
    Readiness,
    Refused,
    ReleaseFromQuarantine,
    Reply,
    RequestCredit,
    Resident,
    RetainWeights,
    Role,
    Running,
    SoonestEnd,
    SoonestEnds,
    StandbysCounted,
    TensorsOffered,
    TensorsReached,
    Unservable,
    WeightsReady,
    WorkerCrashed,
    WorkerHeard,
    WorkerHung,
    WorkerJoined,
    WorkerLost,
    WorkerSilent,
)
from clockwork_serve.messages.records import (
    Code,
    CodeFile,
    DeviceSpec,
    Model,
    OnnxIndex,
    OnnxTensor,
    Profile,
    Quota,
    TensorSpec,
    TorchIndex,
    TorchTensor,
    Weights,
)
from clockwork_serve.messages.requests import (
    LEAST_PRIORITY,
    USUAL_PRIORITY,
    AdmissionQuery,
    AdmissionReply,
    Answer,
    Cancel,
    Cause,
    Delivered,
    Outcome,
    Reason,
    Release,
    Request,
    TensorRef,
    Tensors,
)

ControllerEvent = (
    Request | Cancel | Result | WorkerJoined | WorkerLost | CodeAdded | CodeReady | CodeRemoved | CodeRemade
    | ModelAdded | ModelRemoved | ReleaseFromQuarantine | QuotasSet | GatewayLost | Drain | AdmissionQuery
    | WeightsReady | WorkerCrashed | WorkerSilent | WorkerHeard | ControllerBusy
)  # fmt: skip
"""What the controller observes."""

ControllerEffect = (
    Answer | Release | Load | Unload | Infer | Readiness | AdmissionReply | Quarantined | WorkerHung
    | RetainWeights | Unservable
)  # fmt: skip
"""What the controller decides."""

Frame = (
    Hello | Ping | Request | Cancel | Answer | Release | Load | Unload | Infer | Result
    | WorkerJoined | CodeAdded | CodeReady | CodeRemoved | ModelAdded | ModelRemoved | QuotasSet
    | Drain | Readiness | Ask | Reply | AdmissionQuery | AdmissionReply | Quarantined
    | Unservable | ReleaseFromQuarantine | WorkerCrashed
    | DeviceNumbers | Beat | WorkerHung | RequestCredit | RetainWeights | MachineHello | Refused
    | FarGateway | ProcessesEnded | ArtefactDamaged | CodeRemade | DamageCounted
    | Delivered | Preparing | ModelsAskedFor | SoonestEnds | CreditBlocked | StandbysCounted
    | HandingOver | Admitted | TensorsOffered | TensorsReached | WeightsReady
)  # fmt: skip
"""What may be sent on a link between our processes."""

__all__ = [
    "DATATYPES", "LEAST_PRIORITY", "USUAL_PRIORITY", "Action", "AdmissionQuery", "AdmissionReply", "Admitted",
    "Answer", "ArtefactDamaged", "Ask", "Beat", "Call", "Cancel", "Cause", "Code", "CodeAdded", "CodeFile",
    "CodeReady",
    "CodeRemade", "CodeRemoved", "ControllerBusy", "ControllerEffect", "ControllerEvent", "CreditBlocked",
    "DamageCounted", "Delivered",
    "DeviceNumbers", "DeviceSpec", "DeviceState", "Drain", "Extent", "FarGateway", "Frame",
    "GatewayLost", "HandingOver", "Held", "Hello", "Infer", "Lane", "Load", "MachineHello",
    "MeasuredDurations",
    "Model", "ModelAdded", "ModelRemoved", "ModelsAskedFor", "OnnxIndex", "OnnxTensor", "Outcome",
    "Ping", "Preparing", "ProcessesEnded", "Profile", "Quarantined", "Question", "Quota", "QuotasSet",
    "Readiness", "Reason", "Refused", "Release", "ReleaseFromQuarantine", "Reply", "Request", "RequestCredit",
    "Resident", "Result", "RetainWeights", "Role", "Running", "SoonestEnd",
    "SoonestEnds", "StandbysCounted", "Status", "TensorRef",
    "TensorSpec", "Tensors", "TensorsOffered", "TensorsReached", "TorchIndex", "TorchTensor", "Unload",
    "Unservable", "Weights", "WeightsReady", "Window",
    "WorkerCrashed", "WorkerHeard", "WorkerHung", "WorkerJoined", "WorkerLost", "WorkerSilent",
]  # fmt: skip
