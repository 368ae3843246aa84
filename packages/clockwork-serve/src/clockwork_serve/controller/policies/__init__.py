"""Scheduling policies, by name: our own, and those of other packages (entry points)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Final

from clockwork_serve.controller.belief import Belief
from clockwork_serve.controller.policies.base import Scheduler, SchedulerFactory
from clockwork_serve.controller.policies.default import DefaultScheduler
from clockwork_serve.controller.policies.paper import PaperScheduler
from clockwork_serve.controller.policies.released import ReleasedScheduler
from clockwork_serve.errors import ConfigError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

SCHEDULERS: dict[str, SchedulerFactory] = {"default": DefaultScheduler, "paper": PaperScheduler}
"""A policy of this package is a file beside this one and a line here."""
FACTORIES: Final[tuple[SchedulerFactory, ...]] = (*SCHEDULERS.values(), ReleasedScheduler)
"""What makes the schedulers of this package."""
POLICIES = tuple(SCHEDULERS)
"""Names of this package's scheduling policies."""
POLICY_GROUP: Final = "clockwork_serve.policies"
"""Entry points of this group in other packages are policies, too: ``name = "module:factory"``."""


@cache
def installed_policies() -> dict[str, EntryPoint]:
    """Policies of other packages by name; none replaces one of ours. Reads once what is installed.

    It is asked when settings are read and when a controller is made, and only for a name that is not ours.
    """
    from importlib.metadata import entry_points

    return {entry.name: entry for entry in entry_points(group=POLICY_GROUP) if entry.name not in POLICIES}


def is_policy(name: str) -> bool:
    """Whether ``ControllerConfig.policy`` may be that."""
    return name in POLICIES or name in installed_policies()


def known_policies() -> str:
    """All policies, for messages."""
    return ", ".join((*POLICIES, *installed_policies()))


def scheduler_for(belief: Belief) -> Scheduler:
    """The policy that the settings name. ConfigError where there is none, or what is installed is none."""
    config = belief.config
    if config.released:
        return ReleasedScheduler(belief)
    factory = SCHEDULERS.get(config.policy)
    return _installed(config.policy, belief) if factory is None else factory(belief)


def _installed(name: str, belief: Belief) -> Scheduler:
    entry = installed_policies().get(name)
    if entry is None:
        raise ConfigError(
            f"policy: expected one of {known_policies()}; found {name!r}; install "
            f"the package that has it (entry point group {POLICY_GROUP})"
        )
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
    "FACTORIES", "POLICIES", "SCHEDULERS", "DefaultScheduler", "PaperScheduler", "ReleasedScheduler",
    "Scheduler", "scheduler_for",
]  # fmt: skip
