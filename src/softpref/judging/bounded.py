"""An HTTP client that takes neither more bytes nor more time than a verdict needs."""

from __future__ import annotations

import time
from typing import Any

LONGEST_BODY = 1_000_000
"""Bytes; what comes after them is not read, so that a longer reply is a broken one."""
TRANSPORT_HEADERS = ("content-encoding", "content-length", "transfer-encoding")


def bounded_client(timeout_s: float) -> Any:
    """Return a client for `openai.OpenAI` that follows no redirect and reads no endless body.

    Args:
        timeout_s: seconds from the start of a request to the last byte of its body, beyond which
            it raises TimeoutError.
    """
    from openai import DefaultHttpxClient

    class Bounded(DefaultHttpxClient):
        def send(self, request: Any, **how: Any) -> Any:
            end = time.monotonic() + timeout_s
            response = super().send(request, **how | {"stream": True})
            body = bytearray()
            try:
                for part in response.iter_bytes():
                    body += part
                    if len(body) > LONGEST_BODY:
                        break
                    if time.monotonic() > end:
                        raise TimeoutError
            finally:
                response.close()
            kept = [
                (name, value)
                for name, value in response.headers.multi_items()
                if name.lower() not in TRANSPORT_HEADERS
            ]
            return type(response)(
                response.status_code, headers=kept, content=bytes(body[:LONGEST_BODY]),
                request=request,
            )  # fmt: skip

    return Bounded(timeout=timeout_s, follow_redirects=False)
