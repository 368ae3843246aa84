"""What a journal's steps tell of requests and actions on their way, in the words of traces."""

from __future__ import annotations

from typing import Any, Final, Generic, TypeVar

from clockwork_serve.messages import (
    Action,
    Answer,
    Infer,
    Lane,
    Request,
    Result,
    Unload,
    WorkerJoined,
    WorkerLost,
)
from clockwork_serve.units import to_ms

# ------------------------------------------------------------
# Actions without a result, when they were expected to start, and which of them never will have one.


NEVER_NS: Final = 1 << 61  # later than any instant; windows that end later are open

Asked = TypeVar("Asked")


class SentAction(Generic[Asked]):
    """An action without a result, predicted to start at ``start_ns``; the requests ``asked`` are in it."""

    __slots__ = ("action", "asked", "expected_ns", "sent_ns", "start_ns")

    def __init__(self, action: Action, sent_ns: int, start_ns: int, asked: list[Asked]) -> None:
        self.action, self.sent_ns, self.start_ns, self.asked = action, sent_ns, start_ns, asked
        self.expected_ns = 0 if isinstance(action, Unload) else action.expected_ns

    @property
    def lane(self) -> Lane:
        """The lane that it is for."""
        return Lane.EXEC if isinstance(self.action, Infer) else Lane.LOAD


class _Lane(Generic[Asked]):
    """What a lane was sent and has not ended, by id."""

    def __init__(self) -> None:
        self.sent: dict[int, SentAction[Asked]] = {}
        self.free_ns = 0

    def available_ns(self, now_ns: int) -> int:
        """When all that was sent will have ended, as predicted; what runs and is late is taken to end now."""
        free_ns = self.free_ns
        for sent in self.sent.values():
            free_ns = max(max(free_ns, sent.sent_ns) + sent.expected_ns, now_ns)
        return max(free_ns, now_ns)


class SentActions(Generic[Asked]):
    """All actions without a result. Whoever takes some away is told which."""

    def __init__(self) -> None:
        self._sent: dict[int, SentAction[Asked]] = {}
        self._lanes: dict[tuple[str, bool], _Lane[Asked]] = {}  # by device, and whether it executes
        self._whose: dict[str, str] = {}  # by device, its worker

    def __len__(self) -> int:
        return len(self._sent)

    def send(self, action: Action, now_ns: int, asked: list[Asked]) -> SentAction[Asked]:
        """Note one that is sent; when it is predicted to start follows from those before it on its lane."""
        lane = self._lane(action)
        sent = SentAction(action, now_ns, lane.available_ns(now_ns), asked)
        self._sent[action.action_id] = lane.sent[action.action_id] = sent
        return sent

    def ended(self, result: Result) -> SentAction[Asked] | None:
        """Take the action of a result away; None if it is not known."""
        sent = self._sent.get(result.action_id)
        if sent is not None:
            self._remove(sent)
            self._lane(sent.action).free_ns = result.ended_ns
        return sent

    def of(self, worker: str) -> list[SentAction[Asked]]:
        """Those on devices of a worker."""
        return [sent for sent in self._sent.values() if self._whose.get(sent.action.device) == worker]

    def joined(self, event: WorkerJoined) -> list[SentAction[Asked]]:
        """Take away what an earlier controller sent that worker, and it is not running any more."""
        self._whose.update((spec.device, event.worker) for spec in event.devices)
        running = {one.action_id for state in event.states for one in state.running}
        return self._removed([sent for sent in self.of(event.worker) if sent.action.action_id not in running])

    def lost(self, event: WorkerLost) -> list[SentAction[Asked]]:
        """Take away what was on a worker that was lost."""
        return self._removed(self.of(event.worker))

    def due(self, before_ns: int) -> list[SentAction[Asked]]:
        """Take away those that should have ended before."""
        late = [sent for sent in self._sent.values() if sent.start_ns + sent.expected_ns < before_ns]
        return self._removed(late)

    def end(self) -> list[SentAction[Asked]]:
        """Take all away: no result comes any more, and what lanes are free from helps no successor."""
        for lane in self._lanes.values():
            lane.free_ns = 0
        return self._removed(list(self._sent.values()))

    def _removed(self, gone: list[SentAction[Asked]]) -> list[SentAction[Asked]]:
        for sent in gone:
            self._remove(sent)
        return gone

    def _remove(self, sent: SentAction[Asked]) -> None:
        del self._sent[sent.action.action_id], self._lane(sent.action).sent[sent.action.action_id]

    def _lane(self, action: Action) -> _Lane[Asked]:
        place = action.device, isinstance(action, Infer)
        lane = self._lanes.get(place)
        if lane is None:
            lane = self._lanes[place] = _Lane()
        return lane


