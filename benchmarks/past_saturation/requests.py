"""An open-loop load over a gateway's link to the controller, and its accounting."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from benchmarks.past_saturation.processes import ROW
from clockwork_serve.errors import ClockworkError
from clockwork_serve.messages import Answer, Outcome, Release, Request
from clockwork_serve.oip import InputTensor
from clockwork_serve.serve.gateway.controller_link import GatewayLink, LinkListener, local_connector
from clockwork_serve.serve.gateway.requests import Slots
from clockwork_serve.units import MIB, NS_PER_S

NAME: Final = "gateway-0"
READY_S, TICK_S = 10.0, 0.001
AT_ONCE: Final = 256  # the most requests sent before responses are read again, even if requests are late
ANSWER_S: Final = 5.0  # how long responses are awaited after the last request was sent


@dataclass(slots=True)
class Accounting:
    """The outcomes of the requests of one step. One is ``good`` if it is OK and received by the deadline.

    ``late``: OK after the deadline, by the clock of this process, or expired. ``unanswered`` and ``twice``:
    never.
    """

    offered: int = 0
    good: int = 0
    late: int = 0
    rejected: int = 0
    by_summary: int = 0  # of ``rejected``: those that the controller's summary showed to be hopeless
    failed: int = 0
    unanswered: int = 0
    twice: int = 0
    behind_s: float = 0.0  # how late a request was sent at most, if this process could not keep up

    @property
    def lost(self) -> int:
        """Requests that were not answered in time."""
        return self.offered - self.good

    @property
    def balanced(self) -> bool:
        """Whether each request had exactly one response."""
        answered = self.good + self.late + self.rejected + self.failed
        return answered == self.offered and not self.unanswered and not self.twice


class Requests:
    """A gateway without clients. All methods are called on the running loop's thread."""

    def __init__(self, socket: Path, models: Sequence[str], slo_ns: int) -> None:
        listener = LinkListener(
            self._on_answer, self._on_release, self._on_lost, lambda: None, on_refused=self._on_refused
        )
        self.accounting = Accounting()
        self.refuses = True
        """Whether it refuses, as a gateway does, what is hopeless by the controller's summary."""
        self._link = GatewayLink(local_connector(socket, NAME), None, listener)
        self._models = models
        self._slo_ns = slo_ns
        self._slots = Slots(64 * MIB)
        self._inputs = [InputTensor("x", "FP32", (1, ROW), bytes(4 * ROW))]
        self._free: list[bytes] = []  # encoded references to free slots
        self._open: dict[str, tuple[int, bytes, Accounting]] = {}
        """Of each request without a response: its deadline, its slot, and where it is counted."""
        self._held: dict[str, bytes] = {}  # slots of answered requests that a worker may still touch
        self._count = 0
        self._lost = ""
        self._quiet = asyncio.Event()  # set when all requests have ended
        self._running = asyncio.get_running_loop().create_task(self._link.run())

    async def ready(self) -> None:
        """Return once the controller accepts requests of this gateway. Raises :class:`ClockworkError`."""
        end_s = time.monotonic() + READY_S
        while not self._link.ready:
            if time.monotonic() > end_s:
                raise ClockworkError(f"no link to the controller: {self._link.why_not_ready}")
            await asyncio.sleep(TICK_S)

    async def offer(self, rng: np.random.Generator, rate_rps: float, seconds: float) -> Accounting:
        """Send at this rate, at random times and to random models; the accounting, once all have ended.

        Raises :class:`ClockworkError` if the controller ends.
        """
        self.accounting = Accounting()
        due_ns = _arrivals(rng, rate_rps, seconds)
        models = rng.integers(len(self._models), size=len(due_ns)).tolist()
        await self._send_in_time(due_ns.tolist(), models, time.monotonic_ns())
        await self._answered()
        return self.accounting

    async def close(self) -> None:
        """Close the link and free the tensors' memory."""
        self._running.cancel()
        await asyncio.wait({self._running})
        self._link.close()
        self._slots.close()

    async def _send_in_time(self, due_ns: Sequence[int], models: Sequence[int], start_ns: int) -> None:
        """Send a request to each of these models, so long after the start."""
        accounting, sent = self.accounting, 0
        while sent < len(due_ns):
            now_ns = time.monotonic_ns() - start_ns
            end = min(sent + AT_ONCE, bisect_right(due_ns, now_ns, sent))
            for number in range(sent, end):
                self._send(self._models[models[number]], start_ns + due_ns[number])
            if end > sent:
                accounting.behind_s = max(accounting.behind_s, (now_ns - due_ns[sent]) / NS_PER_S)
            await asyncio.sleep(0 if end == sent + AT_ONCE else TICK_S)
            sent = end
            if self._lost:
                break

    async def _answered(self) -> None:
        """Return once all requests have ended."""
        self._quiet.clear()
        if self._open and not self._lost:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._quiet.wait(), ANSWER_S)
        if self._lost:
            raise ClockworkError(f"the real controller: {self._lost}")
        for _, _, accounting in self._open.values():
            accounting.unanswered += 1
        self._open.clear()

    def _send(self, model: str, arrival_ns: int) -> None:
        deadline_ns = arrival_ns + self._slo_ns
        self.accounting.offered += 1
        if self.refuses and self._link.shortage_ns(model, deadline_ns) > 0:
            self.accounting.by_summary += 1
            self.accounting.rejected += 1
            return
        slot = self._free.pop() if self._free else self._new_slot()
        self._count += 1
        request_id = f"{NAME}-{self._count}"
        self._open[request_id] = (deadline_ns, slot, self.accounting)
        self._link.submit(
            Request(
                request_id=request_id, gateway=NAME, model=model, arrival_ns=arrival_ns,
                deadline_ns=deadline_ns, tensors=slot,
            )
        )  # fmt: skip

    def _new_slot(self) -> bytes:
        slot = self._slots.fill(self._inputs, output_bytes=64)
        if slot is None:
            raise ClockworkError(f"no memory for the tensors of {self._count:,} requests at a time")
        return slot.encoded

    def _on_answer(self, answer: Answer) -> None:
        found = self._open.pop(answer.request_id, None)
        if found is None:
            self.accounting.twice += 1
            return
        deadline_ns, slot, accounting = found
        in_time = time.monotonic_ns() <= deadline_ns
        self._link.note_delivered(answer.request_id, in_time=in_time)
        match answer.outcome:
            case Outcome.OK if in_time:
                accounting.good += 1
            case Outcome.OK | Outcome.EXPIRED:
                accounting.late += 1
            case Outcome.REJECTED:
                accounting.rejected += 1
            case _:
                accounting.failed += 1
        self._ended()
        if answer.release:
            self._free.append(slot)
        else:
            self._held[answer.request_id] = slot

    def _on_refused(self, request: Request, waited_ns: int) -> None:
        _, slot, accounting = self._open.pop(request.request_id)
        self._free.append(slot)
        accounting.rejected += 1
        self._ended()

    def _ended(self) -> None:
        if not self._open:
            self._quiet.set()

    def _on_release(self, release: Release) -> None:
        slot = self._held.pop(release.request_id, None)
        if slot is not None:
            self._free.append(slot)

    def _on_lost(self, why: str) -> None:
        self._lost = why
        self._quiet.set()


def _arrivals(rng: np.random.Generator, rate_rps: float, seconds: float) -> npt.NDArray[np.int64]:
    """When to send, in ns from the start, ascending: a Poisson process."""
    return np.sort(rng.random(rng.poisson(rate_rps * seconds)) * seconds * NS_PER_S).astype(np.int64)
