"""Brain 1, the controller: every choice of the system is made here, inside ``Controller.decide``.

No I/O, no clock, no randomness.
"""

from __future__ import annotations

from clockwork_serve.controller.config import ControllerConfig
from clockwork_serve.controller.controller import Controller
from clockwork_serve.controller.policies import POLICIES

__all__ = ["POLICIES", "Controller", "ControllerConfig"]
