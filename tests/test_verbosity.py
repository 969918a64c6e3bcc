"""`-q`, `-v`, and what libraries print unasked."""

from __future__ import annotations

import logging
import os
import sys
import warnings

import pytest

from softpref.verbosity import BARS_OFF, logging_to_terminal, set_up_libraries, split_verbosity


@pytest.mark.parametrize(
    ("arguments", "verbosity"),
    [(["train"], "normal"), (["train", "-q"], "quiet"), (["--quiet", "train"], "quiet"),
     (["train", "-v"], "verbose"), (["-v", "train", "--quiet"], "quiet")],
)  # fmt: skip
def test_flags_stand_anywhere_and_the_last_one_counts(arguments, verbosity):
    assert split_verbosity(arguments) == (verbosity, ["train"])


@pytest.mark.parametrize(
    ("verbosity", "rank", "out", "err"),
    [
        ("quiet", "0", ["warning"], []),
        ("normal", "0", ["info", "warning"], []),
        ("verbose", "0", ["debug", "info", "warning"], ["library"]),
        ("normal", "1", [], []),
    ],
)
def test_what_is_printed(verbosity, rank, out, err, capsys, monkeypatch):
    monkeypatch.setattr(os, "environ", {"RANK": rank})
    log = logging.getLogger("softpref.test")
    with logging_to_terminal(verbosity):
        for level in ("debug", "info", "warning"):
            getattr(log, level)(level)
        logging.getLogger("urllib3").debug("library")
    log.warning("after")
    said = capsys.readouterr()
    assert said.out.split() == out
    assert [line.split(": ")[-1] for line in said.err.splitlines() if "urllib3" in line] == err


@pytest.mark.parametrize(
    ("verbosity", "shows_bars", "rank", "terminal", "expected"),
    [
        ("normal", True, "0", True, True), ("normal", False, "0", True, False),
        ("quiet", True, "0", True, False), ("normal", True, "1", True, False),
        ("normal", True, "0", False, False),
    ],
)  # fmt: skip
def test_bars_are_for_terminals(verbosity, shows_bars, rank, terminal, expected, monkeypatch):
    monkeypatch.setattr(os, "environ", {"RANK": rank})
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with warnings.catch_warnings():
        set_up_libraries(verbosity, shows_bars=shows_bars)
    assert (not set(BARS_OFF) & os.environ.keys()) == expected
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"


def test_false_alarms_of_libraries_are_not_shown_and_other_warnings_are(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    with warnings.catch_warnings():
        set_up_libraries("normal", shows_bars=False)
    log, shown = logging.getLogger("transformers.trainer_utils"), []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: shown.append(record.getMessage()))
    monkeypatch.setattr(log, "handlers", [handler])
    monkeypatch.setattr(log, "propagate", False)
    log.warning("The tokenizer has new PAD/BOS/EOS tokens that differ. Updated: %s", {})
    log.warning("something else")
    assert shown == ["something else"]
