"""The controller's brain: makes every scheduling decision, without I/O, clock or randomness."""

from __future__ import annotations

from clockwork_serve.controller.config import ControllerConfig
from clockwork_serve.controller.controller import Controller
from clockwork_serve.controller.policies import POLICIES

__all__ = ["POLICIES", "Controller", "ControllerConfig"]
