"""What tests need that copy a controller."""

from __future__ import annotations

from typing import Final

import pytest

from clockwork_serve.controller.cluster import Queue

NEEDS_PURE: Final = pytest.mark.skipif(
    hasattr(Queue, "__mypyc_attrs__"), reason="brains that mypyc compiled can not be forked or restored"
)
