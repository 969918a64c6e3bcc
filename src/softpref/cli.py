"""The command line: parse, call, print. A command imports its modules only when it runs."""

from __future__ import annotations

import errno
import os
import re
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import takewhile

from softpref.commands import COMMAND_HELP
from softpref.errors import UsageError
from softpref.flags import read_flags
from softpref.memory import is_out_of_memory, memory_message
from softpref.options import did_you_mean, parse
from softpref.terminal import printable, unfailing_output
from softpref.verbosity import logging_to_terminal, set_up_libraries, split_verbosity

FIRST_PROCESS_LEAD = 5.0
"""Seconds that the other processes wait, so that the first reports an error first."""
SHARED = ("sft", "train", "audit", "generate", "judge", "compare")
"""Commands that can run in several processes."""

USAGE = """\
softpref: align language models on preference pairs whose labels cannot be trusted

{commands}

`softpref help COMMAND` lists a command's options, `softpref --version` the version, and `softpref
completion bash|zsh|fish` prints a script that completes them. Every command takes --config
FILE.yaml; flags override it. In flags, hyphens and underscores are equivalent. -q prints warnings
and errors only, -v also what libraries log.
"""


def _demo(arguments: list[str]) -> None:
    """Run the whole story on the synthetic world."""
    import torch

    from softpref.study.demo import DemoOptions, run_demo

    torch.set_num_threads(1)  # more threads only add overhead in a world this small
    (options,) = parse("demo", arguments, DemoOptions)
    run_demo(options)


def _inject(arguments: list[str]) -> None:
    """Flip labels."""
    from softpref.models.inject import InjectOptions, run_inject

    run_inject(*parse("inject", arguments, InjectOptions))


def _sft(arguments: list[str]) -> None:
    """Fine-tune on the chosen responses."""
    from softpref.training.sft import SFTFiles, SFTOptions, fine_tune_files

    fine_tune_files(*parse("sft", arguments, SFTFiles, SFTOptions))


def _train(arguments: list[str]) -> None:
    """Align a model."""
    from softpref.training.align import AlignFiles, align
    from softpref.training.config import MSPOConfig
    from softpref.training.dry_run import dry_run

    files, config = parse("train", arguments, AlignFiles, MSPOConfig)
    (dry_run if files.dry_run else align)(files, config)


def _audit(arguments: list[str]) -> None:
    """Find wrong labels."""
    from softpref.auditing.audit import run_audit
    from softpref.auditing.options import AuditOptions
    from softpref.judging.options import OptionalJudge
    from softpref.models.processes import joined_processes

    options, judge = parse("audit", arguments, AuditOptions, OptionalJudge)
    with joined_processes() as ranks:
        run_audit(options, judge.named(), ranks)


def _generate(arguments: list[str]) -> None:
    """Write responses to prompts."""
    from softpref.judging.generate import run_generate
    from softpref.judging.generate_options import GenerateOptions
    from softpref.models.processes import joined_processes

    (options,) = parse("generate", arguments, GenerateOptions)
    with joined_processes() as ranks:
        run_generate(options, ranks)


def _judge(arguments: list[str]) -> None:
    """Judge responses, or measure a judge."""
    from softpref.judging.judge import JudgeFiles, run_judge
    from softpref.judging.options import JudgeOptions
    from softpref.models.processes import joined_processes

    files, options = parse("judge", arguments, JudgeFiles, JudgeOptions)
    with joined_processes() as ranks:
        run_judge(files, options, ranks)


def _compare(arguments: list[str]) -> None:
    """Compare methods with a judge."""
    from softpref.judging.compare import CompareOptions, run_compare
    from softpref.judging.options import JudgeOptions
    from softpref.models.processes import joined_processes

    files, options = parse("compare", arguments, CompareOptions, JudgeOptions)
    with joined_processes() as ranks:
        run_compare(files, options, ranks)


def _study(arguments: list[str]) -> None:
    """Run a table's grid of runs."""
    from softpref.study.choices import StudyOptions
    from softpref.study.study import run_study

    named = arguments[:1] if arguments and not arguments[0].startswith("-") else []
    (options,) = parse("study", arguments[len(named) :], StudyOptions)
    run_study("".join(named), options)


def _bench(arguments: list[str]) -> None:
    """Time a training step."""
    import torch

    from softpref.bench.benchmark import BenchOptions, run_bench

    torch.set_num_threads(1)  # single-thread times are comparable between machines
    (options,) = parse("bench", arguments, BenchOptions)
    run_bench(options)


def _merge(arguments: list[str]) -> None:
    """Merge an adapter."""
    from softpref.training.merging import MergeOptions, run_merge

    run_merge(*parse("merge", arguments, MergeOptions))


def _push(arguments: list[str]) -> None:
    """Upload a run or an audit."""
    from softpref.publishing import PushOptions, run_push

    named = list(takewhile(lambda word: not word.startswith("-"), arguments))
    (options,) = parse("push", arguments[len(named) :], PushOptions)
    run_push(named, options)


