"""Bugs written by hand into the code that recovers: what a tired person might do, one line each.

Each is (module, the line as it is, the line as it should not be, what goes wrong). ``python -m
qa.mutants --planted`` plants one after another.
"""

# ruff: noqa: E501, ISC004, Q003 - code is quoted as it stands there

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

SOURCE = Path("packages/clockwork-serve/src/clockwork_serve")


@dataclass(slots=True)
class Mutant:
    """One change to one module: the ``number``th there is. ``by`` is the test or the seed that noticed.

    ``seed`` is what the first seed that noticed said, where seeds were asked beside the tests.
    """

    module: str
    number: int
    kind: str
    line: int
    before: str
    after: str
    source: str
    fate: str = ""
    by: str = ""
    seed: str = ""


C, W, S = "controller", "worker", "serve"

PLANTED: Final[tuple[tuple[str, str, str, str], ...]] = (
    # Settling: what follows from results and losses.
    (f"{C}/results", "            self._lost.clear()", "            pass",
     "losses are settled again at the next instant"),
    (f"{C}/results", "                self._return(waiter, Cause.DEVICE_LOST, alone=ran)\n                return",
     "                self._return(waiter, Cause.DEVICE_LOST, alone=False)\n                return",
     "a request that ran on a dying worker may take companions down"),
    (f"{C}/results", "            waiter.retries += ran", "            waiter.retries += 0",
     "a request costs any number of workers"),
    (f"{C}/results", "            if waiter.retries <= self._belief.config.retries:",
     "            if waiter.retries < self._belief.config.retries:", "one retry too few"),
    (f"{C}/results", "        elif not model.removed:\n            waiter.retries += ran",
     "        else:\n            waiter.retries += ran", "a request of a removed model is planned again"),
    (f"{C}/results",
     "        if waiter.state == SPENT:\n            self._belief.release(waiter)\n            return\n"
     "        model = ",
     "        if waiter.state == SPENT:\n            return\n        model = ",
     "tensors of who was answered before its worker died are never released"),
    (f"{C}/results", "                for waiter in sent.waiters:\n                    self._handle_lost_request",
     "                for waiter in sent.waiters[:1]:\n                    self._handle_lost_request",
     "only the first request of a lost batch is settled"),
    (f"{C}/fleet", "                residency.step(UNLOAD)\n                belief.drop(residency)\n        if not there",
     "                pass\n        if not there", "weights that a worker says are missing are still believed there"),
    (f"{C}/fleet", " and not residency.in_flight and residency.version not in there:",
     " and residency.version not in there:", "weights are forgotten while other INFERs read them"),
    (f"{C}/fleet", "                self.retained.append(RetainWeights(device=device.name, versions=tuple(kept)))\n",
     "", "weights that a worker holds and belief does not know stay there"),
    (f"{C}/results", "            residency.step(FAILED)\n            self._belief.drop(residency)",
     "            residency.step(FAILED)", "pages of a LOAD that failed are never free again"),
    (f"{C}/results", "            return waiter.retries <= ATTEMPTS_MAX", "            return True",
     "a request is planned again for ever while belief is wrong"),
    (f"{C}/results", "                if residency.state == READY and not residency.in_flight:\n                    self._belief.send_unload",
     "                if residency.state == READY:\n                    self._belief.send_unload",
     "weights of a removed model are unloaded while they are read"),
    (f"{C}/results", "        self._retired[model] = None\n\n    def _answer",
     "        pass\n\n    def _answer", "weights of a model in quarantine stay"),
    (f"{C}/results", "                if now_ns > request.deadline_ns:",
     "                if now_ns > request.deadline_ns + 10**9:", "a late answer is called good"),
    # Stalls: lanes that do not move, and weights that are too slow.
    (f"{C}/hangs", "        lane.stalled = True", "        pass", "a lane that does not move is believed to serve"),
    (f"{C}/hangs", "        self._belief.timers.set(timer, now_ns + STALL_CHECK_NS)", "        pass",
     "a device is looked at once"),
    (f"{C}/belief", "        self.timers.set(device.load_stall_timer, at_ns)", "        pass",
     "a LOAD that does not end is waited for"),
    (f"{C}/hangs", "        if timer.late_id != lane.head_id:", "        if not timer.late_id:",
     "one look is enough, after the first time"),
    (f"{C}/lanes", "            self.stalled = False\n            if outstanding:", "            if outstanding:",
     "a lane that moves again is believed stuck"),
    (f"{C}/feasibility", "                residency.slow = found = True", "                pass",
     "models stay where they are too slow"),
    (f"{C}/belief", "residency.in_flight + 1, False", "residency.in_flight + 1, residency.slow",
     "who was too slow once is never believed to serve"),
    # Suspects and quarantine.
    (f"{C}/quarantine", "            if len(losses) >= self._after:", "            if len(losses) > self._after:",
     "a model takes one worker too many down"),
    (f"{C}/quarantine", "        names = [name for name in names if len(self.losses.get(name, ())) == most]",
     "        pass", "whoever happened to be there is suspected as much"),
    (f"{C}/quarantine", "            self._keep(name, [loss for loss in losses if loss.proven])",
     "            self._keep(name, losses)", "a success clears nobody"),
    (f"{C}/quarantine", "        loss.proven = True", "        loss.proven = False", "nothing is ever proven"),
    (f"{C}/quarantine", "[loss for loss in losses if loss.at_ns > before_ns])",
     "[loss for loss in losses if loss.at_ns > 0])", "losses of last month count"),
    (f"{C}/quarantine", "[loss for loss in losses if loss not in explained])", "losses)",
     "a guilty model's losses count against others too"),
    (f"{C}/quarantine", "            return  # it was sent before the quarantine, and explains this loss, too",
     "            pass", "losses of a model in quarantine are held against others"),
    (f"{C}/admission", "        if model.quarantined:", "        if False:", "a model in quarantine takes requests"),
    (f"{C}/quarantine", "            if code_id in self._held:\n                self._withhold(device, code_id)",
     "            pass", "a worker that joins prepares what kills it"),
    (f"{C}/quarantine", "            self.forget(model.key)\n            self.forget(model.code_id)",
     "            self.forget(model.key)", "a code is never released"),
    (f"{C}/quarantine", "        self._lost.clear()", "        pass", "a loss is judged again and again"),
    (f"{C}/quarantine", "one is not None and one.device.worker == event.worker]", "one is not None]",
     "what runs on other workers is suspected"),
    # Workers and gateways that go, codes that come.
    (f"{C}/fleet", "            del belief.sent[sent.action.action_id]", "            pass",
     "actions of a lost worker stay in flight"),
    (f"{C}/fleet", "ran=not running or sent.action.action_id in running)", "ran=not running)",
     "what ran on a dying worker does not count as run"),
    (f"{C}/fleet", "        for residency in list(device.pages.holders()):\n            belief.drop(residency)",
     "        pass", "weights of a lost worker are still believed there"),
    (f"{C}/fleet", "        self.scheduler.device_lost(device)", "        pass",
     "the scheduler plans on for a lost device"),
    (f"{C}/fleet", "            belief.estimator.forget_device(device.name)", "            pass",
     "a new worker inherits the durations of the old one"),
    (f"{C}/controller", "        self._fleet.worker_lost(lost.worker, running_ids)",
     "        if isinstance(event, WorkerLost):\n            self._fleet.worker_lost(lost.worker, running_ids)",
     "a worker that joins again keeps what its old self had"),
    (f"{C}/controller", "            if waiter.request.gateway == gateway:", "            if True:",
     "one gateway's end cancels the requests of all"),
    (f"{C}/controller", "        if sent is None:\n            self._takeover.observe_result(result, now_ns)",
     "        assert sent is not None\n        if sent is None:\n            pass",
     "a result that comes after its worker was given up breaks the controller"),
    (f"{C}/controller", "                self._end_early(waiter, Outcome.REJECTED, Reason.NOT_SERVING, \"the model was unloaded\")",
     "                pass", "requests of a removed model wait for ever"),
    (f"{C}/belief", "        device.pages.release(residency.extent)", "        pass",
     "pages of weights that are gone stay taken"),
    (f"{C}/belief", "                    device.agenda.remove(strategy)", "                    pass",
     "an agenda keeps weights that are gone"),
    # The worker's side.
    (f"{W}/device", "        if job.owed:", "        if True:", "a job is answered twice"),
    (f"{W}/device", "        if not job.owed:\n            return", "        if False:\n            return",
     "what was answered for the last time is answered again"),
    (f"{W}/device", "                self._stale.append(held)", "                pass",
     "weights that the next controller does not know stay"),
    (f"{W}/device", "            held.stale = True", "            pass",
     "an INFER of the next controller may use weights that go"),
    (f"{W}/device", "            if held.state is WeightsState.READY and not held.readers:",
     "            if held.state is WeightsState.READY:", "weights go while an old INFER reads them"),
    (f"{W}/device", "            if status is _OK and held.state is not WEIGHTS_READY:", "            if False:",
     "an answer of weights that changed while it ran is good"),
    (f"{W}/device", "            job.held.readers -= 1\n        if job.code",
     "            pass\n        if job.code", "weights of a refused INFER are read for ever"),
    (f"{W}/device", "            self.pages.release(held)", "            pass",
     "pages of a failed LOAD stay taken"),
    (f"{W}/pages", "            and self.version == action.version", "            and True",
     "an INFER runs with another version of the weights"),
    (f"{W}/pages", "held.count != extent.count or held.version != version:", "held.count != extent.count:",
     "an UNLOAD takes another version away"),
    # Who leads.
    ("fence", "        return epoch < self.epoch", "        return False", "a deposed controller is obeyed"),
    ("fence", "        self.epoch = epoch\n", "        pass\n", "it is forgotten that a later controller was joined"),
    (f"{S}/transport", "            if self._fence.bars(self._epoch):\n                self.abort(self._why_barred())\n            else:",
     "            if True:", "a link to a deposed controller lives on"),
    (f"{S}/transport", "        self._fence.join(self._epoch)\n", "        pass\n", "no process remembers whom it has joined"),
    (f"{S}/lease", "            epoch = _last_epoch(fd) + 1", "            epoch = _last_epoch(fd)", "two controllers have one epoch"),
    (f"{S}/lease", "        except FileExistsError:\n            return False", "        except FileExistsError:\n            pass", "two hosts have one epoch"),
    (f"{S}/lease", "        if self.left_s(now_s) > 0:\n", "        if True:\n", "a heartbeat that came too late keeps a controller in the lead"),
    (f"{S}/lease", "        return began_s - self._since_s >= self._lease_s", "        return read_s - self._since_s >= self._lease_s", "one that was paused takes the lead from one that lives"),
    (f"{S}/lease", "            if not _locked_at_once(fd):\n                await _in_thread(partial(fcntl.flock, fd, fcntl.LOCK_EX), partial(os.close, fd))", "            _locked_at_once(fd)",
     "two controllers lead"),
    # Links of the controller's process.
    (f"{S}/controller/hub", "            self.driver.post(GatewayLost(gateway=name))", "            pass",
     "nobody hears that a gateway died"),
    (f"{S}/controller/hub", "                self.driver.post(self._read_crash_report(name, link.peer.pid))", "                pass",
     "nobody hears that a worker died"),
    (f"{S}/controller/hub", "                del self._worker_by_device[device]", "                pass",
     "a worker that comes back may not have its devices"),
    (f"{S}/controller/hub", "                self._replace(self._workers.get(name))", "                pass",
     "a worker that connects again has two links"),
    (f"{S}/controller/hub", "                if self._worker_by_device.get(frame.device) is not link:\n                    return False\n                self.driver.post(frame)",
     "                self.driver.post(frame)", "results of devices that are others' are believed"),
)  # fmt: skip


def planted(only: list[str]) -> list[Mutant]:
    """All of them, or those whose module or effect has one of these words in it."""
    made: list[Mutant] = []
    for number, (module, before, after, effect) in enumerate(PLANTED):
        source = (SOURCE / f"{module}.py").read_text()
        found = source.count(before)
        if found != 1:
            raise ValueError(f"planted {number}, {module}: expected {before!r} once, found it {found} times")
        line = source[: source.index(before)].count("\n") + 1
        broken = source.replace(before, after)
        made.append(Mutant(module, number, "planted", line, effect, after.strip(), broken))
    return [one for one in made if not only or any(part in f"{one.module} {one.before}" for part in only)]
