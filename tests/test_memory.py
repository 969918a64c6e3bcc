"""Memory that is not enough: one message with options to lower, from every command."""

from __future__ import annotations

import re
from concurrent.futures import Future

import pytest
import torch

from softpref import cli
from softpref.errors import UsageError
from softpref.memory import LOWER, is_out_of_memory
from softpref.models.weights import in_one_sentence
from softpref.study.study import _outcome
from tests.test_cli import fails

ERRORS = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.OutOfMemoryError(),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't "
                 "allocate memory: you tried to allocate 8796093022208 bytes."),
    RuntimeError("CUDA error: out of memory"),
    OSError(12, "Cannot allocate memory"),
)  # fmt: skip


@pytest.mark.parametrize("error", ERRORS, ids=range(len(ERRORS)))
@pytest.mark.parametrize("command", [*LOWER, "demo", "bench"])
def test_what_takes_less_is_named(monkeypatch, capsys, command, error):
    def runs_out(arguments):
        raise error

    monkeypatch.setitem(cli.COMMANDS, command, runs_out)
    monkeypatch.setattr(cli, "read_flags", lambda *_: None)
    said = fails(capsys, [command])
    gpu = "GPU " * ("CUDA" in str(error))
    remedy = LOWER.get(command, "close other programs")
    assert said.startswith(f"softpref {command}: not enough {gpu}memory: {remedy}")
    assert said.count("\n") == 1


def test_what_torch_says_of_a_cpus_memory_is_known():
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**50)
    assert is_out_of_memory(found.value)


@pytest.mark.parametrize("command", LOWER)
def test_the_options_that_are_named_exist(capsys, command):
    with pytest.raises(SystemExit):
        cli.main([command, "--help_all"])
    known = capsys.readouterr().out
    named = re.findall(r"--\w+", LOWER[command])
    assert named
    for option in named:
        assert f"{option} " in known or f"{option}\n" in known, option


def test_other_errors_are_not_taken_for_it(monkeypatch):
    def fails(arguments):
        raise RuntimeError("shapes do not match")

    monkeypatch.setitem(cli.COMMANDS, "train", fails)
    monkeypatch.setattr(cli, "read_flags", lambda *_: None)
    with pytest.raises(RuntimeError, match="shapes"):
        cli.main(["train"])


def test_a_model_that_does_not_fit_is_not_called_damaged(tmp_path):
    with pytest.raises(MemoryError), in_one_sentence("--model m", "could not", str(tmp_path)):
        raise MemoryError
    with pytest.raises(UsageError), in_one_sentence("--model m", "could not", str(tmp_path)):
        raise KeyError("x")


def test_a_cell_that_did_not_fit_says_so(tmp_path):
    done = Future()
    done.set_exception(MemoryError())
    assert _outcome(done, tmp_path).startswith("not enough memory: lower --jobs")
