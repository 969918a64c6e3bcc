"""How a command declares its options, dataclass fields with a help text, and reads them."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from softpref.errors import UsageError, refuse_streams

USED_MOST = {
    "bf16", "seed", "max_steps", "eval_strategy", "eval_steps", "save_steps", "save_total_limit",
    "activation_checkpointing", "per_device_eval_batch_size",
}  # fmt: skip
"""Options of transformers' trainer that `--help` shows beside our own."""
LONGEST_CONFIG = 1_000_000
"""Bytes of a --config; PyYAML would read a data set that is given by mistake for an hour."""

FLAGS_ALONE = {
    "trust_remote_code": "it lets a model run code",
    "api_key_env": "it sends a secret away",
    "push_to_hub": "it sends the model away",
}
"""What a --config may not set, and why: who writes the file need not be who runs the command."""
_NOT_UTF8_TEXT = re.compile("[\0\ud800-\udfff]")


class Help(str):
    """An option's help text that carries what else is known about the option.

    It travels in the text because parsers hand every other entry of a field on to argparse.
    """

    facts: Mapping[str, Any]


def option(text: str, default: Any = None, **facts: Any) -> Any:
    """Declare an option with its help text and whatever else is known about it.

    `least` is its smallest allowed value; a command may read further facts by `facts_of`.
    """
    help = Help(text)
    help.facts = facts
    return field(default=default, metadata={"help": help})


def facts_of(options: type) -> dict[str, Mapping[str, Any]]:
    """Return what is known about each option of a command, by name."""
    help = {option.name: option.metadata.get("help") for option in fields(options)}
    return {name: text.facts if isinstance(text, Help) else {} for name, text in help.items()}


def require(value: Any, flag: str) -> None:
    """Refuse a command that lacks an option it cannot do without."""
    if value in (None, "", []):
        raise UsageError(f"{flag} is missing.")


def parse(command: str, arguments: list[str], *options: type) -> tuple[Any, ...]:
    """Return the options' dataclasses, from --config and the flags that override it.

    `--help` shows our own options and `--help_all` those of the library's trainer too.

    Raises:
        UsageError: an option or key is unknown, or a value cannot be read.
    """
    from transformers import HfArgumentParser

    names = [field.name for option in options for field in fields(option) if field.init]
    shown, epilog = set(names) & _own(options), None
    config, flags = _split_config(arguments)
    flags = [_with_underscores(flag) for flag in flags]
    if "--help_all" in flags:
        shown, flags = set(names), ["--help"]
    elif len(shown) < len(names):
        shown |= USED_MOST
        epilog = f"{len(names) - len(shown & set(names))} more of transformers: --help_all"

    class Parser(HfArgumentParser):
        def add_argument(self, *flags: str, **kwargs: Any) -> argparse.Action:
            if flags[0].startswith("--"):  # its other spelling was turned into this one
                flags = flags[:1]
                kwargs["help"] = _help(flags[0].lstrip("-") in shown, **kwargs)
            return super().add_argument(*flags, **kwargs)

        def error(self, message: str) -> None:  # type: ignore[override]
            raise UsageError(f"{message}; see softpref {command} --help.")

    prefix = _flags_from_yaml(config, names) if config else []
    _refuse_key_for_config_address(config, prefix, flags)
    parser = Parser(
        cast(Any, options), prog=f"softpref {command}", allow_abbrev=False, epilog=epilog,
        usage=f"softpref {command} [--config FILE.yaml] [--option VALUE ...]",
        formatter_class=argparse.HelpFormatter,
    )  # fmt: skip
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            prefix + flags, return_remaining_strings=True
        )
    except UsageError:
        raise
    except (ValueError, ImportError, RuntimeError) as error:  # of transformers' own options
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"{first}; see softpref {command} --help.") from error
    if unknown:
        close = did_you_mean(unknown[0].lstrip("-"), names)
        raise UsageError(f"unknown option {unknown[0]}{close}; see softpref {command} --help.")
    for found in parsed:
        refuse_non_finite(found)
        _refuse_non_utf8(found)
    return tuple(parsed)


def refuse_non_finite(options: Any) -> None:
    """Refuse NaN and infinity, which compare with bounds as no number should.

    Raises:
        UsageError: the message names the option.
    """
    for name, value in vars(options).items():
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise UsageError(f"--{name} {number}: must be a finite number.")


def refuse_too_small(options: Any) -> None:
    """Refuse values below an option's `least`.

    Raises:
        UsageError: the message names the option.
    """
    for name, facts in facts_of(type(options)).items():
        value = getattr(options, name)
        if "least" in facts and value is not None and value < facts["least"]:
            raise UsageError(f"--{name} {value}: must be at least {facts['least']}.")


def refuse_unknown_choices(options: Any) -> None:
    """Refuse values that are none of an option's choices, which only Python can give.

    Raises:
        UsageError: the message names the option and its choices.
    """
    for name, hint in get_type_hints(type(options)).items():
        choices = [choice for part in (hint, *get_args(hint)) for choice in _choices(part)]
        value = getattr(options, name, None)
        if choices and value is not None and value not in choices:
            raise UsageError(f"--{name} {value}: choose one of {', '.join(choices)}.")


