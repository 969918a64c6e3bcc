"""Whatever a library raises over a user's model, as one message: path, fault and remedy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import safe_open

from softpref.errors import UsageError, first_line
from softpref.memory import is_out_of_memory

COMPLETE = (
    "give a directory with config.json, tokenizer and safetensors weights as save_pretrained "
    "writes it, or a hub id"
)


@contextmanager
def in_one_sentence(place: str, what: str, source: str, remedy: str = COMPLETE) -> Iterator[None]:
    """Turn whatever a library raises over the model in `source` into one message.

    Args:
        place: What the message begins with: option and path.
        what: What went wrong, where no file can be named.
        source: The directory or hub id.
        remedy: What to do, where no file is damaged.

    Raises:
        UsageError: Anything but a full memory or an interrupt; it names the file that is damaged.
    """
    try:
        yield
    except UsageError:
        raise
    except BaseException as error:  # a KeyError for an adapter's type, a SafetensorError, ...
        is_panic = type(error).__name__ == "PanicException"  # Rust's, no Exception
        if is_out_of_memory(error) or not (isinstance(error, Exception) or is_panic):
            raise
        if damage := _damage(Path(source)):
            raise UsageError(f"{place}: {damage}") from None
        if "trust_remote_code" in str(error):
            remedy = "read it, then give --trust_remote_code true, if the command has it"
        speaks = isinstance(error, OSError | ValueError) or type(error) is Exception
        name = "" if speaks else f"{type(error).__name__}: "
        raise UsageError(f"{place}: {what} ({name}{first_line(error)}); {remedy}.") from None


def _damage(directory: Path) -> str | None:
    """Say which file of a model's directory cannot be read at all, None where all can."""
    if directory.is_file():
        return f"{directory} is a file; give the directory that holds it."
    for path in sorted(directory.iterdir() if directory.is_dir() else ()):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
        except Exception as error:
            return f"{path} is damaged ({first_line(error)}); copy or download it again."
    return None
