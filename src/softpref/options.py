"""Declare a command's options as dataclass fields with help texts, and parse them."""

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
"""Options of transformers' trainer that `--help` shows with our own."""
LONGEST_CONFIG = 1_000_000
"""Bytes of a --config; PyYAML would take an hour for a data set given by mistake."""

FLAGS_ALONE = {
    "trust_remote_code": "it lets a model run code",
    "api_key_env": "it sends a secret away",
    "push_to_hub": "it sends the model away",
}
"""Options that a --config may not set, and why: its author may not be the user."""
ALIASES = {
    "lr": ("learning_rate",),
    "epochs": ("num_train_epochs",),
    "batch_size": ("per_device_train_batch_size",),
    "model_name_or_path": ("model",),
    "dataset_name": ("train", "data"),
    "train_file": ("train",),
    "max_seq_length": ("max_length",),
}
"""What other tools call an option, and what it may be called here."""
LARGEST_RATE = 1e6
_NOT_UTF8_TEXT = re.compile("[\0\ud800-\udfff]")


class Help(str):
    """An option's help text with further facts about the option.

    The facts are attached to the text because parsers pass all other metadata to argparse.
    """

    facts: Mapping[str, Any]


def option(text: str, default: Any = None, **facts: Any) -> Any:
    """Declare an option with its help text and further facts.

    `least` is its smallest allowed value; a command may read other facts with `facts_of`.
    """
    help = Help(text)
    help.facts = facts
    return field(default=default, metadata={"help": help})


def facts_of(options: type) -> dict[str, Mapping[str, Any]]:
    """Return the facts about each option of a command, by name."""
    help = {option.name: option.metadata.get("help") for option in fields(options)}
    return {name: text.facts if isinstance(text, Help) else {} for name, text in help.items()}


def require(value: Any, flag: str) -> None:
    """Refuse a missing value of a required option."""
    if value in (None, "", []):
        raise UsageError(f"{flag} is missing.")


def parse(command: str, arguments: list[str], *options: type) -> tuple[Any, ...]:
    """Return the options' dataclasses, from --config and the flags that override it.

    `--help` shows our own options, and `--help_all` also those of the library's trainer.

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
            if flags[0].startswith("--"):  # both spellings were normalized to this one
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
    except (ValueError, ImportError, RuntimeError) as error:  # from transformers' own options
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"{first}; see softpref {command} --help.") from error
    if unknown:
        flag = unknown[0].partition("=")[0]  # its value may be a secret
        close = did_you_mean(flag.lstrip("-"), names)
        raise UsageError(f"unknown option {flag}{close}; see softpref {command} --help.")
    for found in parsed:
        refuse_non_finite(found)
        refuse_impossible_seeds(found)
        refuse_too_small(found)
        _refuse_non_utf8(found)
    return tuple(parsed)


def refuse_non_finite(options: Any) -> None:
    """Refuse NaN and infinity, which range checks can miss.

    Raises:
        UsageError: the message names the option.
    """
    for name, value in vars(options).items():
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise UsageError(f"--{name} {number}: must be a finite number.")


def refuse_impossible_seeds(options: Any) -> None:
    """Refuse seeds that NumPy's generator cannot take: below 0, or 2³² and above.

    Raises:
        UsageError: the message names the option.
    """
    for name, value in vars(options).items():
        if name.endswith(("seed", "seeds")):
            for seed in value if isinstance(value, list) else [value]:
                if isinstance(seed, int) and not 0 <= seed < 2**32:
                    raise UsageError(f"--{name} {seed}: must be at least 0 and below {2**32}.")


def refuse_too_small(options: Any) -> None:
    """Refuse values below an option's `least`.

    Raises:
        UsageError: the message names the option.
    """
    for name, facts in facts_of(type(options)).items():
        value = getattr(options, name)
        if "least" in facts and value is not None and value < facts["least"]:
            raise UsageError(f"--{name} {value}: must be at least {facts['least']}.")


def refuse_too_large(options: Any, *names: str) -> None:
    """Refuse rates that no float32 could be multiplied by.

    Raises:
        UsageError: the message names the option.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and value > LARGEST_RATE:
            raise UsageError(f"--{name} {value}: must be at most {LARGEST_RATE:g}.")


def refuse_unknown_choices(options: Any) -> None:
    """Refuse values outside an option's choices; only Python callers can give them.

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
    """Refuse text that cannot be written to UTF-8 files such as run.json.

    Raises:
        UsageError: the message names the option.
    """
    for name, value in vars(options).items():
        for text in value if isinstance(value, list | tuple) else [value]:
            if isinstance(text, str) and _NOT_UTF8_TEXT.search(text):
                raise UsageError(f"--{name} {text}: is not UTF-8 text; rename it.")


def _help(is_shown: bool, help: str = "", default: Any = None, **_: Any) -> str:
    """Return an option's help, with its default if it has one."""
    if not is_shown or help.startswith("Unused"):
        return argparse.SUPPRESS
    return help if default in (None, "", False) else f"{help} (default: {default})"


def _own(options: Iterable[type]) -> set[str]:
    """Return the names of the options that this project declares, not a library."""
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
            if word.startswith("-") and not _is_number(word):  # argparse would take it for a flag
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
    config: str | None, from_file: Sequence[str], flags: Sequence[str]
) -> None:
    """Refuse an address from a config file if a flag gives the API key to send there.

    Raises:
        UsageError: the address is in the file only.
    """
    given = {flag.partition("=")[0] for flag in flags}
    if "--base_url" in from_file and "--api_key_env" in given and "--base_url" not in given:
        raise UsageError(
            f"--config {config}: base_url is not read from a file if --api_key_env sends a key "
            "there; give --base_url as a flag too."
        )


def _read_yaml(path: str) -> Any:
    """Return the content of a YAML file without aliases and duplicate keys."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):  # a few lines can expand to gigabytes
                raise UsageError(
                    f"--config {path}: aliases (*{self.peek_event().anchor}) are not supported; "
                    "write the value out."
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
            raise UsageError(f"--config {path}: too large; give a YAML file of options.")
        return yaml.load(Path(path).read_text(encoding="utf-8-sig"), Loader)
    except UsageError:
        raise
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}; give a YAML file.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # such as huge numbers
        first = str(error).splitlines()[0]
        raise UsageError(
            f"--config {path}: not YAML ({first}); write `key: value` lines."
        ) from None


def did_you_mean(word: str, known: Any) -> str:
    """Return a hint at the closest known word, or at what other tools call so, if there is one."""
    word = word.replace("-", "_")
    close = [name for name in ALIASES.get(word, ()) if name in known]
    close = close or difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}" if close else ""
