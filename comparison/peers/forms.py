"""Multipart forms, for servers that take no other bytes."""

from __future__ import annotations

_BOUNDARY = "a-boundary-that-no-tensor-holds-7d1f0c9ab2"


def form(field: str, data: bytes) -> tuple[str, bytes]:
    """Content type and body of a form with one file."""
    head = (
        f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"; filename="{field}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    )
    return f"multipart/form-data; boundary={_BOUNDARY}", b"".join(
        (head.encode(), data, f"\r\n--{_BOUNDARY}--\r\n".encode())
    )
