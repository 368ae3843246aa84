"""Whether our own gateways answer, asked as a client would."""

from __future__ import annotations

import asyncio
from typing import Final

_PATIENCE_S: Final = 2.0
_REQUEST: Final = b"GET /v2/health/ready HTTP/1.1\r\nHost: keeper\r\nConnection: close\r\n\r\n"


async def healthy(host: str, port: int) -> bool:
    """Whether a gateway there says that it is ready."""
    try:
        async with asyncio.timeout(_PATIENCE_S):
            reader, writer = await asyncio.open_connection(reachable(host), port)
            try:
                writer.write(_REQUEST)
                status = await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
    return b" 200 " in status


async def listens(host: str, port: int) -> bool:
    """Whether anybody accepts connections there."""
    try:
        async with asyncio.timeout(_PATIENCE_S):
            _, writer = await asyncio.open_connection(reachable(host), port)
            writer.close()
    except (OSError, TimeoutError):
        return False
    return True


def reachable(host: str) -> str:
    """An address to reach a listener at: a wildcard is none."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
