"""Judge options, shared by `judge`, `compare`, `audit` and `study --judge FILE`."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal
from urllib.parse import urlsplit

from softpref.errors import UsageError
from softpref.options import (
    facts_of,
    option,
    parse,
    refuse_too_small,
    refuse_unknown_choices,
    refuse_unread,
    require,
)
from softpref.quantization import Bits, bits_of

JudgeKind = Literal["endpoint", "reward_model", "implicit_reward", "checker"]


@dataclass
class JudgeOptions:
    """Options of the judge and its questions."""

    GROUP: ClassVar[str] = "judge"

    judge: JudgeKind = option(
        "`endpoint`: a chat model behind an OpenAI-compatible API; `reward_model`: a sequence "
        "classifier; `implicit_reward`: an aligned policy against its reference; `checker`: the "
        "right answers of the synthetic world.",
        "endpoint",
    )
    judge_model: str | None = option(
        "endpoint: the model's name; reward_model, implicit_reward: directory or hub id.",
        read_by=("endpoint", "reward_model", "implicit_reward"),
        metavar="NAME|DIR|ID",
    )
    judge_reference: str | None = option(
        "implicit_reward: the model before its training.",
        read_by=("implicit_reward",),
        metavar="DIR|ID",
    )
    base_url: str | None = option(
        "endpoint: its address, up to /v1; default: OpenAI's.", read_by=("endpoint",), metavar="URL"
    )
    api_key_env: str | None = option(
        "endpoint: the environment variable with the key, its only source; default: "
        "OPENAI_API_KEY for OpenAI's address, none for others.",
        read_by=("endpoint",),
        metavar="VARIABLE",
    )
    structured_output: Literal["schema", "words"] = option(
        "endpoint: `schema` enforces a JSON schema; `words` only describes the reply in the "
        "prompt, for older models and some servers.",
        "schema",
        read_by=("endpoint",),
    )
    orders: Literal["both", "one"] = option(
        "Ask in both orders, where a verdict that changes is a tie, or in one random order, as in "
        "the paper.",
        "both",
        read_by=("endpoint",),
    )
    grades: Literal["three", "five"] = option(
        "endpoint: verdicts to choose from: A, B and tie, or five with `much better`; strong "
        "verdicts are reported and weigh no more.",
        "three",
        read_by=("endpoint",),
    )
    order_seed: int = option("Seed of the random order.", 0, read_by=("endpoint",))
    concurrency: int = option(
        "endpoint: maximum concurrent calls; in a study, per job.",
        8,
        read_by=("endpoint",),
        least=1,
    )
    timeout_s: float = option(
        "endpoint: maximum seconds of one attempt of a call.", 300.0, read_by=("endpoint",)
    )
    max_retries: int = option(
        "endpoint: retries of a call after 429, 5xx, a timeout or a broken connection.",
        6,
        read_by=("endpoint",),
        least=0,
    )
    max_reply_tokens: int = option(
        "endpoint: maximum tokens in a reply, thoughts included; a reply that is cut off before "
        "its verdict is asked for once more, with four times as many.",
        4096,
        read_by=("endpoint",),
        least=1,
    )
    reasoning_effort: str | None = option(
        "endpoint: how long a reasoning model thinks, passed on as it is, such as low or high; "
        "default: the model's own.",
        read_by=("endpoint",),
        metavar="LEVEL",
    )
    price_input: float | None = option(
        "endpoint: dollars per million input tokens.", read_by=("endpoint",), least=0
    )
    price_output: float | None = option(
        "endpoint: dollars per million output tokens.", read_by=("endpoint",), least=0
    )
    max_cost: float | None = option(
        "endpoint: maximum dollars for this judge in this output, or for one run of a study; "
        "another model or address is another judge. A call that could exceed it is not made.",
        read_by=("endpoint",),
        least=0,
    )
    batch: bool = option(
        "endpoint: send the questions to OpenAI's batch endpoint, which answers within 24 hours "
        "at half the price; the same command resumes.",
        False,
        read_by=("endpoint",),
    )
    retry_failed: bool = option("Repeat the failed calls of an earlier run.", False)
    judge_batch_size: int = option(
        "reward_model, implicit_reward: pairs per batch.",
        16,
        read_by=("reward_model", "implicit_reward"),
        least=1,
    )
    judge_bf16: bool = option(
        "reward_model, implicit_reward: load weights in bfloat16; default: a reward model's as in "
        "its files, others in float32.",
        False,
        read_by=("reward_model", "implicit_reward"),
    )
    judge_load_in_4bit: bool = option(
        "reward_model, implicit_reward: load linear layers in 4 bits (NF4).",
        False,
        read_by=("reward_model", "implicit_reward"),
    )
    judge_load_in_8bit: bool = option(
        "reward_model, implicit_reward: load linear layers in 8 bits.",
        False,
        read_by=("reward_model", "implicit_reward"),
        rare=True,
    )

    def bits(self) -> Bits | None:
        """Return the bits of a local judge's linear layers, None for the weights as they are."""
        return bits_of(self.judge_load_in_4bit, self.judge_load_in_8bit, "--judge_load_in")


