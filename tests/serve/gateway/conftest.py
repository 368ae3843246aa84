"""A gateway between scripted clients and a scripted controller, as a fixture."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.serve.gateway.worlds import SMALL, World, a_world


@pytest.fixture
async def world(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[World]:
    """With the settings that are its parameter, if it has one."""
    async with a_world(tmp_path, getattr(request, "param", SMALL)) as found:
        yield found