def _choices(hint: Any) -> tuple[str, ...]:
    return get_args(hint) if get_origin(hint) is Literal else ()


def _refuse_non_utf8(options: Any) -> None:
    """Refuse names that no file of text can repeat, such as run.json or a report.

    Raises:
        UsageError: the message names the option.
    """
    for name, value in vars(options).items():
        for text in value if isinstance(value, list | tuple) else [value]:
            if isinstance(text, str) and _NOT_UTF8_TEXT.search(text):
                raise UsageError(f"--{name} {text}: is not UTF-8 text; rename it.")


def _help(is_shown: bool, help: str = "", default: Any = None, **_: Any) -> str:
    """Return an option's line of help, with its default unless that is said already."""
    if not is_shown or help.startswith("Unused"):
        return argparse.SUPPRESS
    return help if default in (None, "", False) else f"{help} (default: {default})"


def _own(options: Iterable[type]) -> set[str]:
    """Return the names of the options that this project declares, rather than a library."""
    return {
        name
        for option in options
        for base in option.__mro__
        if base.__module__.startswith("softpref.")
        for name in base.__annotations__
    }


def _split_config(arguments: list[str]) -> tuple[str | None, list[str]]:
    for i, argument in enumerate(arguments):
        if argument == "--config":
            if i + 1 == len(arguments):
                raise UsageError("--config needs a YAML file.")
            return arguments[i + 1], arguments[:i] + arguments[i + 2 :]
        if argument.startswith("--config="):
            return argument.removeprefix("--config="), arguments[:i] + arguments[i + 1 :]
    return None, arguments


def _with_underscores(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


def _flags_from_yaml(path: str, names: list[str]) -> list[str]:
    content = _read_yaml(path)
    if not isinstance(content, dict):
        raise UsageError(f"--config {path}: write `key: value` lines, one option each.")
    flags: list[str] = []
    seen: set[str] = set()
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in names:
            raise UsageError(f"--config {path}: unknown key {key!r}{did_you_mean(name, names)}.")
        if name in seen:
            raise UsageError(f"--config {path}: {name} appears in both spellings; give one.")
        seen.add(name)
        if value is None:
            continue
        if name in FLAGS_ALONE and value not in (False, ""):
            raise UsageError(
                f"--config {path}: {name} is not read from a file, because {FLAGS_ALONE[name]}; "
                f"give it as a flag, --{name}."
            )
        values = value if isinstance(value, list) else [value]
        words = [v if isinstance(v, str) else json.dumps(v, default=str) for v in values]
        for word in words:
            if word.startswith("-") and not _is_number(word):  # it would be a flag
                raise UsageError(
                    f"--config {path}: {name}: {word!r} begins with a hyphen; a path may begin "
                    "with ./ instead."
                )
        flags += [f"--{name}", *words]
    return flags


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _refuse_key_for_config_address(
    config: str | None, of_file: Sequence[str], flags: Sequence[str]
) -> None:
    """Refuse a key in a flag and the address that it would go to in a file.

    Raises:
        UsageError: it is so.
    """
    given = {flag.partition("=")[0] for flag in flags}
    if "--base_url" in of_file and "--api_key_env" in given and "--base_url" not in given:
        raise UsageError(
            f"--config {config}: base_url is not read from a file where --api_key_env sends a key "
            "there; give --base_url as a flag too."
        )


def _read_yaml(path: str) -> Any:
    """Return what a YAML file holds, which may have no aliases and no key twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):  # a few lines of them can stand for gigabytes
                raise UsageError(
                    f"--config {path}: aliases (*{self.peek_event().anchor}) are not read; write "
                    "the value out."
                )
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            found = super().construct_mapping(node, deep)
            if len(found) < len(node.value):
                keys = [getattr(key, "value", key) for key, _ in node.value]
                twice = next((key for key in keys if keys.count(key) > 1), keys[-1])
                raise UsageError(f"--config {path}: the key {twice!r} appears twice; give one.")
            return found

    try:
        refuse_streams(path, f"--config {path}")
        if Path(path).stat().st_size > LONGEST_CONFIG:
            raise UsageError(f"--config {path}: too large for one; give a YAML file of options.")
        return yaml.load(Path(path).read_text(encoding="utf-8-sig"), Loader)
    except UsageError:
        raise
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}; give a YAML file.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # numbers too long, and worse
        first = str(error).splitlines()[0]
        raise UsageError(
            f"--config {path}: not YAML ({first}); write `key: value` lines."
        ) from None


def did_you_mean(word: str, known: Any) -> str:
    """Return a hint at the nearest known word, if any is near."""
    close = difflib.get_close_matches(word.replace("-", "_"), list(known), n=1)
    return f"; did you mean {close[0]!r}" if close else ""