@dataclass
class OptionalJudge(JudgeOptions):
    """Judge options of a command whose judge is optional."""

    GROUP: ClassVar[str] = "judge"

    judge: JudgeKind | None = option(  # type: ignore[assignment]
        "Also ask a judge which response is better, pair by pair: `endpoint`, a chat model behind "
        "an OpenAI-compatible API, or `reward_model`, `implicit_reward`, `checker` as in `softpref "
        "judge`. Its verdicts are combined with the other signals, and stored in --output."
    )

    def named(self) -> JudgeOptions | None:
        """Return the judge's options, or None without a judge.

        Raises:
            UsageError: options are given, but no judge.
        """
        given = {field.name: getattr(self, field.name) for field in fields(JudgeOptions)}
        if self.judge:
            return JudgeOptions(**given)
        for name, value in given.items():
            if name != "judge" and value != getattr(JudgeOptions, name):
                raise UsageError(f"--{name}: has no effect without a judge; add --judge.")
        return None


def check_judge(options: JudgeOptions) -> None:
    """Refuse options that are missing, out of range, or not read by this judge.

    Raises:
        UsageError: the message names the option and the remedy.
    """
    refuse_unknown_choices(options)
    refuse_unread(options, "judge")
    facts = facts_of(type(options))
    models = ("judge_model", "judge_reference")
    if read := [name for name in models if options.judge in facts[name]["read_by"]]:
        require(options, *read)
    refuse_too_small(options)
    options.bits()
    if not 0 < options.timeout_s < math.inf:
        raise UsageError(f"--timeout_s {options.timeout_s}: must be a positive finite number.")
    if options.base_url is not None:
        check_address(options.base_url)
    check_prices(options.price_input, options.price_output, options.max_cost)


def check_prices(
    price_input: float | None, price_output: float | None, max_cost: float | None
) -> None:
    """Refuse a maximum of dollars without prices.

    Raises:
        UsageError: the message names the options.
    """
    if max_cost is not None and None in (price_input, price_output):
        raise UsageError(
            "--max_cost needs --price_input and --price_output, dollars per million tokens."
        )


def check_address(base_url: str) -> None:
    """Refuse an invalid address, or one with credentials or a query.

    Raises:
        UsageError: the message names `--base_url`, and repeats nothing of it.
    """
    try:
        parts = urlsplit(base_url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port
    except ValueError:
        is_address = False
    if not is_address:
        raise UsageError("--base_url: give an address such as http://localhost:8000/v1.")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UsageError(
            "--base_url: remove user, password and query; a key comes from the variable that "
            "--api_key_env names."
        )


def judge_from_file(path: str, flag: str, key: str | None = None) -> JudgeOptions:
    """Return a judge's options from a YAML file, parsed like `--config`.

    Args:
        path: the file.
        flag: the option that names the file.
        key: NAME=ADDRESS from `{flag}_key`: the variable with the key, and the address to send it
            to. Without it, only OpenAI's key is sent, and only to OpenAI.

    Raises:
        UsageError: the file cannot be read or is invalid, or its address differs.
    """
    try:
        (options,) = parse("judge", ["--config", path], JudgeOptions)
        check_judge(options)
    except UsageError as error:
        message = str(error).removeprefix(f"--config {path}: ")
        message = message.replace("as a flag, --api_key_env", f"by {flag}_key NAME=ADDRESS")
        raise UsageError(f"{flag} {path}: {message}") from None
    found: JudgeOptions = options
    if key:
        name, _, address = key.partition("=")
        if not address:
            raise UsageError(
                f"{flag}_key: give NAME=ADDRESS, the variable that holds the key and the address "
                "it is sent to."
            )
        if found.base_url not in (None, address):
            raise UsageError(
                f"{flag}_key: {flag} {path} has another address, {public_address(found.base_url)}."
            )
        found = replace(found, api_key_env=name, base_url=address)
        check_judge(found)
    return found


def verdict_options(options: JudgeOptions) -> dict[str, object]:
    """Return the options that change verdicts, without those of speed, price and access."""
    names = ["judge", "judge_model", "judge_reference", "structured_output", "orders", "order_seed"]
    names.append("max_reply_tokens")
    address = options.base_url and public_address(options.base_url)
    found = {name: getattr(options, name) for name in names} | {"base_url": address}
    graded = {} if options.grades == "three" else {"grades": options.grades}
    effort = {"reasoning_effort": options.reasoning_effort} if options.reasoning_effort else {}
    return found | graded | effort


def public_address(base_url: str) -> str:
    """Return an address without user, password and query."""
    parts = urlsplit(base_url)
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{parts.hostname}{port}{parts.path}"
