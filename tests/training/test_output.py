"""Files that appear together, or not at all."""

from __future__ import annotations

import os
from contextlib import suppress

import pytest

from softpref.training import output
from softpref.training.output import appearing_together, is_unfinished, one_writer, write_text

NAMES = ("a", "last", "z")


def contents(directory):
    return {path.name: path.read_text() for path in directory.iterdir() if path.is_file()}


def write(directory, text):
    with appearing_together(directory, "last") as home:
        for name in NAMES:
            write_text(home / name, text)


@pytest.mark.parametrize("kill_at", range(3))
def test_a_kill_leaves_the_last_file_only_with_those_of_its_making(tmp_path, kill_at):
    home = tmp_path / "out"
    write(home, "old")
    (home / "own.txt").write_text("of the user")
    if (child := os.fork()) == 0:
        replace, done = os.replace, []

        def dies(source, target):
            if os.path.dirname(target) == str(home):
                done.append(target)
                if len(done) > kill_at:
                    os._exit(9)
            replace(source, target)

        output.os.replace = dies
        write(home, "new")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert is_unfinished(home)
    assert "last" not in contents(home)
    write(home, "new")
    assert not is_unfinished(home)
    assert contents(home) == dict.fromkeys(NAMES, "new") | {"own.txt": "of the user"}


def test_a_failure_leaves_what_was_there(tmp_path):
    write(tmp_path, "old")
    with suppress(KeyboardInterrupt), appearing_together(tmp_path, "last") as home:
        write_text(home / "a", "new")
        raise KeyboardInterrupt
    assert contents(tmp_path) == dict.fromkeys(NAMES, "old")
    assert len(list(tmp_path.iterdir())) == 3


def test_a_link_is_no_way_round_a_lock(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with (
        one_writer(tmp_path / "link"),
        pytest.raises(ValueError, match="another process is writing it"),
        one_writer(tmp_path / "real"),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".lock")] == []