def _env(arguments: list[str]) -> None:
    """Report versions, devices, and how train would use them."""
    from softpref.training.environment import EnvOptions, run_env

    run_env(*parse("env", arguments, EnvOptions))


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "demo": _demo,
    "sft": _sft,
    "inject": _inject,
    "train": _train,
    "audit": _audit,
    "generate": _generate,
    "judge": _judge,
    "compare": _compare,
    "study": _study,
    "bench": _bench,
    "merge": _merge,
    "push": _push,
    "env": _env,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; a user's mistake is one message and exit code 2."""
    try:
        with unfailing_output():
            _run(arguments)
    except UsageError as error:
        _fail(f"softpref: {error.in_flags}")


def _run(arguments: Sequence[str] | None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    verbosity, given = split_verbosity(given)
    command, *rest = given or ["--help"]
    if command == "help" and rest:
        command, *rest = [rest[0], "--help"]
    if command in ("--help", "-h", "help"):
        lines = (f"  softpref {name:<9} {of.sentence}" for name, of in COMMAND_HELP.items())
        print(USAGE.format(commands="\n".join(lines)), end="")
        return
    if command == "--version":
        print(f"softpref {version('softpref')}")
        return
    if command == "completion":
        from softpref.completion import completion_script

        print(completion_script("".join(rest[:1])), end="")
        return
    if command not in COMMANDS:
        close = did_you_mean(command, COMMANDS)
        _fail(f"softpref: no command {command!r}{close}; see softpref --help.")
    processes = os.environ.get("WORLD_SIZE", "1")
    if command not in SHARED and processes != "1":
        _fail(
            f"softpref {command}: runs in one process, and {processes} were started (WORLD_SIZE); "
            f"only {', '.join(SHARED)} share their work. Start it without torchrun or accelerate."
        )
    with logging_to_terminal(verbosity):
        try:
            flags = read_flags(command, rest)
        except UsageError as error:
            _fail(f"softpref {command}: {error}")
        set_up_libraries(verbosity, shows_bars=not getattr(flags, "disable_tqdm", False))
        _call(command, rest)


def _call(command: str, arguments: list[str]) -> None:
    """Run a command, and say in one message what a user can do about an error."""
    from safetensors import SafetensorError

    try:
        COMMANDS[command](arguments)
    except UsageError as error:
        _fail(f"softpref {command}: {error.in_flags}")
    except ImportError as error:  # an option needs a package that is not installed
        if error.name and error.name.startswith("softpref"):
            raise
        _fail(f"softpref {command}: {str(error).strip().splitlines()[0]}")
    except (OSError, SafetensorError, sqlite3.OperationalError) as error:
        text = memory_message(command, error) if is_out_of_memory(error) else _disk_message(error)
        if text is None:
            raise
        _fail(f"softpref {command}: {text}")
    except (MemoryError, RuntimeError) as error:
        if _is_of_lost_process(error):
            time.sleep(FIRST_PROCESS_LEAD)  # the launcher ends this one before it says anything
            _fail(f"softpref {command}: another process ended; its message says why.")
        if not is_out_of_memory(error):
            raise
        _fail(f"softpref {command}: {memory_message(command, error)}")
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") != "0":
            sys.exit(130)
        text = "interrupted; run the same command to resume, sft and train from the last checkpoint"
        print(f"{text} (--save_steps)", file=sys.stderr)
        sys.exit(130)


def _is_of_lost_process(error: Exception) -> bool:
    """Return whether an exchange failed because another of several processes has ended."""
    kinds = ("DistBackendError", "DistNetworkError")
    is_exchange = type(error).__name__ in kinds or "by peer" in str(error)
    return os.environ.get("WORLD_SIZE", "1") != "1" and is_exchange


def _disk_message(error: Exception) -> str | None:
    """Return which disk is full or cannot be written; None for other errors."""
    full = (errno.ENOSPC, errno.EDQUOT)
    not_writable = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)
    if isinstance(error, sqlite3.OperationalError):  # of the temporary database of pairs
        return f"{tempfile.gettempdir()}: {error}; make room, or set TMPDIR to a place with more."
    # safetensors gives the number in its message only.
    match = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else int(match[1]) if match else None
    if number not in full + not_writable:
        return None
    where = getattr(error, "filename", None) or (
        f"the output, or {tempfile.gettempdir()} (TMPDIR), where pairs are stored temporarily"
    )
    remedy = "make room, then run the same command to resume"
    if number in not_writable:
        remedy = "choose a writable location"
    return f"{where}: {os.strerror(number)}; {remedy}. Completed work is kept."


def _fail(message: str) -> None:
    if rank := int(os.environ.get("RANK", "0")):
        # An error of all processes is reported by the first; its exit ends the others.
        time.sleep(FIRST_PROCESS_LEAD)
        message = f"process {rank}: {message}"
    print(printable(message), file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
