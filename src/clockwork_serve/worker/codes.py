"""Which codes a device is ready to run. It knows no action and no time.

A *code* is prepared once it is added, and retired once it is removed and nothing uses it; a failed one is
prepared again when it is added again.

    ABSENT --prepare--> PREPARING --ok------> READY --retire--> RETIRING --gone--> ABSENT
                          +--failed--> FAILED --retire--> RETIRING
                                       FAILED --prepare--> PREPARING
"""

from __future__ import annotations

import enum
from collections import deque
from typing import Final

from clockwork_serve.messages import Code, CodeAdded, DeviceSpec, Infer, Load, Profile


class CodeState(enum.StrEnum):
    """Where a code is on one device."""

    ABSENT = "absent"
    PREPARING = "preparing"
    READY = "ready"
    FAILED = "failed"
    RETIRING = "retiring"


class CodeStep(enum.StrEnum):
    """What happens to a code."""

    PREPARE = "prepare"
    OK = "ok"
    FAILED = "failed"
    RETIRE = "retire"
    GONE = "gone"


CODE_LIFE: dict[CodeState, dict[CodeStep, CodeState]] = {
    CodeState.ABSENT: {CodeStep.PREPARE: CodeState.PREPARING},
    CodeState.PREPARING: {CodeStep.OK: CodeState.READY, CodeStep.FAILED: CodeState.FAILED},
    CodeState.READY: {CodeStep.RETIRE: CodeState.RETIRING},
    CodeState.FAILED: {CodeStep.PREPARE: CodeState.PREPARING, CodeStep.RETIRE: CodeState.RETIRING},
    CodeState.RETIRING: {CodeStep.GONE: CodeState.ABSENT},
}


LOADED: Final = 0
"""Stands for a LOAD where batch sizes tell durations apart."""
RECENT: Final = 10
"""So many last durations are remembered of each kind, as estimates rest on."""
SIGNATURES_MAX: Final = 64
"""Of so many shapes that requests choose: clients could choose for ever."""

CODE_READY: Final = CodeState.READY  # a name of the module's own: an Enum's attribute takes 40 ns


class HeldCode:
    """A code on one device, and what the controller wants of it.

    ``wanted`` while it is added and not removed; ``answer_due`` while a CodeReady is owed for that, and only
    then is it prepared; ``chore`` while a Prepare or a Retire of it waits for the load lane. ``users`` counts
    actions that wait or run with it and the weights in pages that are laid out by it: a code with users is
    not retired. ``fitting`` are the batch sizes that it has and that the device has room for.
    """

    __slots__ = (
        "answer_due", "chore", "code", "fitting", "profile", "recent", "state", "users", "wanted",
    )  # fmt: skip

    def __init__(self, code: Code) -> None:
        self.code = code
        self.profile: Profile | None = None
        self.state = CodeState.ABSENT
        self.wanted = True
        self.answer_due = True
        self.chore = False
        self.users = 0
        self.fitting: frozenset[int] = frozenset()
        self.recent: dict[tuple[int, str], deque[int]] = {}
        """Durations in ns by batch size and signature."""

    def took(self, work: object, lasted_ns: int) -> None:
        """Remember how long a LOAD or an INFER took, for a controller that will not know."""
        if type(work) is Infer:
            key = work.batch, work.signature
        elif type(work) is Load:
            key = LOADED, ""
        else:
            return
        recent = self.recent.get(key)
        if recent is None:
            if key[1] and len(self.recent) >= SIGNATURES_MAX:
                del self.recent[next(iter(self.recent))]
            recent = self.recent[key] = deque(maxlen=RECENT)
        recent.append(lasted_ns)

    def add(self, event: CodeAdded, spec: DeviceSpec) -> None:
        """The controller wants it, and to know when it is ready."""
        self.code = event.code
        self.wanted = self.answer_due = True
        for profile in event.profiles:
            if profile.device_kind == spec.kind:
                self.profile = profile
        fitting = set()
        for batch in self.code.batch_sizes:
            workspace, io = self.need_of(batch)
            if workspace <= spec.workspace_bytes and io <= spec.io_bytes:
                fitting.add(batch)
        self.fitting = frozenset(fitting)

    def step(self, step: CodeStep) -> None:
        """Move along the life cycle."""
        following = CODE_LIFE[self.state].get(step)
        assert following is not None, f"code {self.code.code_id}: {step.name} while {self.state.name}"
        self.state = following

    @property
    def to_prepare(self) -> bool:
        """Whether a Prepare is the next thing it needs."""
        return self.answer_due and self.state in (CodeState.ABSENT, CodeState.FAILED)

    @property
    def to_retire(self) -> bool:
        """Whether a Retire is the next thing it needs."""
        return not self.wanted and not self.users and self.state in (CodeState.READY, CodeState.FAILED)

    def need_of(self, batch: int) -> tuple[int, int]:
        """Workspace and I/O bytes of an INFER of that size; 0 where no profile tells."""
        if self.profile is None:
            return 0, 0
        return self.profile.workspace_bytes.get(batch, 0), self.profile.io_bytes.get(batch, 0)
