"""Declare a command's options as dataclass fields with help texts, and parse them."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from softpref.errors import UsageError, refuse_streams

LONGEST_CONFIG = 1_000_000
"""Bytes of a --config; PyYAML would take an hour for a data set given by mistake."""

_NULL = "tag:yaml.org,2002:null"
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
    "data": ("train",),
    "train": ("data",),
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

    `least` is its smallest allowed value. `required` options must be given, `unless` the option
    of that name is. `group`, `metavar` and `rare` are for `--help`; `softpref.declared` reads these
    from the source, so they must be literals. A command may read other facts with `facts_of`.
    """
    help = Help(text)
    help.facts = facts
    return field(default=default, metadata={"help": help})


def facts_of(options: type) -> dict[str, Mapping[str, Any]]:
    """Return the facts about each option of a command, by name."""
    help = {option.name: option.metadata.get("help") for option in fields(options)}
    return {name: text.facts if isinstance(text, Help) else {} for name, text in help.items()}


def require(options: Any, *names: str) -> None:
    """Refuse missing values of options, by default of the required ones; name them all at once.

    Raises:
        UsageError: one or more are missing.
    """
    facts = dict.fromkeys(names, {"required": True}) if names else facts_of(type(options))
    missing = missing_options(facts, vars(options))
    if missing:
        raise UsageError(missing_message(missing))


def missing_options(facts: Mapping[str, Mapping[str, Any]], given: Mapping[str, Any]) -> list[str]:
    """Return the required options that were not given, by their facts."""
    absent = {name for name in facts if given.get(name) in (None, "", [], False)}
    return [
        name
        for name, of in facts.items()
        if of.get("required") and name in absent and of.get("unless", name) in absent
    ]


def missing_message(names: Sequence[str]) -> str:
    """Return a message that says which options are missing."""
    *first, last = (f"--{name}" for name in names)
    return f"{', '.join(first)} and {last} are missing." if first else f"{last} is missing."


def parse(command: str, arguments: list[str], *options: type) -> tuple[Any, ...]:
    """Return the options' dataclasses, from --config and the flags that override it.

    Raises:
        UsageError: an option or key is unknown, or a value cannot be read.
    """
    from transformers import HfArgumentParser

    names = [field.name for option in options for field in fields(option) if field.init]
    config, flags = split_config(arguments)
    flags = [with_underscores(flag) for flag in flags]

    class Parser(HfArgumentParser):
        def error(self, message: str) -> None:  # type: ignore[override]
            raise UsageError(f"{message}; see softpref {command} --help.")

    prefix = flags_from_yaml(config, names) if config else []
    _refuse_key_for_config_address(config, prefix, flags)
    parser = Parser(cast(Any, options), add_help=False, allow_abbrev=False)
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


