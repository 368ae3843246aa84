"""What the controller is told of quotas: those of the file of keys, again when it changes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from clockwork_serve.messages import Frame, QuotasSet
from clockwork_serve.serve.gateway_keys import read_keys
from clockwork_serve.serve.gateway_watch import REFRESH_S, Watched

_log = logging.getLogger(__name__)


class Quotas:
    """Quotas of one file; without one, nobody has any."""

    def __init__(self, path: str) -> None:
        """Raises :class:`ConfigError`."""
        self._file = Watched((path,), lambda: _quotas(path)) if path else None

    def frames(self) -> list[Frame]:
        """For a controller that knows nothing."""
        return [self._file.content] if self._file is not None and self._file.content.quotas else []

    async def keep_fresh(self, send: Callable[[Frame], None]) -> None:
        """Tell the controller whenever they change, for ever."""
        while self._file is not None:
            await asyncio.sleep(REFRESH_S)
            before = self._file.content
            if self._file.refresh() and self._file.content != before:
                _log.info("api_keys: %d tenants have a quota now", len(self._file.content.quotas))
                send(self._file.content)


def _quotas(path: str) -> QuotasSet:
    quotas = [tenant.quota for tenant in read_keys(path).tenants.values()]
    return QuotasSet(quotas=tuple([quota for quota in quotas if quota is not None]))
