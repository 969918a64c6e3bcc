"""The command line: parse, call, print. Every command imports what it needs only when it runs."""

from __future__ import annotations

import difflib
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from softpref.errors import UsageError
from softpref.options import option, require

USAGE = """\
softpref: align language models on preference pairs whose labels cannot be trusted

  softpref demo    the whole story on a synthetic world, on a CPU, in minutes
  softpref sft     fine-tune a model on the chosen responses
  softpref inject  flip labels at a known rate, keeping the truth in `is_flipped`
  softpref train   align a model with any method
  softpref bench   time a training step against TRL's, on this machine

`softpref COMMAND --help` lists a command's options. Every command takes --config FILE.yaml; flags
override it. In flags, hyphens and underscores are the same.
"""


def demo(arguments: list[str]) -> None:
    """Run the whole story on the synthetic world."""
    import torch

    from softpref.study.demo import DemoOptions, run_demo

    torch.set_num_threads(1)  # in a world this small further threads only wait for each other
    (options,) = parse("demo", arguments, DemoOptions)
    run_demo(options)


@dataclass
class InjectOptions:
    """Options of `softpref inject`."""

    input: str = option("Pairs: JSONL, JSON, Parquet, CSV or hub id.", "")
    output: str = option("New file; its ending says the format.", "")
    rate: float | None = option("Probability that a label is flipped, at least 0 and below 1.")
    seed: int = option("Seed of the draws.", 0)


def inject(arguments: list[str]) -> None:
    """Flip labels."""
    from softpref.data.noise import inject as inject_flips

    (options,) = parse("inject", arguments, InjectOptions)
    for name in ("input", "output", "rate"):
        require(getattr(options, name), f"--{name}")
    done = inject_flips(options.input, options.output, options.rate, options.seed)
    print(
        f"{done.output}: {done.flipped} of {done.pairs} labels flipped ({done.realised_rate:.1%}; "
        f"rate {done.rate:.1%}, seed {options.seed}); the truth is in is_flipped"
    )


def sft(arguments: list[str]) -> None:
    """Fine-tune on the chosen responses."""
    from softpref.training.sft import SFTFiles, SFTOptions, fine_tune_files

    fine_tune_files(*parse("sft", arguments, SFTFiles, SFTOptions))


def train(arguments: list[str]) -> None:
    """Align a model."""
    from softpref.training.align import AlignFiles, align
    from softpref.training.config import MSPOConfig

    align(*parse("train", arguments, AlignFiles, MSPOConfig))


def bench(arguments: list[str]) -> None:
    """Time a training step."""
    import torch

    from softpref.study.bench import BenchOptions, run_bench

    torch.set_num_threads(1)  # one thread's times can be compared between machines
    (options,) = parse("bench", arguments, BenchOptions)
    run_bench(options)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "demo": demo,
    "sft": sft,
    "inject": inject,
    "train": train,
    "bench": bench,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; a user's mistake is one message and exit code 2."""
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("--help", "-h"):
        print(USAGE, end="")
        return
    if command not in COMMANDS:
        close = _did_you_mean(command, COMMANDS)
        _fail(f"softpref: no command {command!r}{close}; see softpref --help.")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, about each other
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("softpref")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        COMMANDS[command](rest)
    except UsageError as error:
        _fail(f"softpref {command}: {error}")
    except KeyboardInterrupt:
        print("interrupted; where a checkpoint was saved (--save_steps), the same command with "
              "--resume_from_checkpoint true goes on from it", file=sys.stderr)  # fmt: skip
        sys.exit(130)
    finally:
        log.removeHandler(handler)


def parse(command: str, arguments: list[str], *options: type) -> tuple[Any, ...]:
    """Return the options' dataclasses, from --config and the flags that override it.

    Raises:
        UsageError: an option or key is unknown, or a value cannot be read.
    """
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> None:  # type: ignore[override]
            raise UsageError(f"{message}; see softpref {command} --help.")

    names = [field.name for option in options for field in fields(option) if field.init]
    config, flags = _split_config(arguments)
    prefix = _flags_from_yaml(config, names) if config else []
    parser = Parser(cast(Any, options), prog=f"softpref {command}", allow_abbrev=False)
    flags = [_with_underscores(flag) for flag in flags]
    *parsed, unknown = parser.parse_args_into_dataclasses(
        prefix + flags, return_remaining_strings=True
    )
    if unknown:
        close = _did_you_mean(unknown[0].lstrip("-"), names)
        raise UsageError(f"unknown option {unknown[0]}{close}; see softpref {command} --help.")
    return tuple(parsed)


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
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}; give a YAML file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0]
        raise UsageError(
            f"--config {path}: not YAML ({first}); write `key: value` lines."
        ) from None
    if not isinstance(content, dict):
        raise UsageError(f"--config {path}: write `key: value` lines, one option each.")
    flags: list[str] = []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in names:
            raise UsageError(f"--config {path}: unknown key {key!r}{_did_you_mean(name, names)}.")
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        flags += [f"--{name}", *(v if isinstance(v, str) else json.dumps(v) for v in values)]
    return flags


def _did_you_mean(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word.replace("-", "_"), list(known), n=1)
    return f"; did you mean {close[0]!r}" if close else ""


def _fail(message: str) -> None:
    print(message, file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
