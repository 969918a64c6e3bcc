"""Flags read before a command's modules are imported: help, and mistakes that need no import."""

from __future__ import annotations

import argparse
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import dropwhile
from typing import Any, NoReturn

from softpref.commands import COMMAND_HELP, LIBRARY_OPTIONS, Command
from softpref.declared import Declared, options_of
from softpref.errors import UsageError
from softpref.options import (
    did_you_mean,
    flags_from_yaml,
    missing_message,
    missing_options,
    refuse_impossible_seeds,
    refuse_non_finite,
    refuse_too_small,
    split_config,
    with_underscores,
)
from softpref.trackers import chosen_trackers

_MODEL_GROUPS = ("method", "judge", "server", "optimizer")
GROUPS = ("required", "data", *_MODEL_GROUPS, "output", "hardware", "other")
"""The order of groups in `--help`; required options come first wherever they are declared."""
WIDEST = 100
METAVARS = {"int": "N", "float": "NUMBER", "bool": "true|false"}
TRUTHS = ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0")


def read_flags(command: str, arguments: Sequence[str]) -> argparse.Namespace:
    """Return the flags of a command as its options' source declares them.

    Only mistakes that are certain without an import are refused; the command checks the rest.

    Raises:
        UsageError: an option or key is unknown, or a value cannot be read, or required options
            are missing; these are named all at once.
        SystemExit: help was asked for, and is printed.
    """
    help = COMMAND_HELP[command]
    if help.positional:
        arguments = [*dropwhile(lambda word: not word.startswith("-"), arguments)]
    config, flags = split_config(list(arguments))
    flags = [with_underscores(flag) for flag in flags]
    declared = declared_options(help)
    if declared is None:  # a package is missing; the command says which
        return argparse.Namespace()
    parser = _parser(command, help, declared, show_all="--help_all" in flags)
    if {"-h", "--help", "--help_all"} & {*flags}:
        print(parser.format_help(), end="")
        raise SystemExit(0)
    given = Counter(flag.partition("=")[0].removeprefix("--") for flag in flags)
    for name, option in declared.items():
        if option.kind.is_list and given[name] > 1:
            raise UsageError(f"--{name} is given twice; give all values after one: --{name} A B.")
    prefix = flags_from_yaml(config, list(declared)) if config else []
    found, unread = parser.parse_known_args(prefix + flags)
    for word in unread:
        if word.startswith("--"):
            flag = word.partition("=")[0]  # a value may be a secret
            close = did_you_mean(flag.lstrip("-"), declared)
            raise UsageError(f"unknown option {flag}{close}; see softpref {command} --help.")
    chosen_trackers(getattr(found, "report_to", None))
    facts = {name: option.facts for name, option in declared.items()}
    refuse_non_finite(found)
    refuse_impossible_seeds(found)
    refuse_too_small(found, facts)
    missing = missing_options(facts, vars(found))
    if missing:
        example = f" For example: softpref {help.examples[0]}"
        raise UsageError(missing_message(missing) + example)
    return found


def declared_options(help: Command) -> dict[str, Declared] | None:
    """Return a command's options by name; None if the package of one is not installed."""
    options: dict[str, Declared] = {}
    for path in help.options:
        of = options_of(path)
        if of is None:
            return None
        options |= of
    return options


def group_of(name: str, option: Declared) -> str:
    """Return the group of an option in `--help`."""
    if option.facts.get("required") is True:
        return "required"
    named = option.facts.get("group")
    if not named and name in LIBRARY_OPTIONS:
        named = LIBRARY_OPTIONS[name].group
    own = (option.group or "other") if option.package == "softpref" else option.package
    return str(named or own)


def shown_text(name: str, option: Declared, show_all: bool = False) -> str | None:
    """Return an option's help text; None if `--help` does not show it."""
    text, library = option.text, LIBRARY_OPTIONS.get(name)
    if option.package != "softpref" and library:
        text = library.text
    elif not show_all and (option.package != "softpref" or option.facts.get("rare")):
        return None
    if text.startswith("Unused"):
        return None
    if option.default in (None, "", False, -1) or "default" in text.lower():
        return text
    return f"{text} (default: {option.default})"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help.")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        """Return `FILE...` for a list of values."""
        if action.nargs == "+":
            return f"{action.metavar or default_metavar}..."
        return super()._format_args(action, default_metavar)


def _formatter(prog: str) -> _Formatter:
    return _Formatter(
        prog, max_help_position=28, width=min(shutil.get_terminal_size().columns, WIDEST)
    )


def _parser(
    command: str, help: Command, declared: Mapping[str, Declared], show_all: bool
) -> _Parser:
    examples = "\n".join(f"  softpref {example}" for example in help.examples)
    shown = {name: shown_text(name, of, show_all) for name, of in declared.items()}
    for name, library in LIBRARY_OPTIONS.items():
        if library.beside and library.beside not in declared and not show_all and name in shown:
            shown[name] = None
    hidden = sum(
        text is None and not declared[name].text.startswith("Unused")
        for name, text in shown.items()
    )
    more = f"\n{hidden} more options: softpref {command} --help_all" if hidden else ""
    target = f" {help.positional}" if help.positional else ""
    parser = _Parser(
        prog=f"softpref {command}", add_help=False, allow_abbrev=False,
        usage=f"softpref {command}{target} [--config FILE.yaml] [--option VALUE ...] [-q | -v]",
        description=f"{help.sentence}\n\nexamples:\n{examples}",
        epilog=f"-q, --quiet: warnings and errors only; -v: also the libraries' logs{more}",
        formatter_class=_formatter,
    )  # fmt: skip
    by_group: dict[str, list[str]] = {group: [] for group in GROUPS}
    for name, option in declared.items():
        by_group.setdefault(group_of(name, option), []).append(name)
    for group, names in by_group.items():
        section = parser.add_argument_group(group)
        for name in names:
            _add(section, name, declared[name], shown[name])
    return parser


def _add(section: Any, name: str, option: Declared, text: str | None) -> None:
    """Add an option that reads what transformers' parser reads, and perhaps more."""
    kind = option.kind
    library = LIBRARY_OPTIONS.get(name)
    metavar = option.facts.get("metavar") or (library and library.metavar)
    given: dict[str, Any] = {"metavar": metavar or METAVARS.get(kind.scalar)}
    if kind.choices:
        given = {"choices": kind.choices}
    elif kind.scalar == "bool":
        given |= {"nargs": "?", "const": "true", "type": _truth}
        if option.default is True:
            section.add_argument(f"--no_{name}", help=argparse.SUPPRESS, action="store_true")
    else:
        given["type"] = {"int": int, "float": float}.get(kind.scalar, str)
    if not (kind.choices or given["metavar"]):
        given["metavar"] = "TEXT"
    if kind.is_list:
        given["nargs"] = "+"
    text = argparse.SUPPRESS if text is None else text.replace("%", "%%")
    section.add_argument(f"--{name}", help=text, **given)


def _truth(word: str) -> bool:
    if word.lower() not in TRUTHS:
        raise argparse.ArgumentTypeError(f"{word!r} is neither true nor false")
    return TRUTHS.index(word.lower()) < TRUTHS.index("no")
