"""Text for the terminal, without control characters and secrets."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from softpref.errors import UsageError

SECRET_NAMES = ("KEY", "TOKEN", "SECRET", "PASSWORD")
"""Suffixes of environment variables whose values are never shown."""
SHORTEST_SECRET = 8
"""Characters; shorter values may occur in a message by chance."""
_CONTROL_CODES = (
    *range(0x20), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F),
    *range(0x2066, 0x206A), 0xFEFF, *range(0xD800, 0xE000),
)  # fmt: skip
"""Control characters, marks that change the direction of text, and surrogates."""
_ESCAPES = {
    code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
    for code in _CONTROL_CODES
    if chr(code) not in "\n\t"
}


def printable(text: str) -> str:
    """Return text with control characters escaped, except newlines and tabs, and secrets hidden.

    The values of variables such as OPENAI_API_KEY are replaced by their names.
    """
    for name, value in os.environ.items():
        if name.upper().endswith(SECRET_NAMES) and len(value.strip()) >= SHORTEST_SECRET:
            text = text.replace(value.strip(), f"[{name}]")
    return text.translate(_ESCAPES)


class PrintableFormatter(logging.Formatter):
    """A log formatter for the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the formatted record, made printable."""
        return printable(super().format(record))


def say(text: str) -> None:
    """Print a line to stdout."""
    sys.stdout.write(printable(text) + "\n")


class _Unfailing:
    """A stream that discards output after a failed write."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._discard(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._discard(error)

    def _discard(self, error: OSError) -> None:
        self.error = self.error or error
        # Flushing the buffer would fail again, at exit at the latest.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def unfailing_output() -> Iterator[None]:
    """Let a command finish even if its output can no longer be written.

    Raises:
        UsageError: at the end, if stdout could not be written; a pipe closed by its reader is no
            error.
    """
    before = sys.stdout, sys.stderr
    out, err = _Unfailing(sys.stdout), _Unfailing(sys.stderr)
    sys.stdout, sys.stderr = out, err
    ended = None
    try:
        yield
    except SystemExit as end:
        ended = end
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = before
    if ended and ended.code:
        raise ended
    if out.error and not isinstance(out.error, BrokenPipeError):
        raise UsageError(
            f"stdout: {out.error.strerror}; later output was lost; all files are complete. "
            "Redirect the output to a disk with free space."
        )
    if ended:
        raise ended
