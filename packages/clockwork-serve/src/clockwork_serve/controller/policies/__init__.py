"""Scheduling policies, by name."""

from __future__ import annotations

from clockwork_serve.controller.belief import Belief
from clockwork_serve.controller.policies.base import Scheduler, SchedulerFactory
from clockwork_serve.controller.policies.default import DefaultScheduler
from clockwork_serve.controller.policies.paper import PaperScheduler
from clockwork_serve.controller.policies.released import ReleasedScheduler

SCHEDULERS: dict[str, SchedulerFactory] = {"default": DefaultScheduler, "paper": PaperScheduler}


def scheduler_for(belief: Belief) -> Scheduler:
    """The policy that the settings name."""
    config = belief.config
    return ReleasedScheduler(belief) if config.released else SCHEDULERS[config.policy](belief)


__all__ = ["SCHEDULERS", "DefaultScheduler", "PaperScheduler", "ReleasedScheduler", "scheduler_for"]
