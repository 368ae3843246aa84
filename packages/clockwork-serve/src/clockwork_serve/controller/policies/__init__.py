"""Scheduling policies, by name: our own, and those of other packages (entry points)."""

from __future__ import annotations

from collections.abc import Callable

from clockwork_serve.controller.belief import Belief
from clockwork_serve.controller.config import installed_policies
from clockwork_serve.controller.policies.base import Scheduler, SchedulerFactory
from clockwork_serve.controller.policies.default import DefaultScheduler
from clockwork_serve.controller.policies.paper import PaperScheduler
from clockwork_serve.controller.policies.released import ReleasedScheduler
from clockwork_serve.errors import ConfigError

SCHEDULERS: dict[str, SchedulerFactory] = {"default": DefaultScheduler, "paper": PaperScheduler}


def scheduler_for(belief: Belief) -> Scheduler:
    """The policy that the settings name. ConfigError for one of another package that is no policy."""
    config = belief.config
    if config.released:
        return ReleasedScheduler(belief)
    factory = SCHEDULERS.get(config.policy)
    return _installed(config.policy, belief) if factory is None else factory(belief)


def _installed(name: str, belief: Belief) -> Scheduler:
    entry = installed_policies()[name]
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
    "SCHEDULERS",
    "DefaultScheduler",
    "PaperScheduler",
    "ReleasedScheduler",
    "Scheduler",
    "scheduler_for",
]
