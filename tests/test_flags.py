"""Flags read from the source: as transformers' parser reads them, and without waiting for it."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import HfArgumentParser

from softpref import cli
from softpref.algorithm.signals import SIGNALS
from softpref.commands import COMMAND_HELP
from softpref.completion import SHELLS, completion_script
from softpref.declared import options_of
from softpref.errors import UsageError
from softpref.flags import GROUPS, declared_options, group_of, read_flags

ROOT = Path(__file__).parent.parent
MODULES_LOADED = """
import sys
from softpref.cli import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    print(stop.code, sorted({"torch", "transformers", "datasets"} & sys.modules.keys()))
"""


def classes_of(command: str, monkeypatch) -> tuple[type, ...]:
    """Return the dataclasses that a command hands to its parser."""
    seen = []

    class StopError(Exception):
        pass

    def parse(name, arguments, *options):
        assert name == command
        seen.extend(options)
        raise StopError

    monkeypatch.setattr(cli, "parse", parse)
    with pytest.raises(StopError):
        cli.COMMANDS[command]([])
    return tuple(seen)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_source_is_read_as_transformers_reads_the_classes(command, monkeypatch):
    """Else a flag would be refused that the command takes, or help would show what it has not."""
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    classes = classes_of(command, monkeypatch)
    paths = [f"{of.__module__}:{of.__name__}" for of in classes]
    assert paths == list(COMMAND_HELP[command].options)
    theirs = HfArgumentParser(classes, add_help=False)
    declared = declared_options(COMMAND_HELP[command])
    actions = {
        action.dest: action
        for action in theirs._actions
        if not isinstance(action, argparse._StoreFalseAction)
    }
    assert list(declared) == list(actions)
    for name, action in actions.items():
        kind = declared[name].kind
        if kind.scalar in ("int", "float"):
            assert action.type is {"int": int, "float": float}[kind.scalar], name
        if kind.choices:
            assert list(action.choices) == list(kind.choices), name
        if kind.scalar != "any" and kind.scalar != "bool":
            assert (action.nargs == "+") == kind.is_list, name
    flags = {flag for action in theirs._actions for flag in action.option_strings}
    no = {flag for flag in flags if flag.startswith("--no_")}
    assert no == {f"--no_{name}" for name, of in declared.items() if of.default is True}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["train", "--modle", "x"], 2), (["train", "--beta", "much"], 2), (["audit", "-q"], 2),
     (["train", "--help"], 0), (["sft", "--help_all"], 0)],
)  # fmt: skip
def test_no_library_is_loaded_for_help_and_mistakes(arguments, code):
    done = subprocess.run(
        [sys.executable, "-c", MODULES_LOADED, *arguments],
        env={"PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == f"{code} []", done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "--model, --train and --output are missing. For example: softpref train --mod"),
        (["train", "--model", "m", "--output", "o"], "--train is missing. For example:"),
        (["audit"], "--model, --data, --clean and --output are missing"),
        (["audit", "--run", "r"], "--output is missing"),
        (["judge", "--check", "c"], "--output is missing"),
        (["judge"], "--responses, --baseline and --output are missing"),
        (["inject", "--rate", "1"], "--input and --output are missing"),
        (["train", "--method", "magic"], "argument --method: invalid choice: 'magic'"),
        (["train", "--beta", "much"], "argument --beta: invalid float value: 'much'"),
        (["train", "--bf16", "maybe"], "argument --bf16: 'maybe' is neither true nor false"),
        (["train", "--meta-everry=3"], "unknown option --meta_everry; did you mean 'meta_every'"),
        (["train", "--seed", "-1"], "--seed -1: must be at least 0 and below 4294967296"),
        (["train", "--meta_every", "0"], "--meta_every 0: must be at least 1"),
        (["train", "--beta", "inf"], "--beta inf: must be a finite number"),
        (["train", "--report_to", "wandbb"], "--report_to wandbb: choose from"),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(arguments, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        read_flags(arguments[0], arguments[1:])


def test_a_config_gives_required_options_too(tmp_path):
    (tmp_path / "c.yaml").write_text("model: m\ntrain: [a, b]\noutput: o\ndisable-tqdm: true\n")
    found = read_flags("train", ["--config", str(tmp_path / "c.yaml"), "--beta", "0.2"])
    assert (found.train, found.beta, found.disable_tqdm) == (["a", "b"], 0.2, True)


@pytest.mark.parametrize("again", [["--train", "b"], ["--train=b"]])
def test_a_list_given_twice_is_refused_and_not_shortened(again):
    with pytest.raises(UsageError, match="--train is given twice; give all values after one: --tr"):
        read_flags("train", ["--train", "a", *again, "--model", "m", "--output", "o"])


@pytest.mark.parametrize("command", COMMAND_HELP)
def test_help_has_groups_in_order_and_examples_that_are_right(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        read_flags(command, ["--help"])
    said = capsys.readouterr().out
    groups = re.findall(r"^(\w+):$", said, re.MULTILINE)
    assert groups[0] == "examples"
    assert groups[1:] == [group for group in GROUPS if group in groups]
    for example in COMMAND_HELP[command].examples:
        assert f"softpref {example}" in said
        name, *arguments = shlex.split(example.partition(" > ")[0])
        assert name == command
        read_flags(name, arguments)
    options = re.findall(r"^  (--\w+) ?(.*?)(?:  |$)", said, re.MULTILINE)
    assert options
    for flag, metavar in options:
        assert metavar, flag
        assert metavar.strip("[]").rstrip(".") != flag.lstrip("-").upper()


def test_help_of_train_fits_on_few_screens(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        read_flags("train", ["--help"])
    said = capsys.readouterr().out
    assert len(said.splitlines()) <= 115
    for line in ("--model DIR|ID", "--train FILE...", "--beta NUMBER", "--bf16 [true|false]"):
        assert f"  {line}  " in said
    assert "--hub_token" not in said
    assert "--zscore" not in said
    with pytest.raises(SystemExit):
        read_flags("train", ["--help-all"])
    everything = capsys.readouterr().out
    assert "--hub_token" in everything
    assert "--zscore" in everything


def test_options_of_the_library_are_shown_where_they_do_something(capsys):
    for command, shows in (("train", True), ("sft", False)):
        with pytest.raises(SystemExit):
            read_flags(command, ["--help"])
        said = capsys.readouterr().out
        assert ("--eval_strategy" in said) == shows
        assert "--report_to" in said


def test_every_option_of_ours_is_in_a_known_group():
    for help in COMMAND_HELP.values():
        for name, option in declared_options(help).items():
            if option.package == "softpref":
                assert group_of(name, option) in GROUPS, name


def test_help_names_every_signal():
    text = options_of("softpref.training.config:MSPOConfig")["signals"].text
    assert re.search(r"any of ([^;]*);", text)[1].split(", ") == list(SIGNALS)


HYPHENATED = re.compile(r"(?<![\w-])--[a-z]+(?:_[a-z]+)*-[a-z_-]+")


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "src").rglob("*.py")],
    ids=lambda path: path.name,
)  # fmt: skip
def test_flags_are_spelled_with_underscores(path):
    names = {name for help in COMMAND_HELP.values() for name in declared_options(help) or ()}
    lines = path.read_text(encoding="utf-8").splitlines()
    found = HYPHENATED.findall("\n".join(line for line in lines if "pip install" not in line))
    assert not [flag for flag in found if flag.lstrip("-").replace("-", "_") in names]


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_scripts_name_commands_flags_and_choices(shell):
    script = completion_script(shell)
    for word in (*COMMAND_HELP, "meta_every", "hub_token", "perpcorrect"):
        assert word in script
    with pytest.raises(UsageError, match="give a shell, one of bash, zsh, fish"):
        completion_script("tcsh")


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("tra", "train"), ("help comp", "compare"), ("completion z", "zsh"),
        ("train --meta_e", "--meta_every"), ("train --method mspo_", "mspo_static"),
        ("env --accelerate g", "gpus"), ("train --beta 0.1 --bf16 f", "false"),
        ("train --train a.jsonl x", ""),
    ],
)  # fmt: skip
def test_bash_completes(words, completed, tmp_path):
    (tmp_path / "script").write_text(completion_script("bash"))
    call = 'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _softpref; echo "$COMPREPLY"'
    given = ["bash", "-c", call, str(tmp_path / "script"), "softpref", *words.split()]
    done = subprocess.run(given, capture_output=True, text=True)
    assert done.stdout.strip() == completed, done.stderr
