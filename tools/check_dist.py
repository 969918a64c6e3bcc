"""Check what a wheel and an sdist contain: `python tools/check_dist.py DIST`."""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
LARGEST = 1_000_000
"""Bytes of either file; the sources are some 300 kB when compressed."""
IN_SDIST = {"PKG-INFO", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff",
            "SECURITY.md", ".gitignore"}  # fmt: skip


def files_under(folder: str) -> set[str]:
    """Return the files of a folder of the repository, by their paths in it."""
    home = ROOT / folder
    paths = (path for path in home.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(home)) for path in paths}


def differences(dist: Path) -> list[str]:
    """Return what is missing, what does not belong, and what is too large."""
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = {name for name in archive.namelist() if ".dist-info/" not in name}
    with tarfile.open(sdist) as archive:
        members = (member.name for member in archive.getmembers() if member.isfile())
        in_sdist = {name.partition("/")[2] for name in members}
    sources, examples = files_under("src"), files_under("examples")
    wanted = IN_SDIST | {f"src/{name}" for name in sources} | {f"examples/{e}" for e in examples}
    found = [f"{wheel.name}: {name}" for name in sorted(in_wheel ^ sources)]
    found += [f"{sdist.name}: {name}" for name in sorted(in_sdist ^ wanted)]
    sizes = {path.name: path.stat().st_size for path in (wheel, sdist)}
    return found + [f"{name}: {size:,} bytes" for name, size in sizes.items() if size > LARGEST]


if __name__ == "__main__":
    if found := differences(Path(sys.argv[1])):
        sys.exit("not as it should be:\n" + "\n".join(found))
