"""What softpref may leave on disk: open formats, and never a pickle."""

from __future__ import annotations

import json
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from matplotlib.image import imread
from safetensors.torch import load_file


def no_constant(name: str):
    raise ValueError(f"{name} is not JSON")


def read_json(path: Path) -> None:
    json.loads(path.read_text("utf-8"), parse_constant=no_constant)


def read_lines(path: Path) -> None:
    for line in path.read_text("utf-8").splitlines():
        json.loads(line, parse_constant=no_constant)


def read_arrow(path: Path) -> None:
    with pa.memory_map(str(path)) as source:
        pa.ipc.open_stream(source).read_all()


def read_text(path: Path) -> None:
    path.read_text("utf-8")


READERS: dict[str, Callable[[Path], object]] = {
    ".json": read_json,
    ".jsonl": read_lines,
    ".yaml": lambda path: yaml.safe_load(path.read_text("utf-8")),
    ".safetensors": load_file,
    ".parquet": pq.read_table,
    ".arrow": read_arrow,
    ".png": imread,
    **dict.fromkeys((".html", ".jinja", ".lock", ".log", ".md", ".svg", ".tex", ".txt"), read_text),
}


def is_pickle(data: bytes) -> bool:
    """Whether a pickle of any protocol stands at the start: opcodes up to the one that ends it."""
    try:
        for _ in pickletools.genops(data):
            pass
    except Exception:  # of whatever is no opcode, or has no such argument
        return False
    return True


def assert_safe_files(directory: Path) -> None:
    """Open every file below, by its ending, in a format that holds no code."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert path.suffix in READERS, f"unexpected file {path}"
        assert not zipfile.is_zipfile(path), f"{path} is a zip, as torch.save writes"
        assert not is_pickle(path.read_bytes()), f"{path} is a pickle"
        READERS[path.suffix](path)
