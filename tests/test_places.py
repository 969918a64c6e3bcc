"""--output where nothing can be written: one message from every command, before any model."""

from __future__ import annotations

import os
import tempfile

import pytest

from softpref.errors import UsageError
from softpref.models import loading
from softpref.places import directory_to_write, file_to_write
from tests.test_cli import fails
from tests.toy import toy_pairs

COMMANDS = {
    "train": ["--model", "m", "--train", "p.jsonl"],
    "sft": ["--model", "m", "--train", "p.jsonl"],
    "audit": ["--model", "m", "--data", "p.jsonl", "--clean", "4"],
    "generate": ["--model", "m", "--prompts", "p.jsonl"],
    "judge": ["--responses", "p.jsonl", "--baseline", "p.jsonl", "--judge", "checker"],
    "compare": ["--responses", "p.jsonl", "--baseline", "p.jsonl", "--judge", "checker"],
    "study": ["table1"],
    "inject": ["--input", "p.jsonl", "--rate", "0.1"],
    "demo": [],
}
DIRECTORIES = [name for name in COMMANDS if name not in ("generate", "inject")]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy_pairs(8).to_json("p.jsonl")
    (tmp_path / "file.jsonl").write_text("kept")
    os.symlink("gone", "link.jsonl")
    os.symlink("loop.jsonl", "loop.jsonl")

    def too_late(*args, **options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(loading, "load_policy", too_late)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("link.jsonl", "link.jsonl is a symbolic link to gone, which does not exist"),
        ("link.jsonl/in.jsonl", "link.jsonl is a symbolic link to gone, which does not exist"),
        ("loop.jsonl", "loop.jsonl is a symbolic link to loop.jsonl, which does not exist"),
        ("file.jsonl/in.jsonl", "file.jsonl is a file; give a path in a directory"),
        ("file.jsonl/a/b.jsonl", "file.jsonl is a file; give a path in a directory"),
        ("x" * 5000 + ".jsonl", "the name is too long"),
    ],
)
def test_every_command_says_at_once_where_it_cannot_write(here, capsys, command, output, message):
    before = sorted(here.rglob("*"))
    said = fails(capsys, [command, *COMMANDS[command], "--output", output])
    assert said.count("\n") == 1
    assert said.startswith(f"softpref {command}: --output {output}: {message}")
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("command", DIRECTORIES)
def test_a_file_is_no_directory(here, capsys, command):
    said = fails(capsys, [command, *COMMANDS[command], "--output", "file.jsonl"])
    assert said == f"softpref {command}: --output file.jsonl: is a file; give a directory.\n"
    assert (here / "file.jsonl").read_text() == "kept"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_read_only_place_is_named(here, capsys, command, monkeypatch):
    make = tempfile.TemporaryFile

    def refuses(*args, dir=None, **options):
        if dir is not None:
            raise PermissionError(13, "Permission denied")
        return make(*args, **options)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuses)
    said = fails(capsys, [command, *COMMANDS[command], "--output", "a/b.jsonl"])
    assert said == (
        f"softpref {command}: --output a/b.jsonl: . cannot be written (Permission denied); choose "
        "a writable location.\n"
    )


def test_what_can_be_made_or_is_there_is_taken(here):
    (here / "there").mkdir()
    os.symlink("there", "way")
    for output in ("there", "way", "way/new", "new/er", str(here / "new")):
        assert str(directory_to_write(output)) == output
    assert file_to_write("file.jsonl").read_text() == "kept"
    assert not (here / "new").exists()
    with pytest.raises(UsageError, match="cannot be written"):
        directory_to_write("/proc/softpref")
