"""Responses compressed for who asked, one at a time beside the loop; it knows no connection.

One thread: however many ask, a gateway spends no more than a core on it. Who would wait long for his turn
gets his response as it is, which HTTP allows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Final

from clockwork_serve.oip import Coding, compress
from clockwork_serve.serve.gateway_responses import Response
from clockwork_serve.units import KIB, MIB

LEAST_BYTES: Final = KIB
"""Smaller ones fit into one packet anyway."""
INLINE_BYTES: Final = 4 * KIB
"""Up to this, at most 0.1 ms, it is done at once: handing it to a thread takes as long."""
WAITING_BYTES: Final = 4 * MIB
"""So much may wait for the thread, 100 ms at most; or one response, whatever its size."""


class Packer:
    """Compresses. All methods are for the running loop's own thread."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._waiting_bytes = 0

    def pack(self, response: Response, coding: Coding) -> Response | Awaitable[Response]:
        """The response compressed, at once or soon; as it is, if that is not worth it."""
        size = sum(map(len, response.parts))
        # Stock clients do not expect it of an error.
        if response.status != HTTPStatus.OK or (size < LEAST_BYTES and not coding.must):
            return response
        if size <= INLINE_BYTES:
            return _packed(response, coding, size)
        if self._waiting_bytes and self._waiting_bytes + size > WAITING_BYTES and not coding.must:
            return response
        self._waiting_bytes += size
        return self._pack_soon(response, coding, size)

    def close(self) -> None:
        """End the thread, once it is done with what it has."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def _pack_soon(self, response: Response, coding: Coding, size: int) -> Response:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "packer")
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._thread, _packed, response, coding, size)
        finally:
            self._waiting_bytes -= size


def _packed(response: Response, coding: Coding, size: int) -> Response:
    body = compress(response.parts, coding)
    if len(body) >= size and not coding.must:
        return response
    headers = b"%sContent-Encoding: %s\r\n" % (response.headers, coding.name.encode())
    return Response(response.status, (body,), response.content_type, headers)
