"""What must be true of a device between two decisions, for tests and simulations. It changes nothing."""

from __future__ import annotations

from clockwork_serve.messages import Infer
from clockwork_serve.worker.codes import CodeState
from clockwork_serve.worker.device import DeviceWorker
from clockwork_serve.worker.events import Prepare, Retire
from clockwork_serve.worker.lanes import Work
from clockwork_serve.worker.pages import Held, WeightsState


def check_device(device: DeviceWorker, live: set[int]) -> None:
    """Assert every invariant; ``live`` are the ids of actions that are owed a result."""
    device.pages.check()
    for lane in device.lanes.values():
        lane.check()
    running = device.load_lane.running
    for held in device.pages.all():
        moving = held.state in (WeightsState.LOADING, WeightsState.UNLOADING)
        assert moving == (running is not None and running.held is held), f"{held.model}, {running} disagree"
    _check_infers(device)
    _check_owed(device, live)
    _check_codes(device)


def _check_infers(device: DeviceWorker) -> None:
    """Jobs know the weights that they read, and weights know how many read them."""
    running = device.exec_lane.running
    jobs = device.exec_lane.queued()
    for job in jobs:
        found = [held for held in device.pages.all() if _serves(held, job.work)]
        known = job.held is not None and job.held.state is not WeightsState.EMPTY
        assert found == ([job.held] if known else []), f"{job.work} does not read {found}"
    if running is not None:
        jobs.append(running)
        held = running.held
        assert held is not None and device.pages.at(held.extent, held.version) is held
        assert held.state is WeightsState.READY
        assert running.code is not None and running.code.state is CodeState.READY
    for held in device.pages.all():
        readers = sum(job.held is held for job in jobs)
        assert readers == held.readers, f"{held.model}: {readers} readers, counted {held.readers}"


def _check_owed(device: DeviceWorker, live: set[int]) -> None:
    for job in device.jobs():
        work = job.work
        if job.owed:
            assert not isinstance(work, (Prepare, Retire)) and work.action_id in live


def _check_codes(device: DeviceWorker) -> None:
    jobs = device.jobs()
    queued = device.load_lane.queued()
    for code_id, code in device.codes.items():
        users = sum(job.code is code and not isinstance(job.work, (Prepare, Retire)) for job in jobs)
        users += sum(held.code_id == code_id for held in device.pages.all())
        assert users == code.users, f"code {code_id}: {users} users, counted {code.users}"
        chores = sum(job.code is code and isinstance(job.work, (Prepare, Retire)) for job in queued)
        assert chores == code.chore, f"code {code_id}: {chores} chores are queued"
        assert code.wanted or not code.answer_due, f"code {code_id}: an answer is due, and nobody asked"
        assert not code.users or code.state is CodeState.READY, f"{code_id} is used while {code.state}"


def _serves(held: Held, work: Work) -> bool:
    return isinstance(work, Infer) and held.serves(work, work.extent.first, work.extent.count)