def refuse_too_small(options: Any, facts: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Refuse values below an option's `least`, by default from the facts of its dataclass.

    Raises:
        UsageError: the message names the option.
    """
    for name, of in (facts or facts_of(type(options))).items():
        value, least = getattr(options, name), of.get("least")
        if None not in (least, value) and not value >= least:
            raise UsageError(f"--{name} {value}: must be at least {least}.")


def refuse_unread(options: Any, chooser: str) -> None:
    """Refuse options that are set and that what an option such as `judge` chose does not read.

    Raises:
        UsageError: the message names the option, and a choice that reads it.
    """
    chosen = getattr(options, chooser)
    for name, facts in facts_of(type(options)).items():
        kinds = facts.get("read_by", (chosen,))
        if chosen not in kinds and getattr(options, name) != getattr(type(options), name):
            raise UsageError(
                f"--{name}: --{chooser} {chosen} does not read it; leave it out, or choose "
                f"--{chooser} {kinds[0]}."
            )


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
        choices = _choices(hint)
        value = getattr(options, name, None)
        if choices and value is not None and value not in choices:
            raise UsageError(f"--{name} {value}: choose one of {', '.join(choices)}.")


def choices_of(options: type) -> set[str]:
    """Return the choices of all options of a command."""
    return {choice for hint in get_type_hints(options).values() for choice in _choices(hint)}


def _choices(hint: Any) -> list[str]:
    parts = (hint, *get_args(hint))
    return [choice for part in parts if get_origin(part) is Literal for choice in get_args(part)]


def _refuse_non_utf8(options: Any) -> None:
    """Refuse text that cannot be written to UTF-8 files such as run.json.

    Raises:
        UsageError: the message names the option.
    """
    for name, value in vars(options).items():
        for text in value if isinstance(value, list | tuple) else [value]:
            if isinstance(text, str) and _NOT_UTF8_TEXT.search(text):
                raise UsageError(f"--{name} {text}: is not UTF-8 text; rename it.")


def split_config(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Return the file that --config names, and the arguments without it."""
    for i, argument in enumerate(arguments):
        if argument == "--config":
            if i + 1 == len(arguments):
                raise UsageError("--config needs a YAML file.")
            return arguments[i + 1], arguments[:i] + arguments[i + 2 :]
        if argument.startswith("--config="):
            return argument.removeprefix("--config="), arguments[:i] + arguments[i + 1 :]
    return None, arguments


def with_underscores(argument: str) -> str:
    """Return a flag in the canonical spelling."""
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


def flags_from_yaml(path: str, names: list[str]) -> list[str]:
    """Return a --config as flags.

    Raises:
        UsageError: a key or value is not allowed there.
    """
    flags: list[str] = []
    seen: set[str] = set()
    for key, value in _read_yaml(path).items():
        name = key.replace("-", "_")
        if name not in names:
            raise UsageError(f"--config {path}: unknown key {key!r}{did_you_mean(name, names)}.")
        if name in seen:
            raise UsageError(f"--config {path}: {name} appears in both spellings; give one.")
        seen.add(name)
        if value is None:
            continue
        if name in FLAGS_ALONE and str(value).lower() not in ("false", "no", "off", ""):
            raise UsageError(
                f"--config {path}: {name} is not read from a file, because {FLAGS_ALONE[name]}; "
                f"give it as a flag, --{name}."
            )
        values = value if isinstance(value, list) else [value]
        if None in values:
            raise UsageError(f"--config {path}: {name}: null is no value in a list; remove it.")
        texts = [v if isinstance(v, str) else json.dumps(v, default=str) for v in values]
        for text in texts:
            if text.startswith("-") and not _is_number(text):  # argparse would take it for a flag
                raise UsageError(
                    f"--config {path}: {name}: {text!r} begins with a hyphen; a path may begin "
                    "with ./ instead."
                )
        # One value in the form that keeps -1e-3 from being taken for a flag.
        flags += [f"--{name}={texts[0]}"] if len(texts) == 1 else [f"--{name}", *texts]
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
    in_file = {flag.partition("=")[0] for flag in from_file}
    if "--base_url" in in_file and "--api_key_env" in given and "--base_url" not in given:
        raise UsageError(
            f"--config {config}: base_url is not read from a file if --api_key_env sends a key "
            "there; give --base_url as a flag too."
        )


def _read_yaml(path: str) -> dict[str, Any]:
    """Return the options in a YAML file without aliases and duplicate keys.

    A value, alone or in a list, is the text as it stands there, which the options read as they
    read a flag: YAML would make a date of `2024-05-13` and 8 of `010`. Null is None. What is nested
    deeper is read as YAML.
    """
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
        loader = Loader(Path(path).read_text(encoding="utf-8-sig"))

        def value(node: Any, is_inner: bool = False) -> Any:
            if isinstance(node, yaml.ScalarNode):
                return None if node.tag == _NULL else node.value
            if isinstance(node, yaml.SequenceNode) and not is_inner:
                return [value(each, is_inner=True) for each in node.value]
            return loader.construct_object(node, deep=True)

        root = loader.get_single_node()
        entries: list[Any] = root.value if isinstance(root, yaml.MappingNode) else [(None, None)]
        if not all(isinstance(key, yaml.ScalarNode) for key, _ in entries):
            raise UsageError(f"--config {path}: write `key: value` lines, one option each.")
        names = [key.value for key, _ in entries]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UsageError(f"--config {path}: the key {twice[0]!r} appears twice; give one.")
        return {key.value: value(of) for key, of in entries}
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
