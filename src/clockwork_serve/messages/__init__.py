"""The vocabulary: frozen records, which are also the wire format. No logic lives here.

``records`` describe what is served, ``actions`` what the controller orders, ``requests`` what clients want,
``links`` what our processes tell each other beside that, ``machines`` what they do across hosts,
``torch_index`` what lies beside a torch code.
"""

from __future__ import annotations

from clockwork_serve.messages.actions import (
    Action,
    Call,
    Extent,
    Infer,
    Lane,
    Load,
    Result,
    Status,
    Unload,
    Window,
)
from clockwork_serve.messages.links import (
    ArtefactDamaged,
    Ask,
    Beat,
    CodeAdded,
    CodeReady,
    CodeRemade,
    CodeRemoved,
    DamageCounted,
    DeviceNumbers,
    DeviceState,
    Drain,
    FarGateway,
    Fetch,
    GatewayLost,
    Hello,
    Intake,
    Keep,
    Machine,
    Measured,
    ModelAdded,
    ModelRemoved,
    Pardon,
    Part,
    Piece,
    Ping,
    ProcessesEnded,
    Quarantined,
    Question,
    QuotasSet,
    Readiness,
    Refused,
    Reply,
    RequestPiece,
    Resident,
    Role,
    Running,
    Unheard,
    WorkerCrashed,
    WorkerHeard,
    WorkerHung,
    WorkerJoined,
    WorkerLost,
    WorkerSilent,
)
from clockwork_serve.messages.records import (
    DATATYPES,
    Code,
    CodeFile,
    DeviceSpec,
    Model,
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
    Announced,
    Answer,
    Cancel,
    Delivered,
    Foretold,
    Outcome,
    Reason,
    Release,
    Request,
    TensorRef,
    Tensors,
)

ControllerEvent = (
    Request | Cancel | Result | WorkerJoined | WorkerLost | CodeAdded | CodeReady | CodeRemoved | CodeRemade
    | ModelAdded | ModelRemoved | Pardon | QuotasSet | GatewayLost | Drain | Announced | WorkerCrashed
    | WorkerSilent | WorkerHeard
)  # fmt: skip
"""What the controller observes."""

ControllerEffect = (
    Answer | Release | Load | Unload | Infer | Readiness | Foretold | Quarantined | WorkerHung | Keep
)  # fmt: skip
"""What the controller decides."""

Frame = (
    Hello | Ping | Request | Cancel | Answer | Release | Load | Unload | Infer | Result
    | WorkerJoined | CodeAdded | CodeReady | CodeRemoved | ModelAdded | ModelRemoved | QuotasSet
    | Drain | Readiness | Ask | Reply | Announced | Foretold | Quarantined | Pardon | WorkerCrashed
    | DeviceNumbers | Beat | WorkerHung | Intake | Keep | Machine | Refused | Piece | Fetch | Part
    | FarGateway | RequestPiece | Unheard | ProcessesEnded | ArtefactDamaged | CodeRemade | DamageCounted
    | Delivered
)  # fmt: skip
"""What may be sent on a link between our processes."""

__all__ = [
    "DATATYPES",
    "LEAST_PRIORITY",
    "USUAL_PRIORITY",
    "Action",
    "Announced",
    "Answer",
    "ArtefactDamaged",
    "Ask",
    "Beat",
    "Call",
    "Cancel",
    "Code",
    "CodeAdded",
    "CodeFile",
    "CodeReady",
    "CodeRemade",
    "CodeRemoved",
    "ControllerEffect",
    "ControllerEvent",
    "DamageCounted",
    "Delivered",
    "DeviceNumbers",
    "DeviceSpec",
    "DeviceState",
    "Drain",
    "Extent",
    "FarGateway",
    "Fetch",
    "Foretold",
    "Frame",
    "GatewayLost",
    "Hello",
    "Infer",
    "Intake",
    "Keep",
    "Lane",
    "Load",
    "Machine",
    "Measured",
    "Model",
    "ModelAdded",
    "ModelRemoved",
    "Outcome",
    "Pardon",
    "Part",
    "Piece",
    "Ping",
    "ProcessesEnded",
    "Profile",
    "Quarantined",
    "Question",
    "Quota",
    "QuotasSet",
    "Readiness",
    "Reason",
    "Refused",
    "Release",
    "Reply",
    "Request",
    "RequestPiece",
    "Resident",
    "Result",
    "Role",
    "Running",
    "Status",
    "TensorRef",
    "TensorSpec",
    "Tensors",
    "TorchIndex",
    "TorchTensor",
    "Unheard",
    "Unload",
    "Weights",
    "Window",
    "WorkerCrashed",
    "WorkerHeard",
    "WorkerHung",
    "WorkerJoined",
    "WorkerLost",
    "WorkerSilent",
]
