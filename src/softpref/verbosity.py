"""How much a command prints: `-q`, `-v`, progress bars, and what libraries say unasked."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from softpref.terminal import PrintableFormatter

Verbosity = Literal["quiet", "normal", "verbose"]
FLAGS: dict[str, Verbosity] = {
    "-q": "quiet",
    "--quiet": "quiet",
    "-v": "verbose",
    "--verbose": "verbose",
}

BARS_OFF = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
FALSE_ALARMS = {
    # Trainers align the model's special tokens with the tokenizer's, as they should.
    "transformers.trainer_utils": "The tokenizer has new PAD/BOS/EOS tokens",
    # A faster product on some CPUs, for inference alone.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
}
"""Warnings in normal runs that ask for nothing, by logger; `-v` shows them."""


def split_verbosity(arguments: Sequence[str]) -> tuple[Verbosity, list[str]]:
    """Return how much to print, by the last flag that says so, and the other arguments."""
    asked = [FLAGS[argument] for argument in arguments if argument in FLAGS]
    others = [argument for argument in arguments if argument not in FLAGS]
    return (asked[-1] if asked else "normal"), others


@contextmanager
def logging_to_terminal(verbosity: Verbosity) -> Iterator[None]:
    """Print softpref's log lines; `verbose` also what libraries log, with names and times."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(PrintableFormatter("%(message)s"))
    log = logging.getLogger("softpref")
    level = {"quiet": logging.WARNING, "normal": logging.INFO, "verbose": logging.DEBUG}[verbosity]
    is_first = os.environ.get("RANK", "0") == "0"
    log.setLevel(level if is_first else logging.ERROR)
    log.addHandler(handler)
    libraries = logging.StreamHandler(sys.stderr)
    libraries.setFormatter(PrintableFormatter("%(asctime)s %(name)s: %(message)s"))
    libraries.addFilter(lambda record: not record.name.startswith("softpref"))
    root = logging.getLogger()
    root_level = root.level
    if verbosity == "verbose":
        root.addHandler(libraries)
        root.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        log.removeHandler(handler)
        root.removeHandler(libraries)
        root.setLevel(root_level)


def set_up_libraries(verbosity: Verbosity, *, shows_bars: bool) -> None:
    """Set what libraries print, before any of them is imported.

    Bars also disappear where output is no terminal, and on all processes but the first.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if verbosity == "verbose":
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "info")
    else:
        warnings.filterwarnings("ignore", category=FutureWarning)
        for name in FALSE_ALARMS:
            logging.getLogger(name).addFilter(_is_no_false_alarm)
    is_first = os.environ.get("RANK", "0") == "0"
    if not (shows_bars and is_first and verbosity != "quiet" and sys.stderr.isatty()):
        os.environ |= dict.fromkeys(BARS_OFF, "1")


def _is_no_false_alarm(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(FALSE_ALARMS[record.name])
