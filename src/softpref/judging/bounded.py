"""An HTTP client with limits on the size and duration of a response."""

from __future__ import annotations

import time
from typing import Any

LONGEST_BODY = 1_000_000
"""Bytes; the rest is not read, so that a longer reply is invalid."""
TRANSPORT_HEADERS = ("content-encoding", "content-length", "transfer-encoding")


def bounded_client(timeout_s: float, longest: int = LONGEST_BODY) -> Any:
    """Return a client for `openai.OpenAI` that follows no redirects and limits the body.

    Args:
        timeout_s: maximum seconds from the start of a request to the last byte of its body; then
            it raises TimeoutError.
        longest: bytes of a body that are read.
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
                    if len(body) > longest:
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
            content = bytes(body[:longest])
            make = type(response)
            return make(response.status_code, headers=kept, content=content, request=request)

    return Bounded(timeout=timeout_s, follow_redirects=False)
