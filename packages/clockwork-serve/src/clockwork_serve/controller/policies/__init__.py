"""Scheduling policies, by name: our own, and those of other packages (entry points)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from clockwork_serve.controller.belief import Belief
from clockwork_serve.controller.policies.base import Scheduler, SchedulerFactory
from clockwork_serve.controller.policies.default import DefaultScheduler
from clockwork_serve.controller.policies.paper import PaperScheduler
from clockwork_serve.controller.timers import NEVER_NS
from clockwork_serve.errors import ConfigError, install_advice

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint
    from types import ModuleType

SCHEDULERS: dict[str, SchedulerFactory] = {"default": DefaultScheduler, "paper": PaperScheduler}
"""A policy of this package is a file beside this one and a line here."""
POLICIES = tuple(SCHEDULERS)
"""Names of this package's scheduling policies."""
POLICY_GROUP: Final = "clockwork_serve.policies"
"""Entry points of this group in other packages are policies, too: ``name = "module:factory"``."""
LABORATORY: Final = "clockwork-lab"
"""Our distribution that has policy ``released``, with the habits of the paper's published code."""


@cache
def installed_policies() -> dict[str, EntryPoint]:
    """Policies of other packages by name; none replaces one of ours. Reads once what is installed.

    It is asked when settings are read and when a controller is made, and only for a name that is not ours.
    """
    from importlib.metadata import entry_points

    return {entry.name: entry for entry in entry_points(group=POLICY_GROUP) if entry.name not in POLICIES}


def installed_modules() -> list[ModuleType]:
    """Their modules, where records of a controller's state may be; without those that are broken."""
    from importlib import import_module

    found: list[ModuleType] = []
    for entry in installed_policies().values():
        with suppress(ImportError):
            found.append(import_module(entry.module))
    return found


def is_policy(name: str) -> bool:
    """Whether ``ControllerConfig.policy`` may be that."""
    return name in POLICIES or name in installed_policies()


def known_policies() -> str:
    """All policies, for messages."""
    return ", ".join((*POLICIES, *installed_policies()))


def advice_on(name: str) -> str:
    """How to install a policy of that name; empty if no distribution of ours has it."""
    return install_advice(LABORATORY) if name == "released" else ""


def unknown_policy(name: str) -> ConfigError:
    """There is no policy of that name."""
    advice = advice_on(name) or f"install the package that has it (entry point group {POLICY_GROUP})"
    return ConfigError(f"policy: expected one of {known_policies()}; found {name!r:.80}; {advice}")


def scheduler_for(belief: Belief) -> Scheduler:
    """The policy that the settings name. ConfigError where there is none, or what is installed is none."""
    policy = belief.config.policy
    factory = SCHEDULERS.get(policy)
    return _installed(policy, belief) if factory is None else factory(belief)


def successor_for(belief: Belief, policy: str) -> Scheduler:
    """Another policy for a run that goes on, told of all that waits; what the one before kept is dropped.

    ConfigError as in ``scheduler_for``, and after a policy that keeps deadlines: nobody else knows those.
    """
    config = belief.config
    if belief.keeps_deadlines:
        raise ConfigError(
            f"policy: expected a run that another policy can go on with; found one of {config.policy}, which "
            "answers requests at deadlines that it alone keeps"
        )
    belief.config = replace(config, policy=policy)
    belief.measures = belief.keeps_promises = False
    belief.dirty_above_ns = config.capacity_ns
    _forget_agendas(belief)
    scheduler = scheduler_for(belief)
    if belief.measures:
        belief.reset_bases()
    else:
        belief.slack_ns = config.slack_ns
    for device in belief.devices.values():
        if not belief.measures:
            device.delays.forget()
            device.delays.extra_ns = 0
            device.exec.network_ns = config.network_ns
        scheduler.device_changed(device)
    for model in belief.models.values():
        if model.waiting:
            belief.mark_dirty(model)
        for queue in model.queues.values():
            if queue.dues:
                scheduler.queued(queue)
    return scheduler


def _forget_agendas(belief: Belief) -> None:
    """Drop what a policy keeps for devices, queues and models."""
    for device in belief.devices.values():
        agenda = device.agenda
        agenda.heap.clear()
        agenda.in_vain.clear()
        agenda.changed = agenda.exec_full = False
        agenda.load_dirty = agenda.load_blocked = agenda.room_blocked = False
        for timer in (agenda.exec_timer, agenda.load_timer):
            belief.timers.set(timer, NEVER_NS)
    for model in belief.models.values():
        model.load_key = None
        for queue in model.queues.values():
            for strategy in queue.strategies:
                strategy.key_ns = NEVER_NS
            if queue.least != queue.sizes[0][1]:
                belief.require(queue, queue.sizes[0][1])


def _installed(name: str, belief: Belief) -> Scheduler:
    entry = installed_policies().get(name)
    if entry is None:
        raise unknown_policy(name)
    try:
        factory: Callable[[Belief], object] = entry.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"policy {name}: expected {entry.value!r} to be there to import; found {error}; "
            f"install {entry.dist.name if entry.dist else 'its package'} again"
        ) from error
    scheduler: object = factory(belief)  # another package's: anything
    if not isinstance(scheduler, Scheduler):
        lacking = [one for one in _METHODS if not callable(getattr(scheduler, one, None))]
        raise ConfigError(
            f"policy {name}: expected what {entry.value!r} makes to have all methods of "
            f"clockwork_serve.controller.policies.base.Scheduler; found none named {', '.join(lacking)}"
        )
    return scheduler


_METHODS = sorted(name for name, value in vars(Scheduler).items() if name[0] != "_" and callable(value))

__all__ = [
    "POLICIES", "SCHEDULERS", "DefaultScheduler", "PaperScheduler", "Scheduler",
    "scheduler_for", "successor_for",
]  # fmt: skip