# ------------------------------------------------------------
# What is told of each, by name. Instants count from when it began, in ms.


Told = dict[str, str | bool | int | float]


def told_of_request(request: Request, outcome: str, now_ns: int) -> Told:
    """What a request asked for, and how it ended; without what is as usual."""
    told: Told = {
        "request": request.request_id, "model": request.model, "gateway": request.gateway,
        "outcome": outcome, "slo_ms": to_ms(request.slo_ns), "left_ms": to_ms(request.deadline_ns - now_ns),
    }  # fmt: skip
    rare: Told = {
        "tenant": request.tenant, "priority": request.priority, "signature": request.signature,
        "rows": request.rows if request.rows > 1 else 0,
    }  # fmt: skip
    return told | {name: value for name, value in rare.items() if value}


def told_of_answer(answer: Answer) -> Told:
    """Why a request ended so, and what was measured of its execution, if there was one."""
    told: Told = {"reason": answer.reason} if answer.reason else {}
    if answer.batch:
        told |= {
            "queue_ms": to_ms(answer.queue_ns), "exec_ms": to_ms(answer.exec_ns),
            "expected_ms": to_ms(answer.expected_ns), "batch": answer.batch,
        }  # fmt: skip
    if answer.cold:
        told["cold"] = True
    if answer.promised:
        told |= {"promised": True, "cause": answer.cause} if answer.cause else {"promised": True}
    if answer.message:
        told["message"] = answer.message
    if answer.retry_after_ns:
        told["retry_after_ms"] = to_ms(answer.retry_after_ns)
    return told


def told_of_action(sent: SentAction[Any], start_ns: int) -> Told:
    """What an action is, and what was expected of it: instants are counted from ``start_ns``."""
    action = sent.action
    told: Told = {
        "action": action.action_id, "model": action.model, "sent_ms": to_ms(sent.sent_ns - start_ns),
        "window_earliest_ms": to_ms(action.window.earliest_ns - start_ns),
    }  # fmt: skip
    if action.window.latest_ns < NEVER_NS:
        told["window_latest_ms"] = to_ms(action.window.latest_ns - start_ns)
    if not isinstance(action, Unload):
        told |= {
            "predicted_start_ms": to_ms(sent.start_ns - start_ns),
            "predicted_end_ms": to_ms(sent.start_ns + sent.expected_ns - start_ns),
            "predicted_lasts_ms": to_ms(sent.expected_ns),
        }  # fmt: skip
    if isinstance(action, Infer):
        rows = sum(call.rows for call in action.calls)
        told |= {"batch": action.batch, "requests": len(action.calls), "rows": rows}
        if action.signature:
            told["signature"] = action.signature
    return told


def told_of_transfers(result: Result) -> Told:
    """How long the tensors of an INFER took over a network; empty where they were on its host."""
    if not (result.transfer_in_ns or result.transfer_out_ns):
        return {}
    return {
        "transfer_in_ms": to_ms(result.transfer_in_ns), "transfer_out_ms": to_ms(result.transfer_out_ns),
    }  # fmt: skip
