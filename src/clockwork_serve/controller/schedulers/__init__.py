"""Scheduling policies, by name."""

from __future__ import annotations

from clockwork_serve.controller.scheduler import SchedulerFactory
from clockwork_serve.controller.schedulers.default import DefaultScheduler
from clockwork_serve.controller.schedulers.paper import PaperScheduler

SCHEDULERS: dict[str, SchedulerFactory] = {"default": DefaultScheduler, "paper": PaperScheduler}

__all__ = ["SCHEDULERS", "DefaultScheduler", "PaperScheduler"]
