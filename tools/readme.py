"""Run every command of README in order, in a fresh directory.

    python tools/readme.py README.md

The worked example runs first, whole. The other blocks then run on its files, each in a directory
of its own; only those that install softpref or call make are skipped. MODEL=DIR in the environment
takes the place of README's model, for runs without a network.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SKIPPED = re.compile(r"^(pip install|uvx?|make) ", re.MULTILINE)
EXAMPLE = re.compile(r"^MODEL=(\S+)", re.MULTILINE)
RUNNERS = {"sh": ["sh", "-eux"], "python": [sys.executable]}


def blocks(readme: str) -> Iterator[tuple[str, str]]:
    """Yield language and text of the blocks to run, the worked example first."""
    found = [(kind, text) for kind, text in BLOCK.findall(readme) if not SKIPPED.search(text)]
    yield from sorted(found, key=lambda block: not EXAMPLE.search(block[1]))


def with_model(text: str, model: str) -> str:
    """Return a block's text with the model that is to be used."""
    if EXAMPLE.search(text):
        return EXAMPLE.sub(lambda _: f"MODEL={shlex.quote(model)}", text)
    # Blocks beside the example call the user's own model "sft".
    text = text.replace('"sft"', repr(model))
    return text.replace("--model sft ", f"--model {shlex.quote(model)} ")


def main(readme: Path) -> None:
    """Run the blocks; the exit code is that of the first one that fails."""
    text = readme.read_text(encoding="utf-8")
    named = EXAMPLE.search(text)
    if not named:
        sys.exit(f"{readme}: no block sets MODEL=.")
    model = os.environ.get("MODEL", named[1])
    home = Path(tempfile.mkdtemp(prefix="softpref-readme-"))
    example = home / "0"
    for number, (kind, block) in enumerate(blocks(text)):
        place = home / str(number)
        place.mkdir()
        if number:
            shutil.copy(example / "noisy.jsonl", place / "pairs.jsonl")
            rows = (example / "pairs.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
            (place / "clean.jsonl").write_text("".join(rows[::3]), encoding="utf-8")
        script = home / f"{number}.{kind}"
        script.write_text(with_model(block, model), encoding="utf-8")
        print(f"--- block {number} ({kind}) in {place}", flush=True)
        begin = time.monotonic()
        code = subprocess.run([*RUNNERS[kind], script], cwd=place).returncode
        print(f"--- exit code {code} after {time.monotonic() - begin:.0f} s", flush=True)
        if code:
            sys.exit(code)
    shutil.rmtree(home)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
