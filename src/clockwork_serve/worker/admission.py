"""What an action must be in itself before it may wait for a lane. It looks at no queue and no page.

``refuse`` says what is wrong: None, or the status and a message that names field, expected and found.
``acceptable`` only says, and fast, whether anything is.
"""

from __future__ import annotations

from typing import Final

from clockwork_serve.messages import Action, Code, DeviceSpec, Extent, Infer, Load, Status, Window
from clockwork_serve.units import NS_PER_S
from clockwork_serve.worker.codes import CODE_READY, CodeState, HeldCode

EARLY_MAX_NS: Final = 10 * NS_PER_S
"""A window that opens later than this is not waited for: nobody plans so far ahead, so clocks disagree."""

Refusal = tuple[Status, str]


def acceptable(action: Infer, spec: DeviceSpec, code: HeldCode | None, now_ns: int) -> bool:
    """Whether :func:`refuse` gives no reason to turn an INFER away."""
    window = action.window
    earliest_ns = window.earliest_ns
    extent = action.extent
    first = extent.first
    count = extent.count
    room = action.batch
    calls = action.calls
    if (
        code is None
        or code.state is not CODE_READY
        or room not in code.fitting
        or earliest_ns > window.latest_ns
        or earliest_ns - now_ns > EARLY_MAX_NS
        or first < 0
        or count < 1
        or first + count > spec.pages
        or not calls
    ):
        return False
    if not code.code.batched:
        return len(calls) == 1
    for call in calls:
        rows = call.rows
        if rows < 1:
            return False
        room -= rows
    return room >= 0


def refuse(action: Action, spec: DeviceSpec, code: HeldCode | None, now_ns: int) -> Refusal | None:
    """Why an action can not be queued. ``code`` is the device's, if it knows it."""
    refusal = _refuse_window(action.window, now_ns) or _refuse_extent(action.extent, spec)
    if refusal is not None:
        return refusal
    if type(action) is Load:
        refusal = _refuse_code(action.code_id, spec, code) or _refuse_size(action, spec)
    elif type(action) is Infer:
        refusal = _refuse_code(action.code_id, spec, code)
        if refusal is None and code is not None:
            refusal = _refuse_batch(action, code.code) or _refuse_need(action.batch, spec, code)
    return refusal


def _refuse_window(window: Window, now_ns: int) -> Refusal | None:
    if window.earliest_ns > window.latest_ns:
        return _bad("window", "earliest_ns <= latest_ns", f"{window.earliest_ns} > {window.latest_ns}")
    if window.earliest_ns - now_ns > EARLY_MAX_NS:
        ahead_s = (window.earliest_ns - now_ns) / NS_PER_S
        return Status.TOO_EARLY, (
            f"window: opens in {ahead_s:.1f} s, expected at most {EARLY_MAX_NS // NS_PER_S} s ahead; "
            "compare the clocks of controller and worker"
        )
    return None


def _refuse_extent(extent: Extent, spec: DeviceSpec) -> Refusal | None:
    if extent.first < 0 or extent.count < 1 or extent.first + extent.count > spec.pages:
        return _bad("extent", f"pages within 0..{spec.pages - 1}", f"{extent.count} from page {extent.first}")
    return None


def _refuse_code(code_id: str, spec: DeviceSpec, code: HeldCode | None) -> Refusal | None:
    if code is not None and code.state is CODE_READY:
        return None
    state = CodeState.ABSENT if code is None else code.state
    return Status.UNKNOWN_CODE, f"code_id: {code_id} is not prepared on {spec.device}; it is {state.value}"


def _refuse_size(action: Load, spec: DeviceSpec) -> Refusal | None:
    room = action.extent.count * spec.page_bytes
    if action.weights.size > room:
        return _bad("extent", f"room for {action.weights.size} bytes of weights", f"{room} bytes")
    return None


def _refuse_batch(action: Infer, code: Code) -> Refusal | None:
    if action.batch not in code.batch_sizes:
        return _bad("batch", f"one of {code.batch_sizes}", str(action.batch))
    if not action.calls:
        return _bad("calls", "at least one", "none")
    if not code.batched:
        found = len(action.calls)
        return None if found == 1 else _bad("calls", "1 where there is no batch axis", str(found))
    rows = [call.rows for call in action.calls]
    if min(rows) < 1 or sum(rows) > action.batch:
        return _bad("rows", f"at least 1 each and at most {action.batch} in all", str(rows))
    return None


def _refuse_need(batch: int, spec: DeviceSpec, code: HeldCode) -> Refusal | None:
    workspace, io = code.need_of(batch)
    if workspace > spec.workspace_bytes:
        return Status.NO_ROOM, f"workspace: batch {batch} needs {workspace} bytes, has {spec.workspace_bytes}"
    if io > spec.io_bytes:
        return Status.NO_ROOM, f"I/O area: batch {batch} needs {io} bytes, has {spec.io_bytes}"
    return None


def _bad(field: str, expected: str, found: str) -> Refusal:
    return Status.BAD_ACTION, f"{field}: expected {expected}, found {found}"
