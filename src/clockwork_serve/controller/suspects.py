"""Who may have taken devices down: losses, counted by name. It quarantines nobody.

A name is a model's key or a code's id. When a worker dies, what its lanes were at are the *suspects*.

- A loss counts against its suspect; of several, against those against whom most is known already: the others
  happened to be there.
- A success of a name clears what counted against it, but for what is *proven*: nothing else ran, and the
  worker crashed (nobody killed it), or it was the second one that the same request was alone on.
- What is older than ``window_ns`` counts no more.
- Who is suspect of ``after`` losses is *guilty*; of several, the first one. What the guilty one explains
  counts against nobody else.
"""

from __future__ import annotations


class Loss:
    """A worker that died."""

    __slots__ = ("at_ns", "proven")

    def __init__(self, at_ns: int) -> None:
        self.at_ns = at_ns
        self.proven = False


class Suspect:
    """A name, and the ``requests`` that were run for it."""

    __slots__ = ("name", "requests")

    def __init__(self, name: str, requests: tuple[str, ...] = ()) -> None:
        self.name = name
        self.requests = requests


class Guilty:
    """A name, of how many losses it is guilty, and when the first of them was."""

    __slots__ = ("count", "first_ns", "name")

    def __init__(self, name: str, count: int, first_ns: int) -> None:
        self.name = name
        self.count = count
        self.first_ns = first_ns


class Suspects:
    """See the module. ``after`` 0: nobody is ever guilty."""

    def __init__(self, after: int, window_ns: int) -> None:
        self._after = after
        self._window_ns = window_ns
        self.losses: dict[str, list[Loss]] = {}
        """What counts against whom, oldest first; the same dict for ever. Nobody has none."""
        self._alone: dict[str, dict[str, Loss]] = {}
        """By name and request: the last loss at which that one, or its batch, was all that ran."""
        self._last: dict[str, tuple[str, Loss]] = {}
        """By worker: its last loss, and who was alone on it, until it is known whether it crashed."""

    def lost(self, suspects: list[Suspect], now_ns: int, worker: str = "") -> Guilty | None:
        """A worker died, and these were at work; who is guilty, if that shows now."""
        if not suspects or not self._after:
            return None
        self._forget_before(now_ns - self._window_ns)
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
                return Guilty(name, len(losses), losses[0].at_ns)
        return None

    def crashed(self, worker: str) -> bool:
        """It was a crash that a worker was lost by; False if no such loss is known of."""
        name, loss = self._last.pop(worker, ("", None))
        if loss is None:
            return False
        if name in self._alone:  # it was neither forgotten nor found guilty since
            self._prove(name, loss)
        return True

    def joined(self, worker: str) -> None:
        """A new process of that name: how the last one ended will not be told any more."""
        self._last.pop(worker, None)

    def succeeded(self, name: str) -> None:
        """It did well: what is not proven counts no more."""
        losses = self.losses.get(name)
        if losses is not None:
            self._keep(name, [loss for loss in losses if loss.proven])

    def forget(self, name: str) -> None:
        """Nothing counts against it any more."""
        self.losses.pop(name, None)
        self._alone.pop(name, None)

    def _count_alone(self, suspect: Suspect, loss: Loss) -> None:
        """If one of its requests was alone on a dying worker before, both losses are proven."""
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

    def _forget_before(self, then_ns: int) -> None:
        for name, losses in list(self.losses.items()):
            self._keep(name, [loss for loss in losses if loss.at_ns > then_ns])
        for name, alone in list(self._alone.items()):
            recent = {request_id: loss for request_id, loss in alone.items() if loss.at_ns > then_ns}
            if recent:
                self._alone[name] = recent
            else:
                del self._alone[name]
        for worker, (_, last) in list(self._last.items()):
            if last.at_ns <= then_ns:
                del self._last[worker]

    def _keep(self, name: str, losses: list[Loss]) -> None:
        if losses:
            self.losses[name] = losses
        else:
            del self.losses[name]


def _when(loss: Loss) -> int:
    return loss.at_ns
