"""Quarantine: models that crash workers are found, and not served until they are released."""

from __future__ import annotations

from typing import Final

from clockwork_serve.controller.belief import Belief, Sent
from clockwork_serve.controller.cluster import DeviceBelief, ServedModel
from clockwork_serve.controller.record import Record
from clockwork_serve.messages import (
    CodeReady,
    Infer,
    Load,
    Quarantined,
    ReleaseFromQuarantine,
    WorkerCrashed,
    WorkerLost,
)
from clockwork_serve.units import NS_PER_S

# ------------------------------------------------------------
# Suspects: losses of workers, counted by name (a model's key or a code's id). When a worker dies, what its
# lanes were executing are the *suspects*.
#
# - A loss counts against its suspect; if there are several, against those with the most losses so far: the
#   others are assumed to be bystanders.
# - A success clears the losses of a name, except those that are *proven*: nothing else ran, and either the
#   worker crashed (it was not killed), or the same request was alone on a dying worker for the second time.
# - Losses older than ``window_ns`` do not count.
# - A name with ``after`` losses is *guilty*; if there are several, the first. Its losses then count against
#   no other name.


class Loss(Record):
    """A worker that died."""

    __slots__ = ("at_ns", "proven")

    def __init__(self, at_ns: int) -> None:
        self.at_ns = at_ns
        self.proven = False


class Suspect:
    """A name, and the ids of the ``requests`` that ran; judged in the decision in which its worker dies."""

    __slots__ = ("name", "requests")

    def __init__(self, name: str, requests: tuple[str, ...] = ()) -> None:
        self.name = name
        self.requests = requests


class Suspects(Record):
    """Counts losses by name, and finds the guilty one. With ``after`` 0, no name is ever guilty."""

    def __init__(self, after: int, window_ns: int) -> None:
        self._after = after
        self._window_ns = window_ns
        self.losses: dict[str, list[Loss]] = {}
        """Losses by name, oldest first; names without any have no entry. The dict is never replaced."""
        self._alone: dict[str, dict[str, Loss]] = {}
        """By name and request: the last loss at which that request, or its batch, was all that ran."""
        self._last: dict[str, tuple[str, Loss]] = {}
        """By worker: its last loss and the only suspect of it, until it is known whether it crashed."""

    def lost(self, suspects: list[Suspect], now_ns: int, worker: str = "") -> tuple[str, list[Loss]] | None:
        """Count the loss of a worker against its suspects; returns a guilty name and its losses, if any."""
        if not suspects or not self._after:
            return None
        self._drop_before(now_ns - self._window_ns)
        loss = Loss(now_ns)
        names = list(dict.fromkeys([one.name for one in suspects]))
        most = max([len(self.losses.get(name, ())) for name in names])
        names = [name for name in names if len(self.losses.get(name, ())) == most]
        for name in names:
            self.losses.setdefault(name, []).append(loss)
        if len(suspects) == 1:
            self._last[worker] = (suspects[0].name, loss)
            self._count_alone(suspects[0], loss)
        for name in names:
            losses = self.losses[name]
            if len(losses) >= self._after:
                self._explain(name)
                return name, losses
        return None

    def crashed(self, worker: str) -> bool:
        """Record that the last loss of a worker was a crash; False if no such loss is known."""
        name, loss = self._last.pop(worker, ("", None))
        if loss is None:
            return False
        if name in self._alone:  # it was neither forgotten nor found guilty since then
            self._prove(name, loss)
        return True

    def joined(self, worker: str) -> None:
        """A worker joined: how its last process ended will not be reported any more."""
        self._last.pop(worker, None)

    def succeeded(self, name: str) -> None:
        """Clear the losses of a name that are not proven."""
        losses = self.losses.get(name)
        if losses is not None:
            self._keep(name, [loss for loss in losses if loss.proven])

    def forget(self, name: str) -> None:
        """Clear all losses of a name."""
        self.losses.pop(name, None)
        self._alone.pop(name, None)

    def _count_alone(self, suspect: Suspect, loss: Loss) -> None:
        """Prove this loss and an earlier one if one of its requests was alone on both workers."""
        alone = self._alone.setdefault(suspect.name, {})
        for request_id in suspect.requests:
            before = alone.get(request_id)
            if before is not None:
                self._prove(suspect.name, before)
                self._prove(suspect.name, loss)
            alone[request_id] = loss

    def _prove(self, name: str, loss: Loss) -> None:
        loss.proven = True
        losses = self.losses.setdefault(name, [])
        if loss not in losses:  # it was cleared
            losses.append(loss)
            losses.sort(key=_when)

    def _explain(self, guilty: str) -> None:
        explained = self.losses[guilty]
        self.forget(guilty)
        for name, losses in list(self.losses.items()):
            self._keep(name, [loss for loss in losses if loss not in explained])

    def _drop_before(self, before_ns: int) -> None:
        for name, losses in list(self.losses.items()):
            self._keep(name, [loss for loss in losses if loss.at_ns > before_ns])
        for name, alone in list(self._alone.items()):
            recent = {request_id: loss for request_id, loss in alone.items() if loss.at_ns > before_ns}
            if recent:
                self._alone[name] = recent
            else:
                del self._alone[name]
        for worker, (_, last) in list(self._last.items()):
            if last.at_ns <= before_ns:
                del self._last[worker]

    def _keep(self, name: str, losses: list[Loss]) -> None:
        if losses:
            self.losses[name] = losses
        else:
            del self.losses[name]


