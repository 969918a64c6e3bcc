"""stdout on a full disk, and into a pipe that nobody reads."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

import pytest

from softpref.cli import main
from softpref.errors import UsageError
from softpref.terminal import unfailing_output
from tests.test_terminal import assert_harmless
from tests.toy import toy_pairs

INJECT = ["inject", "--input", "p.jsonl", "--output", "out.jsonl", "--rate", "0.5"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy_pairs(8).to_json("p.jsonl")
    return tmp_path


def closed_pipe():
    read, write = os.pipe()
    os.close(read)
    return open(write, "w")


@pytest.mark.parametrize("command", [INJECT, ["--help"], ["inject", "--help"]])
def test_a_full_disk_behind_stdout_is_one_message_and_no_work_is_lost(
    here, monkeypatch, capsys, command
):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as stop:
            main(command)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    last = said.splitlines()[-1]
    assert last.startswith("softpref: stdout: No space left on device; later output was lost")
    assert "Traceback" not in said
    assert_harmless(last)
    if command == INJECT:
        assert len((here / "out.jsonl").read_text().splitlines()) == 8


@pytest.mark.parametrize("command", [INJECT, ["--help"], ["inject", "--help"]])
def test_a_closed_pipe_is_no_error(here, monkeypatch, capsys, command):
    with closed_pipe() as nobody:
        monkeypatch.setattr(sys, "stdout", nobody)
        with suppress(SystemExit):  # --help ends so, with code 0
            main(command)
    assert "rror" not in capsys.readouterr().err
    if command == INJECT:
        assert len((here / "out.jsonl").read_text().splitlines()) == 8


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_neither_stream_ends_the_work(monkeypatch, name):
    done = []
    with closed_pipe() as nobody:
        monkeypatch.setattr(sys, name, nobody)
        with unfailing_output():
            for _ in range(3):
                print("x" * 100_000, file=getattr(sys, name), flush=True)
                done.append(1)
        assert getattr(sys, name) is nobody
    assert len(done) == 3


def fails_after_printing():
    with unfailing_output():
        print("x", flush=True)
        raise UsageError("own")


def test_an_error_of_the_work_comes_first(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(UsageError, match="own"):
            fails_after_printing()
