"""Scheduling policies, by name."""

from __future__ import annotations

from clockwork_serve.controller.scheduler import SchedulerFactory
from clockwork_serve.controller.schedulers.paper import PaperScheduler

SCHEDULERS: dict[str, SchedulerFactory] = {"paper": PaperScheduler}

__all__ = ["SCHEDULERS", "PaperScheduler"]