def _when(loss: Loss) -> int:
    return loss.at_ns


# ------------------------------------------------------------
# Quarantine. A code that crashes workers when they prepare it puts all its models into quarantine. Waiting
# requests of such models are answered by ``results``.


WINDOW_NS: Final = 600 * NS_PER_S
"""Losses further apart are not related."""


class QuarantineEntry(Record):
    """Why a model or code is in quarantine, and since when."""

    __slots__ = ("since_ns", "why")

    def __init__(self, why: str, since_ns: int) -> None:
        self.why = why
        self.since_ns = since_ns


class Quarantine(Record):
    """Puts guilty models and codes into quarantine, and releases them."""

    def __init__(self, belief: Belief) -> None:
        self._belief = belief
        self._suspects = Suspects(belief.config.quarantine_after, WINDOW_NS)
        self.watched = self._suspects.losses
        """Names with losses; while it is empty, ``succeeded`` need not be called."""
        self.has_pending = False
        """Events were observed that the next ``decide`` has to process."""
        self._held: dict[str, QuarantineEntry] = {}
        """All that are in quarantine, by a model's key or a code's id."""
        self._lost: list[tuple[str, list[Suspect], dict[str, str]]] = []
        """Lost workers: name, suspects, and what each suspect was doing."""
        self._crashed: list[str] = []
        """Workers that crashed and whose loss is not processed yet."""
        self._gone: list[str] = []
        """Keys of models that were removed while in quarantine."""
        self._changed: list[ServedModel] = []
        """Models that may enter or leave quarantine."""
        self._to_release: list[str] = []
        """Names of models that an operator releases."""

    # Observe

    def worker_lost(self, event: WorkerLost) -> set[int]:
        """Record the suspects of a lost worker; call it before the worker is removed from belief.

        Returns the ids of the actions that it was running, and 0 if it was preparing a code; empty: unknown.
        """
        hung = self._belief.hung.get(event.worker)
        known = self._belief.sent if hung is None else hung.sent
        # The last action of an idle worker is not why it hung.
        running = () if hung is not None and event.idle else event.running or ()
        how = "" if hung is None else ", where it hung"
        sent = [known.get(action_id) for action_id in running]
        ran = [one for one in sent if one is not None and one.device.worker == event.worker]
        suspects: list[Suspect] = []
        doing: dict[str, str] = {}
        for one in sorted(ran, key=_likelihood):
            requests = tuple([waiter.request.request_id for waiter in one.waiters])
            suspects.append(Suspect(one.action.model, requests))
            doing.setdefault(one.action.model, _doing(one) + how)
        for code_id in event.preparing:
            if code_id in self._belief.codes:
                suspects.append(Suspect(code_id))
                doing[code_id] = "preparing its code" + how
        if suspects:
            self._lost.append((event.worker, suspects, doing))
            self._mark_pending()
        return {one.action.action_id for one in ran} | ({0} if event.preparing else set())

    def succeeded(self, model: str) -> None:
        """An INFER of a model succeeded."""
        self._suspects.succeeded(model)

    def code_prepared(self, event: CodeReady) -> bool:
        """Record that a worker prepared a code or failed to; true if the code is in quarantine."""
        if event.ok:
            self._suspects.succeeded(event.code_id)
        return event.code_id in self._held

    def holds(self, code_id: str) -> bool:
        """Whether a code is in quarantine."""
        return code_id in self._held

    def joined(self, device: DeviceBelief) -> None:
        """A device is added: codes in quarantine are not prepared there."""
        self._suspects.joined(device.worker)
        for code_id in self._belief.codes:
            if code_id in self._held:
                self._withhold(device, code_id)

    def added(self, model: ServedModel) -> None:
        """A model was added; its code may be in quarantine."""
        self._changed.append(model)
        self._mark_pending()

    def removed(self, model: ServedModel) -> None:
        """A model was removed; its losses and its quarantine are forgotten."""
        self.forget(model.key)
        if model.quarantined:
            model.quarantined = False
            self._gone.append(model.key)
            self._mark_pending()

    def forget(self, name: str) -> None:
        """Forget a model or code, its losses and its quarantine."""
        self._held.pop(name, None)
        self._suspects.forget(name)

    def observe(self, event: ReleaseFromQuarantine | WorkerCrashed) -> None:
        """An operator releases a model, or a worker's loss was a crash (it was not killed)."""
        if isinstance(event, ReleaseFromQuarantine):
            self._to_release.append(event.model)
        else:
            self._crashed.append(event.worker)
        self._mark_pending()

    # Decide

    def process(self, now_ns: int) -> list[ServedModel]:
        """Process all events that were observed; returns the models that enter quarantine."""
        self.has_pending = False
        for key in self._gone:
            self._belief.effects.append(Quarantined(model=key))
        self._gone.clear()
        for worker, suspects, doing in self._lost:
            self._find_culprit(worker, suspects, doing, now_ns)
        self._lost.clear()
        up = {device.worker for device in self._belief.devices.values()}
        # A crash may be reported, over the supervisor's link, before the worker's own link ends: keep it.
        self._crashed = [one for one in self._crashed if not self._suspects.crashed(one) and one in up]
        for name in self._to_release:
            self._release(name)
        self._to_release.clear()
        changed, self._changed = self._changed, []
        return [model for model in changed if self._move(model)]

    def reason(self, model: ServedModel, now_ns: int) -> str:
        """The message for a client whose model is in quarantine."""
        held = self._of(model)
        assert held is not None, f"{model.key} is not in quarantine"
        ago_s = (now_ns - held.since_ns) // NS_PER_S
        return f"model {model.key} is in quarantine since {ago_s} s ago: {held.why}; {_advice(model)}"

    def snapshot(self) -> dict[str, str]:
        """The reasons, by key of each model in quarantine."""
        return {
            model.key: held.why
            for model in self._belief.models.values()
            if (held := self._of(model)) is not None
        }

    def check(self) -> None:
        """Assert the invariants."""
        for model in self._belief.models.values():
            assert model.quarantined == (self._of(model) is not None), f"{model.key}: wrongly in quarantine"
            assert not model.quarantined or not model.waiting, f"{model.key}: requests wait in quarantine"
        for device in self._belief.devices.values():
            assert not self._held.keys() & (device.pending_codes | device.codes.keys())

    def _mark_pending(self) -> None:
        self.has_pending = self._belief.has_pending = True

    def _of(self, model: ServedModel) -> QuarantineEntry | None:
        return self._held.get(model.key) or self._held.get(model.code_id)

    def _find_culprit(self, worker: str, suspects: list[Suspect], doing: dict[str, str], now_ns: int) -> None:
        if any(name in self._held for name in doing):
            return  # it was sent before the quarantine, and explains this loss, too
        guilty = self._suspects.lost(suspects, now_ns, worker)
        if guilty is None:
            return
        name, losses = guilty
        if name not in self._belief.models and name not in self._belief.codes:
            self.forget(name)  # it ran when it had been removed already
            return
        span_s = -(-(now_ns - losses[0].at_ns) // NS_PER_S)
        self._held[name] = QuarantineEntry(
            f"it took a device down {_times(len(losses))} within {span_s} s, the last time {doing[name]}",
            now_ns,
        )
        if name in self._belief.codes:
            for device in self._belief.devices.values():
                self._withhold(device, name)
        self._changed += [one for one in self._belief.models.values() if name in (one.key, one.code_id)]

    def _withhold(self, device: DeviceBelief, code_id: str) -> None:
        device.pending_codes.discard(code_id)
        device.codes.pop(code_id, None)
        device.failed_codes[code_id] = self._held[code_id].why
        device.warm = device.warm or not device.pending_codes

    def _release(self, name: str) -> None:
        belief = self._belief
        for model in [one for one in belief.models.values() if one.model.name == name]:
            if self._held.get(model.code_id) is not None:
                hung = [device for one in belief.hung.values() for device in one.devices]
                for device in (*belief.devices.values(), *hung):
                    device.failed_codes.pop(model.code_id, None)
                    device.add_code(belief.codes[model.code_id])
                self._changed += [one for one in belief.models.values() if one.code_id == model.code_id]
            self._changed.append(model)
            self.forget(model.key)
            self.forget(model.code_id)

    def _move(self, model: ServedModel) -> bool:
        """Make a model enter or leave quarantine, if its state requires it; true if it entered."""
        held = self._of(model)
        if model.removed or model.quarantined == (held is not None):
            return False
        model.quarantined = held is not None
        if held is None:
            self._belief.effects.append(Quarantined(model=model.key))
            return False
        code_id = model.code_id if model.code_id in self._held else ""
        why = f"in quarantine: {held.why}; {_advice(model)}"
        self._belief.effects.append(
            Quarantined(model=model.key, why=why, since_ns=held.since_ns, code_id=code_id)
        )
        return True


def _likelihood(sent: Sent) -> bool:
    """Sort key: INFERs first, for an action on a client's input is more likely to crash."""
    return not isinstance(sent.action, Infer)


def _doing(sent: Sent) -> str:
    if isinstance(sent.action, Infer):
        return "running a request" if len(sent.waiters) == 1 else f"running {len(sent.waiters)} requests"
    return "loading its weights" if isinstance(sent.action, Load) else "unloading its weights"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _advice(model: ServedModel) -> str:
    return f"to release it: clockwork models load {model.model.name}"
