"""What a release is made of agrees with itself."""

from __future__ import annotations

import io
import re
import runpy
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture
def check():
    return runpy.run_path(str(ROOT / "tools" / "check_dist.py"))


def make_dist(home: Path, in_wheel: dict[str, bytes], in_sdist: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(home / "softpref-1.whl", "w") as wheel:
        for name, content in ({"softpref-1.dist-info/METADATA": b""} | in_wheel).items():
            wheel.writestr(name, content)
    with tarfile.open(home / "softpref-1.tar.gz", "w:gz") as sdist:
        for name, content in in_sdist.items():
            member = tarfile.TarInfo(f"softpref-1/{name}")
            member.size = len(content)
            sdist.addfile(member, io.BytesIO(content))
    return home


def test_version_and_words_are_those_of_the_project():
    project = PROJECT["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert project["version"] == citation["version"] == newest[1]
    assert project["license"] == citation["license"]
    assert project["description"] == citation["abstract"]
    assert project["keywords"] == citation["keywords"]
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


def test_the_image_gets_what_its_build_copies():
    kept = set(re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.M))
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.M)
    assert {name for line in copied for name in line.split()} == kept
    in_sdist = set(PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["only-include"])
    assert all((ROOT / name).exists() for name in kept | in_sdist)


def test_a_dist_that_lacks_a_file_or_has_one_too_many_is_named(check, tmp_path):
    sources = dict.fromkeys(check["files_under"]("src"), b"")
    examples = dict.fromkeys((f"examples/{name}" for name in check["files_under"]("examples")), b"")
    whole = dict.fromkeys(check["IN_SDIST"], b"") | examples
    whole |= {f"src/{name}": b"" for name in sources}
    assert check["differences"](make_dist(tmp_path, sources, whole)) == []
    lacking = {name: b"" for name in sources if name != "softpref/auditing/page.js"}
    lacking["notes.txt"] = b""
    found = check["differences"](make_dist(tmp_path, lacking, whole | {"runs/x": b""}))
    assert found == [
        "softpref-1.whl: notes.txt",
        "softpref-1.whl: softpref/auditing/page.js",
        "softpref-1.tar.gz: runs/x",
    ]


def test_a_dist_that_is_too_large_is_named(check, tmp_path):
    in_wheel = {"softpref/weights": bytes(check["LARGEST"])}
    found = check["differences"](make_dist(tmp_path, in_wheel, {}))
    assert any(re.fullmatch(r"softpref-1.whl: [\d,]+ bytes", line) for line in found)
